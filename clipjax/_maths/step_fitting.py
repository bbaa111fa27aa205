"""Plain maths behind steps: reductions over step groups, the grid of least squared error, order statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, dtypes
from clipjax._maths import exact_counts, grids, wide

_ROUNDS, _POINTS = 3, 8  # the last passes of a least-squares fit: rounds around the best step so far, and their trials


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
    none = wide.equal(count, wide.of(0))
    rank = count if percent >= 100 else exact_counts.of_fraction(jnp.float32(percent / 100), count)
    rank = wide.where(wide.equal(rank, wide.of(0)), wide.of(1), rank)

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        reached = ~wide.less(wide.count((keys > 0) & (keys <= middle), axes), rank)
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    ends = (jnp.zeros_like(count.low), jnp.full_like(count.low, np.uint32(0x7F800000)))
    found = jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 32, halve, ends)[1], jnp.float32)
    found = jnp.where(none, jnp.zeros_like(found), found)
    return found.reshape(()) if len(axes) == x.ndim else found


def least_squares(x: jax.Array, bits: Any, axes: tuple[int, ...]) -> jax.Array:
    """The step of least squared error over the nonzero entries, see `steps.mse`.

    One loop of three parts, each trial of which is a pass over the entries:
    - Euclid's algorithm: a step is tried, then the smallest remainder that the entries leave, which is at most half as
      large. If all entries are multiples of a step, of which the width has as many, this ends at their largest one.
    - A scan of outermost levels in equal ratios, from where clipping alone costs more than `steps.absmax` does.
    - Rounds of a few trials around the best so far.
    """
    if not arguments.traced(bits) and bits == 1:
        return mean_size(x, axes)
    rms, high = root_mean_square(x, axes)
    size, unit = jnp.abs(x), jnp.where(high > 0, high, jnp.ones_like(high))
    top, entries = grids.top(bits), math.prod(x.shape[a] for a in axes)
    finest, least = unit / top, jnp.float32(entries * 2.0**-44)  # errors below `least` may be those of f32: equal
    first, last, points = _scan(rms, high, bits, entries)
    part = bits + 1  # where the scan begins

    def trial(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # A round tries outermost levels first * ratio^0, ..., first * ratio^(_POINTS - 1), between the neighbours of
        # the best one. Invariant: `best` has the least error so far.
        divisor, first, ratio, least_error, best = state
        in_scan, in_round = i - part, i - part - points
        fresh = jnp.asarray((in_round >= 0) & (in_round % _POINTS == 0))
        first = jnp.where(fresh, best * top / ratio, first)
        ratio = jnp.where(fresh, ratio ** (2 / (_POINTS - 1)), ratio)
        power = jnp.asarray(jnp.where(in_round < 0, in_scan, in_round % _POINTS), jnp.float32)
        step = jnp.where(in_scan < 0, divisor, first * ratio**power / top)
        whole = jnp.round(size / step)
        rest = jnp.abs(size - whole * step)
        divisor = over(jnp.min, jnp.where(rest > finest / 4, rest, jnp.full_like(rest, jnp.inf)), axes)
        ended = jnp.isinf(divisor)  # before that, a divisor may fit by chance as well as f32 can tell, not to the bit
        divisor = jnp.where(ended, finest, divisor)
        # The best step for these codes, step + moment / squares, and its error.
        code = jnp.minimum(whole, top)
        rest = (size - code * step) / unit
        squares = jnp.maximum(over(jnp.sum, jnp.square(code), axes), 1)
        moment = over(jnp.sum, rest * code, axes)
        error = jnp.maximum(over(jnp.sum, jnp.square(rest), axes) - jnp.square(moment) / squares, least)
        better = (error < least_error) & ((in_scan >= 0) | ended)
        best = jnp.where(better, step + unit * moment / squares, best)
        return divisor, first, ratio, jnp.where(better, error, least_error), best

    ratio = (last / first) ** (1 / (points - 1))
    start = (unit, first, ratio, jnp.full_like(high, dtypes.largest(high.dtype)), finest)
    best = jax.lax.fori_loop(0, part + points + _ROUNDS * _POINTS, trial, start)[-1]
    return jnp.where(high > 0, best, jnp.zeros_like(best))


def _scan(rms: jax.Array, high: jax.Array, bits: Any, entries: int) -> tuple[jax.Array, jax.Array, Any]:
    """The outermost levels from which to which a least-squares fit scans, and how many trials that takes.

    The error changes by fits and starts with the step where entries are few and codes are many. The fewer the entries,
    the wider a step may be by chance better than its neighbours, and the denser the trials must be.
    """
    xp: Any = jnp if arguments.traced(bits) else np
    top, root = grids.top(bits), math.sqrt(entries)
    # The largest entry, clipped to an outermost level below this, has an error of its own above that of `steps.absmax`.
    lowest = xp.maximum(1 - root / (2 * top), 0.1)
    widest = min(2.0, 1 + 4 / root)  # twice the largest entry: half of such a step has all of its levels
    dense = xp.where(bits <= 8, 5 * (top + 2) * xp.minimum(1, 16 / root) * xp.log(widest / lowest), 0)
    points = xp.maximum(xp.ceil(dense), _POINTS)
    points = points.astype(jnp.int32) if xp is jnp else int(points)
    first = jnp.minimum(jnp.maximum(0.5 * rms, high * jnp.float32(lowest)), high)
    first = jnp.where(high > 0, first, jnp.ones_like(first))
    return first, jnp.where(high > 0, widest * high, jnp.ones_like(high)), points


def on_grid(x: jax.Array, step: jax.Array, bits: Any, axes: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A step close to a given one whose levels are the entries themselves, rounded to a dtype, and whether it is found.

    An entry of code k allows the steps from (entry - d) / k to (entry + d) / k, d being half of its last place. What
    all entries allow is a few floats in f32, of which the middle ones are tried, and an interval in narrower dtypes.
    """
    info, size, top = jnp.finfo(dtype), jnp.abs(x), grids.top(bits)
    bits_of = jax.lax.bitcast_convert_type(size, jnp.uint32)
    place = jax.lax.bitcast_convert_type(bits_of & 0x7F800000, jnp.float32) * float(info.eps)
    half = jnp.maximum(place, float(info.smallest_subnormal)) / 2
    half_below = jnp.where(bits_of & 0x7FFFFF == 0, half / 2, half)  # powers of two have closer neighbours below

    def allowed(step: jax.Array, most: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The codes, and the smallest and largest step that all entries up to `most` allow."""
        code = jnp.minimum(jnp.round(size / step), top)
        none = jnp.full_like(size, dtypes.largest(size.dtype) / 4)  # no bound; finite, as are its differences
        counted = (code > 0) & (size <= most)
        quotient, below, above = (v / jnp.maximum(code, 1) for v in (size, half_below, half))
        low = over(jnp.max, jnp.where(counted, quotient - below, -none), axes)
        return code, low, over(jnp.min, jnp.where(counted, quotient + above, none), axes)

    step, largest = jnp.where(step > 0, step, jnp.ones_like(step)), over(jnp.max, size, axes)
    if info.bits < 32:  # the codes of large entries may be off by one, and are not when the small ones have been read
        _, low, high = allowed(step, largest / 2)
        step = jnp.where((low > 0) & (low <= high), low + (high - low) / 2, step)
    code, low, high = allowed(step, largest)
    middle = jnp.where(low > 0, low + (high - low) / 2, jnp.ones_like(low))  # beside 0 there are bits of NaNs
    middle = jax.lax.bitcast_convert_type(middle, jnp.uint32)
    exact, found = step, jnp.zeros(step.shape, bool)
    for off in (-1, 1, 0):  # the last one found is taken
        near = jax.lax.bitcast_convert_type(middle + jnp.uint32(off % 2**32), jnp.float32)
        fits = over(jnp.all, dtypes.narrowed(code * near, dtype) == size, axes) & (low > 0)
        exact, found = jnp.where(fits, near, exact), found | fits
    return exact, found


def power_of_two(step: jax.Array) -> jax.Array:
    """The power of two nearest to a step on the logarithmic scale, exact; 0 and what is not finite pass."""
    mantissa, exponent = jnp.frexp(step)  # step = mantissa * 2^exponent, mantissa in [.5, 1)
    up = (mantissa >= math.sqrt(0.5)).astype(exponent.dtype)
    raised = jnp.ldexp(jnp.ones_like(step), exponent - 1 + up)
    return jnp.where((step > 0) & jnp.isfinite(step), raised, step)


def common_power(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest power of two of which all entries are multiples; 0 where all are zero."""
    size = jnp.abs(x)
    bits = jax.lax.bitcast_convert_type(size, jnp.uint32)
    rest = jax.lax.bitcast_convert_type(bits & (bits - 1), jnp.float32)  # without the lowest of its ones
    lowest = jnp.where(bits & 0x7FFFFF == 0, size, size - rest)
    common = over(jnp.min, jnp.where(size > 0, lowest, jnp.full_like(size, jnp.inf)), axes)
    return jnp.where(jnp.isfinite(common), common, jnp.zeros_like(common))


def given(step: Any, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """One number for every step group."""
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    return jnp.full(() if len(axes) == x.ndim else shape, jnp.asarray(step, jnp.float32))


def check_percent(value: Any, name: str) -> None:
    """Check a percentage in (0, 100]."""
    arguments.static(value, name)
    ok = arguments.is_number(value) and 0 < value <= 100
    arguments.require(ok, name, "lie in (0, 100]", value, "Try 99.9.")
