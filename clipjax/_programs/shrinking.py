"""Shrinking: pruned units, which are slices of zeros and still cost memory and time, are cut out of the arrays."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from clipjax._arrays import arguments, dtypes, picked_leaves, trees
from clipjax._programs import cutting, dead_units, group_leaves, models, verifying
from clipjax._programs import groups as grouping
from clipjax._programs.analysis import Analysis
from clipjax._programs.cutting import Cut, Cuts
from clipjax._programs.group_leaves import GroupLeaf
from clipjax._programs.groups import Group, Repair, Traceable
from clipjax.typing import Groups, State, Tree


class _Three(NamedTuple):
    variables: Tree
    opt_state: State
    widths: dict[str | tuple[str, int], int]


class Shrunk(_Three):
    """The result of `shrink`; unpacks as three values, and has three more.

    Attributes:
      variables: the given tree with smaller arrays, the given module itself for NNX.
      opt_state: the optimizer state that fits them, None where none was given.
      widths: the size that is left of the axis of units, keyed by the path of every owner as its group writes it; by
        (path, axis), the axis counted from the end, for an owner that is cut along several axes.
      epsilons: for each scale behind a root mean square over units, by its path, the number that the model must add to
        the mean square now; empty where there is none.
      change: the largest change of an output over its range, as `verify` measured it; None without `verify`.
      dead: how many dead units stay since a statistic runs over them, by the path of the first leaf of their group in
        `Analysis.inexact`; ``exact=False`` cuts them too.
    """

    epsilons: dict[str, float]
    change: float | None
    dead: dict[str, int]

    def __new__(
        cls,
        variables: Tree,
        opt_state: State,
        widths: dict[str | tuple[str, int], int],
        epsilons: dict[str, float] | None = None,
        change: float | None = None,
        dead: dict[str, int] | None = None,
    ) -> Shrunk:
        """The three values, and what stands beside them."""
        made = super().__new__(cls, variables, opt_state, widths)
        made.epsilons, made.change, made.dead = epsilons or {}, change, dead or {}
        return made

    def _replace(self, **fields: Any) -> Shrunk:
        """Other values; what stands beside them stays."""
        made = super()._replace(**fields)
        made.epsilons, made.change, made.dead = self.epsilons, self.change, self.dead
        return made


def shrink(
    variables: Tree,
    groups: Groups | Analysis,
    opt_state: State = None,
    *,
    round_to: int | None = None,
    exact: bool = True,
    verify: tuple[Callable[..., Any], Any] | None = None,
) -> Shrunk:
    r"""Cut dead units out of all arrays: smaller arrays, the same outputs, and an optimizer state that fits.

    A unit is dead if all weights that make it are 0. `groups` says which leaves have entries of the same n units, and
    along which axis: the outputs of a kernel, their biases, the inputs of the next kernel. `analyze` finds the groups
    of a model: pass what it returns. With :math:`W_o` the owners of a group, the units

    .. math:: K = \{u : \exists o,\ W_o[\dots, u, \dots] \ne 0\}, \qquad X \leftarrow X[\dots, K, \dots]

    are kept, in order, in every leaf X of the group. The arrays alone decide; masks in `opt_state` are not read.

    - Owners. In a group of an analysis all leaves are owners but running statistics. In one by hand it is the first
      leaf, and other weights (rank >= 2, not named bias, b, scale or offset) that are cut along the same axis counted
      from the end, as layers are whose outputs are added, multiplied or attended to.
    - Flattened maps. If the owner's axis is its last one, another leaf may have m * n entries, as the kernel after a
      flattened NHWC map does: entry i then belongs to unit i % n. A group by hand says m: ``{"dense/kernel": {0: m}}``.
      Without it such a leaf is refused, since sizes also divide by chance, as where two maps are concatenated.
    - Widths. For every owner the size that is left of the axis. If several groups cut one axis, it is what all of them
      leave: of a query kernel whose heads share key heads the query heads.
    - The optimizer state. An array of it belongs to the leaf whose path its own path ends with. It is cut along each
      axis where it has the leaf's size and left as it is where it has size 1: moments, latent weights, masks, steps.
      Call `shrink` after the last refresh of `prune_mask`, since a later one counts its sparsity from the units left.
    - The outputs are the same if a unit whose weights, bias, scale and offset are 0 outputs 0: its activation maps 0 to
      0 (relu does, sigmoid does not), and no statistic is taken over the units (BatchNorm takes none, LayerNorm does).
      `analyze` reads both from the program. It marks a group as `proved` where the program, traced with other widths,
      differs in its shapes alone, and `shrink` traces it once more with the numbers of units that are left. Any other
      group of it is cut only if `verify` passes.
    - RMSNorm. The mean over d units of which d' are left is larger by d / d'. The scale c behind it becomes
      :math:`(o + c) \sqrt{d / d'} - o`, where the model multiplies by o + c, and the model must add
      :math:`\epsilon\, d / d'`, in the place of its :math:`\epsilon`, to the mean: `Shrunk.epsilons`. `shrink` cannot
      put it into the model, which may change by a percent with the old one: `verify` is required, unless a second trace
      has shown that the model itself adds :math:`\epsilon\, d / d'`. The optimizer's latent weights of c are left, and
      dropped at the next update, as those of any edited param are.

    - Models. A module of NNX is changed in place, and so is an `nnx.Optimizer`; of an Equinox module a new one is
      made. Where a layer of theirs notes a size that an array had (`out_features`, the groups of a depthwise
      convolution, the shape of a norm), it notes the new one. What else holds a size, as a number of heads or a field
      of your own, is yours to set: a model that fails without is refused by `verify`.

    Args:
      variables: params, or Linen variables with their collections, or an `nnx.State`, or a module of NNX or Equinox;
        concrete arrays.
      groups: what `analyze` returned, or some of its groups; or a list of dicts path -> axis, or a tuple of axes, or
        a dict axis -> how many entries of it each unit has. A path may leave out the collection: "bn/mean" is
        "batch_stats/bn/mean". A leaf may be in several groups with different axes.
      opt_state: any optimizer state that belongs to the variables.
      round_to: dead units are kept, the first ones, until the number of units left is a multiple of `round_to`, or
        there are none: some hardware is slow at odd sizes.
      exact: False to cut also the units that a statistic runs over, those of `Analysis.inexact`, as under a LayerNorm.
        The outputs change, by how much `verify` measures, and training repairs it.
      verify: a pair (apply_small, args). The model is run before and after: `apply_small(variables, *args)` gets the
        smaller variables, and may build its model by their shapes; what ran before is the function that was analyzed,
        or `apply_small` itself for groups by hand. A value of `args` that is no tuple is the one argument. Outputs may
        change by 1e-5 of their range in f32 (1e-10 in f64, 4e-3 in f16, 3e-2 in bf16; by the dtype of a scale that is
        repaired where that is narrower), others not at all. Outputs that are new values of variables are compared
        without the units that are cut.

    Returns:
      `Shrunk(variables, opt_state, widths)` with `epsilons`, `change` and `dead`; build the model again with these
      widths.

    Raises:
      ValueError: if a dead unit still has a non-zero bias, scale or offset; for an unknown or ambiguous path, an axis
        that does not exist or that is cut twice, sizes that do not match, a group whose units are all dead, and a state
        array that does not have the shape of its leaf (factored moments) or has groups along an axis that is cut; for a
        leaf on a format of which blocks would be split: whole blocks of inputs are cut with their scales; for
        outputs that change, unless `exact` is False, or that have other shapes; for a group of an analysis that is not
        proved, without `verify`, and one with a statistic over its units, unless `exact` is False; for a model that
        must add another epsilon, without `verify`, unless `exact` is False; and, without `verify`, for a program that
        is another one with the units that are left.
      TypeError: for traced arrays, for groups that are not dicts of paths, and a `verify` that is no pair.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> params = {
      ...     "hidden": {"kernel": jnp.array([[1.0, 0.0, 2.0]]), "bias": jnp.array([0.5, 0.0, 0.0])},
      ...     "out": {"kernel": jnp.array([[3.0], [4.0], [5.0]])},
      ... }
      >>> small, _, widths = shrink(params, [{"hidden/kernel": -1, "hidden/bias": 0, "out/kernel": 0}])
      >>> small["out"]["kernel"].tolist(), widths
      ([[3.0], [5.0]], {'hidden/kernel': 2})
      >>> hidden = lambda p, x: jnp.maximum(x @ p["kernel"] + p["bias"], 0)
      >>> apply = lambda params, x: hidden(params["hidden"], x) @ params["out"]["kernel"]
      >>> params["out"]["kernel"] = jnp.array([[3.0], [0.0], [5.0]])
      >>> x = jnp.array([[1.0], [2.0]])
      >>> shrunk = shrink(params, clipjax.analyze(apply, params, x), verify=(apply, x))
      >>> shrunk.widths["hidden/kernel"], shrunk.change
      (2, 0.0)

    References:
      D0, section 2.2, steps 1 and 2: a "node" is a unit's incoming weights. Fang et al., "DepGraph: Towards Any
      Structural Pruning", 2023, https://arxiv.org/abs/2301.12900. Zhang and Sennrich, "Root Mean Square Layer
      Normalization", 2019, https://arxiv.org/abs/1910.07467.
    """
    tree, state = models.opened(variables), models.opened(opt_state)
    if any(arguments.traced(x) for x in jax.tree.leaves((tree, state))):
        raise TypeError(
            "`variables` and `opt_state` must be concrete, got traced arrays. Call `shrink` outside of jit."
        )
    arguments.static(round_to, "round_to")
    if round_to is not None:
        arguments.whole(round_to, "round_to", low=1, remedy="Give the number that the widths are multiples of, e.g. 8.")
    test = None if verify is None else verifying.pair(verify)
    found, apply_fn = _read(groups, exact)
    resolved = group_leaves.resolve(found, tree)
    kept: dict[str, dict[int, Cut]] = {}
    fewer: list[tuple[Group, int]] = []
    units: dict[str, tuple[tuple[int, ...], Cuts]] = {}
    for group, members in zip(found, resolved, strict=True):
        left = dead_units.left(members, int(round_to or 1))
        known = grouping.analyzed(group)
        if known is not None and not left.all():
            _check_evidence(known, exact, verify)
            fewer.append((known, int(left[0].sum())))
        first = members[0]
        units[first.path] = first.along(first.units), {first.axis: Cut(left, first.layers)}
        for leaf in members:
            cut, before = _of_entries(left, leaf, first), kept.setdefault(leaf.path, {})
            before[leaf.axis] = cut if leaf.axis not in before else cut.both(before[leaf.axis])
    repairs = _repairs(found, resolved, kept)

    def smaller(path: str, x: Any) -> Any:
        x = cutting.entries(x, kept.get(path, {}))
        return _repaired(x, *repairs[path]) if path in repairs else x

    small, tails = trees.map_with_path(smaller, tree), cutting.tails(tree)
    epsilons = {repair.path: repair.epsilon * ratio for repair, ratio in repairs.values() if ratio != 1}
    epsilons = {path: epsilon for path, epsilon in epsilons.items() if epsilon}
    small_state, change = cutting.state(state, tails, kept, units), None
    if test is None and exact:
        _check_epsilons(epsilons)
    if test is None:
        _check_program(fewer)
    if test is not None:
        wanted = cutting.outputs(
            (apply_fn or test.apply_small)(models.merged(variables, tree), *test.args), tails, kept
        )
        changes = verifying.changes(wanted, test.small(models.merged(variables, small)))
        if exact:
            repaired = [str(x.dtype) for path, x in trees.governed(tree) if path in repairs]
            verifying.check(changes, repaired, epsilons)
        change = max((change for change, _ in changes.values()), default=0.0)
    # Nothing is refused from here on: a model that is changed in place is changed whole.
    made, made_state = models.updated(variables, small), models.updated(opt_state, small_state)
    dead = dead_units.staying(groups, tree) if isinstance(groups, Analysis) and exact else {}
    return Shrunk(made, made_state, _widths(resolved, kept), epsilons, change, dead)


def _read(groups: Groups | Analysis, exact: bool) -> tuple[Groups, Callable[..., Any] | None]:
    """The groups to cut, and the function whose params they are of, where an analysis knows it."""
    if isinstance(groups, Analysis):
        return [*groups.groups, *(() if exact else groups.inexact)], groups.apply_fn
    grouping.check(groups)
    return groups, None


def _check_evidence(group: Group, exact: bool, verify: object) -> None:
    """Refuse to cut a group that may change the outputs, unless that is measured, or asked for."""
    name = next(iter(group))
    remedy = f"{'. '.join(group.statistics)}. The outputs change without them: pass `exact=False`, and train on."
    arguments.require(not group.statistics or not exact, name, "have no statistic over its units", "one", remedy)
    why = f" ({group.refusal})" if group.refusal else ""
    remedy = (
        f"The model could not be traced with another number of these units{why}, so a fixed number may depend on it."
        " Pass `verify=(apply_small, args)`, which compares the outputs, or `rebuild=` to `analyze`."
    )
    arguments.require(group.proved or verify is not None, name, "have units proved to be free", "a walk only", remedy)


def _check_program(fewer: list[tuple[Group, int]]) -> None:
    """Refuse, unless the outputs are compared, what is another program with just the numbers of units that are left."""
    programs: dict[int, tuple[Traceable, dict[Any, int]]] = {}
    for group, left in fewer:
        if group.evidence is not None:
            program, atom = group.evidence
            programs.setdefault(id(program), (program, {}))[1][atom] = left
    for program, new in programs.values():
        what = program.differs(new)
        if what and 1 in new.values():  # JAX writes axes of one entry with other equations
            what = program.differs({atom: max(left, 2) for atom, left in new.items()})
        remedy = "Pass `verify=(apply_small, args)`, which compares the outputs, or leave other numbers of units."
        arguments.require(not what, "groups", "leave the same program", what, remedy)


def _check_epsilons(changed: dict[str, float]) -> None:
    """Refuse, unless the outputs are compared, to cut what a model can make up for only by other epsilons."""
    remedy = (
        f"Let the model add {changed} to its mean squares, by the paths of their scales, and pass"
        " `verify=(apply_small, args)`, which compares the outputs."
    )
    rule = "be given where an epsilon belongs to the number of units"
    arguments.require(not changed, "verify", rule, None, remedy)


def _of_entries(left: np.ndarray, leaf: GroupLeaf, first: GroupLeaf) -> Cut:
    """The entries along the axis of a leaf that belong to the units that are left, or to none."""
    kept = left[:, leaf.places] | (leaf.places < 0)
    if leaf.path.rsplit("/", 1)[-1] in picked_leaves.NOT_WEIGHTS:
        _check_zero(~kept, leaf, first)
    return Cut(kept, leaf.layers)


def _check_zero(dead: np.ndarray, leaf: GroupLeaf, owner: GroupLeaf) -> None:
    """A bias, scale or offset of a dead unit must be 0, else the outputs would change without it."""
    wrong = np.nonzero(dead & dead_units.nonzero(leaf))[1]
    units = sorted({int(leaf.places[i]) for i in wrong})
    remedy = (
        f"The weights of these units in {owner.path!r} are 0, but cutting them would change the outputs: set them"
        f" to zero in {leaf.path!r} too, or prune it with the same units."
    )
    arguments.require(not units, leaf.path, "be 0 in the units that are cut", units, remedy)


def _widths(resolved: list[list[GroupLeaf]], kept: Mapping[str, Cuts]) -> dict[str | tuple[str, int], int]:
    """What is left of the axes that are widths of the model."""
    made = {(leaf.path, leaf.axis): leaf.written for members in resolved for leaf in members if leaf.owns}
    times = collections.Counter(path for path, _ in made)
    return {
        (written if times[path] == 1 else (written, axis)): kept[path][axis].size
        for (path, axis), written in made.items()
    }


def _repairs(
    groups: Groups, resolved: list[list[GroupLeaf]], kept: Mapping[str, Cuts]
) -> dict[str, tuple[Repair, float]]:
    """For each scale that is repaired, by its path in the tree, how many times more units there were before.

    Several groups may cut the units of one scale: along one axis, of which the ratio is that of all cuts together, or
    along several, whose ratios multiply.
    """
    axes: dict[str, tuple[Repair, dict[int, float]]] = {}
    for known, members in zip(map(grouping.analyzed, groups), resolved, strict=True):
        for repair in () if known is None else known.repairs:
            for leaf in members:
                if leaf.written == repair.path:
                    cut = kept[leaf.path][leaf.axis]
                    axes.setdefault(leaf.path, (repair, {}))[1][leaf.axis] = cut.kept.shape[1] / cut.size
    return {path: (repair, math.prod(ratios.values())) for path, (repair, ratios) in axes.items()}


def _repaired(x: Any, repair: Repair, ratio: float) -> Any:
    """The scale that makes up for a mean over fewer units: (offset + c) * sqrt(ratio) - offset."""
    if ratio == 1:
        return x
    wide = x.astype(dtypes.wide(x.dtype))
    return ((wide + repair.offset) * math.sqrt(ratio) - repair.offset).astype(x.dtype)
