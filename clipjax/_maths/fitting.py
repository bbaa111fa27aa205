"""Plain maths behind steps: reductions over step groups, the grid of least squared error, order statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._maths import counts, grids, wide

_ROUNDS, _POINTS = 4, 8  # the passes of a least-squares fit


def over(reduce: Callable[..., jax.Array], x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Reduce over the shared axes: a scalar for all of them, else size 1 in each."""
    return reduce(x) if len(axes) == x.ndim else reduce(x, axis=axes, keepdims=True)


def mean_size(x: jax.Array, axes: tuple[int, ...], at: jax.Array | None = None) -> jax.Array:
    """The mean magnitude of the nonzero entries, of those at `at` only; 0 where there are none."""
    size = jnp.abs(x)
    counted = size > 0 if at is None else at
    count = over(jnp.sum, counted.astype(x.dtype), axes)
    return over(jnp.sum, jnp.where(counted, size, jnp.zeros_like(size)), axes) / jnp.maximum(count, 1)


def root_mean_square(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The root mean square of the nonzero entries, right for any scale, and the largest magnitude."""
    size = jnp.abs(x)
    count = jnp.maximum(over(jnp.sum, (size > 0).astype(x.dtype), axes), 1)
    high = over(jnp.max, size, axes)
    unit = jnp.where(high > 0, high, jnp.ones_like(high))
    return unit * jnp.sqrt(over(jnp.sum, jnp.square(size / unit), axes) / count), high


def order_statistic(x: jax.Array, percent: float, axes: tuple[int, ...]) -> jax.Array:
    """The round(percent/100 * n)-th smallest of the n nonzero magnitudes, at least the first.

    Exact, by 32 counting passes over the bits of the floats, which are in the order of their magnitudes: no sort.
    """
    lead = wide.first_axes(x.shape, axes)
    remedy = "Give more of them with `axis` or `group`, or use `steps.absmax()` or `steps.sigma()`."
    ok = math.prod(x.shape[a] for a in axes[:lead]) < 2**30
    arguments.require(ok, "step", "rank weights along axes of less than 2**30 in all for each step", x.shape, remedy)
    keys = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7FFFFFFF)  # |x|, where a float's could flush
    count = wide.count(keys > 0, axes)
    rank = count if percent >= 100 else counts.of_fraction(jnp.float32(percent / 100), count)
    rank = wide.where(wide.equal(rank, wide.of(0)), wide.of(1), rank)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        reached = ~wide.less(wide.count((keys > 0) & (keys <= middle), axes), rank)
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    ends = (jnp.zeros_like(count.low), jnp.full_like(count.low, np.uint32(0x7F800000)))
    found = jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 32, halve, ends)[1], jnp.float32)
    return found.reshape(()) if len(axes) == x.ndim else found


def least_squares(x: jax.Array, bits: Any, axes: tuple[int, ...]) -> jax.Array:
    """The step of least squared error over the nonzero entries, see `steps.mse`."""
    if not arguments.traced(bits) and bits == 1:
        return mean_size(x, axes)
    rms, high = root_mean_square(x, axes)
    size, unit = jnp.abs(x), jnp.where(high > 0, high, jnp.ones_like(high))
    top = grids.top(bits)
    low = jnp.minimum(0.5 * rms, high)

    def error(outermost: jax.Array) -> jax.Array:
        """Squared error, in units of max|w|, of the grid with this outermost level."""
        step = jnp.where(outermost > 0, outermost, unit) / top
        code = jnp.minimum(jnp.round(size / step), top)
        return over(jnp.sum, jnp.square((size - code * step) / unit), axes)

    def trial(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """One pass: the error for the next outermost level."""
        # A round tries _POINTS outermost levels, first * ratio^0, ..., first * ratio^(_POINTS - 1). The next round
        # spreads as many between the neighbours of the best one. Invariant: `best` has the least error so far.
        first, ratio, least, best = state
        fresh = jnp.asarray((i % _POINTS == 0) & (i > 0))
        first = jnp.where(fresh, best / ratio, first)
        ratio = jnp.where(fresh, ratio ** (2 / (_POINTS - 1)), ratio)
        outermost = jnp.minimum(first * ratio ** jnp.asarray(i % _POINTS, jnp.float32), high)
        e = error(outermost)
        return first, ratio, jnp.minimum(least, e), jnp.where(e < least, outermost, best)

    ratio = jnp.where(low > 0, high / jnp.where(low > 0, low, unit), jnp.ones_like(low)) ** (1 / (_POINTS - 1))
    start = (low, ratio, jnp.full_like(high, jnp.inf), high)
    return jax.lax.fori_loop(0, _ROUNDS * _POINTS, trial, start)[3] / top


def power_of_two(step: jax.Array) -> jax.Array:
    """The power of two nearest to a step on the logarithmic scale, exact; 0 and what is not finite pass."""
    mantissa, exponent = jnp.frexp(step)  # step = mantissa * 2^exponent, mantissa in [.5, 1)
    up = (mantissa >= math.sqrt(0.5)).astype(exponent.dtype)
    raised = jnp.ldexp(jnp.ones_like(step), exponent - 1 + up)
    return jnp.where((step > 0) & jnp.isfinite(step), raised, step)


def given(step: Any, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """One number for every step group."""
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    return jnp.full(() if len(axes) == x.ndim else shape, jnp.asarray(step, jnp.float32))


def check_percent(value: Any, name: str) -> None:
    """Check a percentage in (0, 100]."""
    arguments.static(value, name)
    ok = arguments.is_number(value) and 0 < value <= 100
    arguments.require(ok, name, "lie in (0, 100]", value, "Try 99.9.")
