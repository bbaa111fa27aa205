"""Cutting: which entries of each leaf are kept, and arrays, optimizer states and outputs without the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clipjax._arrays import arguments, trees
from clipjax._maths import format_blocks, known_formats
from clipjax._programs import groups
from clipjax.typing import Format, State, Tree


class Cut(NamedTuple):
    """What is kept along one axis of a leaf.

    Attributes:
      kept: bool[layers, entries], as many True in each row; one row where all layers keep the same.
      layers: the axis of the layers, counted from the end; None for one row.
    """

    kept: np.ndarray
    layers: int | None

    def both(self, other: Cut) -> Cut:
        """The entries that both keep: an entry of two groups belongs to a unit of each."""
        return Cut(self.kept & other.kept, other.layers if self.layers is None else self.layers)

    @property
    def size(self) -> int:
        """How many entries are left."""
        return int(self.kept[0].sum())

    @property
    def differs(self) -> bool:
        """True where layers keep entries of their own."""
        return bool((self.kept != self.kept[:1]).any())


Cuts: TypeAlias = Mapping[int, Cut]
"""The cuts of a leaf by axis, counted from the end."""

Units: TypeAlias = Mapping[str, tuple[tuple[int, ...], Cuts]]
"""For the first leaf of each group the shape of an array with one value for each unit, and the cut of such an array."""

Tails: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Path and shape of every array of the variables, keyed by how the paths of what belongs to it end."""


def entries(x: Any, cuts: Cuts) -> Any:
    """The kept entries along each axis of an array; an axis of size 1 holds one value for all units, and is kept."""
    for axis, cut in cuts.items():
        if x.shape[axis] != 1:
            x = _taken(x, axis, cut)
    return x


def _taken(x: Any, axis: int, cut: Cut) -> Any:
    """The kept entries along one axis, sharded as before; an axis whose new size does not divide is replicated."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _indexed(x, axis, cut)
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    taken = _indexed(np.asarray(x), axis, cut)
    if taken.shape[axis] % (x.shape[axis] // sharding.shard_shape(x.shape)[axis]):
        spec[axis] = None
    return jax.device_put(taken, sharding.update(spec=PartitionSpec(*spec)))


def _indexed(x: Any, axis: int, cut: Cut) -> Any:
    if not cut.differs:
        index: Any = (..., np.flatnonzero(cut.kept[0]), *[slice(None)] * (-1 - axis))
        return x[index]
    assert cut.layers is not None
    rows = np.nonzero(cut.kept)[1].reshape(len(cut.kept), -1)
    shape = [1] * x.ndim
    shape[cut.layers], shape[axis] = rows.shape
    indices = (rows if cut.layers < axis else rows.T).reshape(shape)
    return (jnp if isinstance(x, jax.Array) else np).take_along_axis(x, indices, axis)


def tails(variables: Tree) -> Tails:
    """What `state` and `outputs` find the leaf of an array by, also without the collection that it is in."""
    named = [(path, x.shape) for path, x in trees.governed(variables) if hasattr(x, "shape")]
    inner = {path.removeprefix("params/"): (path, shape) for path, shape in named if path.startswith("params/")}
    inner |= {groups.inside_collection(path): (path, shape) for path, shape in named if groups.inside_collection(path)}
    return inner | {path: (path, shape) for path, shape in named}


def _candidates(path: str, found: Tails) -> list[tuple[str, tuple[int, ...]]]:
    """The leaves that the end of a path names, the longest path first."""
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return [found[end] for end in ends if end in found]


def outputs(tree: Tree, found: Tails, kept: Mapping[str, Cuts]) -> Tree:
    """The outputs of a model; one that is a new value of a variable, as a statistic is, is cut as that is."""

    def cut(path: str, x: Any) -> Any:
        of = next((name for name, shape in _candidates(path, found) if shape == getattr(x, "shape", None)), "")
        return entries(x, kept.get(of, {}))

    return trees.map_with_path(cut, tree)


def state(opt_state: State, found: Tails, kept: Mapping[str, Cuts], units: Units) -> State:
    """The optimizer state, every array of it cut as the leaf is that its path ends with, or as the leaf's units are.

    Scales of formats have an entry for each block, and are cut by blocks; bits a weight follow from what is left.
    """
    formed, scales = _formats(opt_state), {}
    bits: dict[str, float] = {}
    for path, x in trees.governed(opt_state):
        if path in formed:
            of = formed[path]
            name, shape = next(iter(_candidates(of.leaf, found)), ("", ()))
            cuts = kept.get(name, {})
            scales[path] = _scales(x, of, name, shape, cuts)
            size = math.prod(cuts[i].size if i in cuts else shape[i] for i in range(-len(shape), 0))
            bits[of.bits] = bits.get(of.bits, of.form.code_bits) + 8 * scales[path].nbytes / max(size, 1)

    def cut(path: str, x: Any) -> Any:
        if path in scales:
            return scales[path]
        if path in bits:
            return jnp.full_like(x, bits[path])
        candidates = _candidates(path, found)
        if not hasattr(x, "shape") or not any(name in kept for name, _ in candidates):
            return x
        for name, shape in candidates:
            if _fits(x.shape, shape):
                _check_steps(f"opt_state/{path}", x, name, shape, kept.get(name, {}))
                return entries(x, kept.get(name, {}))
        for name, _ in candidates:  # the mask of a group, where the leaf has several entries of a unit, or of none
            if name in units and _fits(x.shape, units[name][0]):
                return entries(x, units[name][1])
        name, shape = candidates[0]
        remedy = f"It cannot be cut as {name!r} of shape {shape}: start anew with `tx.init(params)`."
        arguments.require(x.size <= 1, f"opt_state/{path}", "have the shape of its leaf", x.shape, remedy)
        return x

    return trees.map_with_path(cut, opt_state)


class _Formed(NamedTuple):
    """A leaf on a format: its path as the optimizer sees it, that of its bits in the state, and its output axes."""

    leaf: str
    bits: str
    form: Format
    outputs: tuple[int, ...]


def _formats(opt_state: State) -> dict[str, _Formed]:
    """The paths of all scales of formats, which stand beside the ids of the formats in a state of `fake_quantize`."""
    named, formed = dict(trees.governed(opt_state)), {}
    for path in named:
        parts = path.split("/")
        for i in (i for i, part in enumerate(parts[:-1]) if part == "scales"):
            leaf = "/".join(parts[i + 1 : -1])
            number, outputs = (named.get("/".join([*parts[:i], field, leaf])) for field in ("format", "outputs"))
            if number is not None and outputs is not None:
                axes = tuple(axis for axis in range(32) if int(outputs) >> axis & 1)
                formed[path] = _Formed(
                    leaf, "/".join([*parts[:i], "bits", leaf]), known_formats.find(int(number)), axes
                )
    return formed


def _scales(x: Any, formed: _Formed, name: str, shape: tuple[int, ...], cuts: Cuts) -> Any:
    """The scales of the blocks that are left; refused where a cut goes through blocks, or would make others of them."""
    if not x.ndim or not cuts:
        return x
    form, left = formed.form, list(shape)
    remedy = (
        f"It is on {form.name}, with scales for {form.block or 'all'} inputs each, of which the cut takes some. Cut the"
        " model first, or shrink before quantizing: then hold the smaller one on the format. Scales of whole outputs,"
        " those of `formats.int8()` and `fake_quantize(bits, axis=-1)`, are cut with their arrays."
    )
    fits = x.ndim == len(shape) and all(n % count == 0 for n, count in zip(shape, x.shape, strict=True))
    trees.check_state(fits, f"scales of shape {x.shape} for {name!r} of shape {shape}")
    whole = True
    for axis, cut in cuts.items():
        left[axis], count = cut.size, x.shape[axis]
        blocks = cut.kept.reshape(len(cut.kept), count, -1)
        alone = count == 1 or (blocks == blocks[..., :1]).all()
        whole = whole and bool(alone)
        if alone and count > 1:
            own = Cut(blocks[..., 0], cut.layers)
            _check_steps(name, x, name, shape, {axis: own})
            x = _taken(x, axis, own)
    try:
        of = jax.ShapeDtypeStruct(tuple(left), jnp.float32)
        whole = whole and format_blocks.resolve(form, formed.outputs, name, of).counts == x.shape
    except ValueError:
        whole = False
    arguments.require(whole, name, "keep the blocks of its format whole", tuple(left), remedy)
    return x


def _check_steps(path: str, x: Any, name: str, shape: tuple[int, ...], cuts: Cuts) -> None:
    """Refuse values that units share which are cut apart: steps of groups along a cut axis, and steps of all layers."""
    grouped = len(x.shape) > len(shape) and any(x.shape[axis] == 1 != shape[axis] for axis in cuts)
    remedy = f"Groups along the inputs of {name!r} do not survive: quantize it without `group`, or start anew."
    arguments.require(not grouped, path, "have no groups along an axis that is cut", x.shape, remedy)
    for axis, cut in cuts.items():
        shared = cut.layers is not None and cut.differs and x.shape[axis] > 1 == x.shape[cut.layers]
        remedy = f"Each layer of {name!r} loses units of its own: give `axis=` its axis of layers too, or start anew."
        arguments.require(not shared, path, "have a value for each layer", x.shape, remedy)


def _fits(shape: tuple[int, ...], like: tuple[int, ...]) -> bool:
    """True for the leaf's own shape, one that broadcasts to it at full rank, and a stack of either."""
    tail = shape[len(shape) - len(like) :]
    return len(shape) >= len(like) and all(a in (1, b) for a, b in zip(tail, like, strict=True))
