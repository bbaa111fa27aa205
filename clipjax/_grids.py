"""Plain maths of a grid: rounding to codes, the codes a width allows, and steps whose multiples are exact."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import _arguments as arguments
from clipjax import _blocks as blocks
from clipjax import _trees as trees

ROUNDINGS = ("nearest", "half_away", "stochastic")


def clamp(x: jax.Array, bound: Any) -> jax.Array:
    """Limit every entry to [-T, T], or to [lo, hi].

    D3's weight clipping: w -> T sign(w) if |w| > T, else w. The bound is rounded into the interval where the
    dtype of `x` cannot hold it.

    Args:
      x: float array of any shape.
      bound: T >= 0, or a pair (lo, hi); scalars or arrays that broadcast to `x`.

    Returns:
      An array like `x`; NaN stays NaN.

    Raises:
      ValueError: for a negative or NaN bound, lo > hi, or an interval without a value of the dtype of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> clamp(jnp.array([-3.0, 0.5, 3.0]), 1.0).tolist()
      [-1.0, 0.5, 1.0]

    References:
      D3, section 3, step 4.
    """
    x = jnp.asarray(x)
    low, high = inside(bound, x.dtype)
    return limit(x, low, high)


@trees.leafwise
def limit(x: jax.Array, low: Any, high: Any) -> jax.Array:
    """The entries limited to [low, high], NaN as it is; two selects, where min and max would each test for NaN."""
    low, high = (jnp.asarray(end, x.dtype) for end in (low, high))
    x = trees.where(x > high, high, x)
    return trees.where(x < low, low, x)


def interval(bound: Any) -> tuple[Any, Any]:
    """The interval that a bound means: (-T, T) for a number T, a pair as it is, checked where known."""
    if isinstance(bound, tuple | list):
        arguments.require(len(bound) == 2, "bound", "be a number or a pair (lo, hi)", bound, "Give T or (lo, hi).")
        low, high = bound
        for end in (low, high):
            if arguments.known(end):
                ok = not np.any(np.isnan(np.asarray(end, np.float64)))
                arguments.require(ok, "bound", "not hold NaN", bound, "Give numbers, lo <= hi.")
        if arguments.known(low) and arguments.known(high):
            ordered = np.all(np.asarray(low, np.float64) <= np.asarray(high, np.float64))
            arguments.require(ordered, "bound", "have lo <= hi", bound, "Swap the two ends.")
        return low, high
    arguments.non_negative(bound, "bound", "|w| <= bound needs a bound of at least 0.")
    return -bound if not isinstance(bound, jax.Array | np.ndarray) else -jnp.asarray(bound), bound


def inside(bound: Any, dtype: Any) -> tuple[Any, Any]:
    """The ends of the interval, rounded inwards where they fall between two values of `dtype`."""
    low, high = interval(bound)
    ends = toward(low, dtype, up=True), toward(high, dtype, up=False)
    if arguments.known(low) and arguments.known(high):
        remedy = f"No value of {jnp.dtype(dtype).name} lies inside; widen the interval."
        arguments.require(np.all(ends[0] <= ends[1]), "bound", "hold a value of the leaf's dtype", bound, remedy)
    return ends


def toward(end: Any, dtype: Any, *, up: bool) -> Any:
    """`end`, read as f32 (f64 for f64 leaves), rounded up or down to a value that `dtype` holds."""
    xp: Any = np if arguments.known(end) else jnp
    wide = trees.wide(dtype)
    exact = xp.asarray(end).astype(wide)
    if wide == dtype:
        return exact
    near = exact.astype(dtype).astype(wide) if xp is np else trees.narrowed(exact, dtype)
    off = near < exact if up else near > exact
    other = xp.nextafter(near.astype(dtype), xp.asarray(np.inf if up else -np.inf).astype(dtype))
    return xp.where(off, other.astype(wide), near)


def top(bits: Any) -> Any:
    """The largest code of a symmetric grid: 2^(bits-1) - 1, and 1 for bits = 1, where the codes are -1 and 1."""
    if isinstance(bits, int | np.integer):
        return max(1, 2 ** (int(bits) - 1) - 1)
    return jnp.maximum(jnp.left_shift(1, bits - 1) - 1, 1).astype(jnp.float32)


def code_dtype(bits: int | None) -> Any:
    """The narrowest integer that holds the codes."""
    return jnp.int32 if bits is None else jnp.int8 if bits <= 8 else jnp.int16


@trees.leafwise
def ratio(x: jax.Array, step: Any) -> jax.Array:
    """The quotient x / s as the device divides: correctly rounded on a CPU, up to two ulps off on a GPU.

    A select keeps the divisor elementwise: XLA rewrites a division by a broadcast scalar as a product with its
    reciprocal, which rounds near-ties differently.
    """
    return x / trees.where(x == x, jnp.asarray(step, x.dtype), jnp.ones_like(x))


def codes(x: jax.Array, step: Any, bits: Any, *, rounding: str = "nearest", key: Any = None) -> jax.Array:
    """Unlimited integer codes round(x / s), as floats; sign(x) with sign(0) = + for bits = 1, which may be traced."""
    if bits is None or (arguments.known(bits) and bits > 1):
        return rounded(ratio(x, step), rounding, key)
    sign = jnp.where(x < 0, jnp.ones_like(x) * -1, jnp.ones_like(x))
    return sign if arguments.known(bits) else jnp.where(bits == 1, sign, rounded(ratio(x, step), rounding, key))


def rounded(ratio: jax.Array, rounding: str, key: Any) -> jax.Array:
    """Whole numbers near the given ones."""
    if rounding == "half_away":
        return jax.lax.round(ratio, jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    if rounding == "stochastic":
        return jnp.floor(ratio + jax.random.uniform(key, ratio.shape, ratio.dtype))
    return jax.lax.round(ratio, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


def short(step: jax.Array, bits: Any) -> jax.Array:
    """Keep 23 - bits significant bits, toward zero, so that codes * s and their differences are exact in f32."""
    raw = jax.lax.bitcast_convert_type(step.astype(jnp.float32), jnp.uint32)
    drop = jnp.asarray(1 + bits, jnp.uint32)
    return jax.lax.bitcast_convert_type((raw >> drop) << drop, jnp.float32)


def share(whole: jax.Array, parts: Any, bits: Any) -> jax.Array:
    """The largest short step of which so many do not exceed `whole`; the quotient itself may round to more."""
    step = short(whole / parts, bits)
    below = jax.lax.bitcast_convert_type(step, jnp.uint32) - (jnp.uint32(1) << jnp.asarray(1 + bits, jnp.uint32))
    return jnp.where(step * parts > whole, short(jax.lax.bitcast_convert_type(below, jnp.float32), bits), step)


@trees.leafwise
def multiples(limit: jax.Array, step: jax.Array) -> jax.Array:
    """The largest whole k with k * s <= limit, exact where k * s is; 0 for limit < 0."""
    k = jnp.floor(limit / step)  # may be one off: XLA may take it as a product, hardware may round it
    k = jnp.where((k + 1) * step <= limit, k + 1, k)
    return jnp.maximum(jnp.where(k * step > limit, k - 1, k), 0)


def ends(step: jax.Array, bits: Any, below: jax.Array, above: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many levels lie on both sides of zero in [-below, above], cut at both ends to what the width has.

    Never beyond zero: a side that has none gives none.
    """
    low, high = multiples(below, step), multiples(above, step)
    surplus = jnp.maximum(low + high - 2 * jnp.asarray(top(bits), low.dtype), 0)
    cut = jnp.minimum(jnp.maximum(jnp.floor(surplus / 2), surplus - high), low)
    return low - cut, high - (surplus - cut)


def shared_axes(ndim: int, axis: int | tuple[int, ...] | None, group: int | None = None) -> tuple[int, ...]:
    """The axes that share a step, all but `axis`, in the `view` of an array of this rank.

    Raises:
      ValueError: for an axis that does not exist.
    """
    if axis is None:
        axis = () if group is None else -1
    kept = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in kept:
        remedy = f"An array of rank {ndim} has axes {-ndim} to {ndim - 1}."
        arguments.require(-ndim <= a < ndim, "axis", "exist in every picked leaf", axis, remedy)
    own = {a % ndim for a in kept}
    if group is not None:
        own = {a if a <= ndim - 2 else a + 1 for a in own | {ndim - 2}}
        ndim += 1
    return tuple(i for i in range(ndim) if i not in own)


def view(x: jax.Array, group: int | None) -> jax.Array:
    """An array whose step groups lie along whole axes: axis -2 cut into groups, where there are any."""
    return x if group is None else blocks.split(x, x.ndim - 2, group)


def joined(x: jax.Array, group: int | None, like: jax.Array) -> jax.Array:
    """The array that a `view` is of, sharded as another one."""
    return x if group is None else trees.laid_as(blocks.join(x, x.ndim - 3, x.shape[-3] * group), like)


def per_block(values: jax.Array, group: int | None) -> jax.Array:
    """Values of step groups in the rank of the array itself, to broadcast block by block."""
    return values if group is None else jnp.squeeze(values, -2)


def round_to_step(x: jax.Array, step: Any, *, rounding: str = "nearest", key: Any = None) -> jax.Array:
    r"""Round every entry to a multiple of the step: :math:`Q(x) = \mathrm{round}(x/s)\,s` (D4).

    Args:
      x: float array of any shape.
      step: s > 0, a scalar or an array that broadcasts to `x`, also block by block.
      rounding: "nearest" (halves to even), "half_away" (D4's schoolbook rounding) or "stochastic".
      key: a PRNG key, for "stochastic" only.

    Returns:
      An array like `x`, unbounded; non-finite entries pass.

    Raises:
      ValueError: for a step that is not positive and finite, an unknown rounding, or a missing key.

    Example:
      >>> import jax.numpy as jnp
      >>> round_to_step(jnp.array([0.5, 1.5, -1.5]), 1.0).tolist()
      [0.0, 2.0, -2.0]
      >>> round_to_step(jnp.array([0.5, 1.5, -1.5]), 1.0, rounding="half_away").tolist()
      [1.0, 2.0, -2.0]

    References:
      D4, section 3.2.
    """
    check_step(step)
    check_rounding(rounding, key)
    x = jnp.asarray(x)
    wide = trees.widened(x)
    step = blocks.spread(jnp.asarray(step), x.shape).astype(wide.dtype)
    level = codes(wide, step, None, rounding=rounding, key=key) * step
    return jnp.where(jnp.isfinite(wide), level, wide).astype(x.dtype)


def quantize(
    x: jax.Array,
    step: Any,
    bits: int | None = None,
    *,
    zero_point: Any = 0,
    rounding: str = "nearest",
    key: Any = None,
) -> jax.Array:
    r"""The integer codes of an array on a symmetric grid, or on an affine one, where 0 has the code z.

    .. math:: c = \mathrm{clip}(\mathrm{round}(x/s) + z,\ -(2^{b-1}-1),\ 2^{b-1}-1)

    One bit has the codes -1 and 1, with sign(0) = +1. NaN has the code 0. The quotient is correctly rounded on a CPU; a
    GPU's may be off by two units in the last place, so that one as close to the middle of two codes may take either.

    Args:
      x: float array of any shape.
      step: s > 0, a scalar or an array that broadcasts to `x`, also block by block: an axis of n steps then serves n
        equal groups.
      bits: b, 1 to 16, or None for unbounded codes.
      zero_point: z, an integer or an array like `step`.
      rounding: "nearest" (halves to even), "half_away" or "stochastic".
      key: a PRNG key, for "stochastic" only.

    Returns:
      i8 up to 8 bits, i16 up to 16, i32 for None; the shape of `x`.

    Raises:
      ValueError: for bits outside 1 to 16, a step that is not positive and finite, an unknown rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> quantize(jnp.array([-9.0, -0.3, 0.0, 0.9]), 0.5, 4).tolist()
      [-7, -1, 0, 2]

    References:
      D4, section 2.2.
    """
    check_step(step)
    check_rounding(rounding, key)
    if bits is not None:
        arguments.bits(bits)
    x = trees.widened(jnp.asarray(x))
    step, zero = (blocks.spread(jnp.asarray(v), x.shape).astype(x.dtype) for v in (step, zero_point))
    whole = codes(x, step, bits, rounding=rounding, key=key)
    whole = jnp.where(jnp.isnan(x) | jnp.isnan(whole), jnp.zeros_like(x), whole) + zero
    limit = float(2**31 - 128) if bits is None else float(top(bits))
    return jnp.clip(whole, -limit, limit).astype(code_dtype(bits))


def dequantize(codes: jax.Array, step: Any, dtype: Any = jnp.float32, *, zero_point: Any = 0) -> jax.Array:
    """The values that codes stand for: (code - z) * s, computed in f32 and rounded once to `dtype`.

    Args:
      codes: integer array from `quantize`.
      step: s, a scalar or an array that broadcasts to `codes`, also block by block.
      dtype: the float dtype to return.
      zero_point: z, the code of 0 on an affine grid; an integer or an array like `step`.

    Returns:
      f[...] of the shape of `codes`.

    Example:
      >>> import jax.numpy as jnp
      >>> dequantize(quantize(jnp.array([0.9, -0.2]), 0.5, 4), 0.5).tolist()
      [1.0, 0.0]
    """
    codes = jnp.asarray(codes)
    step, zero = (blocks.spread(jnp.asarray(v), codes.shape).astype(trees.wide(dtype)) for v in (step, zero_point))
    return ((codes.astype(step.dtype) - zero) * step).astype(dtype)


def check_step(step: Any) -> None:
    """Check a known step: positive and finite."""
    check_positive(step, "step", "It is the distance of two levels.")


def check_positive(value: Any, name: str, remedy: str) -> None:
    """Check a known number: positive and finite."""
    if arguments.checkable(value):
        number = arguments.numeric(value, name, remedy)
        ok = np.all(number > 0) and arguments.finite(value)
        arguments.require(ok, name, "be positive and finite", value, remedy)


def check_rounding(rounding: str, key: Any) -> None:
    """Check a rounding and the key that one of them needs."""
    arguments.choice(rounding, "rounding", ROUNDINGS)
    if rounding == "stochastic":
        remedy = "Pass `key=jax.random.key(0)`."
        arguments.require(key is not None, "key", "be given for stochastic rounding", key, remedy)
