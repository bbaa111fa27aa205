"""Plain maths of a grid: rounding to codes, the codes a width allows, and steps whose multiples are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes, elementwise

ROUNDINGS = ("nearest", "half_away", "stochastic")


def top(bits: Any) -> Any:
    """The largest code of a symmetric grid: 2^(bits-1) - 1, and 1 for bits = 1, where the codes are -1 and 1."""
    if not arguments.traced(bits):
        return max(1, 2 ** (int(bits) - 1) - 1)
    return jnp.maximum(jnp.left_shift(1, bits - 1) - 1, 1).astype(jnp.float32)


def code_dtype(bits: int | None) -> Any:
    """The narrowest integer that holds the codes."""
    return jnp.int32 if bits is None else jnp.int8 if bits <= 8 else jnp.int16


@elementwise.leafwise
def ratio(x: jax.Array, step: Any) -> jax.Array:
    """The quotient x / s as the device divides: correctly rounded on a CPU, up to two ulps off on a GPU.

    A select keeps the divisor elementwise: XLA rewrites a division by a broadcast scalar as a product with its
    reciprocal, which rounds near-ties differently.
    """
    return x / elementwise.where(x == x, jnp.asarray(step, x.dtype), jnp.ones_like(x))


def codes(
    x: jax.Array,
    step: jax.Array,
    binary: bool | jax.Array | None = None,
    *,
    rounding: str = "nearest",
    key: jax.Array | None = None,
) -> jax.Array:
    """Unlimited integer codes round(x / s), as floats; sign(x) with sign(0) = + where the grid is `binary`.

    `binary` is None where it is not, True where it is, and a traced bool where the width follows from the weights.
    """
    if binary is None:
        return rounded(ratio(x, step), rounding, key)
    sign = elementwise.where(x < 0, jnp.ones_like(x) * -1, jnp.ones_like(x))
    return sign if binary is True else jnp.where(binary, sign, rounded(ratio(x, step), rounding, key))


def rounded(ratio: jax.Array, rounding: str, key: Any) -> jax.Array:
    """Whole numbers near the given ones."""
    if rounding == "half_away":
        return jax.lax.round(ratio, jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    if rounding == "stochastic":
        return jnp.floor(ratio + jax.random.uniform(key, ratio.shape, ratio.dtype))
    return jax.lax.round(ratio, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


def short(step: jax.Array, bits: Any) -> jax.Array:
    """Keep 24 - bits significant bits, toward zero: codes * s and their differences are then exact in f32."""
    raw, drop = jax.lax.bitcast_convert_type(step.astype(jnp.float32), jnp.uint32), jnp.asarray(bits, jnp.uint32)
    return jax.lax.bitcast_convert_type((raw >> drop) << drop, jnp.float32)


def best_short(step: jax.Array, bits: Any, covered: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The short step beside `step` that covers the most, the smallest of equals.

    From 12 bits on the next short step below may be so much smaller that its codes end several levels before the
    largest weight; the next one above then covers more with fewer codes. Where the step came from a quotient that was
    rounded up, the one below covers more than the nearest. As a step that covers the most of some weights covers the
    most of their levels too, weights on a grid get this grid again.
    """
    near, unit = short(step, bits), jnp.uint32(1) << jnp.asarray(bits, jnp.uint32)
    usable = (near > 0) & jnp.isfinite(near)  # else there is nothing to cover: 1 makes no NaN on the way
    trial = jnp.where(usable, near, jnp.ones_like(near))
    raw = jax.lax.bitcast_convert_type(trial, jnp.uint32)
    below, above = (jax.lax.bitcast_convert_type(other, jnp.float32) for other in (raw - unit, raw + unit))
    best = jnp.where(covered(trial) > covered(below), trial, below)
    best = jnp.where(covered(above) > covered(best), above, best)
    return jnp.where(usable, best, near)


def share(below: jax.Array, above: jax.Array, parts: Any) -> jax.Array:
    """The largest s for which i * s and (parts - i) * s do not exceed `below` and `above`, for the best whole i."""
    half, parts = jnp.maximum(below / 2 + above / 2, jnp.finfo(below.dtype).tiny), jnp.asarray(parts, below.dtype)
    first, best = jnp.floor(parts * (below / 2 / half)), jnp.zeros_like(below)
    for i in (first - 1, first, first + 1, first + 2):  # the quotient may be one off
        i = jnp.clip(i, 0, parts)
        shares = (jnp.where(n > 0, side / jnp.maximum(n, 1), jnp.inf) for n, side in ((i, below), (parts - i, above)))
        best = jnp.maximum(best, jnp.minimum(*shares))
    return best


def reach(end: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The largest f32 that a dtype rounds to at most `end`, a magnitude in f32 that it can hold."""
    if jnp.dtype(dtype).itemsize >= 4:
        return end
    inner = (end > 0) & (end < dtypes.largest(dtype))
    start = jnp.where(inner, end, jnp.zeros_like(end)).astype(dtype)  # what follows the largest is infinite
    above = jnp.nextafter(start, jnp.asarray(dtypes.largest(dtype), dtype)).astype(jnp.float32)
    middle = end + (above - end) / 2
    tie = jnp.where(dtypes.narrowed(middle, dtype) > end, jnp.nextafter(middle, end), middle)  # half to even
    return jnp.where(inner, tie, end)


@elementwise.leafwise
def multiples(limit: jax.Array, step: jax.Array) -> jax.Array:
    """The largest whole k with k * s <= limit, exact where k * s is; 0 for limit < 0, never infinite."""
    k = jnp.floor(limit / step)  # may be one off: XLA may take it as a product, hardware may round it
    k = jnp.where((k + 1) * step <= limit, k + 1, k)
    return jnp.clip(jnp.where(k * step > limit, k - 1, k), 0, dtypes.largest(k.dtype))


def ends(step: jax.Array, bits: Any, below: jax.Array, above: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many levels lie on both sides of zero in [-below, above], cut at both ends to what the width has.

    Never beyond zero: a side that has none gives none.
    """
    low, high = multiples(below, step), multiples(above, step)
    surplus = jnp.maximum(low + high - 2 * jnp.asarray(top(bits), low.dtype), 0)
    cut = jnp.minimum(jnp.maximum(jnp.floor(surplus / 2), surplus - high), low)
    return low - cut, high - (surplus - cut)


def check_rounding(rounding: str, key: Any) -> None:
    """Check a rounding and the key that one of them needs."""
    arguments.choice(rounding, "rounding", ROUNDINGS)
    if rounding == "stochastic":
        remedy = "Pass `key=jax.random.key(0)`."
        arguments.require(key is not None, "key", "be given for stochastic rounding", key, remedy)
