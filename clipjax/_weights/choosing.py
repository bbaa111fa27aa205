"""Bit widths and steps that are chosen before a run, from the arrays as they are (D4): `choose_bits`, `choose_step`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import steps, widths
from clipjax._arrays import arguments, picking, trees
from clipjax._maths import levels, spectra, step_groups
from clipjax.typing import Axis, PerLeaf, StepSize, Tree, Where

_compiled_spectrum = jax.jit(spectra.spectrum, static_argnames=("rule", "axes", "allowed"))


def choose_bits(
    params: Tree,
    *,
    target_db: float | None = None,
    budget: float | None = None,
    allowed: Sequence[int] = widths.ALLOWED,
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
      allowed: the widths to choose from, each 1 to 16.
      step: a rule of `clipjax.steps`, `mse()` by default, or a number.
      axis: as in `fake_quantize`; may be `per_leaf`.
      group: as in `fake_quantize`; may be `per_leaf`.
      sensitivity: a tree like `params`, how much a squared error of each weight weighs, e.g. the mean of the squared
        gradients; scalars serve a whole leaf. All weigh the same by default.
      where: `where(path, leaf) -> bool`; by default arrays of rank >= 2 not named bias, b, scale or offset that are no
        embeddings, see `prune_mask`.

    Returns:
      A tree like `params` of Python ints, None for leaves not picked: pass it as `bits=`.

    Raises:
      ValueError: for neither or both of target and budget, an empty `allowed`, widths outside 1 to 16, or a budget
        below the smallest allowed width.

    Example:
      >>> import jax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jax.numpy.zeros(64)}
      >>> choose_bits(params, target_db=20.0)
      {'bias': None, 'kernel': 5}

    References:
      D4, section 2.2, steps 1 and 2.
    """
    one = (target_db is None) != (budget is None)
    arguments.require(one, "target_db", "be given, or else `budget`, not both", target_db, "Try 20.")
    width = widths.sqnr(target_db, allowed) if budget is None else widths.budget(budget, allowed)  # type: ignore[arg-type]
    rule = levels.resolve(step, steps.mse())
    picks = picking.pick(picking.resolve(where, picking.layers), params)
    picked = trees.governed(picking.restrict(params, picks))
    counts_for = dict(trees.governed(sensitivity))
    found = []
    for path, leaf in picked:
        groups = step_groups.resolve(axis, group, path, leaf)
        if sensitivity is not None:
            remedy = "Give a tree like the params."
            arguments.require(path in counts_for, "sensitivity", "name every picked leaf", path, remedy)
        h = None if sensitivity is None else step_groups.view(jnp.broadcast_to(counts_for[path], leaf.shape), groups)
        x = jnp.where(jnp.isfinite(leaf), leaf, jnp.zeros_like(leaf)).astype(jnp.float32)
        view = step_groups.view(x, groups)
        found.append(_compiled_spectrum(view, rule, groups.axes, width.allowed, sensitivity=h))
    chosen = {}
    if found:
        energy, noise = (jnp.stack([getattr(s, name) for s in found]) for name in ("energy", "noise"))
        index = np.asarray(width.choose([leaf.size for _, leaf in picked], energy, noise))
        chosen = {path: width.allowed[i] for (path, _), i in zip(picked, index, strict=True)}
    return trees.map_with_path(lambda path, leaf: chosen.get(path), params)


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
