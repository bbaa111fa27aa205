"""Pruning after the optimizer: weights that stay exactly zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax import scores as scoring
from clipjax import selections, structures
from clipjax._arrays import arguments, picking, trees
from clipjax._maths import counts
from clipjax._weights import masks, projecting, refreshing
from clipjax.typing import Context, Projection, Score, Selection, Structure, Tree, Where


class PruneState(NamedTuple):
    """State of `prune_mask` inside its `ProjectState`.

    Attributes:
      mask: bool arrays, True keeps, one entry per unit (they broadcast to the weights); None at leaves not governed.
      score: the state of the score.
      grow: the state of the score by which removed weights grow again; () without `regrow`.
    """

    mask: Any
    score: Any
    grow: Any


def prune_mask(
    sparsity: Any = None,
    *,
    score: Score | None = None,
    structure: Structure | None = None,
    scope: str = "global",
    where: Where | None = None,
    start: Any = 0,
    every: Any = None,
    stop: Any = None,
    carry: bool = False,
    inner: optax.GradientTransformation | None = None,
    regrow: Any = None,
    grow: Score | None = None,
    select: Selection | None = None,
    mask: Tree = None,
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hold the weights of lowest score at exactly zero: :math:`w \leftarrow m \odot w`.

    A refresh removes exactly round(sparsity * n) of n weights (units), earlier positions being kept among equals.
    Refreshes happen at updates c >= `start` with (c - start) divisible by `every`, and at `stop`; a constant sparsity
    without `every` fires once, at `start`. What is removed stays removed, unless `carry=True` keeps the float weights
    (straight-through pruning), or `regrow` exchanges a part of what is kept. No sort, no gather: a refresh is a few
    counting passes.

    With `inner=optimizer` the moments of removed weights are 0, and a weight that grows again starts at 0 without any:
    every array of the optimizer's state that has the shape of its param is cleared; factored moments stay.

    Args:
      sparsity: fraction of zeros in [0, 1), a number (may be traced), a schedule count -> fraction, `per_leaf`, or a
        tree of fractions at the paths of the leaves. None with `mask`, and for a structure that fixes it.
      score: which weights matter, `scores.magnitude()` by default.
      structure: what is removed together, `structures.element()` by default.
      scope: "global" compares all picked leaves together as they are; "leaf" prunes each to the sparsity; "erk" each to
        one that follows from its shape (Erdős–Rényi-kernel): the density is in proportion to sum(shape) / prod(shape),
        at most 1, and all leaves together keep 1 - sparsity.
      where: `where(path, leaf) -> bool`; by default arrays of rank >= 2 not named bias, b, scale or offset.
      start: first update that prunes; may be traced.
      every: updates between two refreshes; may be traced. 100 for a schedule.
      stop: the last refresh; may be traced. A schedule needs it.
      carry: keep the float weights, 4 bytes a weight: a weight that was cut can come back.
      inner: a transformation that sees the float weights, see `project`. The gradient that it gets is also the `grad`
        of scores, unless the caller passes another.
      regrow: the fraction of kept weights that each refresh exchanges, in [0, 1) or a schedule, e.g.
        `optax.cosine_decay_schedule(0.3, stop)`; needs `inner`. 0 exchanges none, but lets weights grow back when the
        sparsity falls (AC/DC).
      grow: which removed weights grow first: `scores.gradient(decay=0.0)` by default (RigL); `scores.random()` is SET.
      select: which entries (units) are candidates, redrawn at each refresh; sparsity then counts candidates.
      mask: a tree of bool arrays, True keeps, that is held as it is; may be traced. Leaves without one pass.
      key: PRNG key for random scores and selections; folded with the count. `jax.random.key(0)` by default, as in
        `fake_quantize`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where parameters are narrower. Extra
      arguments: `grad` for gradient scores, `refresh` as in `project`.

    Raises:
      ValueError: for a sparsity outside [0, 1), a schedule without `stop`, stop < start, every < 1, an unknown scope,
        regrow without inner, with carry or n_of_m, neither or both of sparsity and mask; at init for a mask of the
        wrong shape, for 2**32 units or more in one array, or in all with scope "global"; at update for missing
        `params`, or a missing `grad` of a gradient score.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.5), prune_mask(0.5))
      >>> params = {"kernel": jnp.array([[1.0, -0.2], [0.3, -4.0]])}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.5, 0.0], [0.0, -2.0]]

    References:
      D2, section 2.2; D0, section 2.2; Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878. Evci et al., "Rigging the
      Lottery", 2020, https://arxiv.org/abs/1911.11134. Mocanu et al., SET, 2018, https://arxiv.org/abs/1707.04780.
    """
    structure = structures.element() if structure is None else structure
    score = scoring.magnitude() if score is None else score
    grow = scoring.gradient(decay=0.0) if grow is None else grow
    for name, value in (("score", score), ("grow", grow)):
        arguments.instance(value, Score, name, "Call a factory: `scores.magnitude()`.")
    arguments.static(carry, "carry")
    if select is not None:
        selections.check(select)
    _check_regrow(regrow, structure, carry, inner)
    _check_cycle(sparsity, structure, scope, start, every, stop, mask)
    if mask is not None:
        given = {path for path, m in trees.governed(mask) if m is not True}

        def masked(path: str, leaf: Any) -> bool:
            return path in given and (where is None or where(path, leaf))

        return projecting.project(_held(mask), carry=carry, inner=inner, start=start, where=masked, key=key)
    if every is None and arguments.is_schedule(sparsity):
        every = 100
    scope = masks.effective(sparsity, scope)
    where = picking.weights if where is None else where

    def pack(units: Tree) -> Any:
        return units if structure.whole else trees.by_path(units)

    def votes(params: Tree) -> Callable[[Tree], Tree]:
        """Trees without the leaves that die with a unit but have no say."""
        return functools.partial(picking.restrict, picks=picking.pick(where, params))

    def init_fn(params: Tree) -> PruneState:
        voters = votes(params)(params)
        structure.check(params, voters)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), voters)
        units = jax.tree.map(lambda u: u == 0, structure.reduce(zeros))
        masks.check_sizes(units, structure, scope)
        if masks.varies(sparsity):
            masks.shares(sparsity, scope, [], structure.owners(params))
        return PruneState(pack(units), score.init(voters), () if regrow is None else grow.init(voters))

    def apply_fn(target: Tree, state: PruneState, context: Context) -> tuple[Tree, PruneState]:
        vote = votes(context.params)
        voters, heard = vote(target), _restricted(context, vote)
        seen = score.observe(voters, state.score, heard)
        growing = state.grow if regrow is None else grow.observe(voters, state.grow, heard)

        def refresh(target: Tree, landed: Tree) -> Any:
            voters = vote(target)
            values = score.score(voters, seen, heard)
            old = trees.place(state.mask, structure.owners(target))
            ready = {"finite": jax.tree.map(jnp.isfinite, voters)}
            if select is not None:
                ready["chosen"] = selections.choose(select, structure.reduce(values), key, context.count)
            now = sparsity(context.count) if arguments.is_schedule(sparsity) else sparsity
            units = masks.pool(values, structure, held=None if carry else old, **ready)
            removed = masks.removals(now, scope, units, structure.owners(target))
            if regrow is None:
                kept = masks.cut(units, structure, removed, scope)
                return pack(kept if carry else jax.tree.map(jnp.logical_and, kept, old))
            share = regrow(context.count) if callable(regrow) else regrow
            stay = masks.cut(units, structure, _before_growth(removed, units, old, share, scope), scope)
            units = masks.pool(grow.score(voters, growing, heard), structure, safe=stay, **ready)
            return pack(masks.cut(units, structure, removed, scope))

        mask = refreshing.refreshed(context, start, every, stop, refresh, state.mask)
        new = PruneState(mask, seen, growing)
        kept = survives(target, state, new)
        return jax.tree.map(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), target, kept), new

    def survives(target: Tree, before: PruneState, after: PruneState) -> Tree:
        """What grows again starts at zero: its weight, and its moments."""
        owners = structure.owners(target)
        units = trees.place(after.mask, owners)
        if regrow is not None:
            units = jax.tree.map(jnp.logical_and, units, trees.place(before.mask, owners))
        return structure.expand(units, target)

    def hold_fn(target: Tree, state: PruneState, context: Context) -> Tree:
        kept = survives(target, state, state)
        return jax.tree.map(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), target, kept)

    return projecting.project(
        Projection(init_fn, apply_fn, hold_fn, survives=survives),
        carry=carry,
        inner=inner,
        start=start,
        where=where if structure.holds is None else structure.holds,
        key=key,
    )


def _restricted(context: Context, vote: Callable[[Tree], Tree]) -> Context:
    grad = None if context.grad is None else vote(context.grad)
    return context._replace(params=vote(context.params), landed=vote(context.landed), grad=grad)


def _before_growth(removed: list[Any], units: masks.Pool, old: Tree, share: Any, scope: str) -> list[Any]:
    """How many units go before others grow in their place: the share of those that stay is exchanged."""
    alive = jnp.stack([jnp.sum(m, dtype=jnp.uint32) for m in jax.tree.leaves(old)])
    sizes = jnp.stack([jnp.asarray(n, jnp.uint32) for n in units.sizes])
    if scope == "global":
        alive, sizes = (jnp.full_like(x, x.sum(dtype=jnp.uint32)) for x in (alive, sizes))
    kept = sizes - jnp.minimum(jnp.stack([jnp.asarray(n, jnp.uint32) for n in removed]), sizes)
    grown = jnp.stack([counts.of_fraction(jnp.asarray(share, jnp.float32), n) for n in kept])
    return list(sizes - jnp.minimum(kept - grown, alive))


def _held(mask: Tree) -> Projection:
    """The projection onto the zeros of a given mask."""

    def init_fn(params: Tree) -> PruneState:
        given = trees.match(mask, params)
        return PruneState(trees.map_with_path(_as_mask, params, given), (), ())

    def survives(target: Tree, before: PruneState, after: PruneState) -> Tree:
        return trees.place(after.mask, target)

    def hold_fn(target: Tree, state: PruneState, context: Context) -> Tree:
        return jax.tree.map(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), target, survives(target, state, state))

    def apply_fn(target: Tree, state: PruneState, context: Context) -> tuple[Tree, PruneState]:
        return hold_fn(target, state, context), state

    return Projection(init_fn, apply_fn, hold_fn, survives=survives)


def _as_mask(path: str, p: jax.Array, m: Any) -> jax.Array:
    m = jnp.asarray(m)
    remedy = f"Leaf {path!r} has shape {p.shape}."
    tail = p.shape[p.ndim - m.ndim :] if m.ndim <= p.ndim else None
    ok = m.dtype == bool and tail is not None and all(a in (1, b) for a, b in zip(m.shape, tail, strict=True))
    arguments.require(ok, "mask", "hold bool arrays that broadcast to the params", (m.dtype, m.shape), remedy)
    return jnp.zeros_like(p, dtype=bool) | m.reshape((1,) * (p.ndim - m.ndim) + m.shape)


def _check_cycle(sparsity: Any, structure: Any, scope: str, start: Any, every: Any, stop: Any, mask: Tree) -> None:
    arguments.times(start, every, stop)
    if mask is not None:
        remedy = "Give a fraction of zeros, or `mask=` to hold a given tree."
        arguments.require(sparsity is None, "sparsity", "be left out with `mask`", sparsity, remedy)
        return
    masks.check(sparsity, structure, scope)
    if arguments.is_schedule(sparsity):
        arguments.require(
            stop is not None, "stop", "be given with a schedule", stop, "It is the update that refreshes last."
        )


def _check_regrow(regrow: Any, structure: Any, carry: bool, inner: Any) -> None:
    if regrow is None:
        return
    remedy = "It resets the moments of what grows again, so it must own the optimizer: `inner=optax.adam(1e-3)`."
    arguments.require(inner is not None, "inner", "be given with `regrow`", inner, remedy)
    arguments.require(
        not carry, "carry", "be False with `regrow`", carry, "With a carry weights come back by themselves."
    )
    if not callable(regrow):
        remedy = "It is the fraction of kept weights to exchange, e.g. 0.3, or a schedule."
        arguments.fraction(regrow, "regrow", remedy)
    if isinstance(structure, Structure):
        remedy = "Use `carry=True` to let weights come back."
        arguments.require(structure.keep is None, "regrow", "be None for n_of_m", regrow, remedy)
        remedy = "A unit whose weights in and out are 0 has no gradient and would not grow. " + remedy
        arguments.require(structure.holds is None, "regrow", "be None with groups", regrow, remedy)
