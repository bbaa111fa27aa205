"""What holds of the scales and codes of every format: limits, few digits, dtypes, shards, zeros."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from format_rules import ALL, CHUNK, bf16_valued, chunks, jitted, largest, named

from clipjax import formats

pytestmark = pytest.mark.usefixtures("strict")
to_the_bit = pytest.mark.optimized  # an FMA, or a product with an inverse, would change codes


def some_blocks(form, seed=0):
    """100 blocks, those of `chunks` that are special among them."""
    rng = np.random.default_rng(seed)
    x = next(chunks(CHUNK, form.block or 48, seed))
    return x[np.r_[:16, rng.choice(len(x), 84, replace=False)]]


@named(ALL)
def test_no_level_exceeds_a_limit_and_others_stay(form):
    """The limit of a clamp: of the whole array, below its largest entry, and with the scales of before."""
    quantize, encode, decode = jitted(form)
    x = some_blocks(form)
    x = x[np.abs(x).max(-1) > 1e-4]
    infinite = np.full((len(x), 1), np.inf, np.float32)
    plain = np.asarray(decode(*quantize(x, infinite, None)))
    for share in (1.0, 0.999, 0.37):
        limit = largest(x) * np.float32(share)  # a limit for each block: all of them feel it
        codes, scales = quantize(x, limit, None)
        values = np.asarray(decode(codes, scales))
        assert (np.abs(values) <= limit).all()
        again = np.asarray(decode(encode(x, scales, limit), scales))
        assert (np.abs(again) <= limit).all()
        if form.name.startswith(("fp8", "nbits")):  # an ulp of the scale, not the largest code, makes room
            assert (np.abs(values).max(-1, keepdims=True) > 0.9999 * limit).all()
        target = np.clip(x, -limit, limit)
        free = np.asarray(decode(*quantize(target, infinite, None)))
        worse = np.sqrt(np.mean((values - target) ** 2, -1)) / np.sqrt(np.mean((free - target) ** 2, -1) + 1e-12)
        assert np.median(worse) < 1.2
        within = (np.abs(free) <= limit).all(-1) & (form.name[:5] != "nvfp4")  # whose f32 is that of all blocks
        np.testing.assert_array_equal(values[within], free[within])
    wide = np.full_like(infinite, max(np.abs(x).max(), np.abs(plain).max()))
    np.testing.assert_array_equal(decode(*quantize(x, wide, None)), plain)


def off(form, x, limit, precision=None):
    """The relative error of blocks within limits, and their values."""
    scales = jax.jit(form.fit, static_argnums=2)(x, limit, precision)
    values = np.asarray(jax.jit(form.decode)(jax.jit(form.encode)(x, scales, limit), scales))
    return np.sqrt(np.sum((values - x) ** 2) / np.sum(x**2)), values


@named([form for form in ALL if form.name[:3] != "int"])
def test_limits_of_two_sides_lose_neither(form):
    """Blocks that fill the narrower side are as well off as with that limit on both sides, and so is their mirror."""
    x = np.random.default_rng(6).standard_normal((24, form.block or 48), np.float32)
    x = np.maximum(np.minimum(x, np.float32(0.29)), np.float32(-0.3))
    alike, _ = off(form, x, (0.3, 0.3))
    for sign, limit in ((1, (0.3, 1.0)), (-1, (1.0, 0.3))):
        error, values = off(form, sign * x, limit)
        assert error < 1.05 * alike and values.min() >= -np.float32(limit[0]) and values.max() <= np.float32(limit[1])


@named([formats.tq2_0(), formats.q8_0(), formats.fp8_e4m3(), formats.nf4(32), formats.q4_0()])
def test_a_wider_side_that_is_far_out_sets_the_scale(form):
    x = np.zeros((2, form.block or 48), np.float32)
    x[:, 0], x[:, 1] = (0.9, 0.9), (-0.3, -0.01)
    _, values = off(form, x, (0.3, 1.0))
    np.testing.assert_allclose(values[:, 0], 0.9, rtol=1e-3)


def test_a_level_beside_zero_keeps_the_limit_of_its_own_side():
    """Q4_1 has levels on the other side of zero than an entry, its f16 minimum among them."""
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = -0.001, 0.00002, 0.9, -0.0009
    for form in (formats.q4_1(), formats.q5_1()):
        _, values = off(form, x, (0.001, 1.0))
        assert values.min() >= -np.float32(0.001) and values[0, 0] < -0.0009


@named([formats.nvfp4(), formats.nvfp4("modelopt")])
@pytest.mark.parametrize("bound", [0.7, 1.2])
def test_nvfp4_lowers_a_scale_that_would_take_the_largest_code(form, bound):
    x = np.random.default_rng(0).standard_normal((64, 16), np.float32)
    x = np.clip(x, -np.float32(bound), np.float32(bound))
    precision = form.precision(jnp.float32)  # the f32 of the array is a power of two, and scales are rounded
    (within, values), (free, _) = (off(form, x, limit, precision) for limit in (bound, np.inf))
    assert within < 1.4 * free and np.abs(values).max() <= np.float32(bound)


SHORT = [f for f in ALL if f.precision(jnp.bfloat16) is not None]


@named(SHORT)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_few_digits_of_scale_make_values_exact_in_16_bits(form, dtype):
    """The reference finds the same codes and scale in the values, where it is that of an extremum."""
    quantize, encode, decode = jitted(form)
    x = some_blocks(form, 1)
    x = x[(np.abs(x).max(-1) > 1e-2) & (np.abs(x).max(-1) < 1e3)]  # whose values f16 holds as normal numbers
    codes, scales = quantize(x, np.inf, form.precision(dtype))
    values = np.asarray(decode(codes, scales))
    whole = np.abs(values) > 1e-3 if dtype == jnp.float16 else np.ones(values.shape, bool)
    exact = np.asarray(jnp.asarray(values, dtype).astype(jnp.float32)) == values
    if form.code_bits <= 5:
        assert exact[whole].all()
    np.testing.assert_array_equal(decode(encode(values, scales, np.inf), scales), values)
    if form.name[0] in "qt" or form.name.startswith("nbits"):
        for ours, theirs in zip((codes, *scales), jax.tree.leaves(quantize(values, np.inf, None)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def run(form, x):
    codes, scales = form.quantize(x, np.inf, None)
    return codes, scales, form.decode(codes, scales)


KINDS = [formats.q5_0(), formats.q4_1(), formats.mxfp4(), formats.nvfp4(), formats.int4(32)]
KINDS += [formats.fp8_e4m3()]


@to_the_bit
@named(KINDS)
def test_dtypes_vmap_eager_and_explicit_axes_give_the_same(form):
    """One program of f32 blocks, and what else may reach it: narrower dtypes, f64, stacks, shards."""
    width = form.block or 32
    x = bf16_valued(np.random.default_rng(4).standard_normal((8, 4, width), np.float32))
    x[0, 0, 5] = 40
    compiled = jax.jit(functools.partial(run, form))
    codes, scales, values = expected = compiled(x)
    assert values.dtype == jnp.float32 and codes.dtype in (jnp.uint8, jnp.int8) and codes.shape == x.shape
    assert scales[0].shape == (8, 4, 1) and values.shape == x.shape
    equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    equal(run(form, jnp.asarray(x)), expected)
    equal(compiled(jnp.asarray(x, jnp.bfloat16)), expected)
    with jax.enable_x64(True):
        equal(compiled(jnp.asarray(x, jnp.float64)), expected)
    if len(scales) < 2 or scales[1].ndim:  # nvfp4 has one f32 for an array
        equal(jax.jit(jax.vmap(functools.partial(run, form)))(x), expected)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("a", "b")))
        found = compiled(placed)
        assert jax.typeof(found[0]).sharding.spec == jax.P("a", "b", None)
        equal(jax.tree.map(np.asarray, found), expected)
    assert compiled(x[:0])[2].shape == (0, 4, width)


@named([form for form in ALL if form.zero])
def test_zeros_are_levels_and_blocks_are_elementwise_programs(form):
    """No sort, no gather, no scatter: the program of a sharded leaf stays on its devices."""
    x = np.zeros((4, form.block or 48), np.float32)
    x[0, :2] = 3, -1
    program = str(jax.make_jaxpr(functools.partial(run, form))(x))
    assert not {"sort", "gather", "scatter", "argmax", "argmin", "top_k"} & set(re.findall(r"\b[a-z_]+\b", program))
    values = np.asarray(jax.jit(functools.partial(run, form))(x)[2])
    assert (values[x == 0] == 0).all()
