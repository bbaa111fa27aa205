"""Shrinking: dead units leave the arrays for real, and the outputs stay what they are.

A pruned unit is a slice of zeros that still costs memory and time.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clipjax._arrays import arguments, picking, trees
from clipjax._programs import groups as grouping
from clipjax.typing import Groups, Tree


class Shrunk(NamedTuple):
    """What `shrink` returns; unpacks as three values.

    Attributes:
      variables: the tree with smaller arrays.
      opt_state: the optimizer state that belongs to it, None where none was given.
      widths: the number of units left, keyed by the path of every owner as its group writes it; by (path, axis), the
        axis counted from the end, for an owner that is cut by several groups.
    """

    variables: Any
    opt_state: Any
    widths: dict[str | tuple[str, int], int]


Cuts = dict[str, dict[int, np.ndarray]]  # path -> axis counted from the end -> the indices that stay


def shrink(variables: Tree, groups: Groups, opt_state: Any = None) -> Shrunk:
    r"""Remove dead units: smaller arrays, the same outputs, and an optimizer state that fits.

    A group names the leaves, and their axis, that hold the entries of the same n units. Its first leaf owns them, and
    so does every other weight of it (rank >= 2, not named bias, b, scale or offset) that is cut along the same axis
    counted from the end: layers whose outputs are added, multiplied or attended to. With W_o the owners, the units

    .. math:: K = \{u : \exists o,\ W_o[\dots, u, \dots] \ne 0\}, \qquad X \leftarrow X[\dots, K, \dots]

    stay, in order, in all leaves X of the group. Deadness is judged on the arrays as they are given. Where the
    owner's axis is its last one, another leaf may have m * n entries (the kernel after a flattened NHWC map): entry i
    belongs to unit i % n.

    Arrays of the optimizer state are found by the end of their path and cut where they have the leaf's size: moments,
    carries, masks, steps; a size of 1 stays. Cut after the last refresh of `prune_mask`: its sparsity would count the
    units that are left. The outputs are the same where a unit whose weights, bias, scale and offset are 0 gives 0:
    the activation maps 0 to 0 (not sigmoid), and no statistic runs over the units (BatchNorm, not LayerNorm).

    Args:
      variables: params, or Linen variables with their collections, or an `nnx.State`; concrete arrays.
      groups: dicts path -> axis, or a tuple of axes. A path may leave out the collection: "bn/mean" is
        "batch_stats/bn/mean". A leaf may be in several groups with different axes.
      opt_state: any optimizer state that belongs to the variables.

    Returns:
      `Shrunk(variables, opt_state, widths)`; build the model again with these widths.

    Raises:
      ValueError: if a cut unit still has a non-zero bias, scale or offset; for an unknown or ambiguous path, an axis
        that does not exist or that is cut twice, sizes that do not match, a group with no unit alive, and a state
        array that does not have the shape of its leaf (factored moments).
      TypeError: for traced arrays, and for groups that are not dicts of paths.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {
      ...     "hidden": {"kernel": jnp.array([[1.0, 0.0, 2.0]]), "bias": jnp.array([0.5, 0.0, 0.0])},
      ...     "out": {"kernel": jnp.array([[3.0], [4.0], [5.0]])},
      ... }
      >>> small, _, widths = shrink(params, [{"hidden/kernel": -1, "hidden/bias": 0, "out/kernel": 0}])
      >>> small["out"]["kernel"].tolist(), widths
      ([[3.0], [5.0]], {'hidden/kernel': 2})

    References:
      D0, section 2.2, steps 1 and 2: a "node" is a unit's incoming weights.
    """
    _check(variables, groups, opt_state)
    leaves, treedef = trees.flatten(variables)
    paths = trees.paths(variables)
    cuts: Cuts = {}
    widths: dict[str | tuple[str, int], int] = {}
    found = grouping.resolve(groups, variables)
    owned = [[m for m in members if grouping.owns(m, members[0])] for members in found]
    times = collections.Counter(owner.path for owners in owned for owner in owners)
    for members, owners in zip(found, owned, strict=True):
        keep = _alive(owners)
        for o in owners:
            widths[o.written if times[o.path] == 1 else (o.written, o.axis)] = len(keep)
        for member in members:
            cuts.setdefault(member.path, {})[member.axis] = _indices(keep, member, owners[0])
    new = [_take(x, cuts.get(path, {})) for path, x in zip(paths, leaves, strict=True)]
    state = _follow(opt_state, _shapes(paths, leaves), cuts)
    return Shrunk(treedef.unflatten(new), state, widths)


def _alive(owners: list[grouping.Member]) -> np.ndarray:
    """The units with a weight that is not 0, NaN included, in at least one owner."""
    alive = np.zeros(grouping.units_of(owners[0]), bool)
    for owner in owners:
        others = tuple(a for a in range(-owner.leaf.ndim, 0) if a != owner.axis)
        alive |= np.asarray(jnp.any(jnp.asarray(owner.leaf) != 0, axis=others))
    remedy = "Prune with `structures.unit(min_keep=1)`, or take the layer out of the model."
    arguments.require(alive.any(), owners[0].path, "have a unit alive", f"{alive.size} dead units", remedy)
    return np.flatnonzero(alive)


def _indices(keep: np.ndarray, member: grouping.Member, owner: grouping.Member) -> np.ndarray:
    """The indices of a leaf's axis that belong to the units that stay."""
    units = grouping.units_of(owner)
    kept = (np.arange(member.repeats)[:, None] * units + keep).ravel()
    if member.path.rsplit("/", 1)[-1] in picking.NOT_WEIGHTS:
        _check_silent(np.delete(np.arange(member.repeats * units), kept), member, owner)
    return kept


def _check_silent(cut: np.ndarray, member: grouping.Member, owner: grouping.Member) -> None:
    """A bias, scale or offset of a unit that is cut must be 0, else the outputs change."""
    others = tuple(a for a in range(-member.leaf.ndim, 0) if a != member.axis)
    loud = np.flatnonzero(np.asarray(jnp.any(jnp.asarray(member.leaf) != 0, axis=others)))
    units = sorted({int(i) % grouping.units_of(owner) for i in np.intersect1d(cut, loud)})
    remedy = (
        f"The weights of these units in {owner.path!r} are 0, but cutting them would change the outputs: set them"
        f" to zero in {member.path!r} too, or prune it with the same units."
    )
    arguments.require(not units, member.path, "be 0 in the units that are cut", units, remedy)


def _take(x: Any, axes: Mapping[int, np.ndarray]) -> Any:
    """The array without what is cut; an axis of size 1 stays."""
    for axis, kept in axes.items():
        if x.shape[axis] != 1:
            x = _pick(x, axis, kept)
    return x


def _pick(x: Any, axis: int, kept: np.ndarray) -> Any:
    """The entries that stay, sharded as before; an axis whose new size does not divide is replicated."""
    index: Any = (..., kept, *[slice(None)] * (-1 - axis))
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return x[index]
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    picked = np.asarray(x)[index]
    if picked.shape[axis] % (x.shape[axis] // sharding.shard_shape(x.shape)[axis]):
        spec[axis] = None
    return jax.device_put(picked, sharding.update(spec=PartitionSpec(*spec)))


def _shapes(paths: list[str], leaves: list[Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path and shape of every array, keyed by what the path of its state may end with: also by Linen's params."""
    named = [(path, x.shape) for path, x in zip(paths, leaves, strict=True) if hasattr(x, "shape")]
    inner = {path.removeprefix("params/"): (path, shape) for path, shape in named if path.startswith("params/")}
    return inner | {path: (path, shape) for path, shape in named}


def _follow(opt_state: Any, shapes: dict[str, tuple[str, tuple[int, ...]]], cuts: Cuts) -> Any:
    """The state, every array in it cut as the leaf is that its path ends with, the longest one first."""
    leaves, treedef = trees.flatten(opt_state)

    def follow(path: str, x: Any) -> Any:
        parts = path.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        leaf = [shapes[tail] for tail in tails if tail in shapes]
        if not hasattr(x, "shape") or not any(name in cuts for name, _ in leaf):
            return x
        for name, shape in leaf:
            if _fits(x.shape, shape):
                return _take(x, cuts.get(name, {}))
        remedy = f"It cannot be cut as {leaf[0][0]!r} of shape {leaf[0][1]}: start anew with `tx.init(params)`."
        arguments.require(x.size <= 1, f"opt_state/{path}", "have the shape of its leaf", x.shape, remedy)
        return x

    return treedef.unflatten([follow(path, x) for path, x in zip(trees.paths(opt_state), leaves, strict=True)])


def _fits(shape: tuple[int, ...], like: tuple[int, ...]) -> bool:
    """True for the leaf's own shape, one that broadcasts to it at full rank, and a stack of either."""
    tail = shape[len(shape) - len(like) :]
    return len(shape) >= len(like) and all(a in (1, b) for a, b in zip(tail, like, strict=True))


def _check(variables: Tree, groups: Any, opt_state: Any) -> None:
    if any(arguments.traced(x) for x in jax.tree.leaves((variables, opt_state))):
        raise TypeError(
            "`variables` and `opt_state` must be concrete, got traced arrays. Call `shrink` outside of jit."
        )
    grouping.check(groups)
