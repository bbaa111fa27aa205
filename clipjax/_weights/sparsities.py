"""The number of units of each leaf that go: the one reading of `sparsity` and `scope`, and the exact counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, picking, trees
from clipjax._maths import counts
from clipjax.typing import Number, PerLeaf, Schedule, Sparsity, Structure, Tree, Where

SCOPES = ("global", "leaf", "erk")
_REMEDY = "It is the fraction of zeros, e.g. 0.9; `per_leaf` or a tree gives every leaf its own."

Sizes = Sequence[int | jax.Array]
"""How many units of every leaf may go; traced where a selection draws the candidates."""


class Amount(NamedTuple):
    """A sparsity, read.

    Attributes:
      pooled: True where the units of all leaves are compared together.
      scheduled: True where it changes with the count.
      asked: `asked(owners) -> f32`, the fraction, or one for each leaf, for which a mask would be made at any count; 0
        for a schedule, and for a structure that fixes it.
      default: the `where` without a caller's own: embeddings are left out unless they have a fraction of their own.
      check: `check(owners)` raises where a leaf has no fraction, or a wrong one.
      removed: `removed(count, sizes, owners) -> u32 for each leaf`, how many units go: of each leaf, or where `pooled`
        of all together, every entry the same.
    """

    pooled: bool
    scheduled: bool
    asked: Callable[[Tree], jax.Array]
    check: Callable[[Tree], object]
    removed: Callable[[jax.Array | None, Sizes, Tree], list[jax.Array]]
    default: Where = picking.layers


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
        return Amount(scope == "global", False, _nothing, lambda owners: None, lambda count, sizes, owners: [])
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


def _nothing(owners: Tree) -> jax.Array:
    return jnp.zeros(())


def _uniform(schedule: Schedule, scope: str) -> Callable[[jax.Array | None, Sizes, Tree], list[jax.Array]]:
    """The counts for one fraction."""

    def removed(count: jax.Array | None, sizes: Sizes, owners: Tree) -> list[jax.Array]:
        fraction: Number = schedule(count)  # type: ignore[arg-type, assignment]
        arguments.scalar(fraction, "sparsity", _REMEDY)
        if scope == "global":
            return [counts.of_fraction(fraction, sum(sizes))] * len(sizes)
        fractions: Sequence[Number] = [fraction] * len(sizes)
        if scope == "erk":
            fractions = _erdos_renyi(fraction, [leaf.shape for _, leaf in trees.governed(owners)], sizes)
        return [counts.of_fraction(f, n) for f, n in zip(fractions, sizes, strict=True)]

    return removed


def _leaf_by_leaf(sparsity: Tree) -> Amount:
    """The counts for fractions by path."""

    def fractions(owners: Tree) -> list[Number]:
        found = picking.values(sparsity, owners)
        missing = [path for path, _ in trees.governed(owners) if path not in found]
        remedy = "Leave the others out with `where`."
        arguments.require(not missing, "sparsity", "name every picked leaf", missing, remedy)
        for fraction in found.values():
            arguments.fraction(fraction, "sparsity", _REMEDY)
        return list(found.values())

    def removed(count: jax.Array | None, sizes: Sizes, owners: Tree) -> list[jax.Array]:
        return [counts.of_fraction(f, n) for f, n in zip(fractions(owners), sizes, strict=True)]

    def asked(owners: Tree) -> jax.Array:
        return jnp.asarray(fractions(owners) or 0.0, jnp.float32)

    return Amount(False, False, asked, fractions, removed, _picks_own(sparsity))


def _picks_own(sparsity: Tree) -> Where:
    """Leaves with a fraction of their own, embeddings too; a tree must name all others that are picked by default."""
    if isinstance(sparsity, PerLeaf):
        fn = sparsity.fn
        return lambda path, leaf: picking.weights(path, leaf) and fn(path, leaf) is not None
    named = dict(trees.governed(sparsity))
    return lambda path, leaf: picking.layers(path, leaf) or (picking.weights(path, leaf) and path in named)


def _erdos_renyi(sparsity: Number, shapes: list[tuple[int, ...]], sizes: Sizes) -> list[Number]:
    """Densities in proportion to sum(shape) / prod(shape), at most 1, that keep (1 - sparsity) of all units together.

    A leaf that would be denser than 1 is dense, and the others share the rest, until none would be.
    """
    static = arguments.known(sparsity) and all(isinstance(n, int) for n in sizes)
    xp: ModuleType = np if static else jnp
    real = np.float64 if static else jnp.float32
    raw = xp.asarray([sum(shape) / math.prod(shape) for shape in shapes], real)
    n = xp.stack([xp.asarray(size).astype(real) for size in sizes])
    kept = (1 - xp.asarray(sparsity, real)) * n.sum()
    dense, density = xp.zeros(len(shapes), bool), raw
    for _ in shapes:  # each round makes at least one more leaf dense, or changes nothing
        weight = xp.where(dense, 0, raw * n).sum()
        scale = (kept - xp.where(dense, n, 0).sum()) / xp.where(weight > 0, weight, 1)
        density = xp.where(dense, 1, xp.clip(scale * raw, 0, 1))
        dense = density >= 1
    return [1 - float(d) for d in density] if static else list(1 - density)
