"""Quantizing after the optimizer: weights that stay on a grid (D4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from clipjax import steps
from clipjax._arrays import elementwise, picked_leaves, stacks, trees
from clipjax._maths import grid_errors, levels, step_groups
from clipjax._weights import (
    allowed_values,
    bit_widths,
    code_rates,
    leaf_format,
    leaf_grid,
    leaf_levels,
    projecting,
    quantize_arguments,
    quantize_state,
    refreshing,
)
from clipjax._weights.constraints import Constraint
from clipjax._weights.leaf_grid import Plan
from clipjax._weights.leaf_levels import LeafPlan
from clipjax._weights.quantize_state import LeafLevels, QuantizeState
from clipjax.typing import (
    Axis,
    Bits,
    Context,
    Count,
    Leaf,
    PerLeaf,
    Projection,
    RoundingMode,
    StepSize,
    Tree,
    Where,
)


def fake_quantize(
    bits: Bits = None,
    *,
    step: StepSize | None = None,
    axis: Axis | PerLeaf = None,
    group: int | PerLeaf | None = None,
    rounding: RoundingMode = "nearest",
    where: Where | None = None,
    start: Count = 0,
    every: Count | None = 100,
    stop: Count | None = None,
    carry: bool = True,
    inner: optax.GradientTransformation | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hold weights on a grid: :math:`w \leftarrow \mathrm{round}(w/s)\,s` (D4), while float weights learn behind it.

    After `optax.apply_updates` every picked weight is code * s, a product in f32 (f64 for f64 params) that is rounded
    once to the dtype of the weight. The code is a whole number, and s > 0 is the step. (There are two exceptions, one
    each at `step` and `rounding` below.) Rounding weights in place would stop the training: an update is usually much
    smaller than half a step, so no weight would reach its next level. With ``carry=True`` the state therefore keeps the
    weights before rounding, the *latent weights*: they take every update in full, and the params are their rounded
    values.

    A width of b bits has the codes :math:`-(2^{b-1} - 1), \dots, 2^{b-1} - 1`; b = 1 has the codes -1 and 1. A *level*
    is a code times s. The step s follows from the latent weights as they are before a *refresh*. Refreshes are the
    updates c from `start` to `stop` with (c - start) divisible by `every`, and `stop` itself, after which s is frozen.

    In ``optax.chain(optimizer, clamp_weights(C), prune_mask(...), fake_quantize(b))`` the clamp and the mask hold
    behind the rounding too, with both of them or with one. Levels beyond the bound that the clamp had at the latest
    refresh are left out; if the bound shrinks between refreshes, give the optimizer and the clamp as `inner`. A weight
    that `prune_mask` sets to 0 stays 0, even for b = 1, whose grid has no 0, and has no part in the step. With
    ``carry=False`` a refresh fits the grid to weights that lie on the grid of the last one, whose largest level it does
    not exceed.

    Args:
      bits: the width b, 1 to 16. Or ``clipjax.per_leaf(lambda path, leaf: b)``; or a tree from `choose_bits`, whose
        None leaves are left out; or a rule of `clipjax.widths`, which chooses the width of each leaf from its weights
        at every refresh; or None, the default, for codes of any size, for which `step` must be a number (the formula
        of D4). Or a format of `clipjax.formats`, such as `formats.q4_0()` of llama.cpp: params are then what the bytes
        of that format decode to (but see `formats.q4_1`), with a scale for each block of inputs; `group` and `rounding`
        belong to the format, and must be left out. Static. A run that is resumed with another width, another number as
        `step`, or another format of the same blocks and scales refreshes at its first update.
      step: how s follows from the weights: a rule of `clipjax.steps`, `mse()` by default, or a number, which may be
        traced. With a number, a weight that jumps over several levels in one update may land one unit in the last place
        beside its level; the next update corrects this, and sets the latent weight of this entry to the param. With a
        format None takes the scale by the rule of the format's reference. `steps.mse()` then searches for the scale of
        least squared error, under which the largest weights take the outermost level; it reads the weights 32 times,
        and warns with ``every=1``.
      axis: the axis or axes along which each index has a step of its own: -1 gives one step per output unit of a Flax
        kernel; None, without `group`, one step per leaf. Or `per_leaf`, as ``analysis.outputs`` of `clipjax.analyze`.
        With a format, the output axes: its blocks run along all others, flattened in order. None then means that the
        last axis is the output; in an embedding the last axis is the one that blocks run along. Static.
      group: the number g of neighbouring inputs that share a step. The inputs are all axes but those of `axis` (all but
        the last one by default), flattened in order: d in f32[d, heads, head_dim] with ``axis=(-2, -1)``, heads *
        head_dim in f32[heads, head_dim, d] with ``axis=-1``. g divides the size of the last input axis, or is a
        multiple of it; g over that size then does the same with the input axis before, and so on. Or `per_leaf`.
        Static.
      rounding: "nearest" (halves to even), "half_away" (halves away from zero, as in D4), "stochastic", or a rule of
        `clipjax.roundings`, which moves weights onto the grid gradually: until it ends they lie between levels. Static.
      where: `where(path, leaf) -> bool` picks the leaves; a path is a string such as "dense/kernel". By default arrays
        of rank >= 2 that are not named bias, b, scale or offset, and are no embeddings, see `prune_mask`; embeddings to
        which `per_leaf` gives a width are quantized. With a tree of bits, `where` is ignored.
      start: the first update that quantizes, counted from 0; may be traced.
      every: the number of updates between two refreshes of the steps; may be traced. With None, refreshes are at
        `start`, and at `stop` if that is given. If a leaf on a format had nothing but zeros at a refresh, the scales of
        all leaves are also fitted 1, 2, 4, 8, … updates after `start`, up to `stop`.
      stop: the update of the last refresh; may be traced. Weights are rounded after it too, with the last step. None
        sets no end.
      carry: keep latent weights, 4 bytes a weight. False rounds in place, which loses small updates. Static.
      inner: the optimizer, or a chain that ends in `clamp_weights` or `prune_mask`, which then act on the latent
        weights. With ``carry=True`` it is given the latent weights as its params, and steps follow them alone. See
        `project`.
      key: PRNG key of stochastic rounding; each update folds it with the count. The default, `jax.random.key(0)`, draws
        the same numbers in every run and every transformation: give each its own key to have them differ.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where params are narrower. Its `update` takes the
      extra argument `refresh`, see `project`.

    Raises:
      ValueError: for bits outside 1 to 16, bits=None without a number as step, stop < start, every < 1, an unknown
        rounding, or what a format says itself; at init for an axis that does not exist, a group or a block that does
        not divide the inputs, a bits tree that matches no leaf, or more than 8 bits on params narrower than f32, whose
        codes could not be recovered; at update for missing `params`, and zeros of a mask on a format that has no 0.
      TypeError: for traced bits, axis or group; at init for a complex leaf that `where` picks.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), fake_quantize(bits=2, step=0.5))
      >>> params = {"kernel": jnp.array([[0.4, -0.9], [0.1, 0.6]])}
      >>> grads = {"kernel": jnp.zeros((2, 2))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.5, -0.5], [0.0, 0.5]]

    References:
      D4, sections 2.2 and 3.3; D0, section 2.2, step 3. Courbariaux et al., 2015, https://arxiv.org/abs/1511.00363.
      Jin et al., PARQ, 2025, https://arxiv.org/abs/2503.15748.
    """
    rule = levels.resolve(step, steps.mse())
    widths = bit_widths.resolve(bits, rule)
    quantize_arguments.check_alone(widths.form, group, rounding)
    step_groups.check(axis, group)
    hard = quantize_arguments.read_rounding(rounding)
    mode, soften, by_rate = hard.mode, hard.soften, hard.rated
    quantize_arguments.check_rate(by_rate, carry)
    cycle = refreshing.cycle(start, every, stop)
    where = widths.picks(picked_leaves.resolve(where, widths.default))
    quantize_arguments.warn_if_it_shrinks(rule, cycle, carry)
    quantize_arguments.warn_if_it_searches(widths.form is not None and step is not None and rule == steps.mse(), cycle)

    def plans(tree: Tree) -> dict[str, LeafPlan]:
        """The static part of the levels of every governed leaf, of params in their own dtype."""
        allowed = widths.allowed(tree)

        def plan(path: str, leaf: Leaf) -> LeafPlan:
            return leaf_levels.plan(allowed[path], axis, group, step, hard, path, leaf)

        return {path: plan(path, leaf) for path, leaf in trees.governed(tree)}

    def init_fn(params: Tree) -> QuantizeState:
        leaves, by_path = dict(trees.governed(params)), plans(params)
        if widths.form is None:  # which leaves are on a format shows here
            searched = [plan for plan in by_path.values() if isinstance(plan, leaf_format.FormatPlan) and plan.searched]
            quantize_arguments.warn_if_it_searches(bool(searched), cycle)
        begun = {path: leaf_levels.begin(plan, path, leaves[path]) for path, plan in by_path.items()}
        rate = code_rates.begin(_rated(by_path)) if by_rate is not None else ()
        return quantize_state.gathered(begun, leaf_levels.bits(by_path), quantize_state.NEVER, rate)

    @refreshing.compiled
    def refresh(weights: Tree, known: Tree, inputs: refreshing.Inputs) -> QuantizeState:
        """The grids that are fitted to the weights as the transformations before leave them."""
        (params, before, since), values = inputs, jax.tree.leaves(weights)
        by_path, kinds = plans(params), [p.dtype for p in jax.tree.leaves(params)]
        of_leaves = allowed_values.governed(weights, known)
        limits = allowed_values.shared(leaf_grid.max_level, of_leaves, kinds)
        rows = zip(by_path.values(), values, of_leaves, limits, kinds, strict=True)
        measured = [leaf_levels.measure(*row) for row in rows]
        names, static = list(by_path), list(by_path.values())
        if widths.choose is None:
            fitted, width = stacks.mapped(leaf_levels.fit, names, static, measured), leaf_levels.bits(by_path)
        else:
            fitted, width = _chosen(widths.choose, by_path, measured)
        found = dict(zip(names, fitted, strict=True))
        rate: quantize_state.RateState | tuple[()] = ()
        if by_rate is not None:
            on_grid = _rated(by_path)
            chosen = [i for i, name in enumerate(names) if name in on_grid]
            rate = code_rates.rated(
                by_rate, on_grid, [measured[i] for i in chosen], [fitted[i] for i in chosen], width, before, since
            )
        return quantize_state.gathered(found, width, leaf_levels.asked(by_path, found, before.asked), rate)

    def apply_fn(target: Tree, state: QuantizeState, context: Context) -> tuple[Tree, QuantizeState]:
        by_path = plans(context.params)
        if not by_path:
            return target, state
        leaf_levels.check_zeros(by_path, allowed_values.governed(target, context.known))
        outdated = leaf_levels.outdated(by_path, target, state, refreshing.doubling(cycle, context.count))
        inputs = context.params, state, (context.count - start).astype(jnp.float32)
        new = refreshing.refreshed(cycle, context, refresh, inputs, state, target, outdated)
        return frozen_fn(target, new, context), new

    def ready(state: QuantizeState) -> jax.Array | None:
        """False before the first refresh, when weights stay as they are; None where no weight is kept back."""
        # A rounding that hardens is no projection yet: beside a select XLA rounds it otherwise than `check` does.
        return None if refreshing.always(cycle) or soften is not None else quantize_state.fitted(state)

    def frozen_fn(target: Tree, state: QuantizeState, context: Context) -> Tree:
        by_path = plans(context.params)
        index = {path: i for i, path in enumerate(by_path)}
        since = (context.count - start).astype(jnp.float32)

        def level(path: str, x: jax.Array) -> jax.Array:
            key = jax.random.fold_in(context.key, index[path]) if mode == "stochastic" else None
            return leaf_levels.level(by_path[path], path, x, state, key, since)

        shown = jax.tree.map(
            functools.partial(elementwise.keep, ready(state)), trees.map_with_path(level, target), target
        )
        # A weight that is not on its level yet may lie beyond the bound that levels keep.
        return shown if soften is None else allowed_values.settled_tree(shown, context.known)

    def surely_zero(target: Tree, state: QuantizeState, context: Context) -> Tree:
        by_path, begun = plans(context.params), ready(state)

        def zero(path: str, x: jax.Array) -> jax.Array:
            found = leaf_levels.surely_zero(by_path[path], path, x, state)
            return found if begun is None else found & begun

        return trees.map_with_path(zero, target)

    def once(target: Tree, state: QuantizeState, context: Context) -> Tree:
        """The levels as the references of formats have them, where nothing bounds a leaf."""
        by_path = plans(context.params)
        free = [
            all(fact.bound is None for fact in of_leaf) for of_leaf in allowed_values.governed(target, context.known)
        ]
        own = {
            path: leaf_format.once(plan, x)
            for (path, x), ok in zip(trees.governed(target), free, strict=True)
            if ok and isinstance(plan := by_path[path], leaf_format.FormatPlan) and not plan.searched
        }
        return trees.map_with_path(lambda path, x: own.get(path, x), frozen_fn(target, state, context))

    def check_fits(params: Tree, state: QuantizeState, exact: bool) -> None:
        leaf_levels.check_fits(plans(params), params, state, exact)

    def tolerances(tree: Tree) -> Tree:
        by_path = plans(tree)
        return trees.map_with_path(lambda path, x: leaf_levels.tolerance(by_path[path], tolerance), tree)

    # Values between levels come from sums and quotients, which two compiled programs may round differently.
    tolerance = 0.0 if soften is None else 2.0**-16
    projection = Projection(init_fn, apply_fn, frozen_fn)
    constraint = Constraint(
        projection,
        QuantizeState,
        "fake_quantize",
        fitted=quantize_state.fitted,
        surely_zero=surely_zero,
        refits=refreshing.always(cycle),
        once=once,
        check_fits=check_fits,
        tolerance=tolerance,
        tolerances=tolerances,
    )
    tx = projecting.constrain(constraint, carry=carry, inner=inner, start=start, where=where, key=key, stop=stop)

    def checked_init(params: Tree) -> projecting.ProjectState:
        widths.check(params)
        state = tx.init(params)
        return state._replace(projection=code_rates.with_rest(state.projection, params))

    return optax.GradientTransformationExtraArgs(checked_init, tx.update)


def _rated(plans: dict[str, LeafPlan]) -> dict[str, Plan]:
    """The leaves whose codes are chosen by their cost: those on a grid."""
    return {path: plan for path, plan in plans.items() if isinstance(plan, Plan)}


def _chosen(
    choose: bit_widths.Chooser, by_path: dict[str, LeafPlan], measured: list[leaf_grid.Measured]
) -> tuple[list[LeafLevels], dict[str, jax.Array]]:
    """The levels and the width of every leaf, which a rule chooses from all distributions."""
    plans = {path: plan for path, plan in by_path.items() if isinstance(plan, Plan)}  # all: no rule chooses formats
    found = stacks.mapped(leaf_grid.spectrum, list(plans), list(plans.values()), measured)
    energy, noise = (jnp.stack([getattr(s, name) for s in found]) for name in ("energy", "noise"))
    index = choose([x.values.size for x in measured], energy, noise)
    rows = zip(plans.items(), index, strict=True)
    width = {path: grid_errors.width(plan.allowed, i) for (path, plan), i in rows}
    return [leaf_grid.chosen(*row) for row in zip(plans.values(), found, index, strict=True)], width
