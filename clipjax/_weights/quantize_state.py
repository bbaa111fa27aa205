"""The state of `fake_quantize`: grids and scales of all leaves by path, and when they were fitted."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from clipjax._arrays import trees
from clipjax.typing import Scales, Tree


class QuantizeState(NamedTuple):
    """State of `fake_quantize` inside its `ProjectState`: the grids of all leaves, in nested dicts by path.

    A leaf has a step, or the scales of a format.

    Attributes:
      step: f32 per step group, the distance of two levels; with `group` a stack of arrays that broadcast to the leaf.
      low: f32 per step group, the smallest multiple of the step that is a level; 0 for unbounded codes. With a format a
        scalar, below which there is no level.
      high: the largest one; likewise.
      bits: i32, the width; 0 for unbounded codes. With a format f32, bits a weight with its share of the scales.
      asked: i32, an even number that stands for the widths that the grids were made for, one more where a leaf on a
        format had nothing but zeros; -1 before the first refresh.
      format: u32, the id of the format.
      outputs: u32, the axes that keep scales of their own, those counted from 0 by the bits that are set.
      scales: of the format as it stores them, by path and number, an entry for each block along the axes of the leaf.
      rate: a `RateState` with `roundings.rate`, else ().
    """

    step: Tree
    low: Tree
    high: Tree
    bits: Tree
    asked: jax.Array
    format: Tree
    outputs: Tree
    scales: Tree
    rate: Tree = ()


class RateState(NamedTuple):
    """What `roundings.rate` found at the last refresh, in nested dicts by path.

    Attributes:
      thresholds: f32[levels - 1], above which weight, in steps, the code is a higher one.
      bits: f32, of a code, on average.
      error: f32, the mean squared error of a weight.
      lam: f32, λ, squared steps a bit.
      bytes: f32, of the file as estimated.
      rest: f32, the bytes of all but codes and steps: names, shapes, leaves that are not quantized.
    """

    thresholds: Tree
    bits: Tree
    error: Tree
    lam: jax.Array
    bytes: jax.Array
    rest: jax.Array


LeafLevels: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""The step of a leaf, and its smallest and largest level in steps."""


class LeafScales(NamedTuple):
    """What a leaf that is on a format has in the state.

    Attributes:
      id: of the format, u32.
      outputs: the axes that keep scales of their own, as bits.
      scales: as the format stores them.
      low: f32, below which there is no level.
      high: f32, above which there is none.
    """

    id: jax.Array
    outputs: jax.Array
    scales: Scales
    low: jax.Array
    high: jax.Array


Fitted: TypeAlias = LeafLevels | LeafScales

NEVER = -1  # the widths of a grid that was never fitted


def fitted(state: QuantizeState) -> jax.Array:
    """False before the first refresh."""
    return state.asked != NEVER


def gathered(
    found: dict[str, Fitted], bits: dict[str, jax.Array], asked: jax.Array | int, rate: RateState | tuple[()] = ()
) -> QuantizeState:
    """The state of all leaves, from what was fitted and the widths of those that have one."""
    # Without leaves each field is one array all the same, see `trees.by_path`.
    formed = {path: x for path, x in found.items() if isinstance(x, LeafScales)}
    step, low, high = ({path: x[i] for path, x in found.items() if path not in formed} for i in range(3))
    low |= {path: x.low for path, x in formed.items()}
    high |= {path: x.high for path, x in formed.items()}
    scales = {f"{path}/{i}": s for path, x in formed.items() for i, s in enumerate(x.scales)}
    ids, outputs = ({path: x[i] for path, x in formed.items()} for i in range(2))
    fields = (step, low, high, bits, ids, outputs, scales)
    step, low, high, bits, ids, outputs, scales = (trees.by_path(field) for field in fields)
    return QuantizeState(step, low, high, bits, jnp.asarray(asked, jnp.int32), ids, outputs, scales, rate)


def paths(state: QuantizeState) -> list[str]:
    """The leaves that are on a grid or a format."""
    return [path for field in (state.step, state.format) for path, _ in trees.governed(field) if path]


def leaf_scales(state: QuantizeState, path: str) -> LeafScales | None:
    """What a leaf has in the state, if it is on a format."""
    if trees.look_up(state.format, path) is None:
        return None
    scales: list[jax.Array] = []
    while (found := trees.look_up(state.scales, f"{path}/{len(scales)}")) is not None:
        scales.append(found)
    fields = (state.format, state.outputs, state.low, state.high)
    number, outputs, low, high = (trees.look_up(field, path) for field in fields)
    whole = bool(scales) and not any(x is None for x in (outputs, low, high))
    trees.check_state(whole, f"another layout of the scales of {path!r}")
    return LeafScales(number, outputs, tuple(scales), low, high)
