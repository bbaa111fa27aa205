"""The squared error of an array, and its step, on the grid of every allowed width."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._maths import grids, intervals, levels
from clipjax.typing import Levels, Number, Step


class Spectrum(NamedTuple):
    """One array on the grids of several widths.

    Attributes:
      energy: f32, the sum of squares of the array.
      noise: f32[widths], the squared error on the grid of each width.
      levels: the grid of each width, stacked.
    """

    energy: jax.Array
    noise: jax.Array
    levels: Levels


def spectrum(
    x: jax.Array,
    rule: Step,
    axes: tuple[int, ...],
    allowed: tuple[int, ...],
    max_level: tuple[Number, Number] = levels.UNLIMITED,
    sensitivity: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Spectrum:
    """The spectrum of an array whose zeros are no weights, by one loop over all widths above 1.

    Args:
      x: f32.
      rule: which step, and which levels.
      axes: those that share a step.
      allowed: the widths, rising.
      max_level: the largest magnitude of a level below zero and above.
      sensitivity: how much the squared error of each entry counts; all alike by default.
      dtype: to which levels are rounded.
    """

    def on_grid_of(bits: int | jax.Array, binary: bool | None = None) -> tuple[jax.Array, Levels]:
        found = levels.of(rule, x, bits, axes, max_level, dtype)
        code = intervals.limit(grids.codes(x, found.step, binary), found.low, found.high)
        nearest = jnp.where(x == 0, x, code * found.step)
        return weighted(jnp.square(nearest - x), sensitivity), found

    # One bit has a step in closed form and no zero, so it is a program of its own.
    found = [jax.tree.map(lambda v: v[None], on_grid_of(1, binary=True))] if allowed[0] == 1 else []
    wider = jnp.asarray([b for b in allowed if b > 1], jnp.int32)
    found += [jax.lax.map(on_grid_of, wider)] if wider.size else []
    noise, grid = jax.tree.map(lambda *columns: jnp.concatenate(columns), *found)
    return Spectrum(weighted(jnp.square(x), sensitivity), noise, grid)


def weighted(squares: jax.Array, sensitivity: jax.Array | None) -> jax.Array:
    """The sum of squared errors, each counted as much as its entry's sensitivity says."""
    return jnp.sum(squares if sensitivity is None else squares * sensitivity.astype(squares.dtype))


def entry(spectrum: Spectrum, index: jax.Array) -> Levels:
    """The grid of the width at an index."""
    return jax.tree.map(lambda v: jax.lax.dynamic_index_in_dim(v, index, keepdims=False), spectrum.levels)


def width(allowed: tuple[int, ...], index: jax.Array) -> jax.Array:
    """The width at an index, i32."""
    return sum((jnp.where(index == i, b, 0) for i, b in enumerate(allowed)), jnp.zeros((), jnp.int32))
