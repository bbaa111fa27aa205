"""Gradients times a factor that follows from their norm, of all arrays together or of each."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax._gradients import incoming
from clipjax._maths import norms
from clipjax.typing import Tree


def places(params: Tree) -> Tree:
    """A number for each leaf, by path: 0, 1, ... in the order of the tree that results, whatever that of the params."""
    numbers, treedef = trees.arrays(trees.by_path(jax.tree.map(lambda p: 0, params)))
    return treedef.unflatten([jnp.asarray(i, jnp.int32) for i in range(len(numbers))])


def measured(total: Tree, chosen: Tree, place: Tree | None) -> list[tuple[str, jax.Array | None]]:
    """What norms are taken of: each leaf with its path, entries that are not chosen set to 0.

    In the order of their places in the state where leaves have some, and then with None for those without a gradient.
    """
    rows = zip(trees.paths(total), trees.flatten(total)[0], trees.flatten(chosen)[0], strict=True)
    picked: list[tuple[str, jax.Array | None]] = [
        (path, elementwise.where(m, x, jnp.zeros_like(x))) for path, x, m in rows if x is not None
    ]
    if place is None:
        return picked
    by_path, order = dict(picked), [path for path, _ in trees.governed(place)]
    unknown = sorted(by_path.keys() - set(order))
    trees.check_state(not unknown, f"gradients at {unknown}, where there were no params")
    return [(path, by_path.get(path)) for path in order]


def norm_of(
    measured: list[tuple[str, jax.Array | None]], ord: float, axis_name: incoming.AxisName, each: bool
) -> jax.Array:
    """The norm: one, or one for each leaf, 0 for a leaf without a gradient."""
    given = [(path, x) for path, x in measured if x is not None]
    over: dict[str, tuple[str, ...]] = {}
    if axis_name is not None:
        names, arrays = [path for path, _ in given], [x for _, x in given]
        over = dict(zip(names, incoming.sharded_over(axis_name, names, arrays), strict=True))
    arrays = [jnp.zeros((1,)) if x is None else x for _, x in measured]
    return norms.norm(arrays, ord, axes=[over.get(path, ()) for path, _ in measured], each=each)


def of_weights(total: Tree, params: Tree | None) -> Tree:
    """The params in the places of gradients, for norms that are taken alike."""
    remedy = "Its threshold is relative to the weights: `tx.update(grads, state, params)`."
    arguments.require(params is not None, "params", "be given", params, remedy)
    leaves, treedef = trees.flatten(total)
    weights = trees.flatten(params)[0]
    remedy = "Pass the params that the gradients belong to."
    arguments.require(len(weights) == len(leaves), "params", "have a leaf for each gradient", len(weights), remedy)
    rows = zip(leaves, weights, strict=True)
    return treedef.unflatten([None if x is None else jnp.asarray(p, dtypes.wide(p.dtype)) for x, p in rows])


def mean(norm: jax.Array, total: Tree, chosen: Tree, place: Tree | None, axis_name: incoming.AxisName) -> jax.Array:
    """The root mean square over the chosen entries, from their 2-norm."""
    counted = measured(jax.tree.map(jnp.ones_like, total), chosen, place)
    root = norm_of(counted, 2, axis_name, place is not None).astype(norm.dtype)
    return jnp.where(root > 0, norm / jnp.where(root > 0, root, jnp.ones_like(root)), norm)


def factors(total: Tree, measured: list[tuple[str, jax.Array | None]], factor: jax.Array) -> list[jax.Array]:
    """The factor of each leaf: its own where there is one for each that was measured, else the one of all."""
    own = dict(zip((path for path, _ in measured), factor, strict=True)) if factor.ndim else {}
    return [own.get(path, factor) for path in trees.paths(total)]


def rescaled(total: Tree, chosen: Tree, factors: list[jax.Array]) -> Tree:
    """The chosen entries times the factor of their leaf, the others as they are."""
    leaves, treedef = trees.flatten(total)
    rows = zip(leaves, factors, trees.flatten(chosen)[0], strict=True)
    return treedef.unflatten([None if x is None else elementwise.where(m, _scaled(x, f), x) for x, f, m in rows])


@elementwise.leafwise
def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    wide = dtypes.wide(x.dtype)
    scaled = (x.astype(wide) * factor.astype(wide)).astype(x.dtype)
    return elementwise.where(factor != 1, scaled, x)  # a product with 1 would flush denormals
