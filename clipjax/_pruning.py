"""Pruning after the optimizer: weights that stay exactly zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax import _arguments as arguments
from clipjax import _projecting as projecting
from clipjax import _selecting as selecting
from clipjax import _trees as trees
from clipjax import scores as scoring
from clipjax import selections, structures
from clipjax._typing import Tree, Where
from clipjax.projections import Context, Projection

SCOPES = ("global", "leaf")


class PruneState(NamedTuple):
    """State of `prune_mask` inside its `ProjectState`.

    Attributes:
      mask: bool arrays, True keeps, one entry per unit (they broadcast to the weights); None at leaves not governed.
      score: the state of the score.
    """

    mask: Any
    score: Any


def prune_mask(
    sparsity: Any = None,
    *,
    score: scoring.Score | None = None,
    structure: structures.Structure | None = None,
    scope: str = "global",
    where: Where | None = None,
    start: Any = 0,
    every: Any = None,
    stop: Any = None,
    carry: bool = False,
    inner: optax.GradientTransformation | None = None,
    regrow: Any = None,
    select: selections.Selection | None = None,
    mask: Tree = None,
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hold the weights of lowest score at exactly zero: :math:`w \leftarrow m \odot w`.

    A refresh removes exactly round(sparsity * n) of n weights (units), earlier positions being kept among equals.
    Refreshes happen at updates c >= `start` with (c - start) divisible by `every`, and at `stop`; a constant sparsity
    without `every` fires once, at `start`. What is removed stays removed, unless `carry=True` keeps the float weights
    (straight-through pruning). No sort, no gather: a refresh is a few counting passes.

    Args:
      sparsity: fraction of zeros in [0, 1), a number (may be traced), a schedule count -> fraction, or `per_leaf`
        (with scope="leaf"). None only with `mask`.
      score: which weights matter, `scores.magnitude()` by default.
      structure: what is removed together, `structures.element()` by default.
      scope: "global" compares all picked leaves together as they are; "leaf" prunes each to the sparsity.
      where: `where(path, leaf) -> bool`; by default arrays of rank >= 2 not named bias, b, scale or offset.
      start: first update that prunes; may be traced.
      every: updates between two refreshes; may be traced. 100 for a schedule.
      stop: the last refresh; may be traced. A schedule needs it.
      carry: keep the float weights, 4 bytes a weight: a weight that was cut can come back.
      inner: a transformation that sees the float weights, see `project`.
      regrow: reserved for rules that let removed weights grow again; needs `inner`.
      select: which entries (units) are candidates, redrawn at each refresh; sparsity then counts candidates.
      mask: a tree of bool arrays, True keeps, that is held as it is; may be traced. Leaves without one pass.
      key: PRNG key for random scores and selections; folded with the count.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where parameters are narrower. Extra
      arguments: `grad` for gradient scores, `refresh` as in `project`.

    Raises:
      ValueError: for a sparsity outside [0, 1), a schedule without `stop`, stop < start, every < 1, an unknown scope,
        regrow without inner, neither or both of sparsity and mask; at init for a mask of the wrong shape; at update
        for missing `params`, or a missing `grad` of a gradient score.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.5), prune_mask(0.5))
      >>> params = {"kernel": jnp.array([[1.0, -0.2], [0.3, -4.0]])}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.5, 0.0], [0.0, -2.0]]

    References:
      D2, section 2.2; D0, section 2.2; Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878.
    """
    _check_cycle(sparsity, start, every, stop, mask)
    arguments.choice(scope, "scope", SCOPES)
    arguments.static(carry, "carry")
    score = scoring.magnitude() if score is None else score
    structure = structures.element() if structure is None else structure
    arguments.instance(score, scoring.Score, "score", "Call a factory: `scores.magnitude()`.")
    _check_structure(structure)
    if select is not None:
        selections.check(select)
    if regrow is not None:
        remedy = "It resets the moments of what grows again, so it must own the optimizer: `inner=optax.adam(1e-3)`."
        arguments.require(inner is not None, "inner", "be given with `regrow`", inner, remedy)
        raise ValueError(f"`regrow` must be None in this version, got {regrow!r}. Use `carry=True` to regrow.")
    if mask is not None:
        given = {path for path, m in trees.governed(mask) if m is not True}

        def masked(path: str, leaf: Any) -> bool:
            return path in given and (where is None or where(path, leaf))

        return projecting.project(_held(mask), carry=carry, inner=inner, start=start, where=masked, key=key)
    if every is None and callable(sparsity):
        every = 100

    def pack(masks: Tree) -> Any:
        return masks if structure.whole else trees.by_path(masks)

    def init_fn(params: Tree) -> PruneState:
        trees.map_with_path(structure.check, params)
        if not callable(sparsity):
            _shares(sparsity, params)
        masks = jax.tree.map(lambda p: structure.reduce(jnp.zeros_like(p, jnp.float32)) == 0, params)
        return PruneState(pack(masks), score.init(params))

    def apply_fn(target: Tree, state: PruneState, context: Context) -> tuple[Tree, PruneState]:
        seen = score.observe(target, state.score, context)

        def refresh(target: Tree, landed: Tree) -> Any:
            values = score.score(target, seen, context)
            finite = jax.tree.map(jnp.isfinite, target)
            held = None if carry else trees.place(state.mask, target)
            chosen = None
            if select is not None:
                units = jax.tree.map(structure.reduce, values)
                chosen = selections.choose(select, units, key, context.count)
            pool = _pool(values, structure, finite, held, chosen)
            now = sparsity(context.count) if callable(sparsity) else sparsity
            masks = _cut(pool, _shares(now, target), scope == "global" and not _by_leaf(now))
            return pack(masks if held is None else jax.tree.map(jnp.logical_and, masks, held))

        mask = projecting.refreshed(context, start, every, stop, refresh, state.mask)
        new = PruneState(mask, seen)
        return _hold_mask(target, new, context), new

    return projecting.project(
        Projection(init_fn, apply_fn, _hold_mask, zeroing=True, vanishes=_removed),
        carry=carry,
        inner=inner,
        start=start,
        where=trees.weights if where is None else where,
        key=key,
    )


def make_mask(
    scores: Tree,
    sparsity: Any = None,
    *,
    structure: structures.Structure | None = None,
    scope: str = "global",
) -> Tree:
    """Masks that remove exactly round(sparsity * n) of the lowest scores; True keeps.

    Among equal scores the earlier position is kept (tree order, then row-major). NaN scores go first.

    Args:
      scores: a tree of real arrays; every leaf takes part. Integers are compared as f32.
      sparsity: fraction in [0, 1), a number (may be traced) or `per_leaf` (with scope="leaf").
      structure: what is removed together, `structures.element()` by default.
      scope: "global" compares all leaves together, "leaf" each alone.

    Returns:
      A tree of bool arrays of the shapes of `scores`.

    Raises:
      ValueError: for a sparsity outside [0, 1), None where the structure needs one, an unknown scope.

    Example:
      >>> import jax.numpy as jnp
      >>> make_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([1.0, 2.0])}, 0.5)["b"].tolist()
      [False, True]

    References:
      D2, section 2.2, step 2.
    """
    structure = structures.element() if structure is None else structure
    _check_structure(structure)
    arguments.choice(scope, "scope", SCOPES)
    remedy = "Give the fraction of zeros, e.g. 0.9."
    arguments.require(sparsity is not None, "sparsity", "be given for this structure", sparsity, remedy)
    if not isinstance(sparsity, trees.PerLeaf):
        arguments.fraction(sparsity, "sparsity", "It is the fraction of zeros, e.g. 0.9.")
    scores = jax.tree.map(jnp.asarray, scores)
    filled = jax.tree.map(lambda x: x if x.size else None, scores)
    trees.map_with_path(structure.check, filled)
    pool = _pool(filled, structure, None, None, None)
    masks = _cut(pool, _shares(sparsity, filled), scope == "global" and not _by_leaf(sparsity))
    leaves, treedef = trees.flatten(scores)
    pairs = zip(leaves, trees.flatten(masks)[0], strict=True)
    return treedef.unflatten(
        [
            None if x is None else jnp.ones(x.shape, bool) if m is None else jnp.broadcast_to(m, x.shape)
            for x, m in pairs
        ]
    )


class _Pool(NamedTuple):
    """The units of all governed leaves, ready to be compared."""

    keys: list[jax.Array]
    sizes: list[Any]
    treedef: Any


def _pool(values: Tree, structure: structures.Structure, finite: Tree, held: Tree, chosen: Tree) -> _Pool:
    """Order the units: those already gone lowest, those that may not go out of reach.

    Entries whose target is not finite count as 0 in their unit, and on their own may not go.
    """
    scores, treedef = jax.tree.flatten(values)
    if not scores:
        return _Pool([], [], treedef)
    dtype = trees.widest(scores)
    scores = [x.astype(dtype) for x in scores]
    if finite is not None:
        alive = jax.tree.leaves(finite)
        scores = [jnp.where(f, x, jnp.zeros_like(x)) for x, f in zip(scores, alive, strict=True)]
    units = [structure.reduce(x) for x in scores]
    gone = [None] * len(units) if held is None else [~m for m in jax.tree.leaves(held)]
    keys = [selecting.order(u, gone=g) for u, g in zip(units, gone, strict=True)]
    sizes: list[Any] = [u.size for u in units]
    if structure.min_keep:
        spare = [max(n - structure.min_keep, 0) for n in sizes]
        best = selecting.keep(keys, jnp.asarray(spare, jnp.uint32), pooled=False)
        keys = [selecting.protect(x, b) for x, b in zip(keys, best, strict=True)]
    if finite is not None and structure.whole:
        keys = [selecting.protect(x, ~f) for x, f in zip(keys, alive, strict=True)]
    if chosen is not None:
        picked = [jnp.broadcast_to(c, u.shape) for c, u in zip(jax.tree.leaves(chosen), units, strict=True)]
        keys = [selecting.protect(x, ~c) for x, c in zip(keys, picked, strict=True)]
        sizes = [jnp.sum(c, dtype=jnp.uint32) for c in picked]
    return _Pool(keys, sizes, treedef)


def _cut(pool: _Pool, shares: list[Any], pooled: bool) -> Tree:
    """Masks without the lowest units of the pool, or of each leaf."""
    if not pool.keys:
        return pool.treedef.unflatten([])
    if pooled:
        removed = [selecting.share(shares[0], sum(pool.sizes))] * len(shares)
    else:
        removed = [selecting.share(s, n) for s, n in zip(shares, pool.sizes, strict=True)]
    free = selecting.open_count(pool.keys)
    free = jnp.full_like(free, free.sum(dtype=jnp.uint32)) if pooled else free
    return pool.treedef.unflatten(selecting.keep(pool.keys, jnp.minimum(jnp.stack(removed), free), pooled=pooled))


def _shares(sparsity: Any, tree: Tree) -> list[Any]:
    """The sparsity of every governed leaf."""
    shares = [trees.resolve(sparsity, path, leaf) for path, leaf in trees.governed(tree)]
    for share in shares:
        arguments.fraction(share, "sparsity", "It is the fraction of zeros, e.g. 0.9.")
    return shares


def _by_leaf(sparsity: Any) -> bool:
    return isinstance(sparsity, trees.PerLeaf)


def _hold_mask(target: Tree, state: PruneState, context: Context) -> Tree:
    masks = trees.place(state.mask, target)
    return jax.tree.map(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), target, masks)


def _removed(target: Tree, state: PruneState, context: Context) -> Tree:
    masks = trees.place(state.mask, target)
    return jax.tree.map(lambda w, m: ~jnp.broadcast_to(m, w.shape), target, masks)


def _held(mask: Tree) -> Projection:
    """The projection onto the zeros of a given mask."""

    def init_fn(params: Tree) -> PruneState:
        given = trees.match(mask, params)
        return PruneState(trees.map_with_path(_as_mask, params, given), ())

    def apply_fn(target: Tree, state: PruneState, context: Context) -> tuple[Tree, PruneState]:
        return _hold_mask(target, state, context), state

    return Projection(init_fn, apply_fn, _hold_mask, zeroing=True, vanishes=_removed)


def _as_mask(path: str, p: jax.Array, m: Any) -> jax.Array:
    m = jnp.asarray(m)
    remedy = f"Leaf {path!r} has shape {p.shape}."
    tail = p.shape[p.ndim - m.ndim :] if m.ndim <= p.ndim else None
    ok = m.dtype == bool and tail is not None and all(a in (1, b) for a, b in zip(m.shape, tail, strict=True))
    arguments.require(ok, "mask", "hold bool arrays that broadcast to the params", (m.dtype, m.shape), remedy)
    return jnp.zeros_like(p, dtype=bool) | m.reshape((1,) * (p.ndim - m.ndim) + m.shape)


def _check_cycle(sparsity: Any, start: Any, every: Any, stop: Any, mask: Tree) -> None:
    one = (sparsity is None) != (mask is None)
    remedy = "Give a fraction of zeros, or `mask=` to hold a given tree."
    arguments.require(one, "sparsity", "be given, or else `mask`, not both", sparsity, remedy)
    if not _by_leaf(sparsity):
        arguments.fraction(sparsity, "sparsity", "It is the fraction of zeros, e.g. 0.9.")
    arguments.times(start, every, stop)
    if callable(sparsity):
        arguments.require(
            stop is not None, "stop", "be given with a schedule", stop, "It is the update that refreshes last."
        )


def _check_structure(structure: Any) -> None:
    arguments.instance(structure, structures.Structure, "structure", "Call a factory: `structures.unit()`.")
