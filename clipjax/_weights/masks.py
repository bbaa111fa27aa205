"""Plain maths of masks: the units of all leaves as one pool, and which of them go, exactly as many as asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from clipjax import structures
from clipjax._arrays import arguments, dtypes, elementwise, picked_leaves, stacks, trees
from clipjax._maths import exact_counts, ranking, wide
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
      ValueError: for a sparsity outside [0, 1), None where the structure needs one, an unknown scope, and an array
        with an axis of 2**32 units or more.
      TypeError: for complex scores.

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
    scores = jax.tree.map(lambda x: arguments.real(x, "scores"), scores)
    filled = jax.tree.map(lambda x: x if x.size else None, scores)
    scored = filled
    if structure.holds is not None:
        filled = _where(structure.holds, filled)
        scored = _where(picked_leaves.weights, filled)
    structure.check(filled, scored)
    check_sizes(jax.eval_shape(structure.reduce, scored), structure)
    units = pool(scored, structure, structure.owners(filled))
    kept = cut(units, structure, amount, removed(units, amount, None))

    def full(x: jax.Array | None, mask: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        return jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)

    masks = trees.flatten(structure.expand(kept, filled))[0]
    leaves, treedef = trees.flatten(scores)
    return treedef.unflatten([full(x, mask) for x, mask in zip(leaves, masks, strict=True)])


def _where(where: Where, tree: Tree) -> Tree:
    return trees.map_with_path(lambda path, x: x if where(path, x) else None, tree)


def check_sizes(units: Tree, structure: Structure) -> None:
    """Refuse arrays whose units have no index of two words."""
    for path, leaf in trees.governed(units) if structure.keep is None else ():
        remedy = "Remove larger units (`structures.unit()`, `block()`) or n of m, or split the array."
        rule = "make arrays of units whose axes divide into two parts of less than 2**32 (the first 2**30)"
        arguments.require(ranking.countable(leaf.shape), "structure", rule, (path, leaf.shape), remedy)


class Pool(NamedTuple):
    """The units of all governed leaves, ready to be compared. Lists of leaves are in the order of the stacks.

    Attributes:
      keys: stacks of unsigned arrays [leaves, *layers, *units], of which the lowest go first.
      positions: which leaves are in each stack, by their place among the leaves that own units.
      layers: for each stack the axes of an array of units along which it has layers.
      along: for each stack what `Structure.keep` is given beside the keys.
      owners: path and leaf of every array of units.
      sizes: how many units of each may go; of each of its layers, where it has several.
      treedef: the structure of the tree.
    """

    keys: list[jax.Array]
    positions: list[stacks.Positions]
    layers: list[tuple[int, ...]]
    along: list[tuple[tuple[int, ...], ...]]
    owners: list[tuple[str, Leaf]]
    sizes: sparsities.Sizes
    treedef: jax.tree_util.PyTreeDef

    def stacked(self, leaves: Sequence[Tree]) -> list[Tree]:
        """Trees of arrays like those of the units, one for each leaf of the tree, as its keys are stacked."""
        return [
            jax.tree.map(lambda x, axes=axes: _layers_first(x, axes), stacks.stack(leaves, group))
            for group, axes in zip(self.positions, self.layers, strict=True)
        ]

    def depths(self) -> list[int]:
        """How many layers each leaf has."""
        of_stack = [math.prod(x.shape[1 : 1 + len(n)]) for x, n in zip(self.keys, self.layers, strict=True)]
        return [depth for depth, group in zip(of_stack, self.positions, strict=True) for _ in group]


def pool(
    values: Tree,
    structure: Structure,
    owners: Tree,
    *,
    measure: Callable[[jax.Array], jax.Array] | None = None,
    finite: Tree = None,
    before: Tree = None,
    chosen: Tree = None,
    safe: Tree = None,
) -> Pool:
    """Order the units: those already gone lowest, those that may not go highest.

    A protection is never lifted, so the order of the steps matters in one place alone: `min_keep` protects the best of
    those units that may go.

    Args:
      values: a tree of scores; of weights, where there is a `measure` of single arrays, for a structure of single
        weights.
      structure: what makes a unit.
      owners: the leaves that own units.
      measure: the scores of an array of weights. Stacks are made of the weights then, which lie in memory: stacks of
        scores would be stored beside the scores.
      finite: where the weights of `values` are finite; others count as 0 in their unit, and on their own may not go.
      before: masks of units, those that are False go first.
      chosen: masks of units, only these may go, and only they are counted.
      safe: masks of units that stay.
    """
    units, treedef = trees.arrays(values)
    if not units:
        return Pool([], [], [], [], [], [], treedef)
    dtype = dtypes.widest(units)
    if measure is None:
        units = [_finite(x.astype(dtype), f) for x, f in zip(units, _or_none(finite, units), strict=True)]
        units, treedef = trees.arrays(structure.reduce(treedef.unflatten(units)))
    for unit, mask in zip(units, _or_none(before, units), strict=True):
        fits = mask is None or mask.shape == unit.shape
        trees.check_state(fits, f"a mask of other units, of shape {getattr(mask, 'shape', None)} for {unit.shape}")
    picked = _or_none(chosen, units)
    spread = [None if c is None else jnp.broadcast_to(c, u.shape) for c, u in zip(picked, units, strict=True)]
    alone = _or_none(finite if structure.whole and measure is None else None, units)
    leaves = list(zip(units, _or_none(before, units), alone, spread, _or_none(safe, units), strict=True))
    named = trees.governed(owners)
    along = [() if structure.axes is None else (structure.axes(path, leaf),) for path, leaf in named]
    stacked = [picked_leaves.for_leaf(structure.layers, path, leaf) for path, leaf in named]
    positions = stacks.alike([path for path, _ in named], leaves, along, stacked)
    order = [i for group in positions for i in group]
    layers = [tuple(axis % units[i].ndim for axis in stacked[i]) for i, *_ in positions]
    found = Pool([], positions, layers, [along[i] for i, *_ in positions], [named[i] for i in order], [], treedef)
    scored, gone, whole, among, stays = map(list, zip(*found.stacked(leaves), strict=True))
    if measure is not None:
        whole = [jnp.isfinite(x) for x in scored]
        scored = [_finite(jax.vmap(measure)(x).astype(dtype), f) for x, f in zip(scored, whole, strict=True)]
    keys = [ranking.order(u, gone=None if m is None else ~m) for u, m in zip(scored, gone, strict=True)]
    if whole[0] is not None:
        keys = [ranking.protect(x, ~f) for x, f in zip(keys, whole, strict=True)]
    found = found._replace(keys=keys)
    sizes: sparsities.Sizes = [units[i].size // depth for i, depth in zip(order, found.depths(), strict=True)]
    depth = [len(axes) for axes in layers]
    if chosen is not None:
        keys = [ranking.protect(x, ~c) for x, c in zip(keys, among, strict=True)]
        sizes = ranking.marked(among, depth)
    if structure.min_keep and safe is None:
        keys = _with_best_protected(keys, structure.min_keep, sizes, depth)
    if safe is not None:
        keys = [ranking.protect(x, s) for x, s in zip(keys, stays, strict=True)]
    return found._replace(keys=keys, sizes=sizes)


def _or_none(masks: Tree, units: list[jax.Array]) -> list[Tree]:
    """The masks of all leaves, None for each where there are none."""
    return [None] * len(units) if masks is None else jax.tree.leaves(masks)


def _finite(scores: jax.Array, finite: jax.Array | None) -> jax.Array:
    """Scores, 0 where the weight is not finite."""
    return scores if finite is None else elementwise.where(finite, scores, jnp.zeros_like(scores))


def _with_best_protected(
    keys: list[jax.Array], min_keep: int, sizes: sparsities.Sizes, depth: list[int]
) -> list[jax.Array]:
    """The best units of every row that may go stay, so that no layer is removed whole."""
    if min_keep == 1:  # one pass for the highest key, one for its place
        best = [ranking.best(x, n) for x, n in zip(keys, depth, strict=True)]
    else:
        spare = wide.rest(wide.of(sizes), wide.of(min_keep))
        best = ranking.keep(keys, spare, pooled=False, layers=tuple(depth))
    return [ranking.protect(x, b) for x, b in zip(keys, best, strict=True)]


def removed(units: Pool, amount: sparsities.Amount, count: jax.Array | None) -> wide.Wide:
    """How many units go: of each layer of each leaf, or of the pool."""
    axes = [axes for axes, group in zip(units.layers, units.positions, strict=True) for _ in group]
    return amount.removed(count, sparsities.Leaves(units.owners, units.sizes, units.depths(), axes))


def cut(units: Pool, structure: Structure, amount: sparsities.Amount, removed: wide.Wide) -> Tree:
    """Masks of units without the lowest `removed` of each leaf, or of the pool."""
    if not units.keys:
        return units.treedef.unflatten([])
    if structure.keep is not None:
        at = zip(units.keys, units.along, strict=True)
        masks = [jax.vmap(lambda x, along=along: structure.keep(x, *along))(x) for x, along in at]  # type: ignore[misc]
    else:
        depth = tuple(len(axes) for axes in units.layers)
        places = tuple(map(tuple, units.positions))
        how = {"places": places, "layers": depth, "round_to": structure.round_to}
        masks = ranking.keep(units.keys, removed, pooled=amount.pooled, **how)
    masks = [_layers_back(x, axes) for x, axes in zip(masks, units.layers, strict=True)]
    return units.treedef.unflatten(stacks.unstack(masks, units.positions))


def before_growth(
    units: Pool, amount: sparsities.Amount, removed: wide.Wide, before: Tree, share: ArrayLike
) -> wide.Wide:
    """How many units go before others grow in their place: the share of those that stay is exchanged."""
    alive = ranking.marked(units.stacked(jax.tree.leaves(before)), [len(axes) for axes in units.layers])
    sizes = wide.of(units.sizes)
    if amount.pooled:
        depths = np.asarray(units.depths(), np.uint32)
        alive, sizes = (wide.total(wide.times(x, depths), 0) for x in (alive, sizes))
    kept = wide.rest(sizes, removed)
    grown = exact_counts.of_fraction(jnp.asarray(share, jnp.float32), kept)
    return wide.minus(sizes, wide.minimum(wide.minus(kept, grown), alive))


def _layers_first(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A stack with its axes of layers right after the first."""
    return jnp.moveaxis(x, [axis + 1 for axis in axes], range(1, 1 + len(axes))) if axes else x


def _layers_back(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.moveaxis(x, range(1, 1 + len(axes)), [axis + 1 for axis in axes]) if axes else x


def as_mask(path: str, p: Leaf, m: object) -> jax.Array:
    """A given mask of one leaf, in its shape and with its sharding."""
    mask = jnp.asarray(m)
    remedy = f"Leaf {path!r} has shape {p.shape}."
    tail = p.shape[p.ndim - mask.ndim :] if mask.ndim <= p.ndim else None
    ok = mask.dtype == bool and tail is not None and all(a in (1, b) for a, b in zip(mask.shape, tail, strict=True))
    rule = "hold bool arrays that broadcast to the params"
    arguments.require(ok, "mask", rule, (mask.dtype, mask.shape), remedy)
    return jnp.zeros_like(p, dtype=bool) | mask.reshape((1,) * (p.ndim - mask.ndim) + mask.shape)
