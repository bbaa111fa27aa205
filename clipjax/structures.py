"""Structures: which weights `prune_mask` removes together, as `prune_mask(0.5, structure=structures.unit())`."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, leaf_axes, sharding, trees
from clipjax._maths import split_axes
from clipjax._programs import group_units
from clipjax.typing import Groups, Leaf, PerLeaf, Structure

__all__ = ["Structure", "block", "element", "n_of_m", "unit"]


def __dir__() -> list[str]:
    return __all__


_MIN_KEEP = "Give how many of each array are kept at least, e.g. 1, or 0 to let an array vanish."


def element(min_keep: int = 1) -> Structure:
    """Each weight on its own, the default.

    The best `min_keep` weights of every array are kept, so that no layer is removed whole. Of n weights in L arrays
    that are compared together min(round(sparsity * n), n - L * min_keep) go: where one array may not lose more, the
    others do. With `select=` all of these are numbers of the weights that it selects.

    Args:
      min_keep: how many weights of every array are kept, whatever their scores. Static.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for a negative `min_keep`.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> clipjax.make_mask(jnp.array([4.0, 1.0, 3.0]), 0.5, structure=element()).tolist()
      [True, False, False]
    """
    arguments.static(min_keep, "min_keep")
    arguments.whole(min_keep, "min_keep", low=0, remedy=_MIN_KEEP)
    return _leafwise(lambda path, scores: scores, lambda path, leaf: None, min_keep=int(min_keep), whole=True)


def n_of_m(n: int, m: int, axis: int | tuple[int, ...] | PerLeaf = -2) -> Structure:
    """Keep the n best of every m neighbours along an axis, for hardware that skips the others (2:4).

    It fixes the sparsity at 1 - n/m, so `prune_mask` takes none. A last group of fewer than m keeps up to n too. Among
    equal scores the earlier position is kept.

    Several axes are flattened in the order in which they are written, the last one running fastest. The output kernel
    of an attention, f32[heads, head_dim, d], is multiplied as a matrix of heads * head_dim inputs, so its neighbours
    are those along ``axis=(0, 1)``; those of a convolution, f32[h, w, in, out], lie along ``axis=(0, 1, 2)`` where it
    is computed as a product of matrices. ``axis=analysis.inputs`` of `clipjax.analyze` has the axes of every kernel.

    Args:
      n: how many of m are kept, 0 < n <= m. Static, as are the others.
      m: how many neighbours are compared.
      axis: the axis along which they are neighbours; -2 is the input of Flax's Dense and Conv kernels. Or a tuple of
        axes, or `per_leaf`.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for n or m out of range, and at init for an axis that does not exist or is named twice, and a leaf
        for which `per_leaf` names none.

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
    arguments.whole(n, "n", low=1, remedy="Give how many of a group stay, e.g. 2.")
    arguments.whole(m, "m", low=1, remedy="Give the size of a group, e.g. 4.")
    arguments.require(n <= m, "n", "be at most `m`", n, f"A group has {m} entries.")
    given = leaf_axes.plain(axis)

    def keep(keys: jax.Array, axes: tuple[int, ...] = given) -> jax.Array:
        # Groups that do not cross the end of the last axes lie along these alone: no others are flattened.
        axes = tuple(axis % keys.ndim for axis in axes)
        sizes = [keys.shape[axis] for axis in axes]
        apart = next((i for i in range(len(axes) - 1, 0, -1) if math.prod(sizes[i:]) % m == 0), 0)
        line, at = split_axes.flattened(keys, axes[apart:])
        groups = split_axes.split(line, at, m)
        place = jax.lax.broadcasted_iota(jnp.int32, groups.shape, at + 1)
        # The rank of an entry is the number of its group that precede it: larger keys, and equal ones at an earlier
        # place. m comparisons instead of a sort, which would gather a sharded array.
        rank = jnp.zeros(groups.shape, jnp.int32)
        for j in range(m):
            other = jax.lax.slice_in_dim(groups, j, j + 1, axis=at + 1)
            rank += ((other > groups) | ((other == groups) & (j < place))).astype(jnp.int32)
        kept = split_axes.join(rank < n, at, line.shape[at])
        return sharding.laid_as(split_axes.unflattened(kept, axes[apart:], keys.shape), keys)

    kind = zlib.crc32(repr((int(n), int(m))).encode()) >> 8  # f32 holds 24 bits
    axes_at = functools.partial(leaf_axes.named, axis)
    return _leafwise(lambda path, scores: scores, axes_at, whole=True, keep=keep, kind=float(kind), axes=axes_at)


def block(height: int, width: int, min_keep: int = 1) -> Structure:
    """Rectangles of `height` x `width` entries in the last two axes; sparsity counts blocks.

    The score of a block is the mean of the scores of its entries. Blocks at the lower and the right edge are smaller
    where the sizes do not divide.

    Args:
      height: rows of a block, along axis -2. Static, as is the other.
      width: columns of a block, along axis -1.
      min_keep: how many blocks of every array are kept, whatever their scores; 0 lets an array vanish.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for a size below 1 or a negative `min_keep`, and at init for an array of rank below 2.

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
    arguments.static(min_keep, "min_keep")
    arguments.whole(min_keep, "min_keep", low=0, remedy=_MIN_KEEP)

    def totals(x: jax.Array) -> jax.Array:
        return split_axes.split(split_axes.split(x, x.ndim - 1, width), x.ndim - 2, height).sum((-3, -1))

    def reduce(path: str, scores: jax.Array) -> jax.Array:
        return totals(scores) / totals(jnp.ones_like(scores))

    def expand(units: jax.Array, leaf: jax.Array) -> jax.Array:
        for axis, size in ((units.ndim - 2, height), (units.ndim - 1, width)):
            repeated = jnp.broadcast_to(
                jnp.expand_dims(units, axis + 1), split_axes.resized(units, axis, (units.shape[axis], size))
            )
            units = split_axes.join(repeated, axis, leaf.shape[axis])
        return sharding.laid_as(units, leaf)

    return _leafwise(reduce, functools.partial(leaf_axes.named, -2), expand, min_keep=int(min_keep))


def unit(
    axis: int | tuple[int, ...] | PerLeaf = -1,
    reduce: Literal["mean", "sum", "max"] = "mean",
    min_keep: int = 1,
    groups: Groups | None = None,
    round_to: int | None = None,
) -> Structure:
    """Whole units: all weights at one index of `axis`, such as the weights into one neuron or one output channel.

    Sparsity counts units. The score of a unit is, by default, the mean of the scores of its entries.

    With ``axis=analysis.outputs`` of `clipjax.analyze`, or any `per_leaf`, a unit is one entry of all axes together
    that it names for the leaf: the query kernel of an attention, f32[d, heads, head_dim], has heads * head_dim units
    with the axes (-2, -1). A plain tuple has another meaning, the next one.

    An array may be a stack of layers, as `nn.scan` makes them. With one axis the same units go in all of its layers;
    with ``axis=(0, -1)`` axis 0 is that of the layers, and each loses units of its own. All layers of a stack lose the
    same number, so that it can shrink: round(sparsity * units) with scope "leaf". With scope "global" all arrays have
    one threshold t. If c units of a stack of L layers score below t, each layer loses its floor(c / L) lowest. Together
    all arrays lose round(sparsity * n) of n units, or less by at most L - 1 where t falls inside a stack. The exception
    is a `select` that draws other candidates at every refresh: what earlier refreshes removed stays removed.

    Hardware multiplies in tiles: a layer of 123 units is no faster than one of 128. With ``round_to=8`` a multiple of 8
    units of each array stays (of each layer, of each group), or all of them. If K of n would stay otherwise, it is the
    multiple nearest to K, n counting as one; of two that are as near the larger one, and the next larger one where the
    nearest is below `min_keep`, so that by default an array of fewer than 8 units loses none. With scope "leaf" and
    "erk" K follows from the sparsity of the array; with scope "global" from the common threshold, and every array is
    rounded on its own: what that adds to one is not taken from another.

    With `groups` a unit extends over several leaves: the outputs of a kernel, their biases, the scale and offset of a
    batch norm, the inputs of the next kernel. All entries of a removed unit are exactly 0 in all of these leaves, so
    that `shrink`, called with the same groups, can cut them out.

    - The score of a unit is taken over its entries in the leaves that `where` picks: by default, and always in
      `make_mask`, the weights (rank >= 2, not named bias, b, scale or offset). Biases and scales become 0 with their
      unit but have no part in its score.
    - The first leaf of a group must be one that `where` picks. The mask of the group's units is stored under its path,
      which `report` shows. `scope`, `min_keep` and a tree of fractions count the units of the group at this leaf.
    - Leaves that no group names are not pruned.
    - A group of an analysis may say that each of the layers that are stacked in its leaves has units of its own. All of
      them lose the same number, as with an axis of layers.
    - A removed unit has neither weights in nor weights out, so its gradients are 0 and it cannot grow again: `regrow`
      is refused. With `carry=True` its latent weights are kept, and a later refresh can restore it.

    Args:
      axis: the axis of the units; -1 is the output of Flax's Dense and Conv kernels, -2 the heads of the kernels that
        project in `nn.MultiHeadDotProductAttention`. A tuple names the axes of layers first and that of the units last;
        `per_leaf` names, for each leaf, the axis or the axes whose entries are its units. Leave it out with `groups`,
        which name the axis of each leaf.
      reduce: how the scores of its entries become the score of a unit: "mean", "sum" or "max".
      min_keep: how many units are kept of every array (of every layer, of every group), so that none is removed whole.
      groups: `Analysis.groups`, or a list of dicts path -> axis, or a tuple of axes, or a dict axis -> how many entries
        of it each unit has (see `shrink`). A path is that of the params, with or without Linen's "params/" in front.
        Leaves named mean or var are taken for running statistics, which are no params, and are left out; so are leaves
        that are None or `optax.MaskedNode`.
      round_to: the number of which a multiple of units stays, see above. Not together with `select=`. Static.

    Returns:
      A `Structure`.

    Raises:
      ValueError: for an unknown reduction, a negative `min_keep`, a `round_to` below 1 or above 65535, an empty tuple,
        and an axis together with groups; at init for an axis that does not exist or is named twice, a leaf for which
        `per_leaf` names none, an unknown path, sizes that do not match, and a first leaf that `where` does not pick or
        that is the first of another group too.
      TypeError: for groups that are not dicts of paths.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> clipjax.make_mask(jnp.array([[1.0, 9.0], [1.0, 0.0]]), 0.5, structure=unit()).tolist()
      [[False, True], [False, True]]
      >>> scores = {"in": jnp.array([[1.0, 2.0]]), "bias": jnp.array([0.0, 9.0]), "out": jnp.array([[7.0], [0.0]])}
      >>> masks = clipjax.make_mask(scores, 0.5, structure=unit(groups=[{"in": -1, "bias": 0, "out": 0}]))
      >>> masks["in"].tolist(), masks["bias"].tolist(), masks["out"].tolist()
      ([[True, False]], [True, False], [[True], [False]])
      >>> stack = jnp.array([[[1.0, 9.0]], [[8.0, 2.0]]])  # two layers of one input and two units
      >>> clipjax.make_mask(stack, 0.5, structure=unit(axis=(0, -1))).tolist()
      [[[False, True]], [[True, False]]]
      >>> mask = clipjax.make_mask(jnp.arange(20.0)[None], 0.5, structure=unit(round_to=8))  # 10 of 20 would stay
      >>> int(mask.sum())
      8

    References:
      D0, section 2.2, steps 1 and 2: a "node" is a unit's incoming weights. Fang et al., "DepGraph: Towards Any
      Structural Pruning", 2023, https://arxiv.org/abs/2301.12900.
    """
    arguments.choice(reduce, "reduce", ("mean", "sum", "max"))
    arguments.whole(min_keep, "min_keep", low=0, remedy=_MIN_KEEP)
    layers = leaf_axes.plain(axis)[:-1]
    arguments.static(min_keep, "min_keep")
    multiple = 1 if round_to is None else arguments.static(round_to, "round_to")
    remedy = "Give what the number of units is to be a multiple of, e.g. 8."
    arguments.whole(multiple, "round_to", low=1, remedy=remedy)
    arguments.require(multiple < 2**16, "round_to", "be below 65536", round_to, remedy)
    if groups is not None:
        arguments.require(axis == -1, "axis", "be left out with `groups`", axis, "They name the axis of every leaf.")
        return group_units.structure(groups, reduce, int(min_keep), int(multiple))

    def reduce_unit(path: str, scores: jax.Array) -> jax.Array:
        own = axes_at(path, scores)
        others = tuple(i for i in range(scores.ndim) if i not in own)
        if reduce == "max":
            return jnp.max(scores, axis=others, keepdims=True)
        total = jnp.sum if reduce == "sum" else jnp.mean
        return total(scores, axis=others, keepdims=True)

    axes_at = functools.partial(leaf_axes.named, axis)
    return _leafwise(reduce_unit, axes_at, min_keep=int(min_keep), layers=layers, round_to=int(multiple))


def _leafwise(
    reduce: Callable[[str, jax.Array], jax.Array],
    check: Callable[[str, Leaf], object],
    expand: Callable[[jax.Array, jax.Array], jax.Array] = lambda units, leaf: units,
    *,
    min_keep: int = 0,
    whole: bool = False,
    keep: Callable[[jax.Array, tuple[int, ...]], jax.Array] | None = None,
    kind: float = 0.0,
    layers: tuple[int, ...] = (),
    axes: Callable[[str, Leaf], tuple[int, ...]] | None = None,
    round_to: int = 1,
) -> Structure:
    """The structure that treats each leaf on its own, from functions of one array."""
    return Structure(
        functools.partial(trees.map_with_path, reduce),
        lambda params, scored: trees.map_with_path(check, params) and None,
        functools.partial(jax.tree.map, expand),
        min_keep=min_keep,
        whole=whole,
        keep=keep,
        kind=kind,
        layers=layers,
        axes=axes,
        round_to=round_to,
    )
