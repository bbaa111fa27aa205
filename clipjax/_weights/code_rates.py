"""Codes and what they cost in the file: the thresholds of `roundings.rate`, from how often each code occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, elementwise, stacks, trees
from clipjax._maths import code_costs, grids, line_classes, split_axes
from clipjax._weights import leaf_grid, quantize_state
from clipjax._weights.leaf_grid import LeafGrid, Measured, Plan
from clipjax._weights.quantize_state import LeafLevels, QuantizeState, RateState
from clipjax.typing import Rounding, Tree

_LOWEST, _HIGHEST, _HALVINGS = -12, 8, 11  # log2 of λ, found to a hundredth of an octave
_FILE, _LEAF, _STEP, _FLUSH = 80, 12, 4, 5  # bytes around leaves, around codes, of a step, and at the end of a code


class _Coded(NamedTuple):
    """The codes of one leaf, counted.

    Attributes:
      counts: f32[codes], how many weights have each.
      error: f32, the mean squared error of a weight.
      bytes: f32, of the codes in a file.
    """

    counts: jax.Array
    error: jax.Array
    bytes: jax.Array


def begin(plans: dict[str, Plan]) -> RateState:
    """The state before the first refresh: codes cost nothing."""

    def zeros() -> Tree:
        return trees.by_path({path: jnp.zeros((), jnp.float32) for path in plans})

    thresholds = trees.by_path(
        {path: jnp.zeros(2 * grids.top(plan.widest), jnp.float32) for path, plan in plans.items()}
    )
    return RateState(thresholds, zeros(), zeros(), *(jnp.zeros((), jnp.float32) for _ in range(3)))


def with_rest(state: QuantizeState, params: Tree) -> QuantizeState:
    """The state with the bytes of all but codes and steps; nothing changes with other roundings."""
    if not isinstance(state.rate, RateState):
        return state
    on_grid = set(quantize_state.paths(state))
    leaves = trees.governed(params)
    others = [leaf for path, leaf in leaves if path not in on_grid]
    rest = _FILE + _LEAF * len(leaves) + sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in others)
    return state._replace(rate=state.rate._replace(rest=jnp.asarray(rest, jnp.float32)))


def rated(
    rounding: Rounding,
    plans: dict[str, Plan],
    measured: Sequence[Measured],
    fitted: Sequence[LeafLevels],
    bits: dict[str, jax.Array],
    before: QuantizeState,
    since: jax.Array,
) -> RateState:
    """The thresholds of all leaves for what the codes cost that their weights have now.

    Args:
      rounding: of `roundings.rate`.
      plans: of the leaves.
      measured: their weights.
      fitted: their levels, just fitted.
      bits: their widths, just chosen.
      before: the state of the last refresh, whose thresholds say which codes there are.
      since: updates since `start`.
    """
    state = before.rate
    assert isinstance(state, RateState)
    names, static = list(plans), list(plans.values())
    old: list[jax.Array] = [trees.look_up(state.thresholds, path) for path in names]
    of_leaves = [
        LeafGrid(*levels, bits[path], jnp.ones((), bool), t) for path, levels, t in zip(names, fitted, old, strict=True)
    ]
    usable = stacks.mapped(leaf_grid.usable, names, static, of_leaves)
    free, begun = stacks.mapped(_nearest, names, static, usable), quantize_state.fitted(before)
    known = [elementwise.where(begun, *pair) for pair in zip(old, free, strict=True)]
    of_leaves = [grid._replace(thresholds=t) for grid, t in zip(of_leaves, known, strict=True)]
    counts = [coded.counts for coded in stacks.mapped(_coded, names, static, measured, of_leaves)]
    prices = stacks.mapped(code_costs.bits, names, counts, usable)

    def at(lam: jax.Array) -> tuple[list[jax.Array], list[_Coded]]:
        """Thresholds and codes for one λ."""
        every = [leaf_grid.whole_codes(plan) for plan in static]
        found = stacks.mapped(code_costs.thresholds, names, every, prices, usable, [lam] * len(names))
        new = [grid._replace(thresholds=t) for grid, t in zip(of_leaves, found, strict=True)]
        return found, stacks.mapped(_coded, names, static, measured, new)

    def size(coded: list[_Coded]) -> jax.Array:
        steps = sum(levels[0].size for levels in fitted) * _STEP
        return sum((c.bytes for c in coded), jnp.zeros((), jnp.float32)) + steps + state.rest

    lam = _lam(rounding, lambda lam: size(at(lam)[1]), since)
    thresholds, coded = at(lam)
    numbers = [max(x.values.size, 1) for x in measured]
    by_leaf = [code_costs.information(c.counts) / n for c, n in zip(coded, numbers, strict=True)]
    named = lambda values: trees.by_path(dict(zip(names, values, strict=True)))  # noqa: E731
    return RateState(named(thresholds), named(by_leaf), named([c.error for c in coded]), lam, size(coded), state.rest)


def _lam(rounding: Rounding, size: Callable[[jax.Array], jax.Array], since: jax.Array) -> jax.Array:
    """λ as given, or the least one whose codes fit into the budget, 0 where they do without."""
    value = rounding.rate if rounding.budget is None else rounding.budget
    given = arguments.schedule(value)(since)
    given = jnp.maximum(jnp.asarray(given, jnp.float32), 0)
    if rounding.budget is None:
        return given

    def halve(i: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        fits = size(jnp.exp2(middle)) <= given
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    ends = (jnp.asarray(_LOWEST, jnp.float32), jnp.asarray(_HIGHEST, jnp.float32))
    found = jax.lax.fori_loop(0, _HALVINGS, halve, ends)[1]
    return jnp.where(size(jnp.zeros((), jnp.float32)) <= given, jnp.zeros((), jnp.float32), jnp.exp2(found))


def _nearest(plan: Plan, usable: jax.Array) -> jax.Array:
    """Thresholds before the first refresh, when no code has a cost."""
    return code_costs.nearest(leaf_grid.whole_codes(plan), usable)


def _coded(plan: Plan, measured: Measured, grid: LeafGrid) -> _Coded:
    """The codes of a leaf under given thresholds."""
    grid = leaf_grid.in_view(plan, grid)
    codes = leaf_grid.codes(plan, measured.values, grid)
    error = jnp.mean(jnp.square(codes * grid.step - measured.values)) if codes.size else jnp.zeros((), jnp.float32)
    counts = code_costs.histogram(codes, float(-grids.top(plan.widest)), 2 * grids.top(plan.widest) + 1)
    return _Coded(counts, error, _bytes(plan, codes, counts))


def _bytes(plan: Plan, codes: jax.Array, counts: jax.Array) -> jax.Array:
    """What a file takes for the codes: packed, by how often each occurs, or with rows and columns of unlike density."""
    there = counts > 0
    levels = counts.size - jnp.argmax(there) - jnp.argmax(there[::-1])  # from the first code that occurs to the last
    packed = codes.size * jnp.ceil(jnp.log2(jnp.maximum(levels, 1).astype(jnp.float32))) / 8
    coded = code_costs.information(counts) / 8 + levels + _FLUSH
    found = jnp.where(levels > 1, jnp.minimum(packed, coded), 0)
    alive, at = (codes != 0).astype(jnp.float32), plan.groups.at
    if at is not None:  # the array of which this is a view
        alive = split_axes.join(alive, at, codes.shape[at] * codes.shape[at + 1])
    if alive.ndim < 2 or alive.shape[-1] < 2 or alive.size < 2 * alive.shape[-1]:
        return found
    zero = jnp.arange(counts.size) == counts.size // 2
    values = code_costs.information(jnp.where(zero, 0, counts)) / 8 + levels + _FLUSH
    rows = split_axes.flattened(alive, tuple(range(alive.ndim - 1)))[0]
    return jnp.minimum(found, values + line_classes.size(rows))
