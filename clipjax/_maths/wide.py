"""Whole numbers of two words, for counts beyond 2**32: JAX has no u64 unless a user turns it on for everything.

`WORD` is the number of bits of a word. Tests set it to 8, so that small arrays carry from one word to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

WORD = 32


class Wide(NamedTuple):
    """The numbers high * 2**WORD + low, u32 arrays of one shape. `jax.tree.map` reshapes and slices both."""

    high: jax.Array
    low: jax.Array


Countable: TypeAlias = int | Sequence[int] | Wide


def largest() -> np.uint32:
    """The largest word."""
    return np.uint32(2**WORD - 1)


def of(value: Countable) -> Wide:
    """A known number, or an array of some."""
    if isinstance(value, Wide):
        return value
    whole = np.asarray(value, np.uint64)
    return Wide(jnp.asarray((whole >> WORD).astype(np.uint32)), jnp.asarray((whole & largest()).astype(np.uint32)))


def word(low: jax.Array) -> Wide:
    """Numbers of one word."""
    return Wide(jnp.zeros_like(low), low)


def add(a: Wide, b: Wide) -> Wide:
    """The sum a + b."""
    low = (a.low + b.low) & largest()
    return Wide(a.high + b.high + (low < a.low).astype(jnp.uint32), low)


def minus(a: Wide, b: Wide) -> Wide:
    """The difference a - b, where b is at most a."""
    return Wide(a.high - b.high - (a.low < b.low).astype(jnp.uint32), (a.low - b.low) & largest())


def less(a: Wide, b: Wide) -> jax.Array:
    """True where a < b."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def equal(a: Wide, b: Wide) -> jax.Array:
    """True where a = b."""
    return (a.high == b.high) & (a.low == b.low)


def where(condition: jax.Array, a: Wide, b: Wide) -> Wide:
    """Choose a where the condition holds, else b; shapes broadcast."""
    return Wide(jnp.where(condition, a.high, b.high), jnp.where(condition, a.low, b.low))


def minimum(a: Wide, b: Wide) -> Wide:
    """The smaller one."""
    return where(less(a, b), a, b)


def rest(a: Wide, b: Wide) -> Wide:
    """The difference a - b, 0 where b is larger."""
    return minus(a, minimum(a, b))


def least(a: Wide, axes: tuple[int, ...]) -> Wide:
    """The smallest number along some axes."""
    high = jnp.min(a.high, axis=axes, keepdims=True)
    low = jnp.min(jnp.where(a.high == high, a.low, largest()), axis=axes)
    return Wide(high.reshape(low.shape), low)


def halved(a: Wide) -> Wide:
    """The whole part of a / 2."""
    return Wide(a.high >> 1, (a.low >> 1) | ((a.high & 1) << (WORD - 1)))


def real(a: Wide) -> jax.Array:
    """The nearest f32, or a neighbour of it."""
    return a.high.astype(jnp.float32) * 2.0**WORD + a.low.astype(jnp.float32)


def first_axes(shape: Sequence[int], axes: Sequence[int]) -> int:
    """How many of some axes are left out, from the first on, to make the others less than a word counts."""
    return next(i for i in range(len(axes) + 1) if math.prod(shape[axis] for axis in axes[i:]) < 2**WORD)


def count(mask: jax.Array, axes: tuple[int, ...]) -> Wide:
    """How many entries are True along some axes, which are kept with size 1."""
    lead = first_axes(mask.shape, axes)
    counts = word(jnp.sum(mask, axis=axes[lead:], keepdims=True, dtype=jnp.uint32))
    if lead:
        shape = [1 if axis in axes else n for axis, n in enumerate(mask.shape)]
        counts = jax.tree.map(lambda x: x.reshape(shape), total(counts, axes[:lead]))
    return counts


def total(a: Wide, axes: int | tuple[int, ...]) -> Wide:
    """The sum over some axes."""
    axes = (axes,) if isinstance(axes, int) else axes
    summands = math.prod(a.low.shape[axis] for axis in axes)
    # A word is summed up in parts so short that no sum of them, with the carry of the part below, overflows: halves
    # for less than 2^16 summands.
    part = WORD // 2
    while summands << part >= 2**WORD:
        part //= 2
    low = carry = jnp.zeros((), jnp.uint32)
    for shift in range(0, WORD, part):
        parts = jnp.sum((a.low >> shift) & np.uint32(2**part - 1), axis=axes, dtype=jnp.uint32) + carry
        low, carry = low | ((parts & np.uint32(2**part - 1)) << shift), parts >> part
    return Wide(jnp.sum(a.high, axis=axes, dtype=jnp.uint32) + carry, low)


def times(a: Wide, by: np.ndarray) -> Wide:
    """The product a * by, for numbers `by` of at most half a word."""
    half = WORD // 2
    lower = (a.low & np.uint32(2**half - 1)) * by
    upper = (a.low >> half) * by + (lower >> half)
    low = (lower & np.uint32(2**half - 1)) | ((upper & np.uint32(2**half - 1)) << half)
    return Wide(a.high * by + (upper >> half), low)


def quotient(a: Wide, by: np.ndarray) -> Wide:
    """The whole part of a / by, for numbers `by` of at most half a word."""
    half = WORD // 2
    upper = ((a.high % by) << half) | (a.low >> half)
    lower = ((upper % by) << half) | (a.low & np.uint32(2**half - 1))
    return Wide(a.high // by, ((upper // by) << half) | (lower // by))


def multiple(a: Wide, by: np.ndarray) -> Wide:
    """The largest multiple of `by` that is at most a."""
    return times(quotient(a, by), by)
