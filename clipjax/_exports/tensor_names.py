"""The tensors of a file that a tree becomes: `rename`, read for every leaf and checked before a byte is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, leaf_axes, trees
from clipjax._exports import leaf_rows
from clipjax._maths import integers, known_formats
from clipjax._maths.integers import Quantized
from clipjax._weights.quantized_params import quantized
from clipjax.typing import Axis, Format, PerLeaf, Rename, State, Tree

RENAME = "Return None to leave the leaf out, a name, or a list of (name, index, permutation or None)."


class Tensor(NamedTuple):
    """One tensor of a file: rows of a leaf.

    Attributes:
      name: in the file.
      path: of the leaf.
      leaf: the array, or a `Quantized`.
      form: the format, or None for floats and whatever else is no weight.
      picked: the rows.
    """

    name: str
    path: str
    leaf: Any
    form: Format | None
    picked: leaf_rows.Pick

    @property
    def shape(self) -> tuple[int, ...]:
        """[outputs, inputs]; [outputs] or [inputs] where the leaf has only these; () of a scalar."""
        return self.picked.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the leaf, and f32 for what a format decodes to."""
        return np.dtype(leaf_rows.described(self.leaf).dtype)

    def values(self) -> np.ndarray:
        """The entries, in the dtype of the leaf; of a format what its codes decode to, in f32."""
        leaf = integers.dequantize(self.leaf) if isinstance(self.leaf, Quantized) else self.leaf
        return leaf_rows.take(leaf, self.picked)

    def codes(self) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Codes [outputs, inputs] and scales [blocks of outputs, blocks of inputs]; one for all is a scalar."""
        q = self.leaf
        return leaf_rows.take(q.codes, self.picked), tuple(
            leaf_rows.take_scale(s, q.codes, self.picked) for s in q.scales
        )


def tensors(
    params: Tree, opt_state: State | None, rename: Rename | None, axis: Axis | PerLeaf, separator: str
) -> list[Tensor]:
    """Every tensor of a file, in the order of the tree. Arrays are converted when they are asked for.

    Args:
      params: a tree of arrays, with `Quantized` among them where `opt_state` is None.
      opt_state: the state of an optimizer with `fake_quantize`, for params on its formats.
      rename: the argument of the exporters; by default a path is the name, with `separator` in the place of "/".
      axis: which axes of floats are outputs; those of a `Quantized` are its own.
      separator: of the keys in a name.

    Raises:
      ValueError: for a name that is used twice, an index or permutation that does not fit, and weights off their grid.
      TypeError: for what is no name, leaves that are no real arrays, and a `rename` that is no function.
    """
    leaf_axes.check(axis)
    rename = resolve(rename, separator)
    found = [one for path, leaf in leaves(params, opt_state) for one in _tensors(rename, axis, path, leaf)]
    check_once((one.name, one.path) for one in found)
    return found


def resolve(rename: Rename | None, separator: str) -> Rename:
    """The argument `rename`, checked; by default a path is the name, with `separator` in the place of "/"."""
    if rename is None:
        return lambda path, leaf: path.replace("/", separator)
    if not callable(rename):
        raise TypeError(f"`rename` must be a function (path, leaf), got {rename!r}. {RENAME}")
    arguments.takes(rename, "rename", ("path", "leaf"), RENAME)
    return rename


def leaves(params: Tree, opt_state: State | None) -> list[tuple[str, Any]]:
    """Paths and leaves; params on a format are `Quantized`, those on a grid, which other tools do not know, are not."""
    if opt_state is None:
        return whole_leaves(params)
    return [
        (path, q if isinstance(q, Quantized) and q.format else leaf)
        for (path, leaf), (_, q) in zip(whole_leaves(params), coded_leaves(params, opt_state), strict=True)
    ]


def coded_leaves(params: Tree, opt_state: State | None) -> list[tuple[str, Any]]:
    """Paths and leaves; params on a format or on a grid are `Quantized`."""
    named = whole_leaves(params)
    if opt_state is None:
        return named
    given = [path for path, leaf in named if isinstance(leaf, Quantized)]
    remedy = "Params that are `Quantized` have no state: leave `opt_state` out."
    arguments.require(not given, "params", "hold arrays where there is an `opt_state`", given[:4], remedy)
    coded = whole_leaves(quantized(params, opt_state))
    began = any(isinstance(q, Quantized) for _, q in coded)
    remedy = "Train past its `start`, hold the params by `clipjax.hold_once`, or leave `opt_state` out for floats."
    arguments.require(began, "opt_state", "have quantized a leaf", "the state of a quantizer before `start`", remedy)
    return coded


def whole_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """The leaves with their paths, a `Quantized` as one."""
    return [(path, x.leaf if isinstance(x, _Held) else x) for path, x in trees.governed(_held(tree))]


def map_whole_leaves(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """`fn(path, leaf)` at every leaf, a `Quantized` as one."""
    return trees.map_with_path(lambda path, x: fn(path, x.leaf if isinstance(x, _Held) else x), _held(tree))


def _held(tree: Tree) -> Tree:
    whole = lambda x: isinstance(x, Quantized)  # noqa: E731
    return jax.tree.map(lambda x: _Held(x) if whole(x) else x, tree, is_leaf=whole)


class _Held:
    """A leaf around a `Quantized`, which is a tree itself."""

    def __init__(self, leaf: Quantized) -> None:
        self.leaf = leaf


def _tensors(rename: Rename, axis: Axis | PerLeaf, path: str, leaf: Any) -> list[Tensor]:
    """What one leaf becomes."""
    form = known_formats.named(leaf.format) if isinstance(leaf, Quantized) and leaf.format else None
    like, found = leaf_rows.described(leaf), []
    where = f"Leaf {path!r} of shape {like.shape}"
    for name, index, permutation in entries(rename(path, like), path):
        _check_real(path, like)
        picked = leaf_rows.pick(like, leaf_rows.outputs(axis, path, leaf), index, permutation, where)
        if form is not None:
            picked = leaf_rows.with_blocks(picked, leaf, form, where)
        found.append(Tensor(name, path, leaf, form, picked))
    leaf_rows.require_whole([one.picked for one in found], where)
    return found


def _check_real(path: str, leaf: jax.ShapeDtypeStruct) -> None:
    """Refuse a leaf that is no array of real numbers, as a key and complex numbers are."""
    real = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
    if not real:
        raise TypeError(
            f"Leaves must be real arrays, got {leaf.dtype} at {path!r}. Leave it out: `rename` returns None for it."
        )


def entries(given: Any, path: str) -> list[tuple[str, Any, Any]]:
    """What `rename` returned for a leaf as a list of (name, index, permutation)."""
    listed = [] if given is None else [(given, None, None)] if isinstance(given, str) else given
    triples = isinstance(listed, list | tuple) and all(isinstance(t, tuple | list) and len(t) == 3 for t in listed)
    if not (triples and all(isinstance(name, str) and name for name, _, _ in listed)):
        raise TypeError(f"`rename` must return names, got {given!r} for leaf {path!r}. {RENAME}")
    return [(name, index, permutation) for name, index, permutation in listed]


def check_once(named: Iterable[tuple[str, str]]) -> None:
    """Raise where two leaves, or two parts of one, have the same name."""
    owners: dict[str, str] = {}
    for name, path in named:
        remedy = f"Leaves {owners.get(name)!r} and {path!r} have it: give each a name of its own."
        arguments.require(name not in owners, "rename", "return each name once", name, remedy)
        owners[name] = path
