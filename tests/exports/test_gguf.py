"""`export_gguf` and `import_gguf`: bytes against gguf-py's own quantizers, and the way there and back."""

import os
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from format_rules import GGUF, named
from on_format import on_format

import clipjax
from clipjax import formats

RNG = np.random.default_rng(0)


def random(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


def kind(form):
    return gguf.GGMLQuantizationType["MXFP4" if form.name.startswith("mxfp4") else form.name.upper()]


def read(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def same(a, b):
    """Trees whose arrays are equal bit for bit, in dtype and in all that is static."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@named(GGUF)
def test_bytes_are_those_of_the_reference_and_come_back(form, tmp_path):
    """Codes of [in, heads, size], whose rows are [heads * size, in]; a table; and a leaf on one vector."""
    x, table = random(512, 2, 8), random(24, 256)
    params = {"q": {"kernel": on_format(form, x, axis=(1, 2))}, "embed": {"embedding": on_format(form, table, axis=0)}}
    clipjax.export_gguf(tmp_path / "net", params)
    for name, rows in (("q.kernel", np.asarray(x).reshape(512, 16).T), ("embed.embedding", np.asarray(table))):
        tensor = read(tmp_path / "net")[name]
        assert tensor.tensor_type == kind(form) and tensor.shape.tolist() == [*rows.shape[::-1]]
        np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(np.ascontiguousarray(rows), kind(form)))
    like = jax.eval_shape(lambda: {"q": {"kernel": x}, "embed": {"embedding": table}})
    axis = clipjax.per_leaf(lambda path, leaf: (1, 2) if path == "q/kernel" else None)
    same(clipjax.import_gguf(tmp_path / "net", like=like, axis=axis, dequantize=False), params)
    same(clipjax.import_gguf(tmp_path / "net", like=params, dequantize=False), params)
    floats = {"q": {"kernel": clipjax.dequantize(params["q"]["kernel"])}}
    same(clipjax.import_gguf(tmp_path / "net", like=like, axis=axis)["q"], floats["q"])
    alone = clipjax.import_gguf(tmp_path / "net", dequantize=False)
    np.testing.assert_array_equal(alone["q.kernel"].codes, params["q"]["kernel"].codes.reshape(512, 16).T)
    np.testing.assert_array_equal(
        clipjax.import_gguf(tmp_path / "net")["q.kernel"], clipjax.dequantize(alone["q.kernel"])
    )


@named([formats.tq1_0(), formats.q5_1(), formats.mxfp4("gguf")])
def test_every_code_comes_back(form, tmp_path):
    codes = jnp.asarray(RNG.integers(*((-1, 2) if form.block == 256 else (0, 2 ** round(form.code_bits))), (4096, 8)))
    q = on_format(form, random(4096, 8))
    q = clipjax.Quantized(codes.astype(q.codes.dtype), None, None, q.bits, q.axis, q.group, q.format, q.scales)
    clipjax.export_gguf(tmp_path / "net", {"kernel": q})
    same(clipjax.import_gguf(tmp_path / "net", like={"kernel": q}, dequantize=False), {"kernel": q})


def test_mxfp4_of_every_rule_has_the_same_bytes(tmp_path):
    """E2M1 and E8M0 are one encoding; only how a scale is chosen differs."""
    q = on_format(formats.mxfp4("qwix"), random(64, 8))
    clipjax.export_gguf(tmp_path / "net", {"kernel": q})
    tensor = read(tmp_path / "net")["kernel"]
    decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(decoded, np.asarray(clipjax.dequantize(q)).T)


def rename(path, leaf):
    """A stack of three layers with a fused gate and up, permuted."""
    order = np.r_[np.arange(0, 32, 2), np.arange(1, 32, 2)]
    if path != "layers/gate_up/kernel":
        return [(f"blk.{i}.{path.rsplit('/')[1]}", i, None) for i in range(3)] if "layers" in path else path
    parts = (("gate", slice(0, 32), order), ("up", slice(32, 64), None))
    return [(f"blk.{i}.{name}", (i, part), order) for i in range(3) for name, part, order in parts]


def whole(x):
    return isinstance(x, clipjax.Quantized)


CONTAINERS = {
    "dict": lambda tree: {**tree, "none": None},
    "nnx": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree, is_leaf=whole)),
    "linen": lambda tree: jax.tree.map(lambda x: linen.Partitioned(x, (None, None)), tree, is_leaf=whole),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_stacks_parts_and_permutations_come_back(dtype, container, tmp_path):
    fused = random(3, 64, 64).astype(dtype)
    layers = {"gate_up": {"kernel": fused}, "norm": {"scale": random(3, 64).astype(dtype)}}
    floats = {"layers": layers, "head": random(64, 8).astype(dtype), "temperature": jnp.asarray(0.5, dtype)}
    q = on_format(formats.q8_0(), fused)
    coded = floats | {"layers": layers | {"gate_up": {"kernel": q}}}
    for tree, dequantize in ((floats, True), (coded, False)):
        tree = CONTAINERS[container](tree)
        clipjax.export_gguf(tmp_path / "net", tree, rename=rename)
        found = read(tmp_path / "net")
        assert found["blk.2.norm"].shape.tolist() == [64] and found["temperature"].shape.tolist() == [1]
        assert found["blk.1.up"].shape.tolist() == [64, 32]
        same(clipjax.import_gguf(tmp_path / "net", like=tree, rename=rename, dequantize=dequantize), tree)
    values = gguf.quants.dequantize(found["blk.1.gate"].data, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(values, np.asarray(clipjax.dequantize(q))[1, :, :32].T[np.r_[0:32:2, 1:32:2]])


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@named([formats.q4_0(), formats.q8_0(), formats.tq2_0(), formats.mxfp4()])
def test_trained_leaves_are_written_as_their_bytes(form, dtype, tmp_path):
    """Behind a clamp and a mask, refreshed at every update: the reference's own bytes of the params."""
    tx = optax.chain(
        optax.adam(0.02),
        clipjax.clamp_weights(1.5),
        clipjax.prune_mask(0.5),
        clipjax.fake_quantize(form, every=1),
    )
    params = {"dense": {"kernel": random(256, 8).astype(dtype), "bias": random(8).astype(dtype)}}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(lambda p: jnp.sum((p["dense"]["kernel"] - 0.1) ** 2))(params), state, params
        )
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    clipjax.export_gguf(tmp_path / "net", params, state)
    found = read(tmp_path / "net")
    rows = np.ascontiguousarray(np.asarray(params["dense"]["kernel"], np.float32).T)
    np.testing.assert_array_equal(found["dense.kernel"].data, gguf.quants.quantize(rows, kind(form)))
    np.testing.assert_array_equal(found["dense.bias"].data, np.asarray(params["dense"]["bias"], np.float32))
    same(clipjax.import_gguf(tmp_path / "net", like=params), params)
    coded = clipjax.quantized(params, state)
    same(clipjax.import_gguf(tmp_path / "net", like=params, dequantize=False), coded)


@named([formats.q4_0(), formats.tq1_0()])
def test_without_training_the_bytes_are_those_of_the_reference(form, tmp_path):
    """Post-training quantization in two lines, of params on eight devices, which come back as they lie."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    kernel = jax.device_put(random(512, 16), jax.NamedSharding(mesh, jax.P("x", "y")))
    params, state = clipjax.hold_once(clipjax.fake_quantize(form), {"kernel": kernel})
    clipjax.export_gguf(tmp_path / "net", params, state)
    want = gguf.quants.quantize(np.ascontiguousarray(np.asarray(kernel).T), kind(form))
    np.testing.assert_array_equal(read(tmp_path / "net")["kernel"].data, want)
    for dequantize in (True, False):
        found = clipjax.import_gguf(tmp_path / "net", like=params, dequantize=dequantize)["kernel"]
        assert (found if dequantize else found.codes).sharding == params["kernel"].sharding
        np.testing.assert_array_equal(found if dequantize else clipjax.dequantize(found), params["kernel"])


def test_experts_keep_their_axis(tmp_path):
    """llama.cpp has them as [experts, out, in]; biases as [experts, out]."""
    kernel, bias = random(3, 64, 8), random(3, 8)
    params = {"kernel": on_format(formats.q8_0(), kernel, axis=(0, 2)), "bias": bias}
    names = lambda path, leaf: f"blk.0.ffn_up_exps.{path}"
    clipjax.export_gguf(tmp_path / "net", params, rename=names)
    found = read(tmp_path / "net")
    assert [t.shape.tolist() for t in found.values()] == [[8, 3], [64, 8, 3]]
    values = gguf.quants.dequantize(found["blk.0.ffn_up_exps.kernel"].data, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(values, np.asarray(clipjax.dequantize(params["kernel"])).transpose(0, 2, 1))
    same(clipjax.import_gguf(tmp_path / "net", like=params, rename=names, dequantize=False), params)
    with pytest.raises(ValueError, match=r"`axis` must name experts and outputs.*axis=\(0, -1\)"):
        clipjax.export_gguf(tmp_path / "net", {"kernel": kernel}, rename=names)


@pytest.mark.parametrize(("name", "dtype"), [("f32", np.float32), ("f16", np.float16), ("bf16", jnp.bfloat16)])
def test_floats_are_rounded_once(name, dtype, tmp_path):
    params = {"kernel": random(8, 4), "bias": random(4), "steps": jnp.arange(3), "empty": jnp.zeros((0, 4))}
    clipjax.export_gguf(tmp_path / "net", params, float_type=name)
    found = read(tmp_path / "net")
    assert {k: t.tensor_type.name for k, t in found.items()} == {"kernel": name.upper(), "bias": "F32", "steps": "I32"}
    raw = np.ascontiguousarray(found["kernel"].data)
    np.testing.assert_array_equal(raw.view(dtype), np.asarray(params["kernel"]).T.astype(dtype))
    back = clipjax.import_gguf(tmp_path / "net", like=jax.eval_shape(lambda: params))
    assert back["empty"].shape == (0, 4)
    np.testing.assert_array_equal(back["kernel"], np.asarray(params["kernel"]).astype(dtype).astype(np.float32))
    assert back["steps"].tolist() == [0, 1, 2]


def test_metadata_has_the_types_of_llama_cpp(tmp_path):
    metadata = {
        "llama.block_count": 2,
        "negative": -1,
        "large": 2**40,
        "llama.rope.freq_base": 1e4,
        "text": "ä",
        "flag": True,
        "tokenizer.ggml.tokens": ["<s>", "a", ""],
        "tokenizer.ggml.scores": [0.0, -1.5],
        "tokenizer.ggml.token_type": (3, 1),
        "ids": [1, 2**40],
        "small": np.uint8(7),
        "halves": np.array([0.5, 1.0]),
        "jax": jnp.arange(2),
    }
    clipjax.export_gguf(tmp_path / "net", {"a": random(2)}, metadata=metadata, architecture="gpt2")
    fields = gguf.GGUFReader(tmp_path / "net").fields
    kinds = {key: [kind.name for kind in fields[key].types] for key in metadata}
    assert list(kinds.values()) == [
        ["UINT32"], ["INT32"], ["INT64"], ["FLOAT32"], ["STRING"], ["BOOL"], ["ARRAY", "STRING"], ["ARRAY", "FLOAT32"],
        ["ARRAY", "INT32"], ["ARRAY", "INT64"], ["UINT8"], ["ARRAY", "FLOAT64"], ["ARRAY", "INT32"],
    ]  # fmt: skip
    assert fields["general.architecture"].contents() == "gpt2" and "general.quantization_version" not in fields
    for key, value in metadata.items():
        listed = isinstance(value, tuple | np.ndarray | jax.Array)
        assert fields[key].contents() == (np.asarray(value).tolist() if listed else value)


@pytest.mark.parametrize(
    ("params", "options", "error"),
    [
        ({"k": on_format(formats.nf4(), random(64, 4))}, {}, "`format` must be one of GGUF, got 'nf4.*'k'"),
        ({"k": random(8, 4), "a": {"k": random(2)}}, {"rename": lambda path, leaf: "x"}, "each name once"),
        ({"k" * 64: random(2)}, {}, "names of at most 63 bytes"),
        ({"k": random(8, 4) * 1e6}, {"float_type": "f16"}, "`float_type` must hold every weight, got 'f16'.*bf16"),
        ({"k": np.full((8, 4), 3.4e38, np.float32)}, {"float_type": "bf16"}, "got 'bf16'. Leaf 'k' has 3.39"),
        (
            {"k": np.full(4, -1e300)},
            {"float_type": "bf16"},
            "got 'f32'. Leaf 'k' has -1e[+]300. 'bf16' and 'f32' reach",
        ),
        ({"k": random(8, 4)}, {"float_type": "f64"}, "`float_type` must be one of"),
        ({"k": jnp.ones(3, bool)}, {}, "Leaves must be floats or signed integers in GGUF, got bool at 'k'"),
        ({"k": random(2)}, {"architecture": ""}, "`architecture` must be a name"),
        ({"k": random(2)}, {"metadata": {"a": []}}, "no empty lists"),
        ({"k": random(2)}, {"metadata": {"a": [1, "b"]}}, "lists of one kind"),
        ({"k": random(2)}, {"metadata": {"a": {"b": 1}}}, "values that GGUF knows"),
        ({"k": random(2)}, {"metadata": {"a": None}}, "values that GGUF knows"),
        ({"k": random(2)}, {"metadata": {1: 2}}, "strings as keys"),
        ({"k": random(2)}, {"metadata": {"general.architecture": "gpt2"}}, "what is written anyway"),
        ({"k": random(2)}, {"metadata": {"a": 2**70}}, "64 bits"),
    ],
)
def test_bad_input_writes_nothing(params, options, error, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(b"old")
    with pytest.raises((ValueError, TypeError), match=error):
        clipjax.export_gguf(path, params, **options)
    assert os.listdir(tmp_path) == ["net"] and path.read_bytes() == b"old"


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net"
    path.write_bytes(b"old")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        clipjax.export_gguf(path, {"k": random(2)})
    assert os.listdir(tmp_path) == ["net"] and path.read_bytes() == b"old"


def test_what_does_not_fit_the_file(tmp_path):
    path, kernel = tmp_path / "net", random(96, 4)
    clipjax.export_gguf(path, {"a": kernel, "k": on_format(formats.q8_0(), kernel)})
    shape, turned, cut = (jax.ShapeDtypeStruct(n, jnp.float32) for n in ((96, 4), (4, 96), (4, 24, 4)))
    alone = lambda path, leaf: "a" if path == "a" else None
    half = lambda path, leaf: [("a", slice(0, 4), None)]
    for like, options, error in (
        ({"a": shape}, {}, r"`like` must have the tensors of the file, got \['k'\].*partial=True"),
        ({"a": shape, "k": shape, "c": shape}, {}, r"got \['c'\]\. The file lacks these"),
        ({"a": shape, "k": turned}, {}, r"shapes of the file at 'k', got \[96, 4\]. The file has \[4, 96\]"),
        ({"a": shape, "k": shape}, {"rename": alone, "partial": True}, "`like` must have a value, got 'k'"),
        ({"a": turned}, {"rename": half, "partial": True}, r"shapes of the file at 'a', got \[4, 4\]"),
        ({"a": jax.ShapeDtypeStruct((96, 8), jnp.float32)}, {"rename": half, "partial": True}, "all of a leaf"),
        (
            {"a": shape, "k": cut},
            {"dequantize": False},
            "that blocks of q8_0 divide.*dequantize=True",
        ),
        (None, {"rename": alone}, "`like` must be given with `rename`"),
    ):
        with pytest.raises(ValueError, match=error):
            clipjax.import_gguf(path, like=like, **options)
    same(clipjax.import_gguf(path, like={"a": shape}, partial=True), {"a": kernel})
    assert clipjax.import_gguf(path, like={"a": shape, "k": 3}, rename=alone, partial=True)["k"] == 3
    assert clipjax.import_gguf(path, like={"a": shape, "k": cut})["k"].shape == (4, 24, 4)


def test_numbers_that_the_dtypes_of_leaves_do_not_have(tmp_path):
    """Rounding to another float is what a leaf of it asks for; truncation and infinities are not."""
    values = jnp.array([[0.0, 1.0], [1e5, 1.0]])
    clipjax.export_gguf(tmp_path / "net", {"a": values, "b": jnp.array([[0.0, 0.5, 2.0]]), "c": values[:1]})
    like = {"a": jnp.zeros((2, 2), jnp.bfloat16), "b": jnp.zeros((1, 3), jnp.float16), "c": jnp.zeros((1, 2), bool)}
    found = clipjax.import_gguf(tmp_path / "net", like=like)
    assert [found[k].tolist() for k in "abc"] == [[[0, 1], [99840, 1]], [[0, 0.5, 2]], [[False, True]]]
    for key, dtype, lost in (("a", jnp.float16, 100000.0), ("b", jnp.int32, 0.5), ("a", jnp.int8, 100000.0)):
        wrong = like | {key: like[key].astype(dtype)}
        with pytest.raises(
            ValueError, match=rf"dtypes that hold the file, got '{dtype.dtype}'. Tensor '{key}' has {lost},"
        ):
            clipjax.import_gguf(tmp_path / "net", like=wrong)


def test_damaged_files_raise(tmp_path):
    path = tmp_path / "net"
    clipjax.export_gguf(path, {"a": random(64, 4)})
    whole = path.read_bytes()
    for data in (b"", b"GGUF", whole[:40], whole[:-1], b"x" + whole[1:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="`path` must be a whole GGUF file"):
            clipjax.import_gguf(path)
    with pytest.raises(FileNotFoundError):
        clipjax.import_gguf(tmp_path / "none")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (clipjax.import_gguf, lambda path: clipjax.export_gguf(path, {})):
        with pytest.raises(ImportError, match=r"pip install 'clipjax\[export\]'"):
            call(tmp_path / "net")
