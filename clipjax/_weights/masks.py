"""Plain maths of masks: the units of all leaves as one pool, and which of them go, exactly as many as asked for."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipjax import structures
from clipjax._arrays import arguments, dtypes, elementwise, picking, trees
from clipjax._maths import ranking
from clipjax._weights import sparsities
from clipjax.typing import Leaf, Sparsity, Structure, Tree, Where


def make_mask(
    scores: Tree,
    sparsity: Sparsity = None,
    *,
    structure: Structure | None = None,
    scope: str = "global",
) -> Tree:
    """Masks that remove exactly round(sparsity * n) of the lowest scores; True keeps.

    Among equal scores the earlier position is kept (tree order, then row-major). NaN scores go first.

    Args:
      scores: a tree of real arrays; every leaf takes part. Integers are compared as f32.
      sparsity: fraction in [0, 1), a number (may be traced), `per_leaf`, or a tree of fractions, for scope "leaf". None
        where the structure fixes it.
      structure: what is removed together, `structures.element()` by default. With groups only the weights (rank >= 2,
        not named bias, b, scale or offset) of the leaves that they name are scored; all others are kept.
      scope: "global" compares all leaves together; "leaf" each alone; "erk" too, with a sparsity that follows from the
        shape, see `prune_mask`. Both round for each leaf, so that the total may be off by half a unit a leaf.

    Returns:
      A tree of bool arrays of the shapes of `scores`.

    Raises:
      ValueError: for a sparsity outside [0, 1), None where the structure needs one, an unknown scope, and 2**32 units
        or more that are compared.

    Example:
      >>> import jax.numpy as jnp
      >>> make_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([1.0, 2.0])}, 0.5)["b"].tolist()
      [False, True]

    References:
      D2, section 2.2, step 2.
    """
    structure = structures.element() if structure is None else structure
    amount = sparsities.resolve(sparsity, structure, scope)
    remedy = "A mask is made once, at no count: give the fraction itself."
    arguments.require(not amount.scheduled, "sparsity", "be a number or a tree, not a schedule", sparsity, remedy)
    scores = jax.tree.map(jnp.asarray, scores)
    filled = jax.tree.map(lambda x: x if x.size else None, scores)
    scored = filled
    if structure.holds is not None:
        filled = _where(structure.holds, filled)
        scored = _where(picking.weights, filled)
    structure.check(filled, scored)
    check_sizes(jax.eval_shape(structure.reduce, scored), structure, amount)
    units, owners = pool(scored, structure), structure.owners(filled)
    kept = cut(units, structure, amount, amount.removed(None, units.sizes, owners))

    def full(x: jax.Array | None, mask: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        return jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)

    masks = trees.flatten(structure.expand(kept, filled))[0]
    leaves, treedef = trees.flatten(scores)
    return treedef.unflatten([full(x, mask) for x, mask in zip(leaves, masks, strict=True)])


def _where(where: Where, tree: Tree) -> Tree:
    return trees.map_with_path(lambda path, x: x if where(path, x) else None, tree)


def check_sizes(units: Tree, structure: Structure, amount: sparsities.Amount) -> None:
    """Refuse more units than are counted exactly: of one array, or of all that are compared together."""
    if structure.keep is not None:
        return
    sizes = [(path, int(u.size)) for path, u in trees.governed(units)]
    remedy = "Remove larger units (`structures.unit()`, `block()`) or n of m, or split the array."
    for path, size in sizes:
        rule = "make less than 2**32 units of each array"
        arguments.require(size <= ranking.MOST, "structure", rule, (path, size), remedy)
    total = sum(size for _, size in sizes)
    remedy = 'Use "leaf" or "erk", which compare each array alone, or larger units (`structures.unit()`).'
    ok = not amount.pooled or total <= ranking.MOST
    arguments.require(ok, "scope", "compare less than 2**32 units together", ("global", total), remedy)


class Pool(NamedTuple):
    """The units of all governed leaves, ready to be compared.

    Attributes:
      keys: unsigned arrays, the lowest go first.
      sizes: how many units of each may go, i32 or u32.
      treedef: the structure of the tree.
    """

    keys: list[jax.Array]
    sizes: list[int | jax.Array]
    treedef: jax.tree_util.PyTreeDef


def pool(
    values: Tree,
    structure: Structure,
    *,
    finite: Tree = None,
    before: Tree = None,
    chosen: Tree = None,
    safe: Tree = None,
) -> Pool:
    """Order the units: those already gone lowest, those that may not go highest.

    Each key is protected in turn, and no protection is ever lifted, so the order of the steps does not matter but for
    the first: `min_keep` protects the best units by their scores, before any other reason has changed their keys.

    Args:
      values: a tree of scores.
      structure: what makes a unit.
      finite: where the weights of `values` are finite; others count as 0 in their unit, and on their own may not go.
      before: masks of units, those that are False go first.
      chosen: masks of units, only these may go, and only they are counted.
      safe: masks of units that stay.
    """
    scores, treedef = trees.arrays(values)
    if not scores:
        return Pool([], [], treedef)
    dtype = dtypes.widest(scores)
    scores = [x.astype(dtype) for x in scores]
    if finite is not None:
        alive = jax.tree.leaves(finite)
        scores = [elementwise.where(f, x, jnp.zeros_like(x)) for x, f in zip(scores, alive, strict=True)]
    units, treedef = trees.arrays(structure.reduce(treedef.unflatten(scores)))
    gone = [None] * len(units) if before is None else [~m for m in jax.tree.leaves(before)]
    keys = [ranking.order(u, gone=g) for u, g in zip(units, gone, strict=True)]
    sizes: list[int | jax.Array] = [u.size for u in units]
    if structure.min_keep and safe is None:
        spare = [max(u.size - structure.min_keep, 0) for u in units]
        best = ranking.keep(keys, jnp.asarray(spare, jnp.uint32), pooled=False)
        keys = [ranking.protect(x, b) for x, b in zip(keys, best, strict=True)]
    if finite is not None and structure.whole:
        keys = [ranking.protect(x, ~f) for x, f in zip(keys, alive, strict=True)]
    if safe is not None:
        keys = [ranking.protect(x, s) for x, s in zip(keys, jax.tree.leaves(safe), strict=True)]
    if chosen is not None:
        picked = [jnp.broadcast_to(c, u.shape) for c, u in zip(jax.tree.leaves(chosen), units, strict=True)]
        keys = [ranking.protect(x, ~c) for x, c in zip(keys, picked, strict=True)]
        sizes = [jnp.sum(c, dtype=jnp.uint32) for c in picked]
    return Pool(keys, sizes, treedef)


def cut(units: Pool, structure: Structure, amount: sparsities.Amount, removed: list[jax.Array]) -> Tree:
    """Masks of units without the lowest `removed` of each leaf, or of the pool."""
    if not units.keys:
        return units.treedef.unflatten([])
    if structure.keep is not None:
        return units.treedef.unflatten([structure.keep(x) for x in units.keys])
    free = ranking.open_count(units.keys)  # protected units stay, also where more than the others are asked for
    free = jnp.full_like(free, free.sum(dtype=jnp.uint32)) if amount.pooled else free
    counts = jnp.stack([jnp.asarray(n, jnp.uint32) for n in removed])
    return units.treedef.unflatten(ranking.keep(units.keys, jnp.minimum(counts, free), pooled=amount.pooled))


def as_mask(path: str, p: Leaf, m: object) -> jax.Array:
    """A given mask of one leaf, in its shape and with its sharding."""
    mask = jnp.asarray(m)
    remedy = f"Leaf {path!r} has shape {p.shape}."
    tail = p.shape[p.ndim - mask.ndim :] if mask.ndim <= p.ndim else None
    ok = mask.dtype == bool and tail is not None and all(a in (1, b) for a, b in zip(mask.shape, tail, strict=True))
    rule = "hold bool arrays that broadcast to the params"
    arguments.require(ok, "mask", rule, (mask.dtype, mask.shape), remedy)
    return jnp.zeros_like(p, dtype=bool) | mask.reshape((1,) * (p.ndim - mask.ndim) + mask.shape)
