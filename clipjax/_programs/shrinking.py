"""Shrinking: pruned units, which are slices of zeros and still cost memory and time, are cut out of the arrays."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clipjax._arrays import arguments, picking, trees
from clipjax._programs import groups as grouping
from clipjax._programs.groups import GroupLeaf
from clipjax.typing import Groups, State, Tree


class Shrunk(NamedTuple):
    """The result of `shrink`; unpacks as three values.

    Attributes:
      variables: the given tree with smaller arrays.
      opt_state: the optimizer state that fits them, None where none was given.
      widths: the number of units left, keyed by the path of every owner as its group writes it; by (path, axis), the
        axis counted from the end, for an owner that is cut by several groups.
    """

    variables: Tree
    opt_state: State
    widths: dict[str | tuple[str, int], int]


Kept: TypeAlias = dict[int, np.ndarray]
"""The indices that are kept along each axis of a leaf that is cut, the axis counted from the end."""


def shrink(variables: Tree, groups: Groups, opt_state: State = None) -> Shrunk:
    r"""Cut dead units out of all arrays: smaller arrays, the same outputs, and an optimizer state that fits.

    A unit is dead if all weights that make it are 0. `groups` says which leaves have entries of the same n units, and
    along which axis: the outputs of a kernel, their biases, the inputs of the next kernel. The first leaf of a group
    owns its units. Other weights of the group (rank >= 2, not named bias, b, scale or offset) own them too if they are
    cut along the same axis counted from the end, as layers are whose outputs are added, multiplied or attended to. With
    :math:`W_o` the owners of a group, the units

    .. math:: K = \{u : \exists o,\ W_o[\dots, u, \dots] \ne 0\}, \qquad X \leftarrow X[\dots, K, \dots]

    are kept, in order, in every leaf X of the group. The arrays alone decide; masks in `opt_state` are not read.

    - Flattened maps. If the owner's axis is its last one, another leaf may have m * n entries, as the kernel after a
      flattened NHWC map does: entry i then belongs to unit i % n.
    - The optimizer state. An array of it belongs to the leaf whose path its own path ends with. It is cut along each
      axis where it has the leaf's size and left as it is where it has size 1: moments, latent weights, masks, steps.
      Call `shrink` after the last refresh of `prune_mask`, since a later one counts its sparsity from the units left.
    - The outputs are the same if a unit whose weights, bias, scale and offset are 0 outputs 0: its activation maps 0 to
      0 (relu does, sigmoid does not), and no statistic is taken over the units (BatchNorm takes none, LayerNorm does).

    Args:
      variables: params, or Linen variables with their collections, or an `nnx.State`; concrete arrays.
      groups: a list of dicts path -> axis, or a tuple of axes. A path may leave out the collection: "bn/mean" is
        "batch_stats/bn/mean". A leaf may be in several groups with different axes.
      opt_state: any optimizer state that belongs to the variables.

    Returns:
      `Shrunk(variables, opt_state, widths)`; build the model again with these widths.

    Raises:
      ValueError: if a dead unit still has a non-zero bias, scale or offset; for an unknown or ambiguous path, an axis
        that does not exist or that is cut twice, sizes that do not match, a group whose units are all dead, and a state
        array that does not have the shape of its leaf (factored moments) or has groups along an axis that is cut.
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
    if any(arguments.traced(x) for x in jax.tree.leaves((variables, opt_state))):
        raise TypeError(
            "`variables` and `opt_state` must be concrete, got traced arrays. Call `shrink` outside of jit."
        )
    grouping.check(groups)
    leaves, treedef = trees.flatten(variables)
    paths = trees.paths(variables)
    kept: dict[str, Kept] = {}
    widths: dict[str | tuple[str, int], int] = {}
    resolved = grouping.resolve(groups, variables)
    owners_of = [[leaf for leaf in group if grouping.owns(leaf, group[0])] for group in resolved]
    times_owner = collections.Counter(owner.path for owners in owners_of for owner in owners)
    for group, owners in zip(resolved, owners_of, strict=True):
        alive = _alive(owners)
        for owner in owners:
            widths[owner.written if times_owner[owner.path] == 1 else (owner.written, owner.axis)] = len(alive)
        for leaf in group:
            kept.setdefault(leaf.path, {})[leaf.axis] = _indices(alive, leaf, owners[0])
    new = [_cut(x, kept.get(path, {})) for path, x in zip(paths, leaves, strict=True)]
    return Shrunk(treedef.unflatten(new), _cut_state(opt_state, _state_tails(paths, leaves), kept), widths)


def _alive(owners: list[GroupLeaf]) -> np.ndarray:
    """The units with a weight that is not 0, NaN included, in at least one owner."""
    alive = np.zeros(grouping.units_of(owners[0]), bool)
    for owner in owners:
        alive |= _nonzero(owner)
    remedy = "Prune with `structures.unit(min_keep=1)`, or take the layer out of the model."
    arguments.require(alive.any(), owners[0].path, "have a unit alive", f"{alive.size} dead units", remedy)
    return np.flatnonzero(alive)


def _nonzero(leaf: GroupLeaf) -> np.ndarray:
    """Where, along its axis, a leaf has an entry that is not 0."""
    others = tuple(a for a in range(-leaf.leaf.ndim, 0) if a != leaf.axis)
    return np.asarray(jnp.any(jnp.asarray(leaf.leaf) != 0, axis=others))


def _indices(alive: np.ndarray, leaf: GroupLeaf, owner: GroupLeaf) -> np.ndarray:
    """The indices along the axis of a leaf that belong to the units that are kept."""
    units = grouping.units_of(owner)
    kept = (np.arange(leaf.repeats)[:, None] * units + alive).ravel()
    if leaf.path.rsplit("/", 1)[-1] in picking.NOT_WEIGHTS:
        _check_zero(np.delete(np.arange(leaf.repeats * units), kept), leaf, owner)
    return kept


def _check_zero(dead: np.ndarray, leaf: GroupLeaf, owner: GroupLeaf) -> None:
    """A bias, scale or offset of a dead unit must be 0, else the outputs would change without it."""
    wrong = np.intersect1d(dead, np.flatnonzero(_nonzero(leaf)))
    units = sorted({int(i) % grouping.units_of(owner) for i in wrong})
    remedy = (
        f"The weights of these units in {owner.path!r} are 0, but cutting them would change the outputs: set them"
        f" to zero in {leaf.path!r} too, or prune it with the same units."
    )
    arguments.require(not units, leaf.path, "be 0 in the units that are cut", units, remedy)


def _cut(x: Any, kept: Kept) -> Any:
    """The kept entries along each axis of an array; an axis of size 1 holds one value for all units, and is kept."""
    for axis, indices in kept.items():
        if x.shape[axis] != 1:
            x = _take(x, axis, indices)
    return x


def _take(x: Any, axis: int, indices: np.ndarray) -> Any:
    """The entries at these indices, sharded as before; an axis whose new size does not divide is replicated."""
    index: Any = (..., indices, *[slice(None)] * (-1 - axis))
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return x[index]
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    taken = np.asarray(x)[index]
    if taken.shape[axis] % (x.shape[axis] // sharding.shard_shape(x.shape)[axis]):
        spec[axis] = None
    return jax.device_put(taken, sharding.update(spec=PartitionSpec(*spec)))


def _state_tails(paths: list[str], leaves: list[Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Path and shape of every array, keyed by how the paths of its state end: Linen's params also without "params/"."""
    named = [(path, x.shape) for path, x in zip(paths, leaves, strict=True) if hasattr(x, "shape")]
    inner = {path.removeprefix("params/"): (path, shape) for path, shape in named if path.startswith("params/")}
    return inner | {path: (path, shape) for path, shape in named}


def _cut_state(opt_state: State, tails: Mapping[str, tuple[str, tuple[int, ...]]], kept: Mapping[str, Kept]) -> State:
    """The optimizer state, every array of it cut as the leaf is that its path ends with."""
    leaves, treedef = trees.flatten(opt_state)

    def cut(path: str, x: Any) -> Any:
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        candidates = [tails[end] for end in ends if end in tails]  # the longest path first
        if not hasattr(x, "shape") or not any(name in kept for name, _ in candidates):
            return x
        for name, shape in candidates:
            if _fits(x.shape, shape):
                _check_groups(f"opt_state/{path}", x, name, shape, kept.get(name, {}))
                return _cut(x, kept.get(name, {}))
        name, shape = candidates[0]
        remedy = f"It cannot be cut as {name!r} of shape {shape}: start anew with `tx.init(params)`."
        arguments.require(x.size <= 1, f"opt_state/{path}", "have the shape of its leaf", x.shape, remedy)
        return x

    return treedef.unflatten([cut(path, x) for path, x in zip(trees.paths(opt_state), leaves, strict=True)])


def _check_groups(path: str, x: Any, name: str, shape: tuple[int, ...], kept: Kept) -> None:
    """Refuse steps of groups along an axis that is cut: what is left of several groups would share a step."""
    grouped = len(x.shape) > len(shape) and any(x.shape[axis] == 1 != shape[axis] for axis in kept)
    remedy = f"Groups along the inputs of {name!r} do not survive: quantize it without `group`, or start anew."
    arguments.require(not grouped, path, "have no groups along an axis that is cut", x.shape, remedy)


def _fits(shape: tuple[int, ...], like: tuple[int, ...]) -> bool:
    """True for the leaf's own shape, one that broadcasts to it at full rank, and a stack of either."""
    tail = shape[len(shape) - len(like) :]
    return len(shape) >= len(like) and all(a in (1, b) for a, b in zip(tail, like, strict=True))
