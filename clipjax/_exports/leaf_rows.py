"""Leaves as rows: a row for each output with its inputs flattened, and rows picked, with the scales of their blocks.

Files of other tools have the contracted axes last. A leaf becomes [outputs, inputs], or [outputs] where no axis is an
input. Layers that are stacked lie along the first axis, whatever else it is. Scales of blocks become [blocks of
outputs, blocks of inputs].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from clipjax._arrays import arguments, leaf_axes, picked_leaves
from clipjax._maths import format_blocks, known_formats
from clipjax._maths.integers import Quantized
from clipjax.typing import Axis, Format, Index, Leaf, PerLeaf

AnyLeaf = Any  # an array, its shape and dtype, or a `Quantized`

INDEX = "Give None, the number of a layer, a slice of the outputs flattened in order, or a pair (layer, slice)."
PERMUTATION = "Give each number of the rows that are picked once, as integers, or None."


class Pick(NamedTuple):
    """Rows of one leaf.

    Attributes:
      layer: the index along the first axis, or None for all of it.
      outputs: the axes that are outputs, in order, counted without that one where there is a layer.
      sizes: of these axes.
      rows: which rows of these, as a slice or as their numbers, in the order that the file has them.
      blocks: which rows of the scales: the same where a block lies in one row.
      shape: what comes out.
    """

    layer: int | None
    outputs: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: slice | np.ndarray
    blocks: slice | np.ndarray
    shape: tuple[int, ...]


def outputs(axis: Axis | PerLeaf, path: str, leaf: AnyLeaf) -> tuple[int, ...]:
    """The output axes of a leaf, whose rows a file has: those that `axis` names.

    By default the last axis is the output; of an embedding the last axis alone is none, as its blocks run along what is
    looked up; of a leaf that is on a format those are outputs that its blocks leave. All axes are where nothing is
    contracted: of biases and scales, and of vectors. Where `axis` names none of a weight, as an analysis does for what
    is looked up, all but the last are.

    Raises:
      ValueError: for an axis that does not exist, and for blocks that run along another one than the file needs.
    """
    like = described(leaf)
    named = leaf_axes.resolve(axis, path, like) if like.ndim else ()
    coded = isinstance(leaf, Quantized) and leaf.format is not None
    last, others = (like.ndim - 1,), tuple(range(like.ndim - 1))
    if not (coded or picked_leaves.weights(path, like)):
        return tuple(sorted({*named})) if named else tuple(range(like.ndim))
    if named is None:
        table = picked_leaves.weights(path, like) and picked_leaves.table(path)
        wanted = others if table else (own_outputs(leaf) or last) if coded else last
    else:
        wanted = tuple(sorted({*named})) or others
    if coded:
        own = own_outputs(leaf)
        remedy = (
            f"The blocks of leaf {path!r}, of shape {like.shape}, leave the axes {own} as outputs. Quantize it with"
            f" `axis={wanted}`, as a file has it, or name its outputs by `axis` here."
        )
        same = wanted == own or _in_blocks(leaf, wanted, path)
        arguments.require(same, "axis", "name the outputs of every leaf on a format", wanted, remedy)
    return wanted


def _in_blocks(q: Quantized, outputs: tuple[int, ...], path: str) -> bool:
    """True where the blocks of a leaf are those that it would have with these outputs."""
    assert q.format is not None
    try:
        counts = format_blocks.resolve(known_formats.named(q.format), outputs, path, described(q)).counts
    except ValueError:  # no whole blocks along these inputs
        return False
    return all(scale.shape in ((), counts) for scale in q.scales)


def own_outputs(q: Quantized) -> tuple[int, ...]:
    """The axes of a leaf on a format that its blocks do not run along."""
    own = q.axis if isinstance(q.axis, tuple) else () if q.axis is None else (q.axis,)
    return tuple(sorted(i % q.codes.ndim for i in own))


def described(leaf: AnyLeaf) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf, which may be Python's own number; values that codes stand for are f32."""
    if isinstance(leaf, Quantized):
        return jax.ShapeDtypeStruct(leaf.codes.shape, np.float32)
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def pick(leaf: Leaf, outputs: tuple[int, ...], index: Index, permutation: Any, where: str) -> Pick:
    """Read an index and a permutation for a leaf without blocks.

    Raises:
      ValueError: for what the leaf does not have, and for no permutation.
      TypeError: for an index that is none.
    """
    where = f"{where} has outputs of sizes {[leaf.shape[i] for i in outputs]}."
    layer, part = _parts(index, where)
    shape, kept = leaf.shape, outputs
    if layer is not None:
        there = leaf.shape and -leaf.shape[0] <= layer < leaf.shape[0]
        arguments.require(there, "rename", "pick a layer that there is", index, f"{where} {INDEX}")
        layer, shape, kept = int(layer) % leaf.shape[0], leaf.shape[1:], _inside(outputs)
    sizes = tuple(shape[i] for i in kept)
    rows, number = _rows(part, bool(kept), math.prod(sizes), permutation, index, where)
    inputs = [n for i, n in enumerate(shape) if i not in kept]
    found = ((number,) if kept else ()) + ((math.prod(inputs),) if inputs else ())
    return Pick(layer, kept, sizes, rows, rows, found)


def _inside(outputs: tuple[int, ...]) -> tuple[int, ...]:
    """The output axes of one layer, which the first axis counts."""
    return tuple(i - 1 for i in outputs if i)


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
    part: slice | None, kept: bool, n: int, permutation: Any, index: Index, where: str
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
        whole = order.dtype.kind in "iu"  # a mask of bools, too, has each number once
        own = kept and whole and order.shape == (number,) and np.array_equal(np.sort(order), np.arange(number))
        remedy = f"{where} {number} rows are picked. {PERMUTATION}"
        shown = f"{order.dtype}{list(order.shape)}"
        arguments.require(own, "rename", "return a permutation of the rows that it picks", shown, remedy)
        rows = np.arange(n)[span][order]
    return rows, number


def require_whole(picks: Sequence[Pick], where: str) -> None:
    """Raise where several picks divide a leaf, or a layer of it, and leave rows out; one alone may cut some off."""
    for layer in {picked.layer for picked in picks}:
        parts = [picked for picked in picks if picked.layer == layer]
        there = np.zeros(math.prod(parts[0].sizes), bool)
        for picked in parts:
            there[picked.rows] = True
        of = "" if layer is None else f" of layer {layer}"
        remedy = f"{where} has {there.size} rows{of}, which {len(parts)} names divide: none may be left out."
        whole = len(parts) == 1 or there.all()
        arguments.require(whole, "rename", "name every row that it divides", int(there.sum()), remedy)


def with_blocks(picked: Pick, q: Quantized, form: Format, where: str) -> Pick:
    """The same with the blocks of the picked rows.

    Raises:
      ValueError: where rows that share a scale come apart, or next to rows that do not, and where a block goes on in
        the next layer.
    """
    scale = next((s for s in q.scales if s.ndim), None)
    if scale is None:
        return picked
    shape, counts = q.codes.shape, scale.shape
    if picked.layer is not None:
        apart = form.block is None or counts[0] == shape[0] or 0 in own_outputs(q)
        remedy = f"{where} has blocks of {form.block} inputs: name its axis of layers in `axis` of the quantizer."
        arguments.require(apart, "rename", "pick a layer of whole blocks", form.name, remedy)
        shape, counts = shape[1:], counts[1:]
    if form.across == 1:
        return picked
    sizes = [(shape[i], counts[i]) for i in picked.outputs]
    ids = np.arange(math.prod(n for _, n in sizes)).reshape([n for _, n in sizes])
    for i, (n, blocks) in enumerate(sizes):
        ids = np.repeat(ids, n // blocks, axis=i)
    ids = ids.ravel()[picked.rows]
    size = max(ids.size if form.across is None else form.across, 1)
    remedy = f"{where} has blocks of {size} outputs by its format: pick and permute whole ones, or quantize by another."
    together = ids.size % size == 0 and (ids.reshape(-1, size) == ids[::size, None]).all()
    arguments.require(together, "rename", "keep rows of one block together", f"{ids.size} rows", remedy)
    return picked._replace(blocks=ids[::size])


def take(x: Any, picked: Pick) -> np.ndarray:
    """The rows of an array that has a leaf's shape."""
    rows = _flat(np.asarray(x), picked.outputs, picked.layer)
    return (rows[picked.rows] if picked.outputs else rows).reshape(picked.shape)


def take_scale(scale: Any, codes: Any, picked: Pick) -> np.ndarray:
    """The rows of scales that belong to those of the codes; one of the whole array is that of its parts."""
    scale = np.asarray(scale)
    if not scale.ndim:
        return scale
    layer = None if picked.layer is None else picked.layer * scale.shape[0] // codes.shape[0]
    rows = _flat(scale, picked.outputs, layer)
    return rows[picked.blocks] if picked.outputs else rows


def put(x: np.ndarray, picked: Pick, values: Any, of_scales: int | None = None) -> None:
    """Write rows back to where they lie in an array that has a leaf's shape, the inverse of `take`.

    With `of_scales`, the size of the leaf's first axis, `x` has the shape of its scales instead.
    """
    layer, at = picked.layer, picked.rows if of_scales is None else picked.blocks
    if layer is not None and of_scales is not None:
        layer = layer * x.shape[0] // of_scales
    inside = x if layer is None else x[layer]
    rows = _flat(inside, picked.outputs, None).copy()
    rows[at if picked.outputs else ...] = np.reshape(values, rows[at if picked.outputs else ...].shape)
    order = (*picked.outputs, *(i for i in range(inside.ndim) if i not in picked.outputs))
    turned = np.transpose(inside, order)
    turned[...] = rows.reshape(turned.shape)


def _flat(x: np.ndarray, outputs: tuple[int, ...], layer: int | None) -> np.ndarray:
    """The array, or a layer of it, as [outputs, inputs]; without the axis that has nothing to flatten."""
    x = x if layer is None else x[layer]
    inputs = [i for i in range(x.ndim) if i not in outputs]
    sizes = [math.prod(x.shape[i] for i in axes) for axes in (outputs, inputs) if axes]
    return np.transpose(x, (*outputs, *inputs)).reshape(sizes)
