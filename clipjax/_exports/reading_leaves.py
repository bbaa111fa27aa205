"""The way in: the tensors of a file back in a tree of Flax's shapes, `rename` applied backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, leaf_axes
from clipjax._exports import casting, leaf_rows, tensor_names
from clipjax._maths import format_blocks, integers
from clipjax._maths.integers import Quantized
from clipjax.typing import Axis, Format, PerLeaf, Rename, Tree


class Stored(NamedTuple):
    """What a file has under one name.

    Attributes:
      values: numbers [outputs, inputs], or of a format codes of this shape.
      scales: of a format, [blocks of outputs, blocks of inputs]; one of the whole tensor is a scalar.
      form: the format, or None.
    """

    values: np.ndarray
    scales: tuple[np.ndarray, ...] = ()
    form: Format | None = None


class Part(NamedTuple):
    """Which rows of a leaf a tensor has."""

    name: str
    picked: leaf_rows.Pick


def alone(stored: Stored, dequantize: bool) -> Any:
    """A tensor as the leaf [outputs, inputs] that it is in the file."""
    if stored.form is None:
        return _array(stored.values, None)
    outputs = tuple(range(stored.values.ndim - 1))
    scales = tuple(jnp.asarray(scale) for scale in stored.scales)
    q = integers.formed(stored.form, jnp.asarray(stored.values), scales, outputs)
    return integers.dequantize(q) if dequantize else q


def assemble(
    like: Tree,
    names: Iterable[str],
    read: Callable[[str], Stored],
    *,
    rename: Rename | None,
    axis: Axis | PerLeaf,
    separator: str,
    dequantize: bool,
    partial: bool,
    spare: Iterable[str] = (),
) -> Tree:
    """The tree `like` with the leaves of a file.

    Args:
      like: arrays, their shapes and dtypes, or `Quantized`.
      names: all that the file has.
      read: the tensor of a name.
      rename: as for the exporters; a leaf that it leaves out stays as it is in `like`.
      axis: as for the exporters.
      separator: of the keys in a name.
      dequantize: False for `Quantized` where all of a leaf is on one format.
      partial: True where tensors may be left unread.
      spare: names that may be left unread anyway.

    Raises:
      ValueError: for names that one side lacks, shapes that differ, leaves of which the file has a part, numbers that
        the dtype of a leaf does not have, and formats whose blocks do not fit a leaf.
    """
    leaf_axes.check(axis)
    rename, unread = tensor_names.resolve(rename, separator), set(names)
    known = set(unread)
    plan = {path: _parts(rename, axis, path, leaf) for path, leaf in tensor_names.whole_leaves(like)}
    missing = sorted({part.name for parts in plan.values() for part in parts} - known)
    arguments.require(not missing, "like", "have the tensors of the file", missing[:8], "The file lacks these.")
    unread -= {part.name for parts in plan.values() for part in parts} | {*spare}
    remedy = "`like` has no leaf for these: give it one, or leave them unread by `partial=True`."
    arguments.require(partial or not unread, "like", "have the tensors of the file", sorted(unread)[:8], remedy)

    def leaf(path: str, template: Any) -> Any:
        if plan[path]:
            return _leaf(path, template, [(part, read(part.name)) for part in plan[path]], axis, dequantize)
        if not math.prod(leaf_rows.described(template).shape):
            return _array(np.zeros(template.shape, template.dtype), template)
        remedy = "`rename` leaves it out: give the array itself in `like`."
        arguments.require(not isinstance(template, jax.ShapeDtypeStruct), "like", "have a value", path, remedy)
        return template

    return tensor_names.map_whole_leaves(leaf, like)


def _parts(rename: Rename, axis: Axis | PerLeaf, path: str, template: Any) -> list[Part]:
    like = leaf_rows.described(template)
    if not math.prod(like.shape):  # nothing of it is in a file
        return []
    outputs, where = leaf_rows.outputs(axis, path, template), f"Leaf {path!r} of shape {like.shape}"
    return [
        Part(name, leaf_rows.pick(like, outputs, index, permutation, where))
        for name, index, permutation in tensor_names.entries(rename(path, like), path)
    ]


def _leaf(path: str, template: Any, found: list[tuple[Part, Stored]], axis: Axis | PerLeaf, dequantize: bool) -> Any:
    """One leaf from the rows of its tensors."""
    like = leaf_rows.described(template)
    forms = {stored.form for _, stored in found}
    form = forms.pop() if len(forms) == 1 and not dequantize else None
    there = np.zeros(like.shape, bool)
    values = np.zeros(like.shape, found[0][1].values.dtype if form else np.dtype(like.dtype))
    for (name, picked), stored in found:
        have = stored.values.shape
        merged = (have[0] * have[1], *have[2:]) if len(have) > len(picked.shape) > 0 else have  # of experts
        fits = merged in (picked.shape, picked.shape or (1,))
        remedy = f"The file has {list(have)} as {name!r}: another model, or `axis` or `rename` differ."
        arguments.require(fits, "like", f"have the shapes of the file at {path!r}", list(picked.shape), remedy)
        leaf_rows.put(there, picked, np.ones(picked.shape, bool))
        part = stored.values if form else _floats(stored)
        lost = casting.lost(part, values.dtype)
        remedy = f"Tensor {name!r} has {lost}, which would be another number: give leaf {path!r} another dtype."
        arguments.require(lost is None, "like", "have dtypes that hold the file", values.dtype.name, remedy)
        leaf_rows.put(values, picked, part)
    remedy = "The names that `rename` returns for it have a part of its rows: name all of them, or leave the leaf out."
    arguments.require(there.all(), "rename", "find all of a leaf in the file", path, remedy)
    if form is None:
        return _array(values, template)
    return _on_format(path, template, form, values, found, axis)


def _on_format(
    path: str, template: Any, form: Format, codes: np.ndarray, found: list[tuple[Part, Stored]], axis: Axis | PerLeaf
) -> Quantized:
    like = leaf_rows.described(template)
    outputs = leaf_rows.outputs(axis, path, template)
    try:
        placed = format_blocks.resolve(form, outputs, path, like)
    except ValueError:
        remedy = f"It is the shape of leaf {path!r}. Name its outputs by `axis`, or read values: `dequantize=True`."
        arguments.require(False, "like", f"have inputs that blocks of {form.name} divide", like.shape, remedy)
    shape = placed.counts
    first = found[0][1].scales
    scales = tuple(np.zeros(shape, s.dtype) if s.ndim else s for s in first)
    for (_, picked), stored in found:
        for scale, part in zip(scales, stored.scales, strict=True):
            if scale.ndim:
                leaf_rows.put(scale, picked, part, of_scales=like.shape[0])
    return integers.formed(form, _array(codes, template), tuple(jnp.asarray(s) for s in scales), outputs)


def _floats(stored: Stored) -> np.ndarray:
    """The values of a tensor."""
    if stored.form is None:
        return stored.values
    return np.asarray(integers.dequantize(alone(stored, dequantize=False)))


def _array(x: np.ndarray, template: Any) -> Any:
    """The array where the one of the template lies; NumPy's where JAX does not have its dtype."""
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        return np.array(x)
    sharding = getattr(template.codes if isinstance(template, Quantized) else template, "sharding", None)
    return jax.device_put(x, sharding)
