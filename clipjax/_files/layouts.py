"""The shape of a tree as plain JSON, with a name for every leaf.

A name is the leaf's path, `"encoder/lin/kernel"`, as everywhere in clipjax; "~" and "/" inside a key are written "~0"
and "~1". Where the tree is nothing but nested dicts of strings the names say it all. Else a layout is recorded: a
number for a leaf, null for None, `{"list": [...]}`, `{"tuple": [...]}`, `{"dict": [[key, ...], ...]}`. What JSON does
not know (FrozenDict, NNX states, modules) is recorded as a dict; `like` gives it back as it was. A `Quantized` is one
leaf.
"""

from __future__ import annotations

import json
from typing import Any

import jax

from clipjax._arrays import trees
from clipjax._maths.integers import Quantized
from clipjax.typing import Tree

_DEPTH = 256  # how deep trees may nest
_RESERVED = "~2"  # stands for the one name that safetensors keeps for itself


def flatten(tree: Tree) -> tuple[list[str], list[Any], str | None]:
    """Names and leaves in tree order, and the layout, None where the names say it all.

    Raises:
      TypeError: for a dict with keys that are neither strings, whole numbers nor booleans.
    """
    names: list[str] = []
    leaves: list[Any] = []

    def visit(node: Any, path: tuple[str, ...]) -> Any:
        if node is None:
            return None
        children = _children(node)
        if children is None:
            names.append(_name(path))
            leaves.append(node)
            return len(leaves) - 1
        if len(children) == 1 and _box(children[0][0]):
            return visit(children[0][1], path)
        if type(node) in (list, tuple):
            return {type(node).__name__: [visit(child, (*path, str(i))) for i, (_, child) in enumerate(children)]}
        keys = [_key(key) for key, _ in children]
        return {"dict": [[k, visit(child, (*path, str(k)))] for k, (_, child) in zip(keys, children, strict=True)]}

    layout = visit(tree, ())
    if len(set(names)) != len(names):
        raise ValueError(f"Leaf paths must differ, got {sorted(names)}. Rename the keys that read alike.")
    # An empty dict, a list or a key with a meaning of its own leaves no trace in the names: then they are not enough.
    plain = bool(names) and _expanded(layout) == _nested(names)
    return names, leaves, None if plain else json.dumps(layout, separators=(",", ":"))


def unflatten(names: list[str], leaves: list[Any], layout: str | None) -> Tree:
    """The tree of `flatten`.

    Raises:
      ValueError: for a layout that is none, or does not have each leaf once.
    """
    if layout is None:
        shape = _nested(names)
    else:
        try:
            shape = _expanded(json.loads(layout))
        except (RecursionError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"The layout of the tree is damaged: {error!r}") from None
    found = jax.tree.leaves(shape)
    if sorted(found) != list(range(len(leaves))):
        raise ValueError(f"The layout of the tree must have each of {len(leaves)} leaves once.")
    return jax.tree.map(lambda i: leaves[i], shape)


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and children of one node; None for a leaf, which a `Quantized` is too."""
    if isinstance(node, Quantized):
        return None
    keyed, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return None if len(keyed) == 1 and not keyed[0][0] else [(path[0], child) for path, child in keyed]


def _box(key: Any) -> bool:
    """True for the one field of a box of Linen's or NNX's."""
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in trees.BOX_FIELDS


def _key(key: Any) -> Any:
    value = next((getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)), str(key))
    if not isinstance(value, str | int):
        raise TypeError(f"Keys must be strings or whole numbers, got {value!r}. Rename the keys of that dict.")
    return value


def _name(path: tuple[str, ...]) -> str:
    name = "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)
    return _RESERVED if name == "__metadata__" else name


def _nested(names: list[str]) -> Any:
    """Nested dicts of leaf numbers, from the names of the leaves."""
    tree: dict[str, Any] = {}
    for i, name in enumerate(names):
        name = "__metadata__" if name == _RESERVED else name
        # "~1" first: a key "~1" is written "~01", which must not become "/".
        *inner, last = (part.replace("~1", "/").replace("~0", "~") for part in name.split("/"))
        if len(inner) > _DEPTH:
            raise ValueError(f"Names must not nest deeper than {_DEPTH}, got {name[:80]!r}...")
        node = tree
        for part in inner:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"The name {name!r} lies inside another leaf.")
        if last in node:
            raise ValueError(f"The name {name!r} is another's, or holds others.")
        node[last] = i
    return tree


def _expanded(node: Any, depth: int = 0) -> Any:
    """The containers that a layout describes, with leaf numbers in them."""
    if depth > _DEPTH:
        raise ValueError(f"Layouts must not nest deeper than {_DEPTH}.")
    if node is None or type(node) is int:
        return node
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(f"A layout's node must be a leaf or one container, got {str(node)[:80]}.")
    kind, inner = next(iter(node.items()))
    if kind == "dict":
        return {_plain_key(key): _expanded(child, depth + 1) for key, child in inner}
    if kind not in ("list", "tuple"):
        raise ValueError(f"A layout's container must be a dict, list or tuple, got {kind!r}.")
    return {"list": list, "tuple": tuple}[kind](_expanded(child, depth + 1) for child in inner)


def _plain_key(key: Any) -> Any:
    if not isinstance(key, str | int):
        raise ValueError(f"A layout's keys must be strings or whole numbers, got {str(key)[:80]}.")
    return key
