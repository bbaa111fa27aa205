"""Blocks of a format on an array: which entries share scales, and codes and scales as matrices.

A block is a box: `size` neighbours along the input axes flattened in order, which ends with an axis or divides it, and
likewise some outputs where a format has scales for several. In the state scales have the rank of the array, an entry
for each block; along the axes of the array they are cut and sharded as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, leaf_axes, picked_leaves, sharding
from clipjax._maths import split_axes
from clipjax.typing import Axis, Format, Leaf, PerLeaf, Scales, Tree


class FormatBlocks(NamedTuple):
    """The blocks of one array.

    Attributes:
      outputs: the axes of the array that keep scales of their own, in order.
      box: how many entries of a block lie along each axis.
      shape: of the array.
    """

    outputs: tuple[int, ...]
    box: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The shape of scales in the state: an entry for each block, at least one along each axis."""
        return tuple(max(n // b, 1) for n, b in zip(self.shape, self.box, strict=True))

    @property
    def cut(self) -> list[int]:
        """The axes that blocks cut in two; the others lie in blocks as a whole, or not at all."""
        return [i for i, (n, b) in enumerate(zip(self.shape, self.box, strict=True)) if 1 < b < n]

    @property
    def first(self) -> list[int]:
        """The axis of a view that each axis of the array is, or, where it is cut, the one along which blocks follow."""
        return [i + sum(j < i for j in self.cut) for i in range(len(self.shape))]

    @property
    def within(self) -> tuple[int, ...]:
        """The axes of a view that blocks lie along, in the order of the array."""
        return tuple(self.first[i] + (i in self.cut) for i, b in enumerate(self.box) if b > 1)


def resolve(form: Format, axis: Axis | PerLeaf, path: str, leaf: Leaf) -> FormatBlocks:
    """Read `axis` for one leaf that is on a format: by default the last axis is the output, of embeddings all others.

    An analysis names no outputs of an embedding, as nothing is contracted there; its rows are blocks all the same.

    Raises:
      ValueError: for an axis that does not exist, and for inputs that no whole blocks make up.
    """
    kept, table = leaf_axes.resolve(axis, path, leaf), picked_leaves.table(path)
    if kept is None or (table and not kept):  # a table is looked up by its first axes, and a runtime reads its rows
        kept = tuple(range(leaf.ndim))[slice(0, -1) if table else slice(max(leaf.ndim - 1, 1), None)]
    outputs = tuple(sorted(kept))
    inputs = tuple(i for i in range(leaf.ndim) if i not in outputs)
    remedy = f"Leaf {path!r} has shape {leaf.shape}: name its output axes alone, or leave it out with `where`."
    arguments.require(inputs, "axis", "leave an axis for the blocks of a format", axis, remedy)
    box = [1] * leaf.ndim
    for size, axes, kind in ((form.block, inputs, "inputs"), (form.across, outputs, "outputs")):
        total = math.prod(leaf.shape[i] for i in axes)
        remedy = (
            f"Leaf {path!r} has {kind} of shape {tuple(leaf.shape[i] for i in axes)}: name its output axes by `axis`,"
            " choose a format of smaller blocks, or leave it out with `where` or by `per_leaf`."
        )
        left = _laid(box, total if size is None else size, axes, leaf.shape)
        whole = left == 1 or not leaf.size
        arguments.require(whole, "bits", f"have blocks that divide the {kind} of every picked leaf", form.name, remedy)
    return FormatBlocks(outputs, tuple(box) if leaf.size else tuple(max(n, 1) for n in leaf.shape), tuple(leaf.shape))


def _laid(box: list[int], left: int, axes: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Lay this many neighbours along some axes flattened in order, into `box`; returns what finds no place, 1 for none.

    They fill the last axes, and a part of the one before.
    """
    for i in reversed(axes):
        n = shape[i]
        if left % max(n, 1) == 0 and left >= n:
            box[i], left = n, left // max(n, 1)
        elif n % left == 0:
            box[i], left = left, 1
        else:
            return 0
    return left


def counts_of(size: int | None, outputs: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the scales of blocks of so many inputs, None for all of them; None where they do not divide."""
    inputs = tuple(i for i in range(len(shape)) if i not in {axis % len(shape) for axis in outputs})
    total = math.prod(shape[i] for i in inputs)
    box = [1] * len(shape)
    if not math.prod(shape) or _laid(box, total if size is None else size, inputs, shape) != 1:
        return None
    return FormatBlocks(outputs, tuple(box), shape).counts


def view(x: jax.Array, placed: FormatBlocks) -> jax.Array:
    """The array with those axes cut in two that blocks end on the way of, so that blocks lie along whole axes."""
    for i in reversed(placed.cut):
        x = split_axes.split(x, i, placed.box[i])
    return x


def viewed(fn: Callable[[jax.Array, Tree], jax.Array], x: jax.Array, args: Tree, placed: FormatBlocks) -> jax.Array:
    """The view of `fn(x, args)`, an elementwise function that a reduction along blocks follows.

    Arrays of `args` have the shape of x, or none. A TPU's compiler stores what is done to the array before the view,
    and what is done to the view as well if no barrier keeps it there. A GPU's stores a choice that is made in the view.
    """

    def before(x: jax.Array, args: Tree) -> jax.Array:
        return view(fn(x, args), placed)

    def inside(x: jax.Array, args: Tree) -> jax.Array:
        split = lambda a: view(a, placed) if jnp.ndim(a) else a  # noqa: E731
        x, args = jax.lax.optimization_barrier(jax.tree.map(split, (x, args)))
        return fn(x, args)

    return jax.lax.platform_dependent(x, args, tpu=inside, default=before)


def joined(x: jax.Array, placed: FormatBlocks, like: jax.Array) -> jax.Array:
    """The array that a view is of, sharded as another one."""
    for i in placed.cut:
        x = split_axes.join(x, i, like.shape[i])
    return sharding.laid_as(x, like)


def stored(scales: Scales, placed: FormatBlocks) -> Scales:
    """Scales of a view as the state has them, of the rank of the array; one of the whole array stays a scalar."""
    inside = [i + n + 1 for n, i in enumerate(placed.cut)]
    return tuple(jax.lax.squeeze(s, inside) if s.ndim else s for s in scales)


def in_view(scales: Scales, placed: FormatBlocks) -> Scales:
    """Scales of the state as they broadcast to the view of an array."""
    inside = [i + n + 1 for n, i in enumerate(placed.cut)]
    return tuple(jax.lax.expand_dims(s, inside) if s.ndim else s for s in scales)


def spread(scales: Scales, like: jax.Array) -> Scales:
    """Scales for every entry of an array, in their own dtypes.

    A TPU's compiler stores what is broadcast in blocks before it is used. Behind a barrier that is the scale as the
    format has it, 1 or 2 bytes a weight, where it else were several arrays of 4 that are computed from it.
    """
    return tuple(s if s.ndim == 0 else _spread(s, like) for s in scales)


def _spread(scale: jax.Array, like: jax.Array) -> jax.Array:
    wide = split_axes.spread(scale, like.shape)
    if wide is scale or scale.dtype.itemsize > 2:
        return wide
    return jax.lax.platform_dependent(wide, tpu=jax.lax.optimization_barrier, default=_same)


def _same(x: jax.Array) -> jax.Array:
    return x


def matrix(
    codes: jax.Array | np.ndarray, scales: tuple[jax.Array | np.ndarray, ...], outputs: tuple[int, ...]
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Codes [outputs…, inputs] and scales [blocks of outputs…, blocks of inputs] in NumPy, as files have them.

    The axes of the outputs stay as they are, all others are flattened in order and come last. A scalar stays one.
    """
    found = [np.asarray(x) for x in (codes, *scales)]
    ndim = found[0].ndim
    kept = [i % ndim for i in outputs]
    order = [*kept, *(i for i in range(ndim) if i not in kept)]
    rows = [x if not x.ndim else np.transpose(x, order) for x in found]
    flat = [x if not x.ndim else x.reshape(*x.shape[: len(kept)], -1) for x in rows]
    return flat[0], tuple(flat[1:])
