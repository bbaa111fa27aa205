"""Structures: what is removed together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, sharding, trees
from clipjax._maths import blocks
from clipjax._programs import groups as grouping
from clipjax.typing import Groups, Structure, Tree


def _leafwise(
    reduce: Callable[[jax.Array], jax.Array],
    check: Callable[[str, Any], None],
    expand: Callable[[jax.Array, jax.Array], jax.Array] = lambda units, leaf: units,
    **rest: Any,
) -> Structure:
    """The structure of leaves that are cut each on its own."""
    return Structure(
        functools.partial(jax.tree.map, reduce),
        lambda params, voters: trees.map_with_path(check, params) and None,
        functools.partial(jax.tree.map, expand),
        **rest,
    )


def element() -> Structure:
    """Each weight on its own.

    Returns:
      A `Structure`.
    """
    return _leafwise(lambda scores: scores, lambda path, leaf: None, whole=True)


def n_of_m(n: int, m: int, axis: int = -2) -> Structure:
    """The n best of every m neighbours along an axis, for hardware that skips the others (2:4).

    It fixes the sparsity, 1 - n/m; the last group is padded with what goes first, so it keeps up to n too. Among equal
    scores the earlier position is kept.

    Args:
      n: how many stay, 0 < n <= m. Static, as are the others.
      m: the size of a group.
      axis: the axis of the groups; -2 is the input of Flax's Dense and Conv kernels.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for n or m out of range, and at init for an axis that does not exist.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> scores = jnp.array([4.0, 1.0, 3.0, 2.0, 5.0])
      >>> clipjax.make_mask(scores, structure=n_of_m(2, 4, axis=0)).tolist()
      [True, False, True, False, True]

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378.
    """
    for name, value in (("n", n), ("m", m)):
        arguments.static(value, name)
    arguments.axis(axis)
    arguments.whole(n, "n", low=1, remedy="Give how many of a group stay, e.g. 2.")
    arguments.whole(m, "m", low=1, remedy="Give the size of a group, e.g. 4.")
    arguments.require(n <= m, "n", "be at most `m`", n, f"A group has {m} entries.")

    def keep(keys: jax.Array) -> jax.Array:
        at = axis % keys.ndim
        size = keys.shape[at]
        groups = blocks.split(keys, at, m)
        place = jax.lax.broadcasted_iota(jnp.int32, groups.shape, at + 1)
        rank = jnp.zeros(groups.shape, jnp.int32)
        for j in range(m):  # how many of the group come before: no sort
            other = jax.lax.slice_in_dim(groups, j, j + 1, axis=at + 1)
            rank += ((other > groups) | ((other == groups) & (j < place))).astype(jnp.int32)
        return sharding.laid_as(blocks.join(rank < n, at, size), keys)

    return _leafwise(lambda scores: scores, _has_axis(axis), whole=True, keep=keep)


def block(height: int, width: int) -> Structure:
    """Blocks of the last two axes; sparsity counts blocks, the last of which may be smaller.

    A block's score is the mean of its entries'.

    Args:
      height: rows of a block, along axis -2. Static, as is the other.
      width: columns of a block, along axis -1.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for a size below 1, and at init for an array of rank below 2.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> scores = jnp.array([[1.0, 1.0, 5.0], [1.0, 1.0, 0.0]])
      >>> clipjax.make_mask(scores, 0.5, structure=block(2, 2)).tolist()
      [[False, False, True], [False, False, True]]

    References:
      Narang et al., "Block-Sparse Recurrent Neural Networks", 2017, https://arxiv.org/abs/1711.02782.
    """
    for name, value in (("height", height), ("width", width)):
        arguments.static(value, name)
        arguments.whole(value, name, low=1, remedy="Give the size of a block, e.g. 16.")

    def totals(x: jax.Array) -> jax.Array:
        return blocks.split(blocks.split(x, x.ndim - 1, width), x.ndim - 2, height).sum((-3, -1))

    def reduce(scores: jax.Array) -> jax.Array:
        return totals(scores) / totals(jnp.ones_like(scores))

    def expand(units: jax.Array, leaf: jax.Array) -> jax.Array:
        for axis, size in ((units.ndim - 2, height), (units.ndim - 1, width)):
            repeated = jnp.broadcast_to(
                jnp.expand_dims(units, axis + 1), blocks.resized(units, axis, (units.shape[axis], size))
            )
            units = blocks.join(repeated, axis, leaf.shape[axis])
        return sharding.laid_as(units, leaf)

    return _leafwise(reduce, _has_axis(-2), expand)


def unit(axis: int = -1, reduce: str = "mean", min_keep: int = 1, groups: Groups | None = None) -> Structure:
    """Whole units: all weights that share an index of `axis`, e.g. a neuron's or an output channel's incoming weights.

    Sparsity counts units. A unit's score is the mean of its entries'.

    With `groups`, the same that `shrink` takes, the entries of a unit are those of all leaves of its group: a kernel's
    outputs, their biases, the batch norm's scale and offset, the next kernel's inputs. They are exactly 0 together, so
    that `shrink` can cut them. The score is taken over all entries of the leaves that `where` picks (by default, and in
    `make_mask`, the weights); biases and scales die with their unit and have no vote. The first leaf must have one: the
    mask has its place and its path (in `report`, and for `scope`, `min_keep` and a tree of fractions, which count per
    group). What no group names is not pruned. A unit without weights in and out has no gradient, so nothing grows
    again (`regrow`); with `carry=True` it can come back as it was.

    Args:
      axis: the axis of the units; -1 is the output of Flax's Dense and Conv kernels, -2 the heads of the kernels that
        `nn.MultiHeadDotProductAttention` projects with. `groups` name their own.
      reduce: how the scores of a unit become one: "mean", "sum" or "max".
      min_keep: how many units every array (group) keeps, so that no layer dies.
      groups: dicts path -> axis, or a tuple of axes. A path is that of the params, with or without Linen's "params/" in
        front. Running statistics, named mean or var, are passed over, and so is a leaf that is None or `MaskedNode`.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for an unknown reduction, a negative `min_keep`, an axis beside groups, and at init for an axis that
        does not exist, an unknown path, sizes that do not match, a first leaf that `where` does not pick or that
        another group begins with.
      TypeError: for groups that are not dicts of paths.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> clipjax.make_mask(jnp.array([[1.0, 9.0], [1.0, 0.0]]), 0.5, structure=unit()).tolist()
      [[False, True], [False, True]]
      >>> scores = {"in": jnp.array([[1.0, 2.0]]), "bias": jnp.array([0.0, 9.0]), "out": jnp.array([[7.0], [0.0]])}
      >>> masks = clipjax.make_mask(scores, 0.5, structure=unit(groups=[{"in": -1, "bias": 0, "out": 0}]))
      >>> masks["in"].tolist(), masks["bias"].tolist(), masks["out"].tolist()
      ([[True, False]], [True, False], [[True], [False]])

    References:
      D0, section 2.2, steps 1 and 2: a "node" is a unit's incoming weights. Fang et al., "DepGraph: Towards Any
      Structural Pruning", 2023, https://arxiv.org/abs/2301.12900.
    """
    arguments.choice(reduce, "reduce", ("mean", "sum", "max"))
    arguments.whole(min_keep, "min_keep", low=0, remedy="Give the number of units to keep.")
    arguments.axis(axis)
    arguments.static(min_keep, "min_keep")
    if groups is not None:
        arguments.require(axis == -1, "axis", "be left out with `groups`", axis, "They name the axis of every leaf.")
        return _grouped(groups, reduce, int(min_keep))
    fn: Any = {"mean": jnp.mean, "sum": jnp.sum, "max": jnp.max}[reduce]

    def reduce_unit(scores: jax.Array) -> jax.Array:
        others = tuple(i for i in range(scores.ndim) if i != axis % scores.ndim)
        return fn(scores, axis=others, keepdims=True)

    return _leafwise(reduce_unit, _has_axis(axis), min_keep=int(min_keep))


def _grouped(groups: Groups, reduce: str, min_keep: int) -> Structure:
    """Units that several leaves share."""
    groups = grouping.of_params(groups)
    names = {path for group in groups for path in group}
    found = functools.partial(grouping.resolve, groups, partial=True)

    def reduce_units(scores: Tree) -> Tree:
        units: dict[int, Any] = {}
        for members in filter(None, found(scores)):
            units[members[0].index] = _pooled(members, reduce)
        return _placed(units, scores)

    def expand(units: Tree, tree: Tree) -> Tree:
        values = trees.flatten(units)[0]
        masks: dict[int, Any] = {}
        for members in filter(None, found(tree)):
            for m in members:
                spread = _spread(values[members[0].index], m, members[0])
                masks[m.index] = spread if m.index not in masks else masks[m.index] & spread
        return _placed(masks, tree)

    def owners(tree: Tree) -> Tree:
        return _placed({members[0].index: members[0].leaf for members in filter(None, found(tree))}, tree)

    def holds(path: str, leaf: Any) -> bool:
        return path.removeprefix("params/") in names

    check = functools.partial(grouping.check_params, groups)
    return Structure(reduce_units, check, expand, owners, holds, min_keep)


def _placed(values: Mapping[int, Any], like: Tree) -> Tree:
    """A tree with these values by the index of their leaf, None at all others."""
    leaves, treedef = trees.flatten(like)
    return treedef.unflatten([values.get(i) for i in range(len(leaves))])


class _Fold(NamedTuple):
    """How many scores become one: along axes, of two arrays, of none."""

    along: Any
    pair: Any
    none: float


_SUM, _MAX = _Fold(jnp.sum, jnp.add, 0.0), _Fold(jnp.max, jnp.maximum, -jnp.inf)


def _pooled(members: list[grouping.Member], reduce: str) -> jax.Array:
    """The score of every unit of a group over all entries, in the shape that broadcasts to the first leaf."""
    first, fold = members[0], _MAX if reduce == "max" else _SUM
    total = functools.reduce(fold.pair, [_totals(m, first, fold) for m in members])
    count = sum(m.leaf.size for m in members) // grouping.units_of(first)
    return total / count if reduce == "mean" else total


def _totals(member: grouping.Member, first: grouping.Member, fold: _Fold) -> jax.Array:
    """One value a unit from the entries of one leaf, along the other axes first; on a mesh the same everywhere."""
    x, n = member.leaf, grouping.units_of(first)
    values = fold.along(x, axis=tuple(i for i in range(x.ndim) if i != x.ndim + member.axis))
    if jax.typeof(x).sharding.mesh.empty:
        values = fold.along(jnp.reshape(values, (member.repeats, n)), axis=0)
    else:  # a reduction over entries that other devices hold adds up one value a unit, where a reshape would gather
        shape = (n, n * member.repeats)
        mine = jax.lax.broadcasted_iota(jnp.int32, shape, 1) % n == jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        values = fold.along(jnp.where(mine, values[None], jnp.full_like(values, fold.none)[None]), axis=1)
    return _laid(_replicated(values), *_slot(first, n, spread=False), first.leaf)


def _spread(units: jax.Array, member: grouping.Member, first: grouping.Member) -> jax.Array:
    """The units of a group along the axis of one of its leaves."""
    n = grouping.units_of(first)
    row = _laid(_replicated(units), (1, n), (None, None), member.leaf)
    row = jnp.broadcast_to(row, (member.repeats, n))
    return _laid(row, *_slot(member, n * member.repeats), member.leaf)


def _replicated(x: jax.Array) -> jax.Array:
    """A few values, the same on every device of a mesh, lest a leaf be sharded as another one of its group is."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or set(mesh.axis_types) != {jax.sharding.AxisType.Auto}:
        return x
    return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P()))


def _slot(member: grouping.Member, size: int, spread: bool = True) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """The shape of one value for each entry of a member's axis, and how the leaf shards it."""
    at, ndim = member.leaf.ndim + member.axis, member.leaf.ndim
    spec = (*jax.typeof(member.leaf).sharding.spec, *[None] * ndim)
    sites = range(ndim)
    return tuple(size if i == at else 1 for i in sites), tuple(spec[i] if i == at and spread else None for i in sites)


def _laid(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...], like: jax.Array) -> jax.Array:
    """A few values in another shape; where mesh axes are explicit, sharded as the leaf that they meet."""
    mesh = jax.typeof(like).sharding.mesh
    explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    return jnp.reshape(x, shape, out_sharding=jax.NamedSharding(mesh, jax.P(*spec)) if explicit else None)


def _has_axis(axis: int) -> Callable[[str, Any], None]:
    def check(path: str, leaf: Any) -> None:
        remedy = f"Leaf {path!r} has rank {leaf.ndim}; choose an axis it has, or leave it out with `where`."
        arguments.require(-leaf.ndim <= axis < leaf.ndim, "axis", "exist in every picked leaf", axis, remedy)

    return check
