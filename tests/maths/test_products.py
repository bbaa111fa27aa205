"""`dot` against the floats that its kernel stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports.on_format import on_format
from format_rules import ALL, named
from jax.extend import core

import clipjax
from clipjax import Quantized, dequantize, dot, formats


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def close(x, q, y, axes=1, digits=23, dtype=np.float64):
    """The error of y is within the rounding of f32 sums: a few units beside the sum of magnitudes."""
    kernel = np.asarray(dequantize(q), np.float64)
    wanted = np.tensordot(np.asarray(x, np.float64), kernel, axes)
    size = np.tensordot(np.abs(np.asarray(x, np.float64)), np.abs(kernel), axes)
    assert y.dtype == x.dtype and y.shape == wanted.shape
    assert (np.abs(np.asarray(y, np.float64) - wanted) <= size * 2.0 ** (2 - digits) + 1e-30).all()


@named(ALL)
@pytest.mark.parametrize("rows", [(), (3,), (2, 300)])
def test_every_format_equals_its_floats(form, rows):
    q = on_format(form, normal(512, 6) * jnp.exp2(jnp.arange(6.0) - 3))
    x = normal(*rows, 512, seed=1)
    close(x, q, jax.jit(dot)(x, q))


GRIDS = {
    "one_step": {"step": 0.1},
    "steps_of_outputs": {"axis": -1},
    "groups": {"axis": -1, "group": 32},
    "unbounded": {"bits": None, "step": 1e-4},
    "one_bit": {"bits": 1, "axis": -1},
    "affine": {"axis": -1, "step": clipjax.steps.minmax()},
    "affine_groups": {"axis": -1, "group": 16, "step": clipjax.steps.minmax()},
    "wide": {"bits": 12, "axis": -1},
}


@pytest.mark.parametrize("rows", [(4,), (100,)])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_grids_with_groups_and_zero_points_equal_their_floats(grid, rows):
    params = {"kernel": normal(64, 6) + 0.7}
    params, state = clipjax.hold_once(clipjax.fake_quantize(**{"bits": 4, **grid}), params)
    q = clipjax.quantized(params, state)["kernel"]
    x = normal(*rows, 64, seed=1)
    close(x, q, dot(x, q))
    close(x, q, jax.jit(dot)(x, q))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@named([formats.q4_0(), formats.q4_1(), formats.fp8_e4m3(), formats.mxfp4("ocp"), formats.nf4()])
def test_x_keeps_its_dtype_and_sums_are_f32(form, dtype):
    q, x = on_format(form, normal(512, 5)), normal(3, 512, seed=1).astype(dtype)
    close(x, q, dot(x, q), digits=jnp.finfo(dtype).nmant)


def test_several_input_and_output_axes():
    """A kernel f32[heads, size, out] takes x [..., heads, size]; f32[in, heads, size] gives two axes."""
    x, out = normal(2, 4, 32, seed=1), on_format(formats.q8_0(), normal(4, 32, 6))
    close(x, out, dot(x, out), axes=2)
    query = on_format(formats.fp8_e4m3((2, 32)), normal(64, 4, 8), axis=(1, 2))
    close(normal(3, 64), query, dot(normal(3, 64), query))
    rows = on_format(formats.q4_0(), normal(6, 64), axis=0)
    assert jnp.array_equal(dot(normal(3, 64), rows), dot(normal(3, 64), on_format(formats.q4_0(), normal(6, 64).T)))
    codes = jnp.arange(6, dtype=jnp.int8).reshape(3, 2)
    steps = Quantized(codes, jnp.array([[1.0], [2], [4]]), jnp.int32(0), 4, 0, None)
    assert dot(jnp.array([1.0, 1, 1]), steps, axis=-1).tolist() == [0 + 4 + 16, 1 + 6 + 20]
    assert dot(jnp.array([1.0, 10]), steps).tolist() == [10, 64, 4 * 54]


def test_a_stacked_leaf_gives_a_layer_to_scan_and_vmap():
    stack = on_format(formats.q4_0(), normal(3, 64, 64), axis=(0, 2))
    layers = [on_format(formats.q4_0(), layer) for layer in normal(3, 64, 64)]
    x = normal(5, 64, seed=1)
    want = functools.reduce(dot, layers, x)
    assert jnp.allclose(jax.lax.scan(lambda x, q: (dot(x, q), None), x, stack)[0], want, rtol=1e-5, atol=1e-4)
    every = jax.vmap(dot, (None, 0))(x, stack)
    assert jnp.allclose(every, jnp.stack([dot(x, layer) for layer in layers]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 100])
@named([formats.q4_1(), formats.fp8_e5m2("array"), formats.int8()])
def test_the_gradient_of_x_is_that_of_the_floats(form, rows):
    q, x, y = on_format(form, normal(64, 6)), normal(rows, 64), normal(rows, 6, seed=2)
    found = jax.grad(lambda x: jnp.sum(dot(x, q) * y))(x)
    assert jnp.allclose(found, y @ dequantize(q).T, rtol=1e-5, atol=1e-4 * float(jnp.abs(found).max()))
    if q.codes.dtype == jnp.int8 or form is formats.q4_1():
        again = jax.grad(lambda x: jnp.sum(dot(x, q, integers=True) * y))(x)
        assert jnp.array_equal(again, found)


@named([formats.int8(), formats.q8_0(), formats.q4_1(), formats.mxfp4("ocp")])
@pytest.mark.parametrize("rows", [3, 45])
def test_integers_are_the_product_of_the_rows_that_a_step_rounds(form, rows):
    q, x = on_format(form, normal(64, 6)), normal(2, rows, 64, seed=1).at[0, 0].set(0)
    step = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    rounded = np.float32(np.rint(x / np.where(step == 0, 1, step)) * step)
    found = jax.jit(dot, static_argnames="integers")(x, q, integers=True)
    assert jnp.allclose(found, rounded @ dequantize(q), atol=1e-4)
    text = str(jax.make_jaxpr(lambda x: dot(x, q, integers=True))(x))
    assert "i32[" in text.split("dot_general")[0].rsplit("\n", 1)[-1]


def arrays(jaxpr):
    """The shape and dtype of every result of a program, of those inside of it too."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for inner in core.jaxprs_in_params(equation.params):
            yield from arrays(inner)


@named([f for f in ALL if not f.name.startswith("nf4")])
def test_the_program_has_no_float_kernel(form):
    q, x = on_format(form, normal(512, 64)), normal(4, 512).astype(jnp.bfloat16)
    program = jax.make_jaxpr(dot)(x, q)
    big = {a.dtype.name for a in arrays(program.jaxpr) if a.size >= q.codes.size}
    assert big <= {"int8", "uint8", "float8_e4m3fn", "float8_e5m2"}


def test_a_format_without_factors_is_decoded():
    step = formats.register(
        formats.Format(
            "halves",
            fit=lambda x, limit, precision, axes=(-1,): (jnp.max(jnp.abs(x), axis=axes, keepdims=True),),
            encode=lambda x, scales, limit: jnp.round(x / scales[0] * 2).astype(jnp.int8),
            decode=lambda codes, scales: codes.astype(jnp.float32) * scales[0] / 2,
            code_bits=3,
            scale_bits=32,
            block=8,
        )
    )
    q, x = on_format(step, normal(16, 4)), normal(3, 16)
    close(x, q, dot(x, q))
    with pytest.raises(ValueError, match="`integers` must be False"):
        dot(x, q, integers=True)


def test_no_rows_and_zeros():
    q = on_format(formats.q4_0(), jnp.zeros((32, 2)))
    assert dot(jnp.zeros((0, 32)), q).shape == (0, 2)
    assert dot(jnp.ones(32), q).tolist() == [0, 0]


def test_bad_input_is_told():
    q = on_format(formats.q4_0(), normal(64, 6))
    with pytest.raises(TypeError, match=r"`quantized` must be a Quantized.*`@`"):
        dot(normal(3, 64), normal(64, 6))
    with pytest.raises(ValueError, match=r"`x` must have last axes of shape \(64,\), got \(3, 6\)"):
        dot(normal(3, 6), q)
    with pytest.raises(ValueError, match="`x` must have last axes"):
        dot(normal(), q)
    with pytest.raises(TypeError, match="`x` must be floats, got int32"):
        dot(jnp.ones((3, 64), jnp.int32), q)
    with pytest.raises(ValueError, match="`axis` must name axes of an array of rank 2, got 2"):
        dot(normal(3, 64), q, axis=2)
    with pytest.raises(ValueError, match="`axis` must leave an input axis"):
        dot(normal(3, 64), q, axis=(0, 1))
    with pytest.raises(ValueError, match="`format` must be known, got 'q4_9'"):
        dot(normal(3, 64), Quantized(q.codes, None, None, 4, (1,), 32, "q4_9", q.scales))
    with pytest.raises(ValueError, match="`integers` must be False where codes are no integers"):
        dot(normal(3, 64), on_format(formats.fp8_e4m3(), normal(64, 6)), integers=True)
    long = Quantized(jnp.zeros((1 << 18, 1), jnp.int8), jnp.float32(1), jnp.int32(0), 8, None, None)
    with pytest.raises(ValueError, match="more than 2\\^17 inputs"):
        dot(normal(1 << 18), long, integers=True)
