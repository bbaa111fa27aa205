"""NNX and Equinox modules in the place of variables: their arrays, and the sizes that their layers note."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from clipjax._arrays import trees
from clipjax.typing import Tree

SIZES = {
    "in_features": (("kernel", -2), ("weight", -1), ("query/kernel", 0)),
    "in_kv_features": (("key/kernel", 0),),
    "out_features": (("kernel", -1), ("weight", -2), ("out/kernel", -1)),
    "num_heads": (("query/kernel", -2),),
    "num_kv_heads": (("key/kernel", -2),),
    "head_dim": (("query/kernel", -1),),
    "num_features": (("scale", -1), ("bias", -1), ("mean", -1)),
    "features": (("embedding", -1),),
    "feature_group_count": (("kernel", -1),),
    "in_channels": (("weight", 1),),
    "out_channels": (("weight", 0),),
    "channels": (("weight", 0),),
    "groups": (("weight", 0),),
    "embedding_size": (("weight", -1),),
    "hidden_size": (("weight_hh", -1),),
    "input_size": (("weight_ih", -1), ("weight", 0)),
    "kernel_shape": (("kernel", None),),
    "shape": (("weight", None), ("bias", None)),
}
"""Attributes in which layers of NNX and Equinox note a size, and the array and axis that have it; None for all axes.

The array is one of the layer, or of a layer in it. An attribute of several inputs or outputs is a tuple.
"""

COUNTED = {"in_features": "feature_group_count", "in_channels": "groups"}
"""Attributes that are the size of an axis times the number of groups of a convolution."""


def is_module(model: Any) -> bool:
    """True for a module of NNX or Equinox."""
    equinox = sys.modules.get("equinox")
    return _is_nnx(model) or (equinox is not None and isinstance(model, equinox.Module))


def opened(model: Any) -> Tree:
    """The arrays of a model as a tree: an NNX module, or its optimizer, as its state; all else is a tree itself."""
    return _nnx().split(model)[1] if _is_nnx(model) else model


def merged(model: Any, tree: Tree) -> Any:
    """A new model with the arrays of a tree that `opened` gave, smaller ones too."""
    if not _is_nnx(model):
        made = tree
    else:
        made = _nnx().merge(_nnx().split(model)[0], tree)
    _note_sizes(made, _arrays(opened(model)), _arrays(tree))
    return made


def updated(model: Any, tree: Tree) -> Any:
    """The model with these arrays: an NNX module itself, changed, and a new one of every other kind."""
    if not _is_nnx(model):
        return merged(model, tree)
    before = _arrays(opened(model))
    _nnx().update(model, tree)
    _note_sizes(model, before, _arrays(tree))
    return model


def _nnx() -> Any:
    return sys.modules["flax.nnx"]


def _is_nnx(model: Any) -> bool:
    """True for a module of NNX, which exists only where the library was imported."""
    return "flax.nnx" in sys.modules and isinstance(model, _nnx().Module | _nnx().Optimizer)


def _note_sizes(model: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Where layers note the sizes of arrays that became smaller, let them note the new ones."""
    cut = [path for path, x in before.items() if x.shape != after[path].shape]
    parents = [path.rpartition("/")[0] for path in cut]
    for owner in dict.fromkeys((*parents, *(path.rpartition("/")[0] for path in parents))):
        layer = _at(model, owner)
        if layer is not None:
            _note(layer, *({k: x.shape for k, x in _under(owner, tree).items()} for tree in (before, after)))


def _arrays(tree: Tree) -> dict[str, Any]:
    return {path: x for path, x in trees.governed(tree) if hasattr(x, "shape")}


def _under(owner: str, arrays: dict[str, Any]) -> dict[str, Any]:
    root = f"{owner}/" if owner else ""
    return {path.removeprefix(root): x for path, x in arrays.items() if path.startswith(root)}


def _at(model: Any, path: str) -> Any:
    """The layer at a path; None for a container, which notes nothing."""
    for part in path.split("/") if path else ():
        if isinstance(model, Mapping):
            model = model.get(part, model.get(int(part)) if part.isdigit() else None)
        elif hasattr(model, part):
            model = getattr(model, part)
        else:
            model = model[int(part)] if part.isdigit() and int(part) < len(model) else None
    return None if isinstance(model, Mapping | list | tuple) else model


def _note(layer: Any, before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> None:
    """Note the new sizes wherever a layer notes the old ones; it may be frozen, and is new."""
    found: dict[str, Any] = {}
    for name, sources in SIZES.items():
        array, axis = next(((a, i) for a, i in sources if a in before), (None, None))
        if array is None or not hasattr(layer, name):
            continue
        old, new = before[array], after[array]
        several = getattr(layer, name)
        if axis is None:
            found[name] = old, new
        elif isinstance(several, tuple):  # inputs are the first axes of a kernel, outputs the last ones
            own = slice(len(several)) if name == "in_features" else slice(len(old) - len(several), None)
            found[name] = old[own], new[own]
        elif -len(old) <= axis < len(old):
            found[name] = old[axis], new[axis]
    for name, count in COUNTED.items():
        if name in found and isinstance(groups := getattr(layer, count, None), int):
            old, new = found[name]
            changed = found.get(count, (0, 0))
            found[name] = old * groups, new * (changed[1] if changed[0] == groups else groups)
    for name, (old, new) in found.items():
        if getattr(layer, name) == old != new:
            object.__setattr__(layer, name, new)
