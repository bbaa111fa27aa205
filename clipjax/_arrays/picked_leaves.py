"""Which leaves a transformation governs: `where`, trees cut down to them, and values that differ by leaf."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp

from clipjax._arrays import arguments, trees
from clipjax.typing import PerLeaf, Tree, Where

NOT_WEIGHTS = ("bias", "b", "scale", "offset")
EMBEDDINGS = ("pos_embedding", "pos_embed", "position_embedding", "position_embeddings", "cls", "cls_token")


def floating(leaf: Any) -> bool:
    """True for a non-empty array of real floats: the only leaves that the weight side ever touches."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and leaf.size > 0


def weights(path: str, leaf: Any) -> bool:
    """Matrices and kernels: rank >= 2 and not named like a bias or a normalization's scale."""
    return leaf.ndim >= 2 and path.rsplit("/", 1)[-1] not in NOT_WEIGHTS


def layers(path: str, leaf: Any) -> bool:
    """Weights but those of embeddings, the default of pruning and quantizing.

    A row of an embedding is the only thing that a model knows of a token or a position, and is trained as rarely as
    that token occurs: few weights to save, and the ones that hurt most.
    """
    return weights(path, leaf) and not embedding(path)


def embedding(path: str) -> bool:
    """True for a path with a part that begins with "embed", in any case, or that ends with a name of `EMBEDDINGS`."""
    parts = path.lower().split("/")
    return any(part.startswith("embed") for part in parts) or parts[-1] in EMBEDDINGS


def table(path: str) -> bool:
    """True for an embedding that is looked up; what is named kernel or w is multiplied, whatever module it is in."""
    return embedding(path) and path.rsplit("/", 1)[-1] not in ("kernel", "w")


def why_not(path: str, leaf: Any) -> str:
    """Why pruning and quantizing leave a leaf out by default; "where" for one that they would pick."""
    name = path.rsplit("/", 1)[-1]
    if not floating(leaf):
        return str(getattr(leaf, "dtype", type(leaf).__name__)) if getattr(leaf, "size", 1) else "empty"
    if leaf.ndim < 2:
        return f"rank {leaf.ndim}"
    return f"named {name}" if name in NOT_WEIGHTS else "embedding" if embedding(path) else "where"


def everything(path: str, leaf: Any) -> bool:
    """Every float leaf."""
    return True


def resolve(where: Where | None, default: Where) -> Where:
    """A `where=` argument, checked, or the default of its transformation."""
    if where is not None and not callable(where):
        raise TypeError(
            f"`where` must be a function (path, leaf) -> bool, got {where!r}. Try `lambda path, leaf: ...`."
        )
    if where is not None:
        arguments.takes(where, "where", ("path", "leaf"), "Try `lambda path, leaf: ...`.")
    return default if where is None else where


def for_leaf(value: Any, path: str, leaf: Any) -> Any:
    """The value of an argument for one leaf: that of its function where it is a `per_leaf`."""
    return value.fn(path, leaf) if isinstance(value, PerLeaf) else value


def pick(where: Where, tree: Tree) -> list[bool]:
    """Which leaves a transformation governs, aligned with `flatten`.

    Raises:
      TypeError: for a complex leaf that `where` picks: no constraint is meant for it, and it is not passed silently.
    """

    def picked(path: str, leaf: Any) -> bool:
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating) and where(path, leaf):
            raise TypeError(
                f"Weights must be real, got {dtype} in leaf {path!r}. Leave it out by `where`, or keep its real and"
                " imaginary parts as two arrays."
            )
        return floating(leaf) and bool(where(path, leaf))

    leaves, _ = trees.flatten(tree)
    return [picked(path, leaf) for path, leaf in zip(trees.paths(tree), leaves, strict=True)]


def warn_if_nothing(picks: list[bool], tree: Tree) -> None:
    """Warn about a `where` that governs nothing, unless the tree holds no arrays at all."""
    if not any(picks) and any(leaf is not None for leaf in trees.flatten(tree)[0]):
        warnings.warn(
            "`where` picks no float array of these params, so this transformation does nothing. The default for"
            " pruning and quantizing is arrays of rank >= 2 that are not named bias, b, scale or offset and are no"
            " embeddings; pass `where=lambda path, leaf: ...` to choose. `structures.unit(groups=...)` picks the leaves"
            " of its groups alone: units under a statistic, as LayerNorm's, stand in `Analysis.inexact`.",
            stacklevel=4,
        )


def restrict(tree: Tree, picks: list[bool]) -> Tree:
    """The same tree with None at every leaf that is not picked."""
    leaves, treedef = trees.flatten(tree)
    return treedef.unflatten([x if ok else None for x, ok in zip(leaves, picks, strict=True)])


def merge(tree: Tree, over: Tree, picks: list[bool]) -> Tree:
    """`over` where picked, `tree` elsewhere."""
    leaves, treedef = trees.flatten(tree)
    chosen = zip(leaves, trees.flatten(over)[0], picks, strict=True)
    return treedef.unflatten([new if ok else old for old, new, ok in chosen])


def values(argument: Any, tree: Tree) -> dict[str, Any]:
    """The value of an argument for the governed leaves of a tree, in tree order.

    `per_leaf` is called with each leaf; in a tree of values those are found by path, and leaves that it does not name
    are left out; anything else is the value of all leaves.
    """
    named = trees.governed(tree)
    if isinstance(argument, PerLeaf):
        return {path: argument.fn(path, leaf) for path, leaf in named}
    if arguments.is_tree(argument):
        given = dict(trees.governed(argument))
        return {path: given[path] for path, _ in named if path in given}
    return {path: argument for path, _ in named}
