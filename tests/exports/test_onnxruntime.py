"""onnxruntime runs what `export_onnx` writes of models of Flax NNX, with the outputs that JAX has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exported import Cnn, Mlp, Transformer, on_formats, outputs
from flax import nnx
from on_format import on_format
from onnx_graphs import graph, helper, matmul, operators, values

import clipjax
from clipjax import export_onnx, formats

onnxruntime = pytest.importorskip("onnxruntime")
jax2onnx = pytest.importorskip("jax2onnx")

TOKENS = np.arange(48, dtype=np.int32).reshape(3, 16)
VECTORS = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
IMAGES = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)


def run(path, x, optimized=True):
    """The outputs, computed in f32: a product with DequantizeLinear has 8-bit activations unless told otherwise."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.asarray(x)})[0]


def transformer(path, leaf):
    if "embed" in path:
        return formats.q8_0(), 0
    if "attention" in path:
        return formats.q4_0(), (2,) if "/out/" in path else (1, 2)
    return (formats.nbits(8, 32) if "up" in path else formats.int4(64, "float32")), None


def mlp(path, leaf):
    return {"u": formats.nbits(4, 32), "m": formats.tq2_0(), "d": formats.fp8_e4m3()}[path[0]], None


def cnn(path, leaf):
    if "first" in path:
        return formats.int8(None, "float32"), None
    if "depthwise" in path:
        return formats.fp8_e5m2("array"), None
    return (formats.int4(32) if "last" in path else formats.mxfp8()), None


CASES = {
    "transformer": (Transformer, transformer, TOKENS, {"GatherBlockQuantized": 1, "MatMulNBits": 6}),
    "mlp": (Mlp, mlp, VECTORS, {"MatMulNBits": 2, "DequantizeLinear": 1}),
    "cnn": (Cnn, cnn, IMAGES, {"DequantizeLinear": 4, "Conv": 3}),
}


@pytest.mark.filterwarnings("ignore")  # of jax2onnx
@pytest.mark.parametrize("contrib", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_jax(case, contrib, tmp_path):
    make, chosen, x, nodes = CASES[case]
    model = make(nnx.Rngs(0))
    exported = jax2onnx.to_onnx(model, [jax.ShapeDtypeStruct(x.shape, x.dtype)], opset=24)
    params = on_formats(model, chosen)
    export_onnx(exported, tmp_path / "m", params, source=nnx.state(model, nnx.Param), contrib=contrib)
    found = operators(tmp_path / "m")
    if contrib:
        assert {kind: found.count(kind) for kind in nodes} == nodes
    else:
        assert not {"MatMulNBits", "GatherBlockQuantized"} & set(found)
    wanted = outputs(model, params, x)
    for optimized in (True, False):
        np.testing.assert_allclose(run(tmp_path / "m", x, optimized), wanted, rtol=0, atol=1e-5)
    assert np.abs(wanted - outputs(model, nnx.state(model, nnx.Param), x)).max() > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_model_that_was_trained_on_a_format_is_written_as_it_is(dtype, tmp_path):
    """The graph is made of the trained params: no `source` is needed. bf16 params have an f32 graph."""
    model = Mlp(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.Param)))
    tx = optax.chain(optax.adam(1e-3), clipjax.fake_quantize(formats.nbits(4, 32), every=1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        grads = nnx.grad(lambda model: (model(VECTORS.astype(dtype)).astype(jnp.float32) ** 2).mean())(model)
        optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    wide = Mlp(nnx.Rngs(1))
    nnx.update(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    exported = jax2onnx.to_onnx(wide, [VECTORS.shape])
    export_onnx(exported, tmp_path / "m", params, optimizer.opt_state)
    assert operators(tmp_path / "m").count("MatMulNBits") == 3
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(run(tmp_path / "m", VECTORS), wide(VECTORS), rtol=0, atol=1e-5)


BLOCKS = [formats.nbits(2, 16), formats.nbits(4, 64), formats.nbits(8, 32), formats.q5_0(), formats.tq1_0()]


@pytest.mark.parametrize("form", BLOCKS, ids=lambda form: form.name)
@pytest.mark.parametrize("gemm", [{}, {"transB": 1}], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_products_with_blocks_have_the_values_exactly(form, gemm, dtype, tmp_path):
    """The identity times the weights; in a graph of f16, whose scales must be exact in it, rounded once."""
    w = np.random.default_rng(1).standard_normal((256, 48)).astype(np.float32)
    q = on_format(form, w)
    model, x = matmul(np.ascontiguousarray(w.T if gemm else w, dtype), 21, **gemm)
    export_onnx(model, tmp_path / "m", {"w": q}, source={"w": w})
    short = dtype == np.float16 and "nbits" in form.name
    assert operators(tmp_path / "m")[0] == ("DequantizeLinear" if short else "MatMulNBits")
    np.testing.assert_array_equal(run(tmp_path / "m", x), values(q).astype(dtype))


@pytest.mark.parametrize("form", [formats.nbits(4, 16), formats.q8_0(), formats.tq2_0()], ids=lambda form: form.name)
def test_tables_have_the_values_exactly(form, tmp_path):
    table = np.random.default_rng(2).standard_normal((40, 256)).astype(np.float32)
    q = on_format(form, table, 0)
    at = np.array([[0, 39, 7], [7, -1, 2]], np.int64)
    model = graph([helper.make_node("Gather", ["w", "x"], ["y"])], {"w": table}, at, 21, rank=3)
    export_onnx(model, tmp_path / "m", {"w": q}, rename=lambda path, leaf: "w")
    assert operators(tmp_path / "m") == ["GatherBlockQuantized"]
    np.testing.assert_array_equal(run(tmp_path / "m", at), values(q)[at])
