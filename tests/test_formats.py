"""Formats against the quantizers of their references, byte for byte; ids, and formats of one's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from format_rules import (
    ALL,
    CHUNK,
    FAST,
    RULES,
    SLOW,
    bf16_valued,
    chunks,
    divided,
    jitted,
    largest,
    named,
    packed,
)

from clipjax import formats
from clipjax._maths import grids, known_formats

pytestmark = pytest.mark.usefixtures("strict")
to_the_bit = pytest.mark.optimized  # an FMA, or a product with an inverse, would change codes

GGUF = {kind: getattr(formats, kind.lower())() for kind in "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 TQ1_0 TQ2_0 MXFP4".split()}


@to_the_bit
@pytest.mark.parametrize("name", GGUF)
@pytest.mark.parametrize("blocks", [FAST, SLOW])
def test_bytes_are_those_of_gguf(name, blocks):
    """Codes and scales, and values; and for all with an exact zero the values have these bytes again."""
    gguf = pytest.importorskip("gguf")
    form, kind = GGUF[name], gguf.GGMLQuantizationType[name]
    quantize, _, decode = jitted(form)
    for x in chunks(blocks, form.block):
        codes, scales = quantize(x, np.inf, None)
        expected = gguf.quantize(x, kind)
        np.testing.assert_array_equal(packed(form, codes, scales)[0], expected)
        values = decode(codes, scales)
        np.testing.assert_array_equal(values, gguf.dequantize(expected, kind))
        if form.zero:  # but for a block of -0: an update lands on 0
            landed, kept = np.asarray(values) + np.float32(0), ~np.signbit(x).all(1) | (x != 0).any(1)
            np.testing.assert_array_equal(gguf.quantize(landed, kind)[kept], expected[kept])


@to_the_bit
@pytest.mark.parametrize("name", GGUF)
def test_values_within_a_limit_have_their_bytes_again(name):
    """No level beyond a block's largest entry; of a scale that is 0 in f16 the codes are lost, by gguf-py too."""
    gguf = pytest.importorskip("gguf")
    form, kind = GGUF[name], gguf.GGMLQuantizationType[name]
    quantize, _, decode = jitted(form)
    x = next(chunks(CHUNK, form.block))
    limited = quantize(x, largest(x), None)
    values = np.asarray(decode(*limited)) + np.float32(0)
    assert (np.abs(values) <= largest(x)).all()
    kept = values.any(1)
    if form.zero:
        np.testing.assert_array_equal(gguf.quantize(values, kind)[kept], packed(form, *limited)[0][kept])


@to_the_bit
def test_bf16_holds_wide_codes_rounded_and_they_have_their_bytes_again():
    """The scale, a normal f16, is fitted to targets in bf16, and levels reach as far as bf16 rounds to the limit."""
    gguf = pytest.importorskip("gguf")
    quantize, _, decode = jitted(formats.q8_0())
    x = bf16_valued(next(chunks(CHUNK, 32)))
    codes = quantize(x, grids.reach(jnp.asarray(largest(x)), jnp.bfloat16), None)
    values = np.asarray(jnp.asarray(decode(*codes), jnp.bfloat16).astype(jnp.float32))
    kept = largest(x)[:, 0] > 127 * 2.0**-14
    assert (np.abs(values) <= largest(x)).all() and not (values == decode(*codes)).all()
    found = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    same = (found == packed(formats.q8_0(), *codes)[0]).all(1)
    assert same[kept].all()


@to_the_bit
@named(RULES)
@pytest.mark.parametrize("blocks", [FAST, SLOW])
def test_codes_and_scales_follow_the_rule_in_numpy(form, blocks):
    for x in chunks(blocks, form.block or 48):
        codes, scales = jitted(form)[0](x, np.inf, None)
        expected, parts = RULES[form](x)
        for scale, part in zip(scales, parts, strict=True):
            assert np.shape(scale) == np.shape(part)
            np.testing.assert_array_equal(*(np.ravel(s).view(np.uint8) for s in (scale, part)))
        np.testing.assert_array_equal(codes, expected)


@to_the_bit
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nf4"])
def test_codes_and_scales_are_those_of_qwix(name):
    """But where max|x| / largest is a power of two: XLA's log2 may be above it, and Qwix takes the next one."""
    qarray = pytest.importorskip("qwix._src.core.qarray")
    form = {"mxfp4": formats.mxfp4("qwix"), "mxfp8": formats.mxfp8("e4m3", "qwix"), "nf4": formats.nf4(64)}[name]
    how = qarray.HowToQuantize(qtype=name, channelwise_axes=(0,), tiled_axes={1: form.block})
    for x in chunks(CHUNK, form.block, seed=1):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            q = qarray.quantize(jnp.asarray(x), how)
        codes, scales = jitted(form)[0](x, np.inf, None)
        scale = scales[0] if name == "nf4" else np.exp2(np.asarray(scales[0], np.float32) - 127)
        even = np.frexp(divided(largest(x), 6 if name == "mxfp4" else 448))[0] == 0.5
        assert even.any() and not even.all()
        known = ~even[:, 0] | (name == "nf4")
        np.testing.assert_array_equal(np.asarray(q.scale)[known], scale[known])
        theirs = np.asarray(q.qvalue).astype(np.uint8) if name == "nf4" else np.asarray(q.qvalue).view(np.uint8)
        np.testing.assert_array_equal(codes[known], theirs[known])


def compressed_tensors(x, form):
    """The arrays of a file by compressed-tensors, from weights in f32."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    kind, w = form.name.split("(")[0], torch.from_numpy(x)
    how = {
        "int4": dict(num_bits=4, type="int", strategy="group", group_size=form.block),
        "int8": dict(num_bits=8, type="int", strategy="channel"),
        "mxfp4": dict(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8),
        "mxfp8": dict(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8),
        "nvfp4": dict(
            num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
        ),
        "fp8_e4m3": dict(num_bits=8, type="float", strategy="channel"),
    }[kind]
    how = package.QuantizationArgs(symmetric=True, **how)
    total = generate_gparam(w.min(), w.max()) if kind == "nvfp4" else None
    scale, _ = calculate_qparams(w.amin(-1, keepdim=True), w.amax(-1, keepdim=True), how, global_scale=total)
    if form.name.endswith("'bfloat16')"):
        scale = scale.to(torch.bfloat16)
    fp8 = how.num_bits == 8 and how.type == "float"
    dtype = torch.float8_e4m3fn if fp8 else torch.int8 if how.type == "int" else None
    q = quantize(w, scale, zero_point=None, args=how, dtype=dtype, global_scale=total)
    if how.type == "int":
        q = pack_to_int32(q, how.num_bits)
    else:
        q = q.view(torch.uint8) if fp8 else pack_fp4_to_uint8(q)
    if kind.startswith("mx"):
        scale = (127 + torch.floor(torch.log2(scale))).to(torch.uint8)
    elif kind == "nvfp4":
        scale = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    elif scale.dtype == torch.bfloat16:
        scale = scale.view(torch.uint16)
    return [a.numpy() for a in (q, scale, *(() if total is None else (total[0],)))]


@to_the_bit
@named(
    [
        formats.mxfp4("compressed-tensors"),
        formats.mxfp8(),
        formats.nvfp4(),
        formats.int4(64, "float32"),
        formats.int4(128, "bfloat16"),
        formats.int8(None, "float32"),
        formats.fp8_e4m3(),
    ]
)
def test_arrays_are_those_of_compressed_tensors(form):
    for x in chunks(CHUNK, form.block or 48, seed=2):
        expected = compressed_tensors(x, form)
        found = packed(form, *jitted(form)[0](x, np.inf, None))
        some = x.any(1)  # what the scale of zeros is depends on the dtype of the weights
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours[some] if ours.ndim else ours, theirs[some] if theirs.ndim else theirs)


@to_the_bit
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blobs_are_those_of_onnxruntime(bits):
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    for x in chunks(CHUNK, 32, seed=3):
        blobs, scales = np.zeros((len(x), 1, 4 * bits), np.uint8), np.zeros(len(x), np.float32)
        quantize = getattr(state, f"quantize_matmul_{bits}bits")
        quantize(blobs, np.ascontiguousarray(x.T), scales, np.zeros((len(x), 1), np.uint8), 32, len(x), 32, True)
        found = packed(formats.nbits(bits, 32), *jitted(formats.nbits(bits, 32))[0](x, np.inf, None))
        np.testing.assert_array_equal(found[0], blobs)
        np.testing.assert_array_equal(found[1][:, 0], scales)


def test_ids_are_those_of_saved_states():
    """They are written to states and files, so that they never change."""
    assert formats.q4_0().id == 3395232926 and formats.mxfp4().id == 1572722432
    assert len({form.id for form in known_formats._known.values()}) == len(known_formats._known)
    for form in ALL:
        assert known_formats.find(form.id) is form
    with pytest.raises(ValueError, match="The format's id must be that of a known format, got 7"):
        known_formats.find(7)


def test_bits_count_the_scales():
    found = {form.name.split("(")[0]: form.bits for form in ALL}
    assert found["q4_0"] == 4.5 and found["q5_1"] == 6 and found["q8_0"] == 8.5 and found["tq1_0"] == 1.6875
    assert found["mxfp4"] == 4.25 and found["nvfp4"] == 4.5 and formats.fp8_e4m3((128, 128)).bits == 8 + 32 / 2**14
    for name, form in GGUF.items():  # the bytes of a block
        gguf = pytest.importorskip("gguf")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert block == form.block and form.bits == size * 8 / block


def test_a_format_of_ones_own_is_found_and_its_name_is_its_own():
    half = formats.Format(
        "halves",
        lambda x, limit, precision, axes: (jnp.ones_like(jnp.max(x, axis=axes, keepdims=True)),),
        lambda x, scales, limit: jnp.round(2 * jnp.clip(x, -1, 1)).astype(jnp.int8),
        lambda codes, scales: codes / 2 * scales[0],
        code_bits=3,
        scale_bits=0,
        block=2,
    )
    made = formats.register(half)
    assert formats.register(half) is made is known_formats.find(half.id)
    codes, scales = made.quantize(jnp.array([[0.3, -7.0]]), np.inf, None)
    assert made.decode(codes, scales).tolist() == [[0.5, -1.0]]
    with pytest.raises(ValueError, match="`name` must belong to one format, got 'halves'"):
        formats.register(dataclasses.replace(half, decode=lambda codes, scales: codes))
    with pytest.raises(TypeError, match="`format` must be a Format"):
        formats.register("q4_0")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: formats.mxfp4("nvidia"), "`scale` must be one of 'gguf'"),
        (lambda: formats.mxfp8("e3m4"), "`element` must be one of"),
        (lambda: formats.nvfp4("gguf"), "`scale` must be one of"),
        (lambda: formats.int4(12), "`group` must be a multiple of 8, got 12"),
        (lambda: formats.int8(32, "float64"), "`scale` must be one of"),
        (lambda: formats.nbits(3), "`bits` must be one of 2, 4, 8, got 3"),
        (lambda: formats.nbits(4, 48), "`block` must be a power of two, got 48"),
        (lambda: formats.fp8_e4m3(128), '`block` must be "array", "channel" or a pair, got 128'),
        (lambda: formats.nf4(0), "`block` must be a multiple of 1, got 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
