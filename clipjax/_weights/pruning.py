"""Pruning after the optimizer: weights that stay exactly zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax import scores as scoring
from clipjax import structures
from clipjax._arrays import arguments, picked_leaves, trees
from clipjax._maths import random_draws
from clipjax._weights import allowed_values, masks, projecting, refreshing, sparsities, zeros
from clipjax._weights.constraints import Constraint
from clipjax._weights.zeros import NEVER, OTHER, PruneState, zeroed
from clipjax.typing import (
    Context,
    Count,
    Number,
    PerLeaf,
    Projection,
    Schedule,
    Score,
    Selection,
    Sparsity,
    State,
    Structure,
    Tree,
    Where,
)


def prune_mask(
    sparsity: Sparsity = None,
    *,
    score: Score | None = None,
    structure: Structure | None = None,
    scope: str = "global",
    where: Where | None = None,
    start: Count = 0,
    every: Count | None = None,
    stop: Count | None = None,
    carry: bool = False,
    inner: optax.GradientTransformation | None = None,
    regrow: Number | Schedule | None = None,
    grow: Score | None = None,
    select: Selection | None = None,
    mask: Tree = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hold the weights of lowest score at exactly zero: :math:`w \leftarrow m \odot w`, m being a 0-1 mask.

    The mask is chosen at each *refresh*. Refreshes are the updates c from `start` to `stop` with (c - start) divisible
    by `every`, and `stop` itself; without `every` a constant sparsity is applied at `start`, and at `stop` if that is
    given. A refresh chooses the mask by the weights as they are before the update; the weights after this update are
    the first ones that it sets to 0. Only a static ``every=1`` without `stop` chooses it by params + updates. It
    removes the round(sparsity * n) units of lowest score among n; of equal scores the earlier position is kept. A unit
    is what `structure` removes together: a single weight by default. A refresh needs no sort and no gather, only a few
    counting passes over the weights.

    A removed weight stays removed: when a schedule lowers the sparsity, there are more zeros than round(sparsity * n).
    There are two exceptions. With ``carry=True`` the state keeps the float weights behind the mask, the *latent
    weights*: they go on learning, and a weight comes back when its score is high enough again (straight-through
    pruning). With `regrow` each refresh exchanges a part of the kept weights for removed ones.

    With `inner=optimizer` and without `carry` every update sets the moments of removed weights to 0, so that a weight
    that grows again begins at 0 without momentum: each array of the optimizer's state that has the shape of its param
    is cleared; factored moments are not. Init refuses an optimizer such as SM3, in whose state `optax.tree.map_params`
    does not find the arrays that belong to a param.

    Args:
      sparsity: the fraction of zeros, in [0, 1): a number (may be traced); a schedule count -> fraction, which is
        evaluated at count - start; ``clipjax.per_leaf(lambda path, leaf: fraction)``, None for a leaf that is left out;
        or a tree like the params with a fraction at each leaf that is pruned. With `mask`, and with a structure that
        fixes it, such as `structures.n_of_m`, it must be None. A run that is resumed with another constant refreshes at
        its first update.
      score: how much each weight matters, `scores.magnitude()` by default; the lowest go first.
      structure: what is removed together, `structures.element()`, single weights, by default.
      scope: which weights are compared: "global" ranks the scores of all picked leaves together, without normalizing
        them; "leaf" prunes each leaf to the sparsity; "erk" (Erdős–Rényi-kernel) prunes each leaf to a sparsity of its
        own, computed from its shape: its density is in proportion to sum(shape) / prod(shape), at most 1, and all
        leaves together keep 1 - sparsity. Where `sparsity` gives leaves fractions of their own, each is pruned by
        itself.
      where: `where(path, leaf) -> bool` picks the leaves; a path is a string such as "dense/kernel". By default arrays
        of rank >= 2 that are not named bias, b, scale or offset, and are no embeddings. An embedding is a leaf with a
        name in its path that begins with "embed" (in upper or lower case), or whose last name is pos_embedding,
        pos_embed, position_embedding(s), cls or cls_token. Embeddings to which `per_leaf` or a tree gives a sparsity
        are pruned.
      start: the first update that prunes, counted from 0; may be traced.
      every: the number of updates between two refreshes; may be traced. None means 100 for a schedule; for a
        constant, refreshes are then at `start`, and at `stop` if that is given.
      stop: the update of the last refresh; may be traced. A schedule needs it; None refreshes for ever where `every` is
        given.
      carry: keep latent weights, 4 bytes a weight, so that a removed weight can come back at a refresh. Static.
      inner: the optimizer. With `carry` it is given the latent weights as its params, see `project`; without, its
        moments are cleared as above. Scores that need a gradient, such as `scores.taylor()`, then use the one that
        arrives at `inner`; without `inner` put the whole chain into `with_gradient`, or call `update` with `grad=`.
      regrow: the fraction of kept weights that each refresh exchanges, in [0, 1), a number or a schedule, e.g.
        `optax.cosine_decay_schedule(0.3, stop)`; needs `inner`. With any `regrow`, weights grow again when a schedule
        lowers the sparsity; with 0 only then (AC/DC).
      grow: with `regrow`, which removed weights grow first: those of highest `scores.gradient(decay=0.0)` by default
        (RigL); `scores.random()` gives SET.
      select: a selection of `clipjax.selections`, evaluated at each refresh: only the units that it selects may be
        removed then, and sparsity is a fraction of these. With `carry` or `regrow` all other units are kept, those too
        that an earlier refresh removed. With neither, removed units stay removed, so that several refreshes can remove
        more than `sparsity` of all.
      mask: a tree of bool arrays, True keeps, that is used from `start` on instead of a chosen mask; may be traced.
        Leaves without one, and those that `where` does not pick, are not pruned. It is copied into the state, from
        which every update takes it: a resumed run goes on with the old mask. For another one call `tx.init(params)`
        again.
      key: PRNG key for random scores and selections; each update folds it with the count. `jax.random.key(0)` by
        default, as in `fake_quantize`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where params are narrower. Its `update` takes two
      extra arguments: `grad` for gradient scores, and `refresh`, see `project`.

    Raises:
      ValueError: for a sparsity outside [0, 1), a schedule without `stop`, stop < start, every < 1, an unknown scope,
        `regrow` without `inner`, `grow` without `regrow`, `regrow` together with `carry` or `structures.n_of_m`, both
        sparsity and mask, or neither where the structure does not fix the sparsity; at init for a mask of the wrong
        shape or of no leaf, and an array with an axis of 2**32 units or more; at update for missing `params`, or a
        missing `grad` of a gradient score.
      TypeError: for a factory that is not called; at init for a complex leaf that `where` picks.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.5), prune_mask(0.5))
      >>> params = {"kernel": jnp.array([[1.0, -0.2], [0.3, -4.0]])}
      >>> grads = params  # of the loss sum(w ** 2) / 2
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.5, 0.0], [0.0, -2.0]]

    References:
      D2, section 2.2; D0, section 2.2; Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878. Evci et al., "Rigging the
      Lottery", 2020, https://arxiv.org/abs/1911.11134. Mocanu et al., SET, 2018, https://arxiv.org/abs/1707.04780.
    """
    structure = structures.element() if structure is None else structure
    score = scoring.magnitude() if score is None else score
    remedy = "It says which removed weights grow, of which `regrow` is the number: `regrow=0.3`."
    arguments.require(grow is None or regrow is not None, "grow", "be None without `regrow`", grow, remedy)
    grow = scoring.gradient(decay=0.0) if grow is None else grow
    for name, value in (("score", score), ("grow", grow)):
        arguments.instance(value, Score, name, "Call a factory: `scores.magnitude()`.")
    arguments.static(carry, "carry")
    candidates = None if select is None else random_draws.resolve(select)
    remedy = "Units that it does not select now may have been removed before, so that no multiple would stay."
    ok = select is None or not isinstance(structure, Structure) or structure.round_to == 1
    arguments.require(ok, "select", "be None with `round_to`", select, remedy)
    _check_regrow(regrow, structure, carry, inner)
    cycle = refreshing.cycle(start, every, stop)
    if mask is not None:
        remedy = "Give a fraction of zeros, or `mask=` to hold a given tree."
        arguments.require(sparsity is None, "sparsity", "be left out with `mask`", sparsity, remedy)
        remedy = "Build it from the params: `jax.tree.map(lambda p: p != 0, params)`."
        arguments.require(not isinstance(mask, PerLeaf), "mask", "be a tree of bool arrays", mask, remedy)
        constraint, where = zeros.given(mask), zeros.masked_leaves(mask, where)
    else:
        amount = sparsities.resolve(sparsity, structure, scope)
        if amount.scheduled:
            arguments.require(
                stop is not None, "stop", "be given with a schedule", stop, "It is the update of the last refresh."
            )
            cycle = cycle._replace(every=100 if every is None else every)
            refreshing.check_ramp("sparsity", sparsity, cycle)  # type: ignore[arg-type]
            last = refreshing.at_stop(sparsity, cycle)  # type: ignore[arg-type]
            if last is not None:
                arguments.fraction(last, "sparsity", "The schedule has this value at `stop`; it gives fractions.")
                amount = amount._replace(asked=lambda owners: jnp.asarray(last, jnp.float32))
        where = picked_leaves.resolve(where, picked_leaves.weights if structure.holds else amount.default)
        exchange = None if regrow is None else arguments.schedule(regrow)
        if callable(regrow):
            refreshing.check_ramp("regrow", regrow, cycle)
        pruning = Pruning(structure, amount, score, grow, where, cycle, exchange, candidates, key)
        constraint, where = _pruned(pruning, carry), structure.holds or where
    return projecting.constrain(constraint, carry=carry, inner=inner, start=start, where=where, key=key, stop=stop)


class Pruning(NamedTuple):
    """The arguments of `prune_mask`, read.

    Attributes:
      structure: what is removed together.
      amount: how many units go.
      score: which go first.
      grow: which come back first.
      where: the leaves that are scored; with groups more leaves than these are pruned.
      cycle: when the mask is refreshed.
      regrow: the share of kept units that a refresh exchanges, by count; None for a mask whose zeros only grow.
      select: which units are candidates; None for all.
      key: of the selection.
    """

    structure: Structure
    amount: sparsities.Amount
    score: Score
    grow: Score
    where: Where
    cycle: refreshing.Cycle
    regrow: Schedule | None
    select: Selection | None
    key: jax.Array | None


def _pruned(pruning: Pruning, carry: bool) -> Constraint:
    """The constraint to the zeros of a mask that is chosen by score."""
    structure, regrow = pruning.structure, pruning.regrow

    def scored(params: Tree) -> Callable[[Tree], Tree]:
        """A function that sets to None the leaves that lose entries with a unit, but do not enter its score."""
        return functools.partial(picked_leaves.restrict, picks=picked_leaves.pick(pruning.where, params))

    def init_fn(params: Tree) -> PruneState:
        weights = scored(params)(params)
        structure.check(params, weights)
        units = jax.tree.map(
            lambda u: u == 0, structure.reduce(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), weights))
        )
        masks.check_sizes(units, structure)
        pruning.amount.check(structure.owners(params))
        asked = jnp.full_like(pruning.amount.asked(structure.owners(params)), NEVER)
        return PruneState(
            _stored(structure, units),
            asked,
            pruning.score.init(weights),
            () if regrow is None else pruning.grow.init(weights),
        )

    @refreshing.compiled
    def refresh(weights: Tree, known: Tree, inputs: refreshing.Inputs) -> tuple[Tree, jax.Array]:
        """The mask that is chosen from the weights, and the sparsity that it is made for."""
        mask, score, grow, here, since, asked = inputs
        target = allowed_values.settled_tree(weights, known)
        owners, picks = structure.owners(target), [p is not None for p in trees.flatten(here.params)[0]]
        before, values = trees.place(mask, owners), picked_leaves.restrict(target, picks)
        kept = _refreshed(pruning, values, owners, before, score, grow, here, since, carry)
        return _stored(structure, kept), asked

    def apply_fn(target: Tree, state: PruneState, context: Context) -> tuple[Tree, PruneState]:
        if not jax.tree.leaves(target):  # as in a group of `optax.partition` that has no kernel
            return target, state
        only = scored(context.params)
        here = _restricted(context, only)
        new_score = pruning.score.observe(only(target), state.score, here)
        new_grow = state.grow if regrow is None else pruning.grow.observe(only(target), state.grow, here)

        # Schedules count from `start`, as the cycle does.
        since = context.count - pruning.cycle.start
        asked = pruning.amount.asked(structure.owners(target))

        masks_there, owned = len(jax.tree.leaves(state.mask)), len(jax.tree.leaves(structure.owners(target)))
        trees.check_state(masks_there == owned, f"{masks_there} masks for {owned} leaves")

        here = here._replace(refresh=None, memory=None, known=())
        inputs = state.mask, new_score, new_grow, here, since, asked
        # one for all leaves may have become one for each, or the other way round
        before = state.asked if state.asked.shape == asked.shape else jnp.full_like(asked, OTHER)
        old, changed = (state.mask, before), jnp.any(asked != before)
        mask, asked = refreshing.refreshed(pruning.cycle, context, refresh, inputs, old, target, changed)
        new = PruneState(mask, asked, new_score, new_grow)
        return zeroed(target, kept(target, state, new)), new

    def kept(target: Tree, before: PruneState, after: PruneState) -> Tree:
        """Entries whose unit was kept before and is kept now: what grows again starts at 0, with moments of 0."""
        owners = structure.owners(target)
        units = trees.place(after.mask, owners)
        if regrow is not None:
            units = jax.tree.map(jnp.logical_and, units, trees.place(before.mask, owners))
        return structure.expand(units, target)

    def frozen_fn(target: Tree, state: PruneState, context: Context) -> Tree:
        return zeroed(target, kept(target, state, state))

    return zeros.constraint(Projection(init_fn, apply_fn, frozen_fn), kept)


def _refreshed(
    pruning: Pruning,
    target: Tree,
    owners: Tree,
    before: Tree,
    score_state: State,
    grow_state: State,
    context: Context,
    since: jax.Array,
    carry: bool,
) -> Tree:
    """The units that are kept from now on."""
    structure, amount = pruning.structure, pruning.amount
    measure = pruning.score.of_weights if structure.whole and pruning.select is None else None
    values = pruning.score.score(target, score_state, context) if measure is None else target
    ready = {"finite": jax.tree.map(jnp.isfinite, target)}
    if pruning.select is not None:
        ready["chosen"] = random_draws.choose(pruning.select, structure.reduce(values), pruning.key, context.count)
    # With latent weights a removed unit competes again by its score; without them it is 0, and stays removed.
    units = masks.pool(values, structure, owners, measure=measure, before=None if carry else before, **ready)
    removed = masks.removed(units, amount, since)
    if pruning.regrow is None:
        kept = masks.cut(units, structure, amount, removed)
        return kept if carry else jax.tree.map(jnp.logical_and, kept, before)
    # Two cuts: the first removes more than asked, by score; the second fills up again, by the score of growth.
    share = pruning.regrow(since)
    stay = masks.cut(units, structure, amount, masks.before_growth(units, amount, removed, before, share))
    units = masks.pool(pruning.grow.score(target, grow_state, context), structure, owners, safe=stay, **ready)
    return masks.cut(units, structure, amount, removed)


def _restricted(context: Context, only: Callable[[Tree], Tree]) -> Context:
    grad = None if context.grad is None else only(context.grad)
    return context._replace(params=only(context.params), landed=only(context.landed), grad=grad)


def _stored(structure: Structure, units: Tree) -> Tree:
    """Masks as the state keeps them: in the boxes of the params only where they have their shapes."""
    return units if structure.whole else trees.by_path(units)


def _check_regrow(
    regrow: Number | Schedule | None, structure: Structure, carry: bool, inner: optax.GradientTransformation | None
) -> None:
    if regrow is None:
        return
    remedy = "It resets the moments of what grows again, so it must own the optimizer: `inner=optax.adam(1e-3)`."
    arguments.require(inner is not None, "inner", "be given with `regrow`", inner, remedy)
    remedy = "With latent weights, weights come back by themselves."
    arguments.require(not carry, "carry", "be False with `regrow`", carry, remedy)
    arguments.check_schedule(regrow, "regrow", "a fraction or a schedule of it")
    if not callable(regrow):
        remedy = "It is the fraction of kept weights to exchange, e.g. 0.3, or a schedule."
        arguments.fraction(regrow, "regrow", remedy)
    if isinstance(structure, Structure):
        remedy = "Use `carry=True` to let weights come back."
        arguments.require(structure.keep is None, "regrow", "be None for n_of_m", regrow, remedy)
        remedy = "A unit whose weights in and out are 0 has no gradient and would not grow. " + remedy
        arguments.require(structure.holds is None, "regrow", "be None with groups", regrow, remedy)
