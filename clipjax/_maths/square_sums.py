"""Sums of squares to the last place: squares as whole numbers, whose sum is exact in any order and on any devices."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._arrays import dtypes, elementwise
from clipjax._maths import norms, split_axes
from clipjax.typing import Number

_GROUP = 2**12  # terms that are summed at once
_WORD = {"float32": 30, "float64": 62}  # bits of a sum in i32 and i64: less a sign and one to spare
_WHOLE = {"float32": jnp.int32, "float64": jnp.int64}


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def squares(x: jax.Array, axes: tuple[int, ...], group: int = _GROUP) -> jax.Array:
    """The sums of x² over some axes, which stay with size 1; `error` bounds what they are off by.

    Args:
      x: f32 or f64; along the axes all magnitudes are below 1, and the largest is at least 1/2.
      axes: not negative.
      group: a power of two, the number of terms that are summed at once.
    """
    total, room = jnp.square(x), 0  # 0 <= total < 2^room
    low = sum(_bits(x.shape[axis]) for axis in axes)
    for together in _levels(x.shape, axes, group):
        first, size = together[0], math.prod(total.shape[axis] for axis in together)
        if size > group:  # one long axis, cut into groups
            total = split_axes.split(total, first, group)
            together, size = (first + 1,), group
            total = jnp.squeeze(_summed(total, together, size, room, low), first + 1)
        else:
            total = _summed(total, together, size, room, low)
        room += _bits(size)
    return total


@squares.defjvp
def _slope(
    axes: tuple[int, ...], group: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return squares(x, axes, group), jnp.sum(2 * x * dx, axis=axes, keepdims=True)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def norm(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The finite entries over twice a power of two, so that the largest is at least 1/2, that power, and their norm."""
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(finite), axis=axes, keepdims=True, initial=0))
    power = _power_of_two(largest)
    unit, part = norms.divisor(power)
    scaled = finite * part / unit * 0.5
    root = elementwise.root(squares(scaled, axes))
    return scaled, power, jnp.where(root > 0, root, jnp.ones_like(root))


def _power_of_two(largest: jax.Array) -> jax.Array:
    """The power of two that is not above a number; 0 for 0."""
    kind = jnp.dtype(f"int{8 * largest.dtype.itemsize}")
    exponent = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, largest.dtype), kind)  # its bits, all set
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(largest, kind) & exponent, largest.dtype)
    return jnp.where(largest > 0, jnp.maximum(power, jnp.finfo(largest.dtype).tiny), power)


def shortened(x: jax.Array, dtype: DTypeLike, axes: tuple[int, ...], bound: Number) -> jax.Array:
    """The array, or what is parallel to it, whose norm in a dtype is at most the bound; only norms beyond it change."""
    shown = dtypes.narrowed(x, dtype)  # what the params would be
    scaled, power, root = norm(jnp.where(jnp.isfinite(shown), shown, x), axes)
    # In units of u, half an ulp of 1, the norm is off by e at most: half the error of the sum, and the root. So it
    # is surely within C where it is found to be at most C (1 - margin), one rounding more. What is scaled is off by
    # e and four roundings, and must be found to be so by the next update, which may be off by e the other way.
    unit = float(jnp.finfo(x.dtype).eps) / 2
    e = error(x.shape, axes) / 2 + 1
    margin = math.ceil(e + 1)
    short = math.ceil(margin + 2 * e + 4)
    limit = jnp.asarray(bound, x.dtype)
    limit = jnp.where(limit < 0, jnp.zeros_like(limit), limit)
    beyond = 2 * root * power > limit * (1 - margin * unit)
    # a factor that is not used has a derivative all the same
    reached = jnp.where(beyond, limit, jnp.ones_like(root))
    within = dtypes.truncated(scaled * (reached * (1 - short * unit) / root), dtype)
    return jnp.where(beyond & jnp.isfinite(x), within, x)


def error(shape: tuple[int, ...], axes: tuple[int, ...], group: int = _GROUP) -> float:
    """The largest relative error of `squares`, in units u of half an ulp of 1.

    The square is off by u, and so is a sum that is far above 1 in its largest digit: with what is cut off, and the
    digits below, 1.25 u. Sums of groups may be small, (top + (d + rest)), and are then off by 1.75 u: u of the whole,
    and u of the parenthesis, at most half of it, which again is off by u of its own small part.
    """
    return 2.25 * len(_levels(shape, axes, group))


def _bits(size: int) -> int:
    """The exponent of the smallest power of two that is not below a size."""
    return max(size - 1, 0).bit_length()


def _levels(shape: tuple[int, ...], axes: tuple[int, ...], group: int) -> list[tuple[int, ...]]:
    """The axes that are summed one behind the other: as many together as a group holds, a long one again and again."""
    found: list[tuple[int, ...]] = []
    size = group
    for axis in axes:
        length = shape[axis]
        if size * length <= group and found:
            found[-1] += (axis,)
        else:
            size = 1
            while length > group:
                found.append((axis,))
                length = -(-length // group)
            found.append((axis,))
        size *= length
    return found


def _summed(v: jax.Array, axes: tuple[int, ...], size: int, room: int, low: int) -> jax.Array:
    """The sum of `size` numbers in [0, 2^room), of which digits below 2^-(low + 30) of 1 (f64: 59) are cut off."""
    name, precision = v.dtype.name, jnp.finfo(v.dtype).nmant + 1
    word, whole = _WORD[name], _WHOLE[name]
    digit = min(word - _bits(size), precision)
    count = -(-(precision + 6 + low + room) // digit)
    # v 2^-room = sum of digits[i] 2^(-digit (i + 1)), each a whole number below 2^digit; exact, as is their sum
    rest, sums = v * 2.0**-room, []
    for _ in range(count):
        rest = rest * 2.0**digit
        floor = jnp.floor(rest)
        sums.append(jnp.sum(floor.astype(whole), axis=axes, keepdims=True, dtype=whole))
        rest = rest - floor
    fraction = jnp.zeros(sums[0].shape, v.dtype)
    for i in range(count - 1, 0, -1):
        carry = sums[i] >> digit
        sums[i - 1] += carry
        fraction = (fraction + (sums[i] - (carry << digit)).astype(v.dtype)) * 2.0**-digit
    # From 2^precision on a whole number may have more bits than a float: what the last ones are goes to the fraction.
    top = sums[0]
    tail = jnp.where(top < 2**precision, jnp.zeros_like(top), top & (2 ** (word - precision + 1) - 1))
    return ((top - tail).astype(v.dtype) + (tail.astype(v.dtype) + fraction)) * 2.0 ** (room - digit)
