"""Which initializer of an ONNX graph a leaf is: the one that `rename` names, or that has the values of its source."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import leaf_rows, onnx_layouts, tensor_names
from clipjax._exports.onnx_layouts import Order
from clipjax._exports.onnx_weights import Weight
from clipjax._maths import integers, known_formats
from clipjax._maths.integers import Quantized
from clipjax.typing import Rename

ONE_WAY = ("Gather", "Add", "Sub", "Mul", "Div")
"""Operators that take an array as the leaf has it, as an output of the graph does."""

Fingerprint = tuple[str, int, int, int]


class Wanted(NamedTuple):
    """A leaf that belongs into the graph.

    Attributes:
      path: of the leaf.
      leaf: what shall stand in the graph, an array or a `Quantized`.
      source: the values that the graph was made from.
      outputs: the axes of the leaf that are outputs.
    """

    path: str
    leaf: Any
    source: np.ndarray
    outputs: tuple[int, ...]

    @property
    def changed(self) -> bool:
        """False for floats that the graph has already."""
        return isinstance(self.leaf, Quantized) or not _alike(self.leaf, self.source)


class Match(NamedTuple):
    """A leaf, the initializer that it replaces, and the order of its axes there."""

    wanted: Wanted
    weight: Weight
    order: Order


def values(leaf: Any) -> np.ndarray:
    """What a leaf stands for, as an array."""
    return np.asarray(integers.dequantize(leaf) if isinstance(leaf, Quantized) else leaf)


def by_name(wanted: list[Wanted], found: list[Weight], rename: Rename) -> list[Match]:
    """The initializers of the names that `rename` returns.

    Raises:
      ValueError: for a name that the graph does not have or has twice, a name that is used twice, and another shape.
      TypeError: for what is no name.
    """
    matches = []
    for one, name in (part for leaf in wanted for part in _parts(leaf, rename)):
        named = [weight for weight in found if weight.name == name]
        near = difflib.get_close_matches(name, [weight.name for weight in found], 8, 0.3)
        remedy = f"Leaf {one.path!r} is to replace it. The graph has {len(found)} of them, such as {near}."
        arguments.require(len(named) == 1, "rename", "name a float initializer of the graph", name, remedy)
        matches.append(Match(one, named[0], _order(one, named[0])))
    tensor_names.check_once((match.weight.name, match.wanted.path) for match in matches)
    return matches


def _parts(one: Wanted, rename: Rename) -> list[tuple[Wanted, str]]:
    """What a leaf becomes, with the names; it is whole where neither index nor permutation say otherwise."""
    like, where = leaf_rows.described(one.leaf), f"Leaf {one.path!r} of shape {one.source.shape}"
    entries = tensor_names.entries(rename(one.path, like), one.path)
    picks = [leaf_rows.pick(like, one.outputs, index, permutation, where) for _, index, permutation in entries]
    leaf_rows.require_whole(picks, where)
    whole = [index is None and permutation is None for _, index, permutation in entries]
    return [
        (one if all_of_it else _part(one, picked, where), name)
        for (name, *_), picked, all_of_it in zip(entries, picks, whole, strict=True)
    ]


def _part(one: Wanted, picked: leaf_rows.Pick, where: str) -> Wanted:
    """Some rows of a leaf as one output axis, where the first output was, with the inputs behind or before it."""
    own = slice(None) if picked.layer is None else slice(1, None)  # the axes of one layer
    inputs = [i for i in range(len(one.source.shape[own])) if i not in picked.outputs]
    first = not inputs or bool(picked.outputs and picked.outputs[0] < inputs[0])

    def laid(taken: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
        taken = taken.reshape(-1, *(sizes[own][i] for i in inputs))
        return taken if first else np.moveaxis(taken, 0, -1)

    def part(x: Any) -> np.ndarray:
        return laid(leaf_rows.take(x, picked), x.shape)

    at = 0 if first else len(inputs)
    source = part(one.source)
    if not isinstance(one.leaf, Quantized) or one.leaf.format is None:
        return Wanted(one.path, part(values(one.leaf)), source, (at,))
    q, form = one.leaf, known_formats.named(one.leaf.format)
    blocks = leaf_rows.with_blocks(picked, q, form, where)
    scales = tuple(
        jnp.asarray(laid(leaf_rows.take_scale(s, q.codes, blocks), s.shape) if s.ndim else s) for s in q.scales
    )
    leaf = dataclasses.replace(q, codes=jnp.asarray(part(q.codes)), axis=(at,), scales=scales)
    return Wanted(one.path, leaf, source, (at,))


def _order(one: Wanted, weight: Weight) -> Order:
    """How a leaf lies in an initializer: as its values tell, else as the operator takes them.

    Raises:
      ValueError: for an initializer of another shape, and a matrix that may be transposed, where nothing tells.
    """
    orders = list(onnx_layouts.orders(one.source.shape, one.outputs, weight))
    remedy = f"Leaf {one.path!r} has shape {one.source.shape}, and the initializer {weight.name!r} {weight.shape}."
    arguments.require(orders, "rename", "name an initializer of the shape of the leaf", weight.name, remedy)
    equal = next((order for order in orders if _equal(one.source, order, weight)), None)
    if equal is not None:
        return equal
    ways = {tuple(i for i in order if one.source.shape[i] > 1) for order in orders}
    told = weight.outputs is not None or any(use.node is None or use.kind in ONE_WAY for use, _ in weight.ends)
    if len(ways) > 1 and len(weight.shape) == 2 and weight.ends and not told:
        use, _ = weight.ends[0]
        remedy = (
            f"Leaf {one.path!r} may be it or its transpose, and {use.named} does not tell: give `source=`, the params"
            " that the graph was made from."
        )
        arguments.require(False, "rename", "name an initializer whose axes are known", weight.name, remedy)
    return orders[0]


def by_values(wanted: list[Wanted], found: list[Weight]) -> list[Match]:
    """The initializers that equal leaves of the source, up to the order of axes.

    Raises:
      ValueError: for a leaf that the graph does not have, and for one that could be several initializers, or several
        leaves that could be one, with other values in the place of each.
    """
    claims = _claims(wanted, found)
    matches: dict[int, Match] = {}
    for i, one in enumerate(wanted):
        own = [w for w, claimed in claims.items() if i in claimed]
        if not one.changed:
            continue
        remedy = (
            "No float initializer that a node uses has its values: give `source=`, the params that the graph was made"
            " from, or `rename`, which returns None for a leaf that the graph does not have."
        )
        arguments.require(own, "model_in", "have an initializer for every leaf", one.path, remedy)
        rivals = sorted({j for w in own for j in claims[w]} - {i})
        other = next((j for j in rivals if not _same(one.leaf, wanted[j].leaf)), None)
        remedy = "Give the initializer of each leaf by `rename`."
        if other is not None:
            got = f"leaves {one.path!r} and {wanted[other].path!r}, both equal to {found[own[0]].name!r}"
            arguments.require(False, "source", "tell the initializers apart", _Shown(got), remedy)
        names = " and ".join(repr(found[w].name) for w in own)
        got = f"{names}, each equal to leaf {one.path!r}"
        arguments.require(len(own) <= len(rivals) + 1, "source", "tell the initializers apart", _Shown(got), remedy)
        matches |= {w: Match(one, found[w], claims[w][i]) for w in own if w not in matches}
    return list(matches.values())


class _Shown(str):
    """A text that an error shows as it is."""

    def __repr__(self) -> str:
        return str(self)


def _claims(wanted: list[Wanted], found: list[Weight]) -> dict[int, dict[int, Order]]:
    """For each initializer the leaves that equal it, and in which order of axes."""
    by_print: dict[Fingerprint, list[int]] = {}
    for w, weight in enumerate(found):
        by_print.setdefault(_fingerprint(weight.values()), []).append(w)
    claims: dict[int, dict[int, Order]] = {w: {} for w in range(len(found))}
    dtypes = {weight.dtype for weight in found}
    for i, one in enumerate(wanted):
        for w in [w for dtype in dtypes for w in by_print.get(_fingerprint(_cast(one.source, dtype)), [])]:
            orders = onnx_layouts.orders(one.source.shape, one.outputs, found[w])
            order = next((order for order in orders if _equal(one.source, order, found[w])), None)
            if order is not None:
                claims[w][i] = order
    return claims


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def _fingerprint(x: np.ndarray) -> Fingerprint:
    """The sum and the exclusive or of the bits, which do not depend on the order of entries; -0 counts as 0."""
    raw = np.ascontiguousarray(x + np.zeros((), x.dtype)).view(f"u{x.dtype.itemsize}")
    return x.dtype.name, x.size, int(raw.sum(dtype=np.uint64)), int(np.bitwise_xor.reduce(raw, axis=None))


def _equal(source: np.ndarray, order: Order, weight: Weight) -> bool:
    laid, own = onnx_layouts.laid(_cast(source, weight.dtype), order, weight.shape), weight.values()
    return bool(((laid == own) | ((laid != laid) & (own != own))).all())


def _alike(a: Any, b: Any) -> bool:
    """True for arrays of the same bits."""
    a, b = np.asarray(a), np.asarray(b)
    same = a.shape == b.shape and a.dtype == b.dtype
    return bool(same and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes())


def _same(a: Any, b: Any) -> bool:
    """True for leaves of the same content."""
    alike = str(jax.tree.structure(a)) == str(jax.tree.structure(b))
    return alike and all(_alike(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
