"""`export_onnx`: each format and each operator computes with the decoded bytes; what cannot be said raises."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_format import on_format
from onnx_graphs import TensorProto, evaluated, graph, helper, matmul, numpy_helper, onnx, operators, values

import clipjax
from clipjax import Quantized, export_onnx, formats

WRITTEN = [formats.q4_0(), formats.q5_0(), formats.q8_0(), formats.tq1_0(), formats.tq2_0()]
WRITTEN += [formats.int4(32), formats.int4(None, "float16"), formats.int8(), formats.int8(64, "float32")]
WRITTEN += [formats.nbits(2, 16), formats.nbits(4, 32), formats.nbits(8, 128)]
WRITTEN += [formats.fp8_e4m3("array"), formats.fp8_e4m3(), formats.fp8_e5m2((128, 128)), formats.mxfp8("e5m2", "ocp")]
WRITTEN += [formats.mxfp4(), formats.mxfp4("qwix"), formats.mxfp8(), formats.nvfp4(), formats.nvfp4("modelopt")]

named = functools.partial(pytest.mark.parametrize, ids=lambda value: str(getattr(value, "name", value)))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@named("form", WRITTEN)
def test_values_are_the_decoded_bytes(form, tmp_path):
    """By onnx's evaluator, through the operators of ONNX alone; the matrix is stored transposed."""
    w = random(256, 128)
    q = on_format(form, w)
    model, x = matmul(np.ascontiguousarray(w.T), transB=1)
    export_onnx(model, tmp_path / "m", {"w": q}, source={"w": w}, contrib=False)
    assert operators(tmp_path / "m")[-1] == "Gemm" and "DequantizeLinear" in operators(tmp_path / "m")
    np.testing.assert_array_equal(evaluated(tmp_path / "m", x), values(q))


PRODUCTS = [
    ("MatMulNBits", "MatMul", {}, formats.nbits(4, 32), np.float32),
    ("MatMulNBits", "MatMul", {}, formats.q4_0(), np.float16),
    ("MatMulNBits", "Einsum", {"equation": "abc, cd -> abd"}, formats.tq1_0(), np.float32),
    ("MatMulNBits", "Gemm", {"beta": 0.0}, formats.int4(16), np.float32),
    ("GatherBlockQuantized", "Gather", {}, formats.nbits(4, 32), np.float32),
    ("DequantizeLinear", "MatMul", {}, formats.int8(), np.float32),  # one scale an output
    ("DequantizeLinear", "MatMul", {}, formats.int8(8), np.float32),
    ("DequantizeLinear", "MatMul", {}, formats.int4(96), np.float32),
    ("DequantizeLinear", "MatMul", {}, formats.nbits(4, 32), np.float16),  # whose scales do not fit
    ("DequantizeLinear", "Einsum", {"equation": "abc,cd->adb"}, formats.nbits(4, 32), np.float32),
    ("DequantizeLinear", "Gemm", {"transA": 1}, formats.nbits(4, 32), np.float32),
    ("DequantizeLinear", "Gemm", {"alpha": 0.5}, formats.nbits(4, 32), np.float32),
    ("DequantizeLinear", "Gather", {"axis": 1}, formats.nbits(4, 32), np.float32),
]


@named(("written", "kind", "attributes", "form", "dtype"), PRODUCTS)
def test_the_operator_is_the_one_that_has_the_codes(written, kind, attributes, form, dtype, tmp_path):
    rows = formats.tq1_0().block * 3 if form.block in (256, 96) else 64
    w = random(rows, rows)
    table = kind == "Gather"
    node = helper.make_node(kind, ["w", "x"] if table else ["x", "w"], ["y"], **attributes)
    params = {"w": on_format(form, w, 0 if table else None)}
    model = graph([node], {"w": w.astype(dtype)}, np.zeros((1, 1), np.int64 if table else dtype), 21)
    export_onnx(model, tmp_path / "m", params, source={"w": w})
    found = [n for n in onnx.load(tmp_path / "m").graph.node if n.op_type != "Cast"]
    assert [n.op_type for n in found] == [written, *([kind] if written == "DequantizeLinear" else [])]
    assert found[0].output[0] in ("y", "w", "w_f32")


def size(path):
    return sum(len(proto.raw_data) for proto in onnx.load(path).graph.initializer)


@named(
    ("form", "opset", "bits"),
    [
        (formats.int4(32), 21, 5),
        (formats.tq2_0(), 25, 2.125),
        (formats.tq2_0(), 21, 4.125),
        (formats.q8_0(), 21, 9),
        (formats.mxfp4(), 24, 4.25),
        (formats.mxfp4(), 23, 5),
        (formats.nvfp4(), 23, 4.5),
        (formats.int4(None), 19, 8),
    ],
)
def test_an_opset_has_the_narrowest_codes_that_it_knows(form, opset, bits, tmp_path):
    w = random(512, 512)
    q = on_format(form, w)
    model, x = matmul(w, opset)
    export_onnx(model, tmp_path / "m", {"w": q}, source={"w": w}, contrib=False)
    assert bits <= size(tmp_path / "m") * 8 / w.size <= bits * 1.02
    np.testing.assert_array_equal(evaluated(tmp_path / "m", x), values(q))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, jnp.bfloat16], ids=lambda d: np.dtype(d).name)
def test_other_dtypes_hold_the_values_rounded_once(dtype, tmp_path):
    w = random(64, 32).astype(dtype)
    q = on_format(formats.nbits(8, 32), w)
    model, x = matmul(w)
    model.graph.node[0].CopyFrom(helper.make_node("Identity", ["w"], ["y"]))
    export_onnx(model, tmp_path / "m", {"w": q}, source={"w": w})
    y = evaluated(tmp_path / "m", x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, values(q).astype(dtype))


@pytest.mark.parametrize("given", ["values", "name"])
@pytest.mark.parametrize(
    ("shape", "axis", "laid", "kind"),
    [
        ((3, 3, 3, 3), None, lambda w: w.transpose(3, 2, 0, 1), "Conv"),
        ((3, 32, 8), None, lambda w: w.transpose(2, 1, 0), "Conv"),
        ((8, 3, 3, 3), 0, lambda w: w, "Conv"),
        ((3, 3, 32, 3), None, lambda w: w.transpose(2, 3, 0, 1), "ConvTranspose"),
        ((32, 32), None, lambda w: w.T, "Gemm"),
        ((32, 32), None, lambda w: w, "MatMul"),
        ((32, 32), 0, lambda w: w.T, "MatMul"),
        ((32, 2, 16), (1, 2), lambda w: w.reshape(32, 32), "MatMul"),
        ((2, 16, 32), (0, 1), lambda w: w.reshape(32, 32), "Gemm"),
        ((32, 32), 0, lambda w: w, "Gather"),
    ],
    ids=lambda value: str(value) if isinstance(value, str | tuple) else "",
)
def test_a_leaf_lies_as_the_operator_takes_it(shape, axis, laid, kind, given, tmp_path):
    """Found by its values, or named where the graph has other ones: by the axes that are outputs."""
    w = random(*shape)
    form = formats.int8(None, "float32")
    q = on_format(form, w, axis)
    inside = laid(w) if given == "values" else np.zeros_like(laid(w))
    given = {"source": {"w": w}} if given == "values" else {"rename": lambda path, leaf: "w"}
    at = 1 if kind != "Gather" else 0
    attributes = {"transB": 1} if kind == "Gemm" else {}
    inputs = ["a", "a"]
    inputs[at] = "w"
    node = helper.make_node(kind, inputs, ["b"], **attributes)
    model = graph(
        [helper.make_node("Identity", ["w"], ["y"]), node], {"w": inside}, np.zeros(1, np.float32), rank=inside.ndim
    )
    export_onnx(model, tmp_path / "m", {"w": q}, **given)
    written = onnx.load(tmp_path / "m")
    del written.graph.node[-1]  # which only says how the weight is used
    onnx.save(written, tmp_path / "m")
    np.testing.assert_array_equal(evaluated(tmp_path / "m", np.zeros(1, np.float32)), laid(values(q)))


@pytest.mark.parametrize(
    "form", [formats.int4(96), formats.int4(None), formats.fp8_e4m3("array")], ids=lambda form: form.name
)
def test_blocks_of_a_kernel_that_span_axes(form, tmp_path):
    """96 inputs of [3, 3, 32, O] are a row of the window: a scale for each place along it is the same one."""
    w = random(3, 3, 32, 8)
    q = on_format(form, w)
    model = graph([helper.make_node("Identity", ["w"], ["y"])], {"w": w.transpose(3, 2, 0, 1)}, w, rank=4)
    export_onnx(model, tmp_path / "m", {"w": q}, source={"w": w})
    np.testing.assert_array_equal(evaluated(tmp_path / "m", w), values(q).transpose(3, 2, 0, 1))


@pytest.mark.parametrize("lo", [-1.0, 0.0])
@pytest.mark.parametrize(("axis", "group"), [(None, None), (-1, None), (-1, 16)])
@pytest.mark.parametrize("bits", [1, 3, 4, 8, 16])
def test_a_grid_keeps_its_steps_and_zero_points(bits, axis, group, lo, tmp_path):
    params = {"kernel": jnp.asarray(random(64, 32))}
    step = clipjax.steps.absmax() if lo or bits == 1 else clipjax.steps.interval(-0.5, 1.5)
    tx = clipjax.fake_quantize(bits, step=step, axis=axis, group=group)
    params, state = clipjax.hold_once(tx, params)
    model, x = matmul(np.asarray(params["kernel"]), opset=21)
    export_onnx(model, tmp_path / "m", params, state, contrib=False)
    assert operators(tmp_path / "m") == ["DequantizeLinear", "MatMul"]
    np.testing.assert_array_equal(evaluated(tmp_path / "m", x), params["kernel"])


def test_float_leaves_take_the_place_of_their_initializers(tmp_path):
    w, b = random(8, 4), random(4, seed=1)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    model = graph([node], {"w": w.T.copy(), "b": b}, np.eye(8, dtype=np.float32))
    before = model.SerializeToString()
    params = {"w": jnp.asarray(2 * w), "b": jnp.asarray(b), "none": None, "count": jnp.zeros(3, jnp.int32)}
    export_onnx(model, tmp_path / "m", params, source=params | {"w": jnp.asarray(w)})
    assert model.SerializeToString() == before
    np.testing.assert_array_equal(evaluated(tmp_path / "m", np.eye(8, dtype=np.float32)), 2 * w + b)
    onnx.save(model, tmp_path / "in")
    export_onnx(tmp_path / "in", tmp_path / "m", params, rename=lambda path, leaf: "w" if path == "w" else None)
    np.testing.assert_array_equal(evaluated(tmp_path / "m", np.eye(8, dtype=np.float32)), 2 * w + b)


def test_weights_in_constants_subgraphs_and_the_list_of_inputs(tmp_path):
    a, b, c = (random(32, 32, seed=i) for i in range(3))
    constant = helper.make_node("Constant", [], ["a"], value=numpy_helper.from_array(a))
    shape = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(b, "b")]
    then = helper.make_graph([helper.make_node("MatMul", ["h", "b"], ["then"])], "t", [], [shape], held)
    other = helper.make_graph([helper.make_node("MatMul", ["h", "c"], ["else"])], "e", [], [shape])
    then.output[0].name, other.output[0].name = "then", "else"
    nodes = [constant, helper.make_node("MatMul", ["x", "a"], ["h"])]
    nodes += [helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("", TensorProto.BOOL, [], [True]))]
    nodes += [helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other)]
    model = graph(nodes, {"c": c}, np.eye(32, dtype=np.float32))
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [32, 32]))
    params = {name: on_format(formats.int4(32), w) for name, w in (("a", a), ("b", b), ("c", c))}
    export_onnx(model, tmp_path / "m", params, source={"a": a, "b": b, "c": c}, contrib=False)
    wanted = values(params["a"]) @ values(params["b"])
    np.testing.assert_allclose(evaluated(tmp_path / "m", np.eye(32, dtype=np.float32)), wanted, rtol=1e-5, atol=1e-5)
    written = onnx.load(tmp_path / "m").graph
    assert [i.name for i in written.input] == ["x"]
    branches = [a.g for node in written.node if node.op_type == "If" for a in node.attribute]
    assert [[node.op_type for node in g.node] for g in branches] == [["MatMul"], ["DequantizeLinear", "MatMul"]] or [
        [node.op_type for node in g.node] for g in branches
    ] == [["DequantizeLinear", "MatMul"], ["MatMul"]]


def test_layers_of_a_stack_and_parts_of_a_fused_matrix(tmp_path):
    stack, fused = random(2, 32, 32), random(32, 8, seed=1)
    names = {"stack": [("one", 0, None), ("two", 1, None)], "fused": [("odd", slice(4, 8), [3, 1, 2, 0])]}
    params = {"stack": on_format(formats.int4(16), stack, (0, 2)), "fused": on_format(formats.fp8_e5m2(), fused)}
    weights = {"one": random(32, 32), "two": random(32, 32), "odd": random(32, 4)}
    nodes = [helper.make_node("Gemm", ["x", "one"], ["a"], transB=1), helper.make_node("MatMul", ["x", "two"], ["b"])]
    nodes += [
        helper.make_node("MatMul", ["x", "odd"], ["c"]),
        helper.make_node("Concat", ["a", "b", "c"], ["y"], axis=1),
    ]
    x = np.eye(32, dtype=np.float32)
    model = graph(nodes, weights, x)
    export_onnx(model, tmp_path / "m", params, rename=lambda path, leaf: names[path], contrib=False)
    one, two = values(params["stack"])
    odd = values(params["fused"])[:, [7, 5, 6, 4]]
    np.testing.assert_array_equal(evaluated(tmp_path / "m", x), np.concatenate([one, two, odd], axis=1))


def test_large_initializers_go_into_a_file_of_their_own(tmp_path, monkeypatch):
    from clipjax._exports import onnx_writing

    monkeypatch.setattr(onnx_writing, "LIMIT", 1000)
    w = random(64, 64)
    q = on_format(formats.int8(), w)
    model, x = matmul(w)
    export_onnx(model, tmp_path / "m.onnx", {"w": q}, source={"w": w})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").stat().st_size < 1000
    np.testing.assert_array_equal(evaluated(tmp_path / "m.onnx", x), values(q))


def test_equal_leaves_and_initializers(tmp_path):
    """Two leaves of one content may be two initializers, or one, which exporters make of them."""
    w, b = random(32, 32), np.zeros(32, np.float32)
    q = on_format(formats.int4(32), w)
    other = on_format(formats.int8(), w)
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Gemm", ["h", "v", "c"], ["y"])]
    x = np.eye(32, dtype=np.float32)
    model = graph(nodes, {"w": w, "v": w, "b": b, "c": b}, x)
    source = {"b": b, "c": b, "v": w, "w": w}
    export_onnx(model, tmp_path / "m", source | {"v": q, "w": q}, source=source, contrib=False)
    wanted = values(q) @ values(q)
    np.testing.assert_allclose(evaluated(tmp_path / "m", x), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"tell the initializers apart, got leaves 'v' and 'w', both equal to '\w'\."):
        export_onnx(model, tmp_path / "n", source | {"v": q, "w": other}, source=source)
    with pytest.raises(ValueError, match=r"got leaves 'b' and 'c', both equal to 'b'. Give the initializer"):
        export_onnx(model, tmp_path / "n", source | {"b": b + 1}, source=source)
    with pytest.raises(ValueError, match=r"got 'w' and 'v', each equal to leaf 'w'. Give the initializer of each leaf"):
        export_onnx(model, tmp_path / "n", {"w": q}, source={"w": w})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


W = random(64, 64)
ERRORS = [
    ({"source": {"w": W + 1}}, "`model_in` must have an initializer for every leaf, got 'w'. No float initializer"),
    ({"rename": lambda path, leaf: "v"}, "`rename` must name a float initializer of the graph, got 'v'. Leaf 'w' is"),
    (
        {"rename": lambda path, leaf: [("a", slice(0, 8), None), ("b", slice(9, 64), None)]},
        "name every row that it divides, got 63. Leaf 'w' of shape",
    ),
    ({"rename": lambda path, leaf: "s"}, "must name an initializer of the shape of the leaf, got 's'. Leaf 'w' has"),
    (
        {"params": {"w": W, "v": W}, "rename": lambda path, leaf: "w"},
        "must return each name once, got 'w'. Leaves 'v' and 'w'",
    ),
    (
        {"params": {"w": on_format(formats.nf4(), W)}},
        r"on formats that ONNX has, got 'nf4\(block=64\)'. Leaf 'w' has v",
    ),
    ({"params": {"w": np.full((64, 64), 1e39)}}, "hold the params, got 'float32'. Leaf 'w' has 1e[+]39, and its init"),
    ({"params": {"w": on_format(formats.q4_1(), W)}}, "be on formats that ONNX has, got 'q4_1'. Leaf 'w' has values"),
    (
        {"params": {"w": on_format(formats.int4(32), W)}, "opset": 20},
        "opset with these codes, got 20. Leaf 'w' needs o",
    ),
    (
        {"params": {"w": on_format(formats.mxfp4(), W)}, "opset": 22},
        r"got 22. Leaf 'w' needs opset 23: `jax2onnx.to_on",
    ),
    ({"source": {"v": W}}, r"`source` must have every leaf of the params, got \['v'\]. It has no leaf 'w': give the"),
    ({"source": {"w": W[1:]}}, r"`source` must have the shapes of the params, got \(63, 64\). Leaf 'w' has shape"),
    (
        {"params": {"w": Quantized(jnp.zeros((64, 64), jnp.int8), None, None, 4, (1,), 32, "q8_0", (jnp.zeros(3),))}},
        r"hold scales whose blocks divide the codes, got \[\(3,\)\]. Leaf 'w' has codes of shape",
    ),
]


@pytest.mark.parametrize(("given", "message"), ERRORS, ids=[message[:50] for _, message in ERRORS])
def test_what_cannot_be_written_raises_and_writes_nothing(given, message, tmp_path):
    given = dict(given)
    model, _ = matmul(W, given.pop("opset", 25))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "s"))
    model.graph.node.append(helper.make_node("Identity", ["s"], ["t"]))
    params = given.pop("params", {"w": on_format(formats.int8(), W)})
    if "rename" not in given:
        given = {"source": {"w": W}} | given
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "m", params, contrib=False, **given)
    assert not list(tmp_path.iterdir())


def test_a_leaf_off_its_grid_raises_and_a_rename_of_another_kind(tmp_path):
    tx = clipjax.fake_quantize(4)
    params, state = clipjax.hold_once(tx, {"kernel": jnp.asarray(W)})
    model, _ = matmul(np.asarray(params["kernel"]))
    with pytest.raises(ValueError, match="`params` must be on the grid of the state, got 'kernel'"):
        export_onnx(model, tmp_path / "m", jax.tree.map(lambda x: x * 1.01, params), state)
    with pytest.raises(ValueError, match=r"hold arrays where there is an `opt_state`, got \['kernel'\]."):
        export_onnx(model, tmp_path / "m", clipjax.quantized(params, state), state)
    with pytest.raises(ValueError, match="`opt_state` must have quantized a leaf, got 'the state of a quantizer"):
        export_onnx(model, tmp_path / "m", params, tx.init(params))
    with pytest.raises(TypeError, match="`rename` must return names, got 3 for leaf 'kernel'"):
        export_onnx(model, tmp_path / "m", params, state, rename=lambda path, leaf: 3)
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'clipjax\[export\]'"):
        export_onnx(tmp_path / "in", tmp_path / "m", {"w": W})
