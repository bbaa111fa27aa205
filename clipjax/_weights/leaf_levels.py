"""The levels of one leaf, on a grid of steps or on a format: what `fake_quantize` asks of either."""

from __future__ import annotations

import functools
import zlib
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax import steps
from clipjax._arrays import arguments, trees
from clipjax._maths import landing, levels, step_groups
from clipjax._weights import allowed_values, leaf_format, leaf_grid, quantize_state
from clipjax._weights.bit_widths import Kinds
from clipjax._weights.leaf_format import FormatPlan
from clipjax._weights.leaf_grid import Measured, Plan
from clipjax._weights.quantize_state import Fitted, LeafScales, QuantizeState, RateState
from clipjax.typing import Axis, Format, Leaf, PerLeaf, Sides, StepSize, Tree

LeafPlan: TypeAlias = Plan | FormatPlan


def plan(
    kinds: Kinds,
    axis: Axis | PerLeaf,
    group: int | PerLeaf | None,
    step: StepSize | None,
    rounding: tuple[str, leaf_grid.Soften | None, object],
    path: str,
    leaf: Leaf,
) -> LeafPlan:
    """The arguments of `fake_quantize`, read for one leaf."""
    if isinstance(kinds, Format):
        return leaf_format.plan(kinds, axis, step, path, leaf)
    rule = levels.resolve(step, steps.mse())
    mode, soften, rated = rounding
    return Plan(kinds, step_groups.resolve(axis, group, path, leaf), rule, mode, soften, rated is not None)


def bits(plans: dict[str, LeafPlan]) -> dict[str, jax.Array]:
    """The width of every leaf, the largest one before a rule has chosen; with a format the bits of a weight."""

    def of(plan: LeafPlan) -> jax.Array:
        if isinstance(plan, FormatPlan):
            return jnp.asarray(leaf_format.bits(plan), jnp.float32)
        return jnp.asarray(plan.widest, jnp.int32)

    return {path: of(plan) for path, plan in plans.items()}


def begin(plan: LeafPlan, path: str, leaf: Leaf) -> Fitted:
    """What a leaf has before the first refresh; refuse widths that it cannot have."""
    if isinstance(plan, FormatPlan):
        return leaf_format.begin(plan, leaf)
    leaf_grid.check(plan, path, leaf)
    return leaf_grid.begin(plan, leaf)


def check_fits(plans: dict[str, LeafPlan], params: Tree, state: QuantizeState, exact: bool) -> None:
    """Refuse a state of other step groups, other blocks or another format, naming the leaf and both.

    An update fits new scales where those of another format are laid alike; `exact` refuses these too.
    """
    for path, leaf in trees.governed(params):
        plan, own = plans[path], quantize_state.leaf_scales(state, path)
        if isinstance(plan, FormatPlan):
            trees.check_state(own is not None, f"no scales of a format at {path!r}, where {plan.form.name!r} has some")
            assert own is not None
            leaf_format.check_fits(plan, path, own, exact)
        else:
            trees.check_state(own is None, f"scales of a format at {path!r}, where a grid has steps")
            _check_rate(plan, path, state)
            leaf_grid.check_shape(plan, leaf, leaf_grid.at(state, path))


def _check_rate(plan: Plan, path: str, state: QuantizeState) -> None:
    found = isinstance(state.rate, RateState)
    kinds = ("some", "none") if found else ("none", "some")
    got = f"{kinds[0]} of the thresholds of `roundings.rate` at {path!r}, where this optimizer has {kinds[1]}"
    trees.check_state(found == plan.rated, got)


def outdated(plans: dict[str, LeafPlan], target: Tree, state: QuantizeState, again: jax.Array) -> jax.Array:
    """True where levels were made for other widths than they may have now, or for another number as their step.

    Args:
      plans: of all leaves.
      target: the values that are projected.
      state: the levels.
      again: True at the updates at which all scales are fitted again where a leaf had zeros alone.
    """
    number: jax.Array | None = None
    for path, x in trees.governed(target):
        plan = plans[path]
        if isinstance(plan, Plan) and number is None:  # one rule, and so the same number, for all leaves
            number = leaf_grid.other_step(plan, x, leaf_grid.at(state, path))
    mark = state.asked - fingerprint(plans)
    other = (mark != 0) & ((mark != 1) | again)
    return quantize_state.fitted(state) & (other if number is None else other | number)


def asked(plans: dict[str, LeafPlan], found: dict[str, Fitted], before: jax.Array) -> jax.Array:
    """The number that stands for the widths of levels that were just fitted, with a mark where a leaf had zeros alone.

    Args:
      plans: of all leaves.
      found: their levels.
      before: the number of the state before, whose mark stays.
    """
    empty = [
        leaf_format.empty(plans[path], own)  # type: ignore[arg-type]
        for path, own in found.items()
        if isinstance(own, LeafScales)
    ]
    number = fingerprint(plans)
    marked = functools.reduce(jnp.logical_or, empty, before == number + 1)
    return number + marked.astype(jnp.int32)


def fingerprint(plans: dict[str, LeafPlan]) -> int:
    """An even number that differs where a run goes on with other widths, so that the grids are fitted anew."""
    kinds = [
        (path, (p.form.name, p.placed.outputs) if isinstance(p, FormatPlan) else p.allowed) for path, p in plans.items()
    ]
    return zlib.crc32(repr(kinds).encode()) >> 2 << 1


def measure(plan: LeafPlan, x: jax.Array, known: allowed_values.Facts, max_level: Sides, dtype: DTypeLike) -> Measured:
    """The weights to which the levels of a leaf are fitted, see `leaf_grid.measure`."""
    if isinstance(plan, Plan):
        return leaf_grid.measure(plan, x, known, max_level, dtype)
    return Measured(leaf_format.measure(plan, x, known), max_level, dtype)


def fit(plan: LeafPlan, measured: Measured) -> Fitted:
    """The levels of a leaf whose width is fixed."""
    if isinstance(plan, FormatPlan):
        return leaf_format.fit(plan, measured.values, measured.max_level)
    return leaf_grid.fit(plan, measured)


def level(
    plan: LeafPlan, path: str, x: jax.Array, state: QuantizeState, key: jax.Array | None, since: jax.Array
) -> jax.Array:
    """The level of every weight."""
    if isinstance(plan, FormatPlan):
        return leaf_format.level(plan, x, _scales(state, path))
    return leaf_grid.level(plan, x, leaf_grid.at(state, path), key, since)


def tolerance(plan: LeafPlan, otherwise: float) -> float:
    """See `Constraint`: a unit or two in the last place for levels that are not landed on from every other one."""
    return 2.0**-22 if isinstance(plan, FormatPlan) and not plan.form.exact else otherwise


def surely_zero(plan: LeafPlan, path: str, x: jax.Array, state: QuantizeState) -> jax.Array:
    """True only where the level is surely 0."""
    if isinstance(plan, FormatPlan):
        return leaf_format.surely_zero(plan, x, _scales(state, path))
    return leaf_grid.surely_zero(plan, x, leaf_grid.at(state, path))


def check_zeros(plans: dict[str, LeafPlan], known: list[allowed_values.Facts]) -> None:
    """Refuse to move zeros that a mask holds onto a format that has none."""
    for (path, plan), of_leaf in zip(plans.items(), known, strict=True):
        if isinstance(plan, FormatPlan) and not plan.form.zero:
            held = any(fact.zeros for fact in of_leaf)
            remedy = f"`prune_mask` holds zeros of {path!r}: leave it out by `where`, or choose one as `q4_0`."
            arguments.require(not held, "bits", "be a format that has an exact 0", plan.form.name, remedy)


def missed(state: QuantizeState, path: str, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many weights of a leaf are between its levels, and the largest gap; outside of jit."""
    own = quantize_state.leaf_scales(state, path)
    if own is None:
        level = leaf_grid.nearest(leaf_grid.at(state, path), leaf)[1]
    else:
        level = leaf_format.nearest(path, own, leaf)[1]
    return landing.missed(leaf, level, landing.late(leaf, level.dtype))


def _scales(state: QuantizeState, path: str) -> LeafScales:
    own = quantize_state.leaf_scales(state, path)
    assert own is not None  # see `check_fits`
    return own
