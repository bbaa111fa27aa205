"""The grid of one leaf: the arguments of `fake_quantize` as they apply to it, its state, and the level of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes, elementwise, sharding, trees
from clipjax._maths import code_costs, grid_errors, grids, intervals, levels, split_axes, step_fitting, step_groups
from clipjax._weights import allowed_values, quantize_state
from clipjax._weights.quantize_state import LeafLevels, QuantizeState, RateState
from clipjax.typing import Leaf, Sides, Step

Soften = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class LeafGrid(NamedTuple):
    """The grid of one leaf, as in the state.

    Attributes:
      step: the distance of two levels.
      low: the smallest multiple of it that is a level.
      high: the largest one.
      bits: the width.
      fitted: bool, False before the first refresh, when the grid belongs to no weights yet.
      thresholds: in steps, between the codes of `roundings.rate`; None for other roundings.
    """

    step: jax.Array
    low: jax.Array
    high: jax.Array
    bits: jax.Array
    fitted: jax.Array
    thresholds: jax.Array | None = None

    @property
    def zero_point(self) -> jax.Array:
        """i32, the code of 0: the one nearest to 0 with which all levels have a code of the width."""
        top = jnp.asarray(grids.top(self.bits), self.low.dtype)
        return jnp.clip(0, -top - self.low, top - self.high).astype(jnp.int32)


def at(state: QuantizeState, path: str) -> LeafGrid:
    """The grid of one leaf."""
    found = [trees.look_up(field, path) for field in state[:4]]
    trees.check_state(all(x is not None for x in found), f"no grid for {path!r}")
    trees.check_state(getattr(state.asked, "shape", None) == (), f"another layout of the grid of {path!r}")
    step, low, high, bits = found
    thresholds = trees.look_up(state.rate.thresholds, path) if isinstance(state.rate, RateState) else None
    return LeafGrid(step, low, high, bits, quantize_state.fitted(state), thresholds)


class Plan(NamedTuple):
    """The arguments of `fake_quantize`, read for one leaf; all of it is static.

    Attributes:
      allowed: the widths that may occur: one where it is fixed, none for unbounded codes.
      groups: which weights share a step.
      rule: which step, and which levels.
      rounding: how a quotient becomes a whole number, by name.
      soften: the rounding that hardens with time, None for one that is hard.
      rated: True where codes are chosen by what they cost, too.
    """

    allowed: tuple[int, ...]
    groups: step_groups.StepGroups
    rule: Step
    rounding: str
    soften: Soften | None
    rated: bool = False

    @property
    def unbounded(self) -> bool:
        """True for codes without ends."""
        return not self.allowed

    @property
    def widest(self) -> int:
        """The largest width; 0 for unbounded codes."""
        return max(self.allowed, default=0)

    @property
    def fixed(self) -> bool:
        """True where the width does not follow from the weights."""
        return len(self.allowed) == 1

    def binary(self, grid: LeafGrid) -> bool | jax.Array | None:
        """True where the grid has one bit, a traced bool where it may, None where it never has."""
        return None if 1 not in self.allowed else True if self.fixed else grid.bits == 1


def check(plan: Plan, path: str, leaf: Leaf) -> None:
    """Refuse widths that a leaf cannot have."""
    narrow = jnp.dtype(leaf.dtype).itemsize < 4
    remedy = f"Leaf {path!r} is {leaf.dtype}: its codes could not be recovered. Use 8 bits, or f32 params."
    arguments.require(not (narrow and plan.widest > 8), "bits", "be at most 8 for narrow params", plan.widest, remedy)
    if plan.rated:
        remedy = f"`roundings.rate` compares each weight of {path!r} with every level: give a width from 1 to 8."
        known = 0 < plan.widest <= 8
        arguments.require(known, "bits", "be at most 8 with codes by rate", plan.widest or None, remedy)
    least, smallest = min(plan.allowed, default=plan.rule.min_bits), plan.rule.min_bits
    remedy = "An affine grid has levels on both sides of 0: use `steps.mse()`, whose one-bit step is mean|w|."
    arguments.require(least >= smallest, "bits", f"be at least {smallest} for an affine grid", least, remedy)
    if least == 1:  # a rule may refuse one bit, as an interval without levels on both sides of 0 does
        like = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        jax.eval_shape(lambda x: plan.rule.fit(step_groups.view(x, plan.groups), 1, plan.groups.axes), like)


def begin(plan: Plan, leaf: Leaf) -> LeafLevels:
    """The grid before the first refresh."""
    like = jax.eval_shape(lambda x: step_groups.view(x, plan.groups), jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
    step = step_fitting.given(1.0, like, plan.groups.axes)
    top = 0.0 if plan.unbounded else float(grids.top(plan.widest))
    low, high = (jnp.full(step.shape, end, jnp.float32) for end in (-top, top))
    return _stored(plan, step, low, high)


def other_step(plan: Plan, x: jax.Array, grid: LeafGrid) -> jax.Array | None:
    """True where a step is given as a number, and is another one than the grid has; None where it is not given."""
    if plan.rule.levels is not levels.as_given:
        return None
    number = plan.rule.fit(step_groups.view(x, plan.groups), 0, plan.groups.axes)
    number = step_groups.stored(number, plan.groups)
    return jnp.any((grid.step != number) & (number > 0))


def check_shape(plan: Plan, x: jax.Array, grid: LeafGrid) -> None:
    """Raise for steps of other step groups: of another `axis` or `group`."""
    shape = step_groups.shape(x, plan.groups)
    got = f"steps of shape {grid.step.shape} for an array of shape {x.shape}, where they should have {shape}"
    trees.check_state(grid.step.shape == shape, got)


class Measured(NamedTuple):
    """The weights of one leaf to which its step is fitted.

    Attributes:
      values: f32, in the view of step groups; zeros where a weight is not to be counted.
      max_level: f32, the largest magnitude of a level below zero, and above, once it is rounded; the largest value
        where nothing bounds it.
      dtype: of the params, to which levels are rounded.
    """

    values: jax.Array
    max_level: Sides
    dtype: DTypeLike


def max_level(known: allowed_values.Facts, dtype: DTypeLike) -> Sides:
    """How far levels may extend, as in `Measured`, with the transformations before and the dtype of the params."""
    low, high = allowed_values.bound(dtypes.wide(dtype), known)
    reached = (dtypes.truncated(jnp.maximum(end, 0), jnp.float32).astype(jnp.float32) for end in (-low, high))
    below, above = (jnp.asarray(intervals.toward(end, dtype, up=False), jnp.float32) for end in reached)
    return below, above


def measure(plan: Plan, x: jax.Array, known: allowed_values.Facts, max_level: Sides, dtype: DTypeLike) -> Measured:
    """The nonzero finite weights, limited to the largest level.

    Args:
      plan: of the leaf.
      x: the weights, latent ones where there are some.
      known: what the transformations before make of them.
      max_level: how far levels may extend.
      dtype: of the params.
    """
    x = step_groups.view(allowed_values.settled(x, known), plan.groups).astype(jnp.float32)
    if plan.unbounded:
        return Measured(x, max_level, dtype)
    finite = elementwise.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    return Measured(intervals.limit(finite, -max_level[0], max_level[1]), max_level, dtype)


def fit(plan: Plan, measured: Measured) -> LeafLevels:
    """The levels of a leaf of fixed width, or of unbounded codes."""
    axes = plan.groups.axes
    if plan.unbounded:
        step = plan.rule.fit(measured.values, 0, axes)
        return _stored(plan, step, jnp.zeros_like(step), jnp.zeros_like(step))
    found = levels.of(plan.rule, measured.values, plan.widest, axes, measured.max_level, measured.dtype)
    return _stored(plan, found.step, found.low, found.high)


def spectrum(plan: Plan, measured: Measured) -> grid_errors.Spectrum:
    """The error of the leaf on the grid of each allowed width."""
    given = (plan.rule, plan.groups.axes, plan.allowed, measured.max_level)
    return grid_errors.spectrum(measured.values, *given, dtype=measured.dtype)


def chosen(plan: Plan, spectrum: grid_errors.Spectrum, index: jax.Array) -> LeafLevels:
    """The levels of the width at an index of the allowed ones."""
    found = grid_errors.entry(spectrum, index)
    return _stored(plan, found.step, found.low, found.high)


def _stored(plan: Plan, *levels: jax.Array) -> LeafLevels:
    """The levels in the layout of the state."""
    step, low, high = (step_groups.stored(x, plan.groups) for x in levels)
    return step, low, high


def in_view(plan: Plan, grid: LeafGrid) -> LeafGrid:
    """The grid whose levels broadcast to the view of the weights."""
    step, low, high = (step_groups.in_view(x, plan.groups) for x in (grid.step, grid.low, grid.high))
    return grid._replace(step=step, low=low, high=high)


def level(plan: Plan, x: jax.Array, grid: LeafGrid, key: jax.Array | None, since: jax.Array) -> jax.Array:
    """The level of every weight: code * s, the codes limited to those of the grid."""
    w, grid = step_groups.view(x, plan.groups), in_view(plan, grid)
    code = codes(plan, w, grid, key)
    if plan.soften is not None:
        code = _softened(plan, plan.soften, w, code, grid, since)
    binary = plan.binary(grid)
    if binary is not None:  # one bit has no level 0: a pruned weight stays 0 all the same
        code = elementwise.where((w == 0) & binary, jnp.zeros_like(code), code)
    return step_groups.joined(code * grid.step.astype(w.dtype), plan.groups, x)


def codes(plan: Plan, w: jax.Array, grid: LeafGrid, key: jax.Array | None = None) -> jax.Array:
    """The codes of weights as floats, limited to those of the grid; both in the view of step groups."""
    if plan.rated:
        assert grid.thresholds is not None  # see `check_fits`
        code = code_costs.chosen(grids.ratio(w, grid.step), grid.thresholds, -grids.top(plan.widest))
        if grid.step.ndim == 0:  # thresholds know the levels of the one grid of the leaf
            return code
    else:
        code = grids.codes(w, grid.step, plan.binary(grid), rounding=plan.rounding, key=key)
    if plan.unbounded:
        return code
    return intervals.limit(code, grid.low.astype(w.dtype), grid.high.astype(w.dtype))


def whole_codes(plan: Plan) -> jax.Array:
    """All codes of the widest width as floats, rising."""
    top = grids.top(plan.widest)
    return jnp.arange(-top, top + 1, dtype=jnp.float32)


def usable(plan: Plan, grid: LeafGrid) -> jax.Array:
    """Of all codes of the widest width, those that a weight of the leaf may have: bool[codes]."""
    every, binary = whole_codes(plan), plan.binary(grid)
    within = (every >= jnp.min(grid.low)) & (every <= jnp.max(grid.high))
    return within if binary is None else within & ((every != 0) | ~jnp.asarray(binary))


def _softened(
    plan: Plan,
    soften: Soften,
    w: jax.Array,
    code: jax.Array,
    grid: LeafGrid,
    since: jax.Array,
) -> jax.Array:
    """Codes between the levels on both sides of each weight."""
    ends = (-jnp.inf, jnp.inf) if plan.unbounded else (grid.low, grid.high)
    low, high = (sharding.filled(end, w) for end in ends)
    ratio = grids.ratio(w, grid.step)
    below = jnp.minimum(jnp.floor(intervals.limit(ratio, low, high)), high)
    above = jnp.minimum(below + 1, high)
    binary = plan.binary(grid)
    if binary is not None:
        below, above = jnp.where(binary, low, below), jnp.where(binary, high, above)
    return soften(ratio, code, below, above, since)


def surely_zero(plan: Plan, x: jax.Array, grid: LeafGrid) -> jax.Array:
    """True only where the level is surely 0."""
    w, grid = step_groups.view(x, plan.groups), in_view(plan, grid)
    if plan.rounding == "stochastic" or plan.soften is not None or 1 in plan.allowed:
        return step_groups.joined(w == 0, plan.groups, x)
    # |w| <= .499 s: half a step, less the error of a division. A product with s may become a kernel of its own.
    return step_groups.joined(jnp.abs(w) * 2.004 <= grid.step.astype(w.dtype), plan.groups, x)


def nearest(grid: LeafGrid, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The multiple of the step and the level nearest to every weight; the level rounded to the dtype of the leaf.

    A 0 is a level for every width: it may be pruned. A weight that is NaN has the multiple 0.
    """
    w = dtypes.widened(leaf)
    step, low, high = (
        split_axes.spread(step_groups.per_block(x, leaf.shape), leaf.shape).astype(w.dtype)
        for x in (grid.step, grid.low, grid.high)
    )
    multiple = grids.ratio(w, step)
    multiple = jax.lax.round(multiple, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    unbounded = grid.bits == 0
    multiple = jnp.where(unbounded, multiple, jnp.clip(multiple, low, high))
    multiple = jnp.where(jnp.isnan(multiple), jnp.zeros_like(multiple), multiple)
    return multiple, dtypes.narrowed(multiple * step, leaf.dtype)
