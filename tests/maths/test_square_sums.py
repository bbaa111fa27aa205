"""Sums of squares against exact ones, in few terms at once so that small arrays have many levels."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax._maths import square_sums

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
KINDS = {
    "normal": lambda shape: RNG.normal(size=shape),
    "equal": lambda shape: np.ones(shape),
    "one large": lambda shape: np.where(np.arange(math.prod(shape)).reshape(shape) == 3, 1.0, 2.0**-11.5),
    "wide": lambda shape: 2.0 ** RNG.uniform(-40, 0, shape),
    "zero": np.zeros,
}
CASES = [((1000,), (0,), 4), ((1000,), (0,), 4096), ((3, 5, 7), (0, 2), 4), ((40, 30), (0, 1), 16), ((1, 5), (0,), 4)]


def scaled(kind, shape, dtype):
    x = KINDS[kind](shape)
    return (0.999 * x / max(np.abs(x).max(), 1e-9)).astype(dtype)


def reference(x, axes):
    """Exact sums: squares of f64 are not exact in f64, so those are summed as pairs of integers."""
    whole = np.vectorize(lambda v: int(math.ldexp(float(v), 120)) ** 2, otypes=[object])(x)
    return np.sum(whole, axis=axes, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axes", "group"), CASES)
def test_sums_are_off_by_less_than_their_bound(shape, axes, group, dtype):
    with jax.enable_x64(dtype == "float64"):
        summed = jax.jit(functools.partial(square_sums.squares, axes=axes, group=group))
        unit = float(np.finfo(dtype).eps) / 2
        for kind in KINDS:
            x = scaled(kind, shape, dtype)
            got, exact = np.asarray(summed(x)), reference(x, axes)
            for value, true in zip(got.ravel(), exact.ravel(), strict=True):
                off = abs(int(math.ldexp(float(value), 240)) - true)
                assert off <= square_sums.error(shape, axes, group) * unit * max(true, (1 << 240) // 4)


def test_a_sum_is_the_same_on_every_number_of_devices():
    x = jnp.asarray(scaled("normal", (64, 24), np.float32))
    summed = jax.jit(lambda x: square_sums.squares(x, (0, 1), 64))
    expected = summed(x)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            for spec in (jax.P("a", "b"), jax.P("b"), jax.P(None, ("b", "a"))):
                np.testing.assert_array_equal(summed(jax.device_put(x, jax.NamedSharding(mesh, spec))), expected)


def test_derivatives():
    x = jnp.asarray(scaled("normal", (4, 6), np.float32))
    slope = jax.grad(lambda x: jnp.sum(square_sums.squares(x, (1,))))(x)
    chex.assert_trees_all_close(slope, 2 * x, rtol=1e-6)
