"""The last norms in a ring buffer of fixed shape, and the same in ascending order, without a sort or a gather."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Window(NamedTuple):
    """The last norms.

    Attributes:
      seen: i32, how many there were; past a full window it goes round.
      norms: f32[window], a ring; infinite where not filled yet.
    """

    seen: jax.Array
    norms: jax.Array


class Sorted(NamedTuple):
    """A window, and the same norms in ascending order: one that goes and one that comes cost no sort.

    Attributes:
      window: the norms by age.
      ordered: f32[window], the norms by size.
    """

    window: Window
    ordered: jax.Array


def empty(size: int) -> Window:
    """A window before the first norm."""
    return Window(jnp.zeros((), jnp.int32), jnp.full((size,), jnp.inf))


def push(state: Window, norm: jax.Array) -> Window:
    """The window with its oldest norm replaced."""
    size = state.norms.size
    here = jnp.arange(size) == state.seen % size
    seen = jnp.where(state.seen >= 2 * size - 1, state.seen - size + 1, state.seen + 1)  # never overflows
    return Window(seen, jnp.where(here, norm, state.norms))


def insert(state: Sorted, norm: jax.Array) -> Sorted:
    """The same with the order kept: the oldest norm leaves its place, the others close up around the new one."""
    window, ordered = state
    index, last = jnp.arange(ordered.size), ordered.size - 1
    oldest = at(window.norms, window.seen % ordered.size)
    rest = jnp.where(index < jnp.sum(ordered < oldest), ordered, jnp.roll(ordered, -1))  # its last entry is void
    rank = jnp.sum((rest < norm) & (index < last))
    ordered = jnp.where(index < rank, rest, jnp.where(index == rank, norm, jnp.roll(rest, 1)))
    return Sorted(push(window, norm), ordered)


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    """One of the values, selected by position: a sum, which no vmap turns into a gather."""
    return jnp.sum(jnp.where(jnp.arange(values.size) == index, values, 0.0))
