"""The number of units of each leaf that go: the one reading of `sparsity` and `scope`, and the exact counts."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, picked_leaves, trees
from clipjax._maths import exact_counts, wide
from clipjax._maths.wide import Wide
from clipjax.typing import Leaf, Number, PerLeaf, Schedule, Sparsity, Structure, Tree, Where

SCOPES = ("global", "leaf", "erk")
_REMEDY = "It is the fraction of zeros, e.g. 0.9; `per_leaf` or a tree gives every leaf its own."


Sizes: TypeAlias = Sequence[int] | Wide
"""How many units of each leaf may go; traced where a selection draws the candidates."""


class Leaves(NamedTuple):
    """The leaves that own units, in any order.

    Attributes:
      owners: their paths and arrays.
      sizes: how many units of each may go; of each of its layers, where it has several.
      depths: how many layers each has.
      axes: the axes of its layers.
    """

    owners: list[tuple[str, Leaf]]
    sizes: Sizes
    depths: list[int]
    axes: list[tuple[int, ...]]


class Amount(NamedTuple):
    """A sparsity, read.

    Attributes:
      pooled: True where the units of all leaves are compared together.
      scheduled: True where it changes with the count.
      asked: `asked(owners) -> f32`, the fraction, or one for each leaf, for which a mask would be made at any count; 0
        for a schedule; for a structure that fixes it its `kind`.
      default: the `where` without a caller's own: embeddings are left out unless they have a fraction of their own.
      check: `check(owners)` raises where a leaf has no fraction, or a wrong one.
      removed: `removed(count, leaves)`, how many units go: of each layer of each leaf, or where `pooled` of all
        together, a scalar.
    """

    pooled: bool
    scheduled: bool
    asked: Callable[[Tree], jax.Array]
    check: Callable[[Tree], object]
    removed: Callable[[jax.Array | None, Leaves], Wide]
    default: Where = picked_leaves.layers


def resolve(sparsity: Sparsity, structure: Structure, scope: str) -> Amount:
    """Read `sparsity` and `scope` for a structure.

    Raises:
      ValueError: for an unknown scope, a sparsity outside [0, 1), one beside a structure that fixes it, a missing one.
    """
    arguments.instance(structure, Structure, "structure", "Call a factory: `structures.unit()`.")
    arguments.choice(scope, "scope", SCOPES)
    if structure.keep is not None:
        remedy = "This structure fixes the sparsity itself: leave it out."
        arguments.require(sparsity is None, "sparsity", "be None for n_of_m", sparsity, remedy)
        kind = functools.partial(_kind, structure)
        return Amount(scope == "global", False, kind, lambda owners: None, lambda count, leaves: wide.of(0))
    arguments.require(sparsity is not None, "sparsity", "be given for this structure", sparsity, _REMEDY)
    if arguments.is_tree(sparsity):  # also `per_leaf`, a tuple: with own fractions no leaves are compared with others
        return _leaf_by_leaf(sparsity)
    scheduled = arguments.is_schedule(sparsity)
    arguments.check_schedule(sparsity, "sparsity", "a fraction of zeros or a schedule of it")
    if not scheduled:
        arguments.fraction(sparsity, "sparsity", _REMEDY)
    asked = _nothing if scheduled else lambda owners: jnp.asarray(sparsity, jnp.float32)
    removed = _uniform(arguments.schedule(sparsity), scope)
    return Amount(scope == "global", scheduled, asked, lambda owners: None, removed)


def _kind(structure: Structure, owners: Tree) -> jax.Array:
    """A number that differs where a structure that fixes the sparsity keeps other entries of these leaves."""
    kind = structure.kind
    if structure.axes is not None:
        axes = [structure.axes(path, leaf) for path, leaf in trees.governed(owners)]
        kind = zlib.crc32(repr((kind, axes)).encode()) >> 8  # f32 holds 24 bits
    return jnp.asarray(kind, jnp.float32)


def _nothing(owners: Tree) -> jax.Array:
    return jnp.zeros(())


def _uniform(schedule: Schedule, scope: str) -> Callable[[jax.Array | None, Leaves], Wide]:
    """The counts for one fraction."""

    def removed(count: jax.Array | None, leaves: Leaves) -> Wide:
        fraction: Number = schedule(count)  # type: ignore[arg-type, assignment]
        arguments.scalar(fraction, "sparsity", _REMEDY)
        if scope == "global":
            return exact_counts.of_fraction(fraction, _together(leaves))
        if scope == "leaf":
            return exact_counts.of_fraction(fraction, leaves.sizes)
        return exact_counts.of_fraction(_erdos_renyi(fraction, leaves), leaves.sizes)

    return removed


def _together(leaves: Leaves) -> int | Wide:
    """How many units may go of all leaves."""
    if isinstance(leaves.sizes, Wide):
        return wide.total(wide.times(leaves.sizes, np.asarray(leaves.depths, np.uint32)), 0)
    return sum(size * depth for size, depth in zip(leaves.sizes, leaves.depths, strict=True))


def _leaf_by_leaf(sparsity: Tree) -> Amount:
    """The counts for fractions by path."""

    def fractions(owners: Tree) -> dict[str, Number]:
        found = picked_leaves.values(sparsity, owners)
        missing = [path for path, _ in trees.governed(owners) if path not in found]
        remedy = "Leave the others out with `where`."
        arguments.require(not missing, "sparsity", "name every picked leaf", missing, remedy)
        for fraction in found.values():
            arguments.fraction(fraction, "sparsity", _REMEDY)
        return found

    def removed(count: jax.Array | None, leaves: Leaves) -> Wide:
        found = fractions(dict(leaves.owners))
        return exact_counts.of_fraction([found[path] for path, _ in leaves.owners], leaves.sizes)

    def asked(owners: Tree) -> jax.Array:
        return jnp.asarray(list(fractions(owners).values()) or 0.0, jnp.float32)

    return Amount(False, False, asked, fractions, removed, _picks_own(sparsity))


def _picks_own(sparsity: Tree) -> Where:
    """Leaves with a fraction of their own, embeddings too; a tree must name all others that are picked by default."""
    if isinstance(sparsity, PerLeaf):
        fn = sparsity.fn
        return lambda path, leaf: picked_leaves.weights(path, leaf) and fn(path, leaf) is not None
    named = dict(trees.governed(sparsity))
    return lambda path, leaf: picked_leaves.layers(path, leaf) or (picked_leaves.weights(path, leaf) and path in named)


def _erdos_renyi(sparsity: Number, leaves: Leaves) -> Number | list[float]:
    """Densities in proportion to sum(shape) / prod(shape), at most 1, that keep (1 - sparsity) of all units together.

    A leaf that would be denser than 1 is dense, and the others share the rest, until none would be. The shape is that
    of one layer.
    """
    static = arguments.known(sparsity) and not isinstance(leaves.sizes, Wide)
    xp: ModuleType = np if static else jnp
    real = np.float64 if static else jnp.float32
    at = zip(leaves.owners, leaves.axes, strict=True)
    shapes = [[n for i, n in enumerate(leaf.shape) if i not in axes] for (_, leaf), axes in at]
    raw = xp.asarray([sum(shape) / math.prod(shape) for shape in shapes], real)
    sizes = wide.real(leaves.sizes) if isinstance(leaves.sizes, Wide) else xp.asarray(leaves.sizes, real)
    n = sizes * xp.asarray(leaves.depths, real)
    kept = (1 - xp.asarray(sparsity, real)) * n.sum()
    dense, density = xp.zeros(len(shapes), bool), raw
    for _ in shapes:  # each round makes at least one more leaf dense, or changes nothing
        weight = xp.where(dense, 0, raw * n).sum()
        scale = (kept - xp.where(dense, n, 0).sum()) / xp.where(weight > 0, weight, 1)
        density = xp.where(dense, 1, xp.clip(scale * raw, 0, 1))
        dense = density >= 1
    return [1 - float(d) for d in density] if static else 1 - density
