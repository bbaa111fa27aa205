"""Bit widths and steps that are chosen before a run, from the arrays as they are (D4): `choose_bits`, `choose_step`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import steps, widths
from clipjax._arrays import arguments, dtypes, picked_leaves, trees
from clipjax._maths import format_blocks, grid_errors, known_formats, levels, step_groups
from clipjax._weights import leaf_format
from clipjax._weights.leaf_format import FormatPlan
from clipjax.typing import Axis, Format, PerLeaf, StepSize, Tree, Where

_compiled_spectrum = jax.jit(grid_errors.spectrum, static_argnames=("rule", "axes", "allowed"))


def choose_bits(
    params: Tree,
    *,
    target_db: float | None = None,
    budget: float | None = None,
    allowed: Sequence[int | Format] = widths.ALLOWED,
    step: StepSize | None = None,
    axis: Axis | PerLeaf = None,
    group: int | PerLeaf | None = None,
    sensitivity: Tree = None,
    where: Where | None = None,
) -> Tree:
    r"""Choose each array's bit width from its distribution, before a run (D4's "analyse, then choose the bits").

    By `widths.sqnr` with a target, by `widths.budget` with a budget.

    Args:
      params: a tree of concrete arrays; zeros and non-finite entries are ignored.
      target_db: the SQNR to reach, in decibels.
      budget: mean bits per picked weight.
      allowed: the widths to choose from, each 1 to 16, or formats; or both. A format counts with its scales, and is
        left out for a leaf whose inputs its blocks do not divide; beside formats a width counts with its steps.
      step: a rule of `clipjax.steps`, `mse()` by default, or a number; with formats as in `fake_quantize`.
      axis: as in `fake_quantize`; may be `per_leaf`.
      group: as in `fake_quantize`; may be `per_leaf`.
      sensitivity: a tree like `params`, how much a squared error of each weight weighs, e.g. the mean of the squared
        gradients; scalars serve a whole leaf. All weigh the same by default.
      where: `where(path, leaf) -> bool`; by default arrays of rank >= 2 not named bias, b, scale or offset that are no
        embeddings, see `prune_mask`.

    Returns:
      A tree like `params` of Python ints or formats, None for leaves not picked: pass it as `bits=`.

    Raises:
      ValueError: for neither or both of target and budget, an empty `allowed`, widths outside 1 to 16, a budget below
        the smallest allowed width, and a leaf that no allowed format fits.

    Example:
      >>> import jax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jax.numpy.zeros(64)}
      >>> choose_bits(params, target_db=20.0)
      {'bias': None, 'kernel': 5}
      >>> from clipjax import formats
      >>> found = choose_bits(params, budget=4.6, allowed=(formats.q4_0(), formats.q8_0()))
      >>> found["kernel"].name
      'q4_0'

    References:
      D4, section 2.2, steps 1 and 2.
    """
    one = (target_db is None) != (budget is None)
    arguments.require(one, "target_db", "be given, or else `budget`, not both", target_db, "Try 20.")
    width = widths.sqnr(target_db, allowed) if budget is None else widths.budget(budget, allowed)  # type: ignore[arg-type]
    picks = picked_leaves.pick(picked_leaves.resolve(where, picked_leaves.layers), params)
    picked = trees.governed(picked_leaves.restrict(params, picks))
    counts_for = dict(trees.governed(sensitivity))
    kinds = tuple(known_formats.register(k) if isinstance(k, Format) else k for k in width.allowed)
    found = []
    for path, leaf in picked:
        if sensitivity is not None:
            remedy = "Give a tree like the params."
            arguments.require(path in counts_for, "sensitivity", "name every picked leaf", path, remedy)
        h = None if sensitivity is None else jnp.broadcast_to(counts_for[path], leaf.shape)
        found.append(_candidates(path, leaf, h, kinds, step, axis, group))
    chosen = {}
    if found:
        energy, noise = (jnp.stack([getattr(one, name) for one in found]) for name in ("energy", "noise"))
        given = [leaf.size for _, leaf in picked], energy, noise
        if any(isinstance(kind, Format) for kind in kinds):
            assert width.choose_formats is not None
            index = np.asarray(width.choose_formats(*given, [one.costs for one in found]))
        else:
            index = np.asarray(width.choose(*given))
        chosen = {path: kinds[i] for (path, _), i in zip(picked, index, strict=True)}
    return trees.map_with_path(lambda path, leaf: chosen.get(path), params)


class _Candidates(NamedTuple):
    """One leaf on each allowed width or format.

    Attributes:
      energy: f32, its sum of squares.
      noise: f32[widths], the squared error.
      costs: bits a weight with scales and steps; infinite for a format that does not fit.
    """

    energy: jax.Array
    noise: jax.Array
    costs: list[float]


def _candidates(
    path: str,
    leaf: jax.Array,
    sensitivity: jax.Array | None,
    kinds: tuple[int | Format, ...],
    step: StepSize | None,
    axis: Axis | PerLeaf,
    group: int | PerLeaf | None,
) -> _Candidates:
    """The errors and bits of one leaf."""
    x = jnp.where(jnp.isfinite(leaf), leaf, jnp.zeros_like(leaf)).astype(jnp.float32)
    energy = grid_errors.weighted(jnp.square(x), sensitivity)
    noise: dict[int | Format, jax.Array] = {}
    costs: dict[int | Format, float] = {}
    numbers = tuple(kind for kind in kinds if not isinstance(kind, Format))
    if numbers:
        groups, rule = step_groups.resolve(axis, group, path, leaf), levels.resolve(step, steps.mse())
        h = None if sensitivity is None else step_groups.view(sensitivity, groups)
        found = _compiled_spectrum(step_groups.view(x, groups), rule, groups.axes, numbers, sensitivity=h)
        energy, steps_of = found.energy, found.levels.step.size / len(numbers)
        noise |= dict(zip(numbers, found.noise, strict=True))
        costs |= {bits: bits + 32 * steps_of / leaf.size for bits in numbers}
    refused = None
    for form in (kind for kind in kinds if isinstance(kind, Format)):
        try:
            format_blocks.resolve(form, axis, path, leaf)
        except ValueError as error:  # no blocks divide its inputs, or `axis` fits no format
            refused = refused or error
            noise[form], costs[form] = jnp.asarray(jnp.inf, jnp.float32), math.inf
            continue
        plan = leaf_format.plan(form, axis, step, path, leaf)
        noise[form] = _compiled_error(x, plan, sensitivity)
        costs[form] = form.code_bits + form.scale_bits * math.prod(plan.placed.counts) / leaf.size
    if refused is not None and not any(map(math.isfinite, costs.values())):
        raise refused
    return _Candidates(energy, jnp.stack([noise[kind] for kind in kinds]), [costs[kind] for kind in kinds])


def _error(x: jax.Array, plan: FormatPlan, sensitivity: jax.Array | None) -> jax.Array:
    """The squared error of a leaf on a format, without bounds."""
    if plan.searched:
        largest = jnp.asarray(jnp.finfo(jnp.float32).max)
        own = leaf_format.fit(plan, format_blocks.view(x, plan.placed), (largest, largest))
        level = leaf_format.level(plan, x, own)
    else:
        level = leaf_format.once(plan, x)
    level = dtypes.narrowed(level, plan.dtype)
    return grid_errors.weighted(jnp.square(level.astype(jnp.float32) - x), sensitivity)


_compiled_error = jax.jit(_error, static_argnames=("plan",))


def choose_step(
    x: jax.Array,
    bits: int,
    *,
    step: StepSize | None = None,
    axis: Axis = None,
    group: int | None = None,
) -> jax.Array:
    """The step that `fake_quantize` would take for this array, before any run.

    Args:
      x: float array; zeros and non-finite entries are ignored.
      bits: 1 to 16.
      step: a rule of `clipjax.steps`, `mse()` by default, or a number.
      axis: the axis or axes that keep a step of their own; None for one step in all.
      group: the number of neighbouring inputs that share a step, see `fake_quantize`.

    Returns:
      f32, a scalar for `axis=None`, else with size 1 in every other axis, so that it broadcasts to `x`; with groups
      block by block.

    Raises:
      ValueError: for bits outside 1 to 16 or an axis that does not exist.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> choose_step(jnp.array([[0.5, 3.0], [-0.25, 0.0]]), 2, step=clipjax.steps.absmax(), axis=-1).tolist()
      [[0.5, 3.0]]

    References:
      D4, section 2.2, steps 1 and 2.
    """
    arguments.bits(bits)
    x = jnp.asarray(x).astype(jnp.float32)
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    groups = step_groups.resolve(axis, group, "x", x)
    found = levels.of(levels.resolve(step, steps.mse()), step_groups.view(finite, groups), bits, groups.axes)
    return step_groups.per_block(step_groups.stored(found.step, groups), x.shape)
