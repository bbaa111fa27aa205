"""The last norms in a ring buffer of fixed shape, by age and by size, kept without a sort or a gather."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipjax._arrays import elementwise
from clipjax.typing import Number


class Window(NamedTuple):
    """The last norms.

    Attributes:
      added: i32, how many norms were added, modulo the window once that is full: from `window` to 2 `window` - 1.
      norms: f32[window], the k-th norm at k mod window; 0 where not filled yet.
    """

    added: jax.Array
    norms: jax.Array


class Sorted(NamedTuple):
    """A window and its norms in ascending order.

    Attributes:
      window: the norms by age.
      ordered: f32[window], the same norms by size; places not filled yet, of any value, last.
    """

    window: Window
    ordered: jax.Array


def empty(size: int) -> Window:
    """A window before the first norm."""
    return Window(jnp.zeros((), jnp.int32), jnp.zeros((size,)))


def push(state: Window, norm: jax.Array) -> Window:
    """The window with its oldest norm replaced."""
    size = state.norms.size
    here = jnp.arange(size, dtype=jnp.int32) == state.added % size
    added = jnp.where(state.added >= 2 * size - 1, state.added - size + 1, state.added + 1)  # never overflows
    return Window(added, jnp.where(here, norm, state.norms))


def insert(state: Sorted, norm: jax.Array) -> Sorted:
    """The window with its oldest norm replaced, in both orders."""
    # Invariant: `ordered` begins with the norms of `window`, ascending. Two shifts keep it, each one pass:
    # 1. where the window is full remove the oldest norm: the entries behind its place move down by one;
    # 2. insert the new norm at its rank among the rest: the entries from there on move up by one.
    # Which of several equal norms is removed makes no difference.
    window, ordered = state
    size = ordered.size
    index = jnp.arange(size, dtype=jnp.int32)
    oldest = at(window.norms, window.added % size)
    moved = (window.added >= size) & (index >= jnp.sum(ordered < oldest, dtype=jnp.int32))
    rest = jnp.where(moved, jnp.roll(ordered, -1), ordered)  # its last place is free
    rank = jnp.sum((rest < norm) & (index < jnp.minimum(window.added, size - 1)), dtype=jnp.int32)
    ordered = jnp.where(index < rank, rest, jnp.where(index == rank, norm, jnp.roll(rest, 1)))
    return Sorted(push(window, norm), ordered)


def moments(state: Window) -> tuple[jax.Array, jax.Array]:
    """Mean and population standard deviation of a full window, of norms over the largest: no square overflows."""
    unit = state.norms.max()
    past = state.norms / jnp.where(unit > 0, unit, 1.0)
    mean = past.mean()
    return mean * unit, elementwise.root(jnp.mean(jnp.square(past - mean))) * unit


def percentile(state: Sorted, q: Number) -> jax.Array:
    """The q-th percentile of the norms, interpolated linearly between the two next to it."""
    last = jnp.minimum(state.window.added, state.ordered.size) - 1
    dtype = state.ordered.dtype
    place = last.astype(dtype) * jnp.asarray(q, dtype)  # in hundredths: exact where q is whole
    low = jnp.floor(place / 100).astype(jnp.int32)
    below, above = (at(state.ordered, i) for i in (low, jnp.minimum(low + 1, last)))
    part = (place - 100 * low.astype(dtype)) / 100
    return below + part * (above - below)


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[index] as a sum over a mask: indexing would become a gather under vmap."""
    return jnp.sum(jnp.where(jnp.arange(values.size, dtype=jnp.int32) == index, values, 0.0))
