"""Plain maths of one leaf's grid: what is static about it, what is measured, and the level of every weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipjax import steps as stepping
from clipjax._arrays import arguments, elementwise
from clipjax._maths import fitting, grids, intervals, step_groups
from clipjax.typing import Rounding, Step, Width


class Grid(NamedTuple):
    """What changes about one leaf's grid.

    Attributes:
      step: f32 per step group.
      reach: f32 per step group: no level is larger; for an affine grid two in front, one below zero and one above.
      zero_point: i32 per step group, the code of 0.
      bits: i32, the width; 0 for unbounded codes.
      low: f32 per step group, the smallest multiple of the step that is a level; 0 for unbounded codes.
      high: the largest; likewise.
    """

    step: jax.Array
    reach: jax.Array
    zero_point: jax.Array
    bits: jax.Array
    low: jax.Array
    high: jax.Array


class Plan(NamedTuple):
    """What is static about one leaf's grid: a width or a rule for it, which axes and groups have a step, which step."""

    bits: Any
    axis: Any
    group: int | None
    rule: Step
    rounding: Any

    @property
    def chosen(self) -> bool:
        """True where the width follows the distribution."""
        return isinstance(self.bits, Width)

    @property
    def allowed(self) -> tuple[int, ...]:
        """Every width that may occur; none for unbounded codes."""
        return self.bits.allowed if self.chosen else () if self.bits is None else (self.bits,)


def check(plan: Plan, path: str, leaf: Any) -> None:
    """Refuse what a leaf cannot have."""
    if plan.group is not None:
        arguments.whole(plan.group, "group", low=1, remedy="Give the size of a group, e.g. 32.")
        remedy = f"Leaf {path!r} has shape {leaf.shape}: leave it out with `where`, or give `per_leaf` sizes or None."
        ok = leaf.ndim >= 2 and leaf.shape[-2] % plan.group == 0
        arguments.require(ok, "group", "divide axis -2 of every picked leaf", plan.group, remedy)
    step_groups.shared_axes(leaf.ndim, plan.axis, plan.group)
    wide = max(plan.allowed, default=0)
    narrow = jnp.dtype(leaf.dtype).itemsize < 4
    remedy = f"Leaf {path!r} is {leaf.dtype}: its codes could not be recovered. Use 8 bits, or f32 params."
    arguments.require(not (narrow and wide > 8), "bits", "be at most 8 for narrow params", wide, remedy)
    remedy = "An affine grid has levels on both sides of 0: use `steps.mse()`, whose one-bit step is mean|w|."
    uneven = plan.rule.affine or (plan.chosen and plan.rule.limits is not None)
    arguments.require(not uneven or 1 not in plan.allowed, "bits", "be at least 2 for an affine grid", 1, remedy)


def begin(plan: Plan, leaf: Any) -> Grid:
    """The grid before the first refresh."""
    like = jax.eval_shape(lambda x: step_groups.view(x, plan.group), jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
    axes = step_groups.shared_axes(leaf.ndim, plan.axis, plan.group)
    step = fitting.given(1.0, like, axes)
    reach = jnp.full((2, *step.shape) if plan.rule.affine else step.shape, jnp.inf, jnp.float32)
    width = 0 if plan.bits is None else plan.allowed[-1]
    return _grid(plan, step, reach, jnp.zeros(step.shape, jnp.int32), jnp.asarray(width, jnp.int32))


class Measured(NamedTuple):
    """The weights of one leaf as its step is to see them.

    Attributes:
      values: f32, in the `view` of groups; zeros where a weight has no say.
      axes: those that share a step.
      reach: as in `Grid`, values of the leaf's dtype.
    """

    values: jax.Array
    axes: tuple[int, ...]
    reach: jax.Array


def measure(plan: Plan, x: jax.Array, landed: jax.Array, grid: Grid, dtype: Any) -> Measured:
    """The nonzero finite weights, limited to the largest |weight| that members before have landed on."""
    x, landed = (step_groups.view(v, plan.group).astype(jnp.float32) for v in (x, landed))
    axes = step_groups.shared_axes(x.ndim - (plan.group is not None), plan.axis, plan.group)
    if plan.bits is None:
        return Measured(x, axes, jnp.zeros_like(grid.reach))
    alive = (landed != 0) & jnp.isfinite(x) & jnp.isfinite(landed)
    shown = elementwise.where(alive, landed, jnp.zeros_like(landed))
    if plan.rule.affine:
        sides = [fitting.over(jnp.max, side, axes) for side in (-shown, shown)]
        largest = jnp.maximum(jnp.stack(sides), 0)
    else:
        largest = fitting.over(jnp.max, jnp.abs(shown), axes)
    reach = elementwise.where(jnp.isinf(grid.reach), largest, jnp.maximum(grid.reach, largest))
    reach = intervals.toward(reach, dtype, up=False).astype(jnp.float32)
    below, above = sides_of(plan, reach)
    return Measured(intervals.limit(elementwise.where(alive, x, jnp.zeros_like(x)), -below, above), axes, reach)


def sides_of(plan: Plan, reach: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The reach below zero and above."""
    return (reach[0], reach[1]) if plan.rule.affine else (reach, reach)


def limit(plan: Plan, seen: Measured) -> jax.Array:
    """What no step may exceed, so that a level lies within the reach."""
    below, above = sides_of(plan, seen.reach)
    return jnp.maximum(below, above)


def fit(plan: Plan, seen: Measured) -> Grid:
    """The grid of a leaf of given width for the measured weights."""
    if plan.bits is None:
        return fitted(plan, seen, plan.rule.fit(seen.values, 0, seen.axes), 0)
    return fitted(plan, seen, stepping.fit(plan.rule, seen.values, plan.bits, seen.axes, limit(plan, seen)), plan.bits)


def fitted(plan: Plan, seen: Measured, step: jax.Array, bits: Any) -> Grid:
    """The grid of a step and a width, which may be traced."""
    return _grid(plan, step, seen.reach, _zero_point(plan, seen, step, bits), jnp.asarray(bits, jnp.int32))


def _zero_point(plan: Plan, seen: Measured, step: jax.Array, bits: Any) -> jax.Array:
    """The code of 0: 0 where both sides are alike; else from where weights are, which the reach may exceed by far."""
    if (not plan.rule.affine and plan.rule.limits is None) or 1 in plan.allowed:
        return jnp.zeros(step.shape, jnp.int32)
    if plan.rule.limits is not None:
        below, above = (jnp.asarray(abs(end), jnp.float32) for end in plan.rule.limits)
    else:
        below, above = (fitting.over(jnp.max, side, seen.axes) for side in (-seen.values, seen.values))
    low, _ = grids.ends(step, bits, below, above)
    return (low - jnp.asarray(grids.top(bits), low.dtype)).astype(jnp.int32)


def _grid(plan: Plan, step: jax.Array, reach: jax.Array, zero_point: jax.Array, bits: jax.Array) -> Grid:
    """The grid with its levels: as many as the width has codes, none beyond the reach or interval."""
    if plan.bits is None:
        return Grid(step, reach, zero_point, bits, jnp.zeros_like(step), jnp.zeros_like(step))
    zero = zero_point.astype(jnp.float32)
    top = jnp.asarray(grids.top(bits if plan.chosen else plan.bits), jnp.float32)
    ends = [jnp.where(jnp.isinf(r), jnp.inf, grids.multiples(r, step)) for r in sides_of(plan, reach)]
    if plan.rule.limits is not None and plan.bits != 1:
        sides = [grids.multiples(jnp.asarray(abs(end), jnp.float32), step) for end in plan.rule.limits]
        ends = [jnp.minimum(end, side) for end, side in zip(ends, sides, strict=True)]
    return Grid(step, reach, zero_point, bits, -jnp.minimum(ends[0], top + zero), jnp.minimum(ends[1], top - zero))


def level(plan: Plan, x: jax.Array, grid: Grid, key: Any, since: jax.Array) -> jax.Array:
    """The level of every weight: code * s, the codes limited by the width, the interval and the reach."""
    w = step_groups.view(x, plan.group)
    soft = isinstance(plan.rounding, Rounding)
    one = (1 in plan.allowed) and (grid.bits if plan.chosen else 1)
    code = grids.codes(
        w, grid.step, None if one is False else one, rounding="nearest" if soft else plan.rounding, key=key
    )
    if plan.bits is not None:
        low, high = (end.astype(w.dtype) for end in (grid.low, grid.high))
        code = intervals.limit(code, low, high)
    if soft:
        code = _softened(plan, w, code, grid, one, since)
    if one is not False:
        code = jnp.where((w == 0) & (jnp.asarray(one) == 1), jnp.zeros_like(code), code)
    return step_groups.joined(code * grid.step.astype(w.dtype), plan.group, x)


def _softened(plan: Plan, w: jax.Array, code: jax.Array, grid: Grid, one: Any, since: jax.Array) -> jax.Array:
    ends = (-jnp.inf, jnp.inf) if plan.bits is None else (grid.low, grid.high)
    low, high = (jnp.full_like(w, end) for end in ends)
    inside = intervals.limit(grids.ratio(w, grid.step), low, high)
    below = jnp.minimum(jnp.floor(inside), high)
    above = jnp.minimum(below + 1, high)
    if one is not False:
        two = jnp.asarray(one) == 1
        below, above = jnp.where(two, low, below), jnp.where(two, high, above)
    return plan.rounding.soften(inside, code, below, above, since)


def vanishes(plan: Plan, x: jax.Array, grid: Grid) -> jax.Array:
    """True only where the level is surely 0."""
    sure = plan.rounding in ("nearest", "half_away") and 1 not in plan.allowed
    w = step_groups.view(x, plan.group)
    # |w| <= .499 s, half a step less what a division may be off; a product with s may become a kernel of its own
    return step_groups.joined(jnp.abs(w) * 2.004 <= grid.step.astype(w.dtype) if sure else w == 0, plan.group, x)
