"""Plain maths of masks: which units of which arrays go, exactly as many as asked for, and how many of each array."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import structures
from clipjax._arrays import arguments, dtypes, picking, trees
from clipjax._maths import counts, ranking
from clipjax.typing import PerLeaf, Structure, Tree, Where

SCOPES = ("global", "leaf", "erk")


_SPARSITY = "It is the fraction of zeros, e.g. 0.9."


def make_mask(
    scores: Tree,
    sparsity: Any = None,
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
        not named bias, b, scale or offset) of the leaves that they name have a say; all others are kept.
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
    check(sparsity, structure, scope)
    scores = jax.tree.map(jnp.asarray, scores)
    filled = jax.tree.map(lambda x: x if x.size else None, scores)
    voters = filled
    if structure.holds is not None:
        filled = _where(structure.holds, filled)
        voters = _where(picking.weights, filled)
    structure.check(filled, voters)
    scope = effective(sparsity, scope)
    check_sizes(jax.eval_shape(structure.reduce, voters), structure, scope)
    units = pool(voters, structure)
    kept = cut(units, structure, removals(sparsity, scope, units, structure.owners(filled)), scope)

    def full(x: Any, mask: Any) -> Any:
        if x is None:
            return None
        return jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)

    masks = trees.flatten(structure.expand(kept, filled))[0]
    leaves, treedef = trees.flatten(scores)
    return treedef.unflatten([full(x, mask) for x, mask in zip(leaves, masks, strict=True)])


def _where(where: Where, tree: Tree) -> Tree:
    return trees.map_with_path(lambda path, x: x if where(path, x) else None, tree)


def check(sparsity: Any, structure: Any, scope: str) -> None:
    """Check the arguments that say how much goes."""
    remedy = "Call a factory: `structures.unit()`."
    arguments.instance(structure, Structure, "structure", remedy)
    arguments.choice(scope, "scope", SCOPES)
    if structure.keep is not None:
        remedy = "This structure fixes the sparsity itself: leave it out."
        arguments.require(sparsity is None, "sparsity", "be None for n_of_m", sparsity, remedy)
        return
    arguments.require(sparsity is not None, "sparsity", "be given for this structure", sparsity, _SPARSITY)
    if arguments.known(sparsity) and not varies(sparsity):
        arguments.fraction(sparsity, "sparsity", _SPARSITY)


def check_sizes(units: Tree, structure: Structure, scope: str) -> None:
    """Refuse more units than are counted exactly: of one array, or of all together for scope "global"."""
    if structure.keep is not None:
        return
    sizes = [(path, int(u.size)) for path, u in trees.governed(units)]
    remedy = "Remove larger units (`structures.unit()`, `block()`) or n of m, or split the array."
    for path, size in sizes:
        rule = "make less than 2**32 units of each array"
        arguments.require(size <= ranking.MOST, "structure", rule, (path, size), remedy)
    total = sum(size for _, size in sizes)
    remedy = 'Use "leaf" or "erk", which compare each array alone, or larger units (`structures.unit()`).'
    ok = scope != "global" or total <= ranking.MOST
    arguments.require(ok, "scope", "compare less than 2**32 units together", (scope, total), remedy)


def varies(sparsity: Any) -> bool:
    """True for a sparsity that is given leaf by leaf: `per_leaf`, or a tree of fractions."""
    return arguments.is_tree(sparsity)


class Pool(NamedTuple):
    """The units of all governed leaves, ready to be compared.

    Attributes:
      keys: unsigned arrays, the lowest go first.
      sizes: how many units of each may go, i32 or u32.
      treedef: the structure of the tree.
    """

    keys: list[jax.Array]
    sizes: list[Any]
    treedef: Any


def pool(
    values: Tree,
    structure: Structure,
    *,
    finite: Tree = None,
    held: Tree = None,
    chosen: Tree = None,
    safe: Tree = None,
) -> Pool:
    """Order the units: those already gone lowest, those that may not go out of reach.

    Args:
      values: a tree of scores.
      structure: what makes a unit.
      finite: where the weights of `values` are finite; others count as 0 in their unit, and on their own may not go.
      held: masks of units, those that are False go first.
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
        scores = [jnp.where(f, x, jnp.zeros_like(x)) for x, f in zip(scores, alive, strict=True)]
    units, treedef = trees.arrays(structure.reduce(treedef.unflatten(scores)))
    gone = [None] * len(units) if held is None else [~m for m in jax.tree.leaves(held)]
    keys = [ranking.order(u, gone=g) for u, g in zip(units, gone, strict=True)]
    sizes: list[Any] = [u.size for u in units]
    if structure.min_keep and safe is None:
        spare = [max(n - structure.min_keep, 0) for n in sizes]
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


def cut(units: Pool, structure: Structure, removed: list[Any], scope: str) -> Tree:
    """Masks of units without the lowest `removed` of the pool (scope "global"), or of each leaf."""
    if not units.keys:
        return units.treedef.unflatten([])
    if structure.keep is not None:
        return units.treedef.unflatten([structure.keep(x) for x in units.keys])
    pooled = scope == "global"
    free = ranking.open_count(units.keys)
    free = jnp.full_like(free, free.sum(dtype=jnp.uint32)) if pooled else free
    counts = jnp.stack([jnp.asarray(n, jnp.uint32) for n in removed])
    return units.treedef.unflatten(ranking.keep(units.keys, jnp.minimum(counts, free), pooled=pooled))


def effective(sparsity: Any, scope: str) -> str:
    """A sparsity given leaf by leaf leaves nothing to compare across leaves."""
    return "leaf" if varies(sparsity) else scope


def removals(sparsity: Any, scope: str, units: Pool, tree: Tree) -> list[Any]:
    """How many units of each leaf go; of all together for scope "global"."""
    if sparsity is None or not units.keys:
        return []
    if scope == "global":
        return [counts.of_fraction(sparsity, sum(units.sizes))] * len(units.sizes)
    return [
        counts.of_fraction(s, n) for s, n in zip(shares(sparsity, scope, units.sizes, tree), units.sizes, strict=True)
    ]


def shares(sparsity: Any, scope: str, sizes: list[Any], tree: Tree) -> list[Any]:
    """The sparsity of every governed leaf."""
    named = trees.governed(tree)
    if scope == "erk":
        return _erdos_renyi(sparsity, [leaf.shape for _, leaf in named], sizes)
    if varies(sparsity) and not isinstance(sparsity, PerLeaf):
        given = dict(trees.governed(sparsity))
        missing = [path for path, _ in named if path not in given]
        arguments.require(
            not missing, "sparsity", "name every picked leaf", missing, "Leave the others out with `where`."
        )
        fractions = [given[path] for path, _ in named]
    else:
        fractions = [arguments.resolve(sparsity, path, leaf) for path, leaf in named]
    for fraction in fractions:
        arguments.fraction(fraction, "sparsity", _SPARSITY)
    return fractions


def _erdos_renyi(sparsity: Any, shapes: list[tuple[int, ...]], sizes: list[Any]) -> list[Any]:
    """Densities in proportion to sum(shape) / prod(shape), at most 1, that keep (1 - sparsity) of all units together.

    Whatever would be denser than 1 is dense, and the others share what it leaves, until none is.
    """
    static = arguments.known(sparsity) and all(isinstance(n, int) for n in sizes)
    xp: Any = np if static else jnp
    real = np.float64 if static else jnp.float32
    raw = xp.asarray([sum(shape) / math.prod(shape) for shape in shapes], real)
    n = xp.stack([xp.asarray(size).astype(real) for size in sizes])
    kept = (1 - xp.asarray(sparsity, real)) * n.sum()
    dense, density = xp.zeros(len(shapes), bool), raw
    for _ in shapes:
        weight = xp.where(dense, 0, raw * n).sum()
        scale = (kept - xp.where(dense, n, 0).sum()) / xp.where(weight > 0, weight, 1)
        density = xp.where(dense, 1, xp.clip(scale * raw, 0, 1))
        dense = density >= 1
    return [1 - float(d) for d in density] if static else list(1 - density)
