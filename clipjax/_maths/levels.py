"""The levels of a grid from its fitted step: how the codes of a width are laid around zero.

Each function here is the `levels` of a `Step`: `(s, bits, extents, max_level) -> Levels`. `extents` and `max_level` are
pairs, below zero and above: how far the weights extend, and how far levels may.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes
from clipjax._maths import grids, step_fitting
from clipjax.typing import Format, Levels, Number, Sides, Step

Bits: TypeAlias = int | jax.Array

UNLIMITED = (math.inf, math.inf)


def resolve(step: Number | Step | None, default: Step) -> Step:
    """Read a `step=` argument: a rule, a number for a given step, or None for the default."""
    if isinstance(step, Step):
        return step
    if step is None:
        return default
    arguments.called(step, "step", "a number or a rule of `clipjax.steps`")
    if callable(step) or isinstance(step, str | Format):
        formed = isinstance(step, Format)
        remedy = "Give the format in the place of `bits`." if formed else "Call the factory: `steps.mse()`."
        raise TypeError(f"`step` must be a number or a rule from `clipjax.steps`, got {step!r}. {remedy}")
    arguments.scalar(step, "step", "Give one step; steps of units and groups follow from `axis` and `group`.")
    return given(step)


def given(step: Number) -> Step:
    """The rule of a step that the caller gives: it is taken as it is, whatever the weights."""
    arguments.check_step(step)
    return Step(lambda x, bits, axes: step_fitting.given(step, x, axes), as_given)


def of(
    rule: Step,
    x: jax.Array,
    bits: Bits,
    axes: tuple[int, ...],
    max_level: tuple[Number, Number] = UNLIMITED,
    dtype: DTypeLike = jnp.float32,
) -> Levels:
    """The levels of a rule for an array, fitted to its nonzero entries.

    Args:
      rule: which step, and which levels.
      x: f32; zeros are no weights.
      bits: the width, which may be traced where it is at least 2.
      axes: those that share a step.
      max_level: the largest magnitude of a level below zero and above, once it is rounded.
      dtype: to which it is rounded, that of the params.
    """
    below, above = (grids.reach(jnp.asarray(end, jnp.float32), dtype) for end in max_level)
    limits = (below, above)
    extents = extent(rule, x, axes)
    step = rule.fit(x, bits, axes)
    if rule.levels is not None:
        if len(extents) > 1:  # both outermost levels are to be the outermost weights, once they are rounded
            extents = [grids.reach(dtypes.narrowed(end, dtype), dtype) for end in extents]
        return rule.levels(step, bits, (extents[0], extents[-1]), limits)
    found = symmetric(step, bits, (extents[0], extents[-1]), limits)
    exact, held = step_fitting.on_grid(x, step, bits, axes, dtype)
    return _laid(jnp.where(held, exact, found.step), bits, found.zero_point, limits)


def extent(rule: Step, x: jax.Array, axes: tuple[int, ...]) -> list[jax.Array]:
    """How far the entries extend: to both sides alike, one array, or below zero and above, two."""
    sides = (jnp.abs(x),) if rule.sides is None else rule.sides(x)
    return [step_fitting.over(jnp.max, side, axes) for side in sides]


def symmetric(s: jax.Array, bits: Bits, extents: Sides, max_level: Sides) -> Levels:
    """As many levels below zero as above; the step is at most the largest level, so that a level is left."""
    step = jnp.minimum(s, _largest(max_level))
    return _reaching(step, bits, jnp.minimum(step * grids.top(bits), _largest(max_level)), max_level)


def covering(s: jax.Array, bits: Bits, extents: Sides, max_level: Sides) -> Levels:
    """Symmetric levels of which one comes closest to the largest weight, and is not beyond it."""
    return _reaching(s, bits, _largest(_lesser(extents, max_level)), max_level)


def _reaching(s: jax.Array, bits: Bits, end: jax.Array, max_level: Sides) -> Levels:
    """Symmetric levels of the short step with which they come closest to an end."""
    top = jnp.asarray(grids.top(bits), jnp.float32)
    step = _usable(grids.best_short(s, bits, lambda s: jnp.minimum(grids.multiples(end, s), top) * s))
    return _laid(step, bits, jnp.zeros(step.shape, jnp.int32), max_level)


def as_given(s: jax.Array, bits: Bits, extents: Sides, max_level: Sides) -> Levels:
    """Symmetric levels of a step that nothing changes."""
    step = _usable(s)
    return _laid(step, bits, jnp.zeros(step.shape, jnp.int32), max_level)


def power_of_two(s: jax.Array, bits: Bits, extents: Sides, max_level: Sides) -> Levels:
    """Symmetric levels of the power of two nearest to the step, or the next smaller one if a level needs it."""
    largest = _largest(max_level)
    near = step_fitting.power_of_two(jnp.minimum(s, largest))
    step = _usable(jnp.where(near > largest, near / 2, near))
    return _laid(step, bits, jnp.zeros(step.shape, jnp.int32), max_level)


def affine(s: jax.Array, bits: Bits, extents: Sides, max_level: Sides) -> Levels:
    """Levels from the lowest weight to the highest, 0 among them; for two bits or more."""
    parts = 2 * grids.top(bits)

    def covered(s: jax.Array) -> jax.Array:
        """The step that would be best for the outermost levels of this one."""
        low, high = grids.ends(s, bits, *extents)
        return grids.share(low * s, high * s, parts)

    step = _usable(grids.best_short(grids.share(*extents, parts), bits, covered))
    return _laid(step, bits, _zero_point(step, bits, extents), _lesser(extents, max_level))


def between(lo: float, hi: float) -> Callable[[jax.Array, Bits, Sides, Sides], Levels]:
    """Levels inside of [lo, hi], an interval that encloses 0; one bit has the levels -s and s."""
    ends = (jnp.float32(-lo), jnp.float32(hi))

    def levels(s: jax.Array, bits: Bits, extents: Sides, max_level: Sides) -> Levels:
        one = jnp.asarray(bits) == 1
        best = grids.best_short(s, bits, lambda s: sum(grids.ends(s, bits, *ends)) * s)
        step = _usable(jnp.where(one, grids.short(s, bits), best))
        zero_point = jnp.where(one, 0, _zero_point(step, bits, ends))
        inside = tuple(jnp.where(one, jnp.inf, end) for end in ends)
        return _laid(step, bits, zero_point, _lesser((inside[0], inside[1]), max_level))

    return levels


def _usable(step: jax.Array) -> jax.Array:
    """The step, 1 where nothing could be fitted: all entries are zero."""
    return jnp.where((step > 0) & jnp.isfinite(step), step, jnp.ones_like(step))


def _largest(max_level: Sides) -> jax.Array:
    return jnp.maximum(*max_level)


def _lesser(one: Sides, other: Sides) -> Sides:
    return jnp.minimum(one[0], other[0]), jnp.minimum(one[1], other[1])


def _zero_point(step: jax.Array, bits: Bits, extents: Sides) -> jax.Array:
    """The code of 0 for which the codes of the width reach from one extent to the other."""
    low, _ = grids.ends(step, bits, *extents)
    return (low - jnp.asarray(grids.top(bits), low.dtype)).astype(jnp.int32)


def _laid(step: jax.Array, bits: Bits, zero_point: jax.Array, max_level: Sides) -> Levels:
    """The multiples of the step that have a code, -top <= k + zero_point <= top, within the largest level."""
    top, zero = jnp.asarray(grids.top(bits), jnp.float32), zero_point.astype(jnp.float32)
    below, above = (grids.multiples(end, step) for end in max_level)
    return Levels(step, -jnp.minimum(below, top + zero), jnp.minimum(above, top - zero), zero_point)
