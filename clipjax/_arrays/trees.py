"""Walks over trees of parameters: leaves and their paths, with None and boxes left in place.

A transformation works on trees with the structure of the params and None at every leaf that it does not govern, so
that `jax.tree.map` visits the governed leaves alone.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from clipjax.typing import Tree

Kind = TypeVar("Kind")
KeyPath = tuple[Any, ...]  # the keys of `jax.tree_util`, which have no common type

BOX_FIELDS = ("value", "raw_value")  # where Linen's and NNX's boxes keep their array


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Leaves and structure, None counted as a leaf so that positions stay aligned."""
    return jax.tree.flatten(tree, is_leaf=lambda x: x is None)


def arrays(tree: Tree) -> tuple[list[Any], Any]:
    """The governed leaves alone and their structure."""
    return jax.tree.flatten(tree)


def paths(tree: Tree) -> list[str]:
    """The path of every leaf: keys joined by "/", the same in every container and at init and update."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    under = collections.Counter(keys[:-1] for keys, _ in keyed)
    under.update(keys[:i] for keys, _ in keyed for i in range(len(keys) - 1))
    return [_join(keys, alone=under[keys[:-1]] == 1) for keys, _ in keyed]


def _join(keys: KeyPath, *, alone: bool) -> str:
    """The path without the field of a box.

    `nnx.Optimizer` inits with `kernel.value` and updates with `kernel`, so that the field would make two paths of one.
    An attribute of that name is a box only where it is the one leaf under its parent.
    """
    last = keys[-1] if keys else None
    boxed = isinstance(last, jax.tree_util.GetAttrKey) and last.name in BOX_FIELDS
    return jax.tree_util.keystr(keys[:-1] if boxed and alone and len(keys) > 1 else keys, simple=True, separator="/")


def match(tree: Tree, like: Tree) -> Tree:
    """The leaves of `tree` at the paths of `like`, None where it has none: `tree` may be larger or unmasked."""
    found = dict(zip(paths(tree), flatten(tree)[0], strict=True))
    leaves, treedef = flatten(like)
    at = zip(paths(like), leaves, strict=True)
    return treedef.unflatten([None if leaf is None else found.get(path) for path, leaf in at])


def governed(tree: Tree) -> list[tuple[str, Any]]:
    """The governed leaves in tree order, with their paths."""
    return [(p, x) for p, x in zip(paths(tree), flatten(tree)[0], strict=True) if x is not None]


def by_path(tree: Tree) -> Any:
    """The governed leaves in nested dicts, a level for each key of their paths: outside of the params' boxes.

    No key has a "/", so that tools which join keys by it, as `flax.traverse_util.flatten_dict(sep="/")`, find them
    again. Where a path goes on behind another leaf's ("a" and "a/b") the params have such keys themselves: it is one.
    """
    named = governed(tree)
    if not named:  # one leaf all the same: `optax.tree.map_params` inits with a tree that has none
        return jnp.zeros(())
    check_differ([path for path, _ in named])
    found = dict(named)
    stored: dict[str, Any] = {}
    for path, leaf in named:
        *outer, last = path.split("/")
        behind_leaf = any("/".join(outer[: i + 1]) in found for i in range(len(outer)))
        node = stored
        for key in () if behind_leaf else outer:
            node = node.setdefault(key, {})
        node[path if behind_leaf else last] = leaf
    return stored


def check_differ(paths: list[str]) -> None:
    """Raise where two leaves have one path, as a key "a/b" and a key "b" under "a" do."""
    twice = sorted(path for path, times in collections.Counter(paths).items() if times > 1)
    if twice:
        raise ValueError(f"Leaf paths must differ, got {twice} more than once. Rename the keys that contain '/'.")


def look_up(stored: Any, path: str) -> Any:
    """The leaf of one path in what `by_path` gave; None where it has none."""
    if isinstance(stored, dict) and _is_array(stored.get(path)):
        return stored[path]
    for key in path.split("/"):
        stored = stored.get(key) if isinstance(stored, dict) else None
    return stored if _is_array(stored) else None


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn(path, leaf, *leaves)` at every governed leaf."""
    leaves, treedef = flatten(tree)
    others = [flatten(other)[0] for other in rest]
    at = zip(paths(tree), leaves, *others, strict=True)
    return treedef.unflatten([None if x is None else fn(path, x, *xs) for path, x, *xs in at])


def place(values: Tree, like: Tree) -> Tree:
    """State arrays at the governed leaves of `like`: looked up by path in dicts, else by position."""
    leaves, treedef = flatten(like)
    names = [None if leaf is None else path for path, leaf in zip(paths(like), leaves, strict=True)]
    found = [None if name is None else look_up(values, name) for name in names]
    if all((x is None) == (name is None) for x, name in zip(found, names, strict=True)):
        return treedef.unflatten(found)
    ordered, wanted = jax.tree.leaves(values), sum(name is not None for name in names)
    check_state(len(ordered) == wanted, f"{len(ordered)} arrays for {wanted} leaves")
    rest = iter(ordered)
    return treedef.unflatten([None if name is None else next(rest) for name in names])


def check_state(fits: bool, got: str) -> None:
    """Raise for a state of other params, of other options, or of a version with another layout."""
    if not fits:
        raise ValueError(
            f"`state` must belong to these params, got {got}. Start anew with `tx.init(params)`; states of other"
            " params, options or versions do not fit."
        )


def check_named(named: list[str], params: Tree) -> None:
    """Raise where a state has arrays for leaves that the params do not have."""
    found = {path for path, _ in governed(params)}
    missing = sorted({path for path in named if path and path not in found})
    check_state(not missing, f"{missing}, which the params do not have")


def check_kind(state: object, kind: type) -> None:
    """Raise for a state of another transformation, and for one that is no state."""
    if not isinstance(state, kind):
        raise TypeError(
            f"`state` must be the {kind.__name__} that `init` returned, got {type(state).__name__}. Restore a"
            " checkpoint into `tx.init(params)`; states of other versions do not fit."
        )


def _is_array(x: object) -> bool:
    return hasattr(x, "dtype")


def find(state: Tree, kind: type[Kind]) -> list[Kind]:
    """Every state of one kind inside any optimizer state, in tree order, boxes removed."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [unboxed(x) for x in found if isinstance(x, kind)]


def unboxed(tree: Tree) -> Tree:
    """The arrays of a tree out of their boxes."""
    return jax.tree.map(_unboxed, tree, is_leaf=_is_box)


def pure(tree: Tree) -> Tree:
    """The tree with arrays in the place of NNX's variables, as `nnx.Optimizer` gives it to its transformation."""
    return jax.tree.map(lambda x: _unboxed(x) if _is_variable(x) else x, tree, is_leaf=_is_variable)


def with_boxes(tree: Tree, like: Tree) -> Tree:
    """What became of `pure(like)`, in the boxes of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def _is_variable(x: object) -> bool:
    return any(kind.__module__.startswith("flax.nnx.variable") for kind in type(x).__mro__) and _is_box(x)


def _is_box(x: object) -> bool:
    """True for a node with one value, under the name that boxes give it."""
    # Only the top level of x is flattened, so that a box around a whole state counts as one value.
    inside, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda child: child is not x)
    keys, child = inside[0] if len(inside) == 1 else ((), None)
    named = bool(keys) and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in BOX_FIELDS
    return named and (not jax.tree.leaves(child) or jax.tree_util.treedef_is_leaf(jax.tree.structure(child)))


def _unboxed(x: Any) -> Any:
    """Arrays out of their boxes; a box may also hold None, or a state without arrays."""
    return jax.tree.map(jnp.asarray, jax.tree.leaves(x, is_leaf=lambda child: child is not x)[0])
