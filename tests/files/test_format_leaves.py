"""The payload of a `Quantized` on a format: codes and scales bit for bit, in no more bytes than the format takes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_bits import bits, same

import clipjax
from clipjax import Quantized, formats
from clipjax._files import format_leaves

RNG = np.random.default_rng(0)
SQUARE = {form.name: (form, (256, 40), None) for form in (
    *(formats.q4_0(), formats.q4_1(), formats.q5_0(), formats.q5_1(), formats.q8_0(), formats.tq1_0(), formats.tq2_0()),
    *(formats.mxfp4(), formats.mxfp8(), formats.nvfp4(), formats.int4(32), formats.int8(), formats.nbits(2, 16)),
    *(formats.int4(64, "float32"), formats.nf4(), formats.fp8_e4m3("channel"), formats.fp8_e5m2("array")),
)}  # fmt: skip
CASES = SQUARE | {
    "tiles": (formats.fp8_e4m3((128, 128)), (256, 128), None),
    "first_axis": (formats.q4_0(), (40, 64), 0),
    "stacked": (formats.q8_0(), (3, 64, 20), (0, 2)),
    "conv": (formats.int4(16), (3, 3, 16, 8), None),
    "split_axis": (formats.q4_0(), (3, 64, 5), 2),
}


def held(name, dtype=jnp.float32, zeros=0.0):
    """Params on a format, and their codes and scales."""
    form, shape, axis = CASES[name]
    sparsity = zeros * RNG.choice([0.5, 1.25], shape[-1])  # a unit loses few of its weights, or all
    w = RNG.normal(size=shape) * RNG.uniform(0.5, 2, shape[-1]) * (RNG.random(shape) >= sparsity)
    params = {"kernel": jnp.asarray(w, dtype), "bias": jnp.ones(3, dtype)}
    params, state = clipjax.hold_once(clipjax.fake_quantize(form, axis=axis), params)
    return params, clipjax.quantized(params, state)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_scales_and_values_come_back(name, dtype):
    params, integers = held(name, dtype)
    data = clipjax.pack(integers)
    same(clipjax.unpack(data, dequantize=False), integers)
    same(clipjax.unpack(data, dequantize=False, like=integers), integers)
    same(
        *(
            jax.tree.map(lambda x: x + jnp.zeros((), dtype), tree)
            for tree in (clipjax.unpack(data, like=params), params)
        )
    )
    assert bits(clipjax.unpack(data)["kernel"]) == bits(clipjax.dequantize(integers["kernel"]))
    same(clipjax.unpack(clipjax.pack(params)), params)  # without the state, as values


@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_it_takes_no_more_bytes_than_the_format(name, zeros):
    """Codes of `code_bits` and the scales as they are, beside some bytes of fields; of pruned weights far fewer."""
    form = CASES[name][0]
    leaf = held(name, zeros=zeros)[1]["kernel"]
    most = leaf.codes.size * form.code_bits / 8 + sum(s.nbytes for s in leaf.scales)
    size = len(format_leaves.pack(leaf, ""))
    assert size <= most + len(form.name) + 32
    if zeros and form.zero and form.code_bits >= 4:
        assert size < (0.4 if name == "q4_0" else 0.6) * most


def test_what_follows_takes_no_bytes():
    """An array of zeros is its fields, one scale and one code: the shapes of scales are not written."""
    leaf = held("q4_0")[1]["kernel"]
    codes, scales = jnp.full_like(leaf.codes, 8), (jnp.zeros_like(leaf.scales[0]),)
    alike = dataclasses.replace(leaf, codes=codes, scales=scales)
    assert len(format_leaves.pack(alike, "")) == 1 + 5 + 1 + 3 + 3 + 2
    same(format_leaves.unpack(format_leaves.pack(alike, ""), (256, 40)), jax.tree.map(np.asarray, alike))


def test_a_format_that_is_not_known_loads_as_codes():
    leaf = dataclasses.replace(held("q4_0")[1]["kernel"], format="largest(7)")
    data = clipjax.pack({"a": leaf})
    same(clipjax.unpack(data, dequantize=False), {"a": leaf})
    with pytest.raises(ValueError, match=r"`format` must be known, got 'largest\(7\)'. .*register"):
        clipjax.unpack(data)


def test_codes_go_where_the_leaf_shall_be():
    mesh = jax.make_mesh((8,), ("x",))
    rows = jax.NamedSharding(mesh, jax.P("x"))
    _, integers = held("q4_0")
    places = {"kernel": rows, "bias": None}
    for sharding in (places, lambda path, x: places[path], integers | places):
        back = clipjax.unpack(clipjax.pack(integers), dequantize=False, sharding=sharding)
        same(back, integers)
        assert back["kernel"].codes.sharding == rows
        assert bits(clipjax.dequantize(back["kernel"])) == bits(clipjax.dequantize(integers["kernel"]))


def formed(**changed):
    fields = {"codes": jnp.zeros((64, 4), jnp.uint8), "scales": (jnp.zeros((2, 4), jnp.uint16),), "format": "q4_0"}
    return Quantized(**({"step": None, "zero_point": None, "bits": 4, "axis": (1,), "group": 32} | fields | changed))


@pytest.mark.parametrize("shape", [(0, 8), (32, 0)])
def test_an_empty_leaf_comes_back(shape):
    scales = tuple(max(n, 1) for n in (shape[0] // 32, shape[1]))
    leaf = formed(codes=jnp.zeros(shape, jnp.uint8), scales=(jnp.zeros(scales, jnp.uint16),))
    same(clipjax.unpack(clipjax.pack([leaf, None]), dequantize=False), [leaf, None])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"step": jnp.ones(())}, TypeError, "`step` and `zero_point` must be None .* stands at 'x/y'"),
        ({"format": None}, TypeError, "`format` must be the name"),
        ({"axis": None}, TypeError, "`axis` must be the tuple of the output axes"),
        ({"axis": (2,)}, ValueError, r"`axis` must name axes of codes of shape \(64, 4\), got \(2,\)"),
        ({"scales": ()}, ValueError, "`scales` must be 1 to 8 arrays, got 0"),
        ({"scales": (jnp.zeros((3, 4), jnp.uint16),)}, ValueError, r"an entry for each block of .*got \(3, 4\)"),
        ({"scales": (jnp.zeros(4, jnp.uint16),)}, ValueError, r"an entry for each block of .*got \(4,\)"),
        ({"scales": (jnp.zeros((2, 4)),)}, ValueError, "of q4_0 must be .*uint8.*uint16.*, got .*float32"),
        ({"codes": jnp.zeros((64, 4))}, TypeError, "Codes must be whole"),
        ({"group": 0}, ValueError, "`group` must be"),
        ({"format": "x" * 2000}, ValueError, "1024 bytes at most"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        clipjax.pack({"x": {"y": formed(**change)}})


HOSTILE = {
    "q4_0": lambda: held("q4_0")[1]["kernel"],
    "nvfp4": lambda: held("nvfp4(scale='compressed-tensors')", zeros=0.9)[1]["kernel"],
    "stacked": lambda: held("stacked")[1]["kernel"],
    "scalar": lambda: Quantized(jnp.uint8(3), None, None, 4, (), None, "of a user", (jnp.float32(2),)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_only_raise_value_errors(name):
    """Bytes changed at random where no checksum of the entry is in the way, half of them among the fields."""
    leaf = HOSTILE[name]()
    data, shape = format_leaves.pack(leaf, ""), np.shape(leaf.codes)
    same(format_leaves.unpack(data, shape), jax.tree.map(np.asarray, leaf))
    raised = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(RNG.integers(1, 4)):
            at = RNG.integers(0, min(20, len(data)) if RNG.random() < 0.5 else len(data))
            damaged[at] = RNG.choice([damaged[at] ^ (1 << RNG.integers(8)), 0, 255, RNG.integers(256)])
        try:
            back = format_leaves.unpack(damaged, shape)
            format_leaves.describe(damaged, shape)
            if back.format == leaf.format and math.prod(shape) > 1:
                clipjax.dequantize(back)
        except ValueError:
            raised += 1
    assert raised
    with pytest.raises(ValueError, match="1 bytes too long"):
        format_leaves.unpack(data + b"\0", shape)
