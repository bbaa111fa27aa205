"""Leaves as rows: a row for each output with its inputs flattened, and rows picked, with the scales of their blocks.

Files of other tools have the contracted axes last. A leaf becomes [outputs, inputs], or [outputs] where no axis is an
input; with one layer of a stack picked, its outputs are those of the layer. Scales of blocks become [blocks of outputs,
blocks of inputs].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from clipjax._arrays import arguments, leaf_axes, picking
from clipjax._maths.integers import Quantized
from clipjax.typing import Axis, Index, Leaf, PerLeaf

AnyLeaf = Any  # an array, its shape and dtype, or a `Quantized`

INDEX = "Give None, the number of a layer, a slice of the outputs flattened in order, or a pair (layer, slice)."
PERMUTATION = "Give each number of the rows that are picked once, or None."


class Pick(NamedTuple):
    """Rows of one leaf.

    Attributes:
      outputs: the axes of the leaf that are outputs, in order.
      layer: the index of the first of them, or None for all.
      rows: which rows of these, as a slice or as their numbers, in the order that the file has them.
      blocks: which rows of the scales: the same where a block lies in one row.
      shape: what comes out.
    """

    outputs: tuple[int, ...]
    layer: int | None
    rows: slice | np.ndarray
    blocks: slice | np.ndarray
    shape: tuple[int, ...]


def outputs(axis: Axis | PerLeaf, path: str, leaf: AnyLeaf) -> tuple[int, ...]:
    """The output axes of a leaf: of a `Quantized` its own, else those that `axis` names.

    By default the last axis is the output; of an embedding the last axis alone is none, as its blocks run along what is
    looked up; all axes are where nothing is contracted: of biases and scales, and of vectors.
    """
    if isinstance(leaf, Quantized) and leaf.format is not None:
        own = leaf.axis if isinstance(leaf.axis, tuple) else () if leaf.axis is None else (leaf.axis,)
        return tuple(sorted(i % leaf.codes.ndim for i in own))
    like = described(leaf)
    found = leaf_axes.resolve(axis, path, like) if like.ndim else ()
    if found:
        return tuple(sorted({*found}))
    if not picking.weights(path, like):
        return tuple(range(like.ndim))
    return tuple(range(like.ndim - 1)) if picking.embedding(path) else (like.ndim - 1,)


def described(leaf: AnyLeaf) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf; values that codes stand for are f32."""
    if isinstance(leaf, Quantized):
        return jax.ShapeDtypeStruct(leaf.codes.shape, np.float32)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def pick(leaf: Leaf, outputs: tuple[int, ...], index: Index, permutation: Any, where: str) -> Pick:
    """Read an index and a permutation for a leaf without blocks.

    Raises:
      ValueError: for what the leaf does not have, and for no permutation.
      TypeError: for an index that is none.
    """
    where = f"{where} has {len(outputs)} output axes, of sizes {[leaf.shape[i] for i in outputs]}."
    layer, part = _parts(index, where)
    kept = outputs
    if layer is not None:
        alone = len(outputs) == 1 and outputs[0] > 0
        remedy = f"{where} Name the axis of the layers as an output too: `axis=(0, -1)`, or `per_leaf`."
        arguments.require(outputs and not alone, "rename", "pick a layer along an axis of layers", index, remedy)
        n = leaf.shape[outputs[0]]
        arguments.require(-n <= layer < n, "rename", "pick a layer that there is", index, f"{where} {INDEX}")
        layer, kept = int(layer) % n, outputs[1:]
    whole = tuple(leaf.shape[i] for i in kept)
    rows, number = _rows(part, kept, math.prod(whole), permutation, index, where)
    inputs = [leaf.shape[i] for i in range(len(leaf.shape)) if i not in outputs]
    shape = ((number,) if kept else ()) + ((math.prod(inputs),) if inputs else ())
    return Pick(outputs, layer, rows, rows, shape)


def _parts(index: Any, where: str) -> tuple[int | None, slice | None]:
    """The layer and the slice of an index."""
    if index is None or isinstance(index, slice):
        return None, index
    if _whole(index):
        return index, None
    if isinstance(index, tuple) and len(index) == 2 and _whole(index[0]) and isinstance(index[1], slice):
        return index
    raise TypeError(f"An index that `rename` returns must be one, got {index!r}. {where} {INDEX}")


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _rows(
    part: slice | None, kept: tuple[int, ...], n: int, permutation: Any, index: Index, where: str
) -> tuple[slice | np.ndarray, int]:
    """The rows of a slice in the order of a permutation, and their number."""
    span = slice(None) if part is None else part
    number = len(range(*span.indices(n)))
    if part is not None:
        ends = [abs(i) for i in (part.start, part.stop) if i is not None]
        fits = kept and number and max(ends, default=0) <= n
        arguments.require(fits, "rename", "pick rows that there are", index, f"{where} {INDEX}")
    rows: slice | np.ndarray = span
    if permutation is not None:
        order = np.asarray(permutation)
        own = kept and order.shape == (number,) and np.array_equal(np.sort(order), np.arange(number))
        remedy = f"{where} {number} rows are picked. {PERMUTATION}"
        shown = f"{order.dtype}{list(order.shape)}"
        arguments.require(own, "rename", "return a permutation of the rows that it picks", shown, remedy)
        rows = np.arange(n)[span][order]
    return rows, number


def with_blocks(picked: Pick, q: Quantized, across: int | None, where: str) -> Pick:
    """The same with the blocks of the picked rows.

    Raises:
      ValueError: where rows that share a scale come apart, or next to rows that do not.
    """
    scale = next((s for s in q.scales if s.ndim), None)
    if across == 1 or scale is None:
        return picked
    sizes = [(q.codes.shape[i], scale.shape[i]) for i in picked.outputs]
    ids = np.arange(math.prod(blocks for _, blocks in sizes)).reshape([blocks for _, blocks in sizes])
    for i, (n, blocks) in enumerate(sizes):
        ids = np.repeat(ids, n // blocks, axis=i)
    if picked.layer is not None:
        ids = ids[picked.layer] - ids[picked.layer].min(initial=ids.size)
    ids = ids.ravel()[picked.rows]
    size = max(ids.size if across is None else across, 1)
    remedy = f"{where} has blocks of {size} outputs by its format: pick and permute whole ones, or quantize by another."
    together = ids.size % size == 0 and (ids.reshape(-1, size) == ids[::size, None]).all()
    arguments.require(together, "rename", "keep rows of one block together", f"{ids.size} rows", remedy)
    return picked._replace(blocks=ids[::size])


def take(x: Any, picked: Pick) -> np.ndarray:
    """The rows of an array that has a leaf's shape."""
    matrix, kept = _matrix(np.asarray(x), picked.outputs, picked.layer)
    rows = _flat(matrix, kept)
    return (rows[picked.rows] if kept else rows).reshape(picked.shape)


def take_scale(scale: Any, codes: Any, picked: Pick) -> np.ndarray:
    """The rows of scales that belong to those of the codes; one of the whole array is that of its parts."""
    scale = np.asarray(scale)
    if not scale.ndim:
        return scale
    layer = picked.layer
    if layer is not None:
        at = picked.outputs[0]
        layer = layer * scale.shape[at] // codes.shape[at]
    matrix, kept = _matrix(scale, picked.outputs, layer)
    return _flat(matrix, kept)[picked.blocks] if kept else matrix


def _matrix(x: np.ndarray, outputs: tuple[int, ...], layer: int | None) -> tuple[np.ndarray, int]:
    """The array as [outputs…, inputs…], of one layer or of all, and how many axes the outputs have; a view."""
    x = np.transpose(x, (*outputs, *(i for i in range(x.ndim) if i not in outputs)))
    return (x, len(outputs)) if layer is None else (x[layer], len(outputs) - 1)


def _flat(x: np.ndarray, kept: int) -> np.ndarray:
    """Outputs flattened and, where there are any, inputs."""
    axes = (x.shape[:kept], x.shape[kept:])
    return x.reshape([math.prod(sizes) for sizes in axes if sizes])
