"""Walks over parameter trees: which leaves, under which paths, with None and boxes left in place.

A tree that a member works on has the structure of the parameters, with None at every leaf that the
member does not govern. `jax.tree.map` then visits the governed leaves alone.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipjax import _arguments as arguments
from clipjax._typing import Tree, Where

BOX_FIELDS = ("value", "raw_value")  # where Linen's and NNX's boxes keep their array
NOT_WEIGHTS = ("bias", "b", "scale", "offset")


class PerLeaf(NamedTuple):
    """A static value that differs by leaf; see `per_leaf`."""

    fn: Callable[[str, Any], Any]


def per_leaf(fn: Callable[[str, Any], Any]) -> PerLeaf:
    """Give every leaf its own value of an argument.

    A bare callable is always a schedule, so a function of the leaf is marked by this name. It works wherever
    a static value may differ by leaf: the bound of `clamp_weights`, the sparsity of `prune_mask` and the
    bits and axis of `fake_quantize`.

    Args:
      fn: `fn(path, leaf) -> value` of the path, shape and dtype; `path` is like `"encoder/lin/kernel"`. It is called
        at init, and again whenever an update is traced, where a leaf has no values.

    Returns:
      The argument to pass.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> tx = clipjax.clamp_weights(clipjax.per_leaf(lambda path, leaf: 1.0 if "head" in path else 0.5))
      >>> params = {"body": jnp.array([2.0]), "head": jnp.array([2.0])}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> {k: float((params[k] + u)[0]) for k, u in updates.items()}
      {'body': 0.5, 'head': 1.0}
    """
    return PerLeaf(fn)


def resolve(value: Any, path: str, leaf: Any) -> Any:
    """The value of an argument for one leaf."""
    return value.fn(path, leaf) if isinstance(value, PerLeaf) else value


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


def _join(keys: tuple[Any, ...], *, alone: bool) -> str:
    """The path without the field of a box: the only leaf under its parent."""
    last = keys[-1] if keys else None
    boxed = isinstance(last, jax.tree_util.GetAttrKey) and last.name in BOX_FIELDS
    return "/".join(_name(key) for key in (keys[:-1] if boxed and alone and len(keys) > 1 else keys))


def _name(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def floating(leaf: Any) -> bool:
    """True for a non-empty array of real floats: the only leaves that the weight side ever touches."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and leaf.size > 0


def weights(path: str, leaf: Any) -> bool:
    """Matrices and kernels: rank >= 2 and not named like a bias or a normalization's scale."""
    return leaf.ndim >= 2 and path.rsplit("/", 1)[-1] not in NOT_WEIGHTS


def everything(path: str, leaf: Any) -> bool:
    """Every float leaf."""
    return True


def pick(where: Where, tree: Tree) -> list[bool]:
    """Which leaves a member governs, aligned with `flatten`."""
    leaves, _ = flatten(tree)
    return [floating(leaf) and bool(where(path, leaf)) for path, leaf in zip(paths(tree), leaves, strict=True)]


def warn_if_nothing(picks: list[bool], tree: Tree) -> None:
    """Warn about a `where` that governs nothing, unless the tree holds no arrays at all."""
    if not any(picks) and any(leaf is not None for leaf in flatten(tree)[0]):
        warnings.warn(
            "`where` picks no float array of these params, so this member does nothing. The default for"
            " pruning and quantizing is arrays of rank >= 2 that are not named bias, b, scale or offset;"
            " pass `where=lambda path, leaf: ...` to choose.",
            stacklevel=4,
        )


def restrict(tree: Tree, picks: list[bool]) -> Tree:
    """The same tree with None at every leaf that is not picked."""
    leaves, treedef = flatten(tree)
    return treedef.unflatten([x if ok else None for x, ok in zip(leaves, picks, strict=True)])


def merge(tree: Tree, over: Tree, picks: list[bool]) -> Tree:
    """`over` where picked, `tree` elsewhere."""
    leaves, treedef = flatten(tree)
    chosen = zip(leaves, flatten(over)[0], picks, strict=True)
    return treedef.unflatten([new if ok else old for old, new, ok in chosen])


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
    """The governed leaves keyed by path: plain arrays of any shape, outside of the params' boxes."""
    named = governed(tree)
    if not named:  # one leaf all the same: `optax.tree.map_params` inits with a tree that has none
        return jnp.zeros(())
    found = dict(named)
    if len(found) != len(named):
        raise ValueError(
            f"Leaf paths must differ, got {sorted(p for p, _ in named)}. Rename the keys that contain '/'."
        )
    return found


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn(path, leaf, *leaves)` at every governed leaf."""
    leaves, treedef = flatten(tree)
    others = [flatten(other)[0] for other in rest]
    at = zip(paths(tree), leaves, *others, strict=True)
    return treedef.unflatten([None if x is None else fn(path, x, *xs) for path, x, *xs in at])


def place(values: Tree, like: Tree) -> Tree:
    """State arrays at the governed leaves of `like`: found by path in a dict of paths, else by position."""
    leaves, treedef = flatten(like)
    names = [None if leaf is None else path for path, leaf in zip(paths(like), leaves, strict=True)]
    if isinstance(values, dict) and all(name is None or _is_array(values.get(name)) for name in names):
        return treedef.unflatten([None if name is None else values[name] for name in names])
    ordered = iter(jax.tree.leaves(values))
    return treedef.unflatten([None if leaf is None else next(ordered) for leaf in leaves])


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype")


def find(state: Tree, kind: type) -> list[Any]:
    """Every state of one kind inside any optimizer state, in tree order, boxes removed."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return [jax.tree.map(_unboxed, x, is_leaf=_is_box) for x in found if isinstance(x, kind)]


def _is_box(x: Any) -> bool:
    """True for one value under the name that boxes give it."""
    inside, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda child: child is not x)
    keys, child = inside[0] if len(inside) == 1 else ((), None)
    named = bool(keys) and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in BOX_FIELDS
    return named and (not jax.tree.leaves(child) or jax.tree_util.treedef_is_leaf(jax.tree.structure(child)))


def _unboxed(x: Any) -> Any:
    """Arrays out of their boxes; a box may also hold None, or a state without arrays."""
    return jax.tree.map(jnp.asarray, jax.tree.leaves(x, is_leaf=lambda child: child is not x)[0])


def leafwise(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The maths of one leaf, traced once for all leaves of a shape and inlined: no call is left in the program."""
    return jax.jit(fn, inline=True)


def where(mask: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.where` without the call that it leaves in the program, which takes time to compile; scalars broadcast.

    Under explicit mesh axes the result is sharded as x, y or the mask is, along the most axes; constants are not.
    """
    if not all(isinstance(v, jax.Array) for v in (mask, x, y)) or x.dtype != y.dtype or mask.dtype != bool:
        return jnp.where(mask, x, y)
    whole = x if x.ndim else y
    x, y = (v if v.shape == whole.shape else jnp.full_like(whole, v) if v.ndim == 0 else v for v in (x, y))
    if x.shape != y.shape or mask.shape not in ((), x.shape):
        return jnp.where(mask, x, y)
    placed = max((x, y, mask), key=lambda v: sum(names is not None for names in jax.typeof(v).sharding.spec))
    mask, x, y = (laid_as(v, placed) if v.ndim else v for v in (mask, x, y))
    return jax.lax.select(mask, x, y)


def laid_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` sharded as another array of its shape; only explicit mesh axes ask for it."""
    sharding = jax.typeof(like).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types or sharding == jax.typeof(x).sharding:
        return x
    traced = arguments.traced(x) or arguments.traced(like)
    return jax.reshard(x, sharding) if traced else jax.device_put(x, like.sharding)  # no mesh has to be set then


def wide(dtype: Any) -> Any:
    """The dtype in which a leaf is computed: f64 for f64, else f32. Not jnp's lattice: strict promotion refuses it."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widest(arrays: list[Any]) -> Any:
    """The computing dtype of several arrays together."""
    return wide(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


def widened(leaf: jax.Array) -> jax.Array:
    """A leaf in its computing dtype."""
    return leaf.astype(wide(leaf.dtype))


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` rounded to values of a narrower dtype, still in the dtype of `x`.

    For 16 bits it is not a conversion there and back, which XLA is free to drop for the sake of precision, and on GPUs
    does.
    """
    info = jnp.finfo(dtype)
    if x.dtype == dtype or info.bits < 16:  # 8 bits: each format has its own infinity, or none
        return x.astype(dtype).astype(x.dtype)
    near = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp == jnp.finfo(x.dtype).nexp:
        return near
    tiny, lowest = (jnp.asarray(limit, x.dtype) for limit in (info.smallest_normal, info.smallest_subnormal))
    below = jax.lax.round(x / lowest, jax.lax.RoundingMethod.TO_NEAREST_EVEN) * lowest  # to which the above gives 0
    return jnp.where(jnp.abs(x) < tiny, below, near)
