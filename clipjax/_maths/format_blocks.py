"""Blocks of a format on an array: which entries share scales, and codes and scales as matrices.

A block is a box: `size` neighbours along the input axes flattened in order, which ends with an axis or divides it, and
likewise some outputs where a format has scales for several. In the state scales have the rank of the array, an entry
for each block; along the axes of the array they are cut and sharded as it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, leaf_axes, picking, sharding
from clipjax._maths import blocks
from clipjax.typing import Axis, Format, Leaf, PerLeaf, Scales


class FormatBlocks(NamedTuple):
    """The blocks of one array.

    Attributes:
      outputs: the axes of the array that keep scales of their own, in order.
      box: how many entries of a block lie along each axis.
    """

    outputs: tuple[int, ...]
    box: tuple[int, ...]


def resolve(form: Format, axis: Axis | PerLeaf, path: str, leaf: Leaf) -> FormatBlocks:
    """Read `axis` for one leaf that is on a format: by default the last axis is the output, of embeddings all others.

    Raises:
      ValueError: for an axis that does not exist, and for inputs that no whole blocks make up.
    """
    kept = leaf_axes.resolve(axis, path, leaf)
    if kept is None:  # a table is looked up by its first axes, and a runtime reads its rows
        kept = tuple(range(leaf.ndim))[slice(0, -1) if picking.embedding(path) else slice(max(leaf.ndim - 1, 1), None)]
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
    return FormatBlocks(outputs, tuple(box) if leaf.size else tuple(max(n, 1) for n in leaf.shape))


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


def shape(leaf: Leaf, placed: FormatBlocks) -> tuple[int, ...]:
    """The shape of scales in the state: an entry for each block, at least one along each axis."""
    return tuple(max(n // b, 1) for n, b in zip(leaf.shape, placed.box, strict=True))


def view(x: jax.Array, placed: FormatBlocks) -> jax.Array:
    """The array as x[..., block], as the functions of a format take it; before the blocks are the axes of the array."""
    for i in reversed(range(x.ndim)):
        x = blocks.split(x, i, placed.box[i])
    x, at = blocks.flattened(x, _inside(placed))
    return jnp.moveaxis(x, at, -1)


def joined(x: jax.Array, placed: FormatBlocks, like: jax.Array) -> jax.Array:
    """The array that a view is of, sharded as another one."""
    counts, inside = shape(like, placed), _inside(placed)
    apart = tuple(n for pair in zip(counts, placed.box, strict=True) for n in pair)
    x = blocks.unflattened(jnp.moveaxis(x, -1, inside[0]), inside, apart)
    for i, size in enumerate(like.shape):
        x = blocks.join(x, i, size)
    return sharding.laid_as(x, like)


def _inside(placed: FormatBlocks) -> tuple[int, ...]:
    """The axes that lie within blocks, of an array each of whose axes is cut in two."""
    return tuple(2 * i + 1 for i in range(len(placed.box)))


def stored(scales: Scales) -> Scales:
    """Scales [..., 1] of a view as the state has them; one of the whole array stays a scalar."""
    return tuple(jax.lax.squeeze(s, [s.ndim - 1]) if s.ndim else s for s in scales)


def spread(scales: Scales, like: jax.Array) -> Scales:
    """Scales for every entry of an array, in their own dtypes.

    A TPU's compiler stores what is broadcast in blocks before it is used. Behind a barrier that is the scale as the
    format has it, 1 or 2 bytes a weight, where it else were several arrays of 4 that are computed from it.
    """
    return tuple(s if s.ndim == 0 else _spread(s, like) for s in scales)


def _spread(scale: jax.Array, like: jax.Array) -> jax.Array:
    wide = blocks.spread(scale, like.shape)
    if wide is scale or scale.dtype.itemsize > 2:
        return wide
    return jax.lax.platform_dependent(wide, tpu=jax.lax.optimization_barrier, default=lambda x: x)


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
