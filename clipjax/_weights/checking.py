"""`check`: whether params are in the sets that the transformations of an optimizer hold them in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import arguments, dtypes, picked_leaves, trees
from clipjax._maths import intervals, landing, random_draws
from clipjax._weights import latents, leaf_levels, quantize_state, visiting
from clipjax._weights.clamping import ClampState
from clipjax._weights.projecting import ProjectState
from clipjax._weights.quantize_state import QuantizeState
from clipjax._weights.visiting import Visited
from clipjax._weights.zeros import PruneState
from clipjax.typing import State, Tree

_NAMES = {PruneState: "prune_mask", QuantizeState: "fake_quantize", ClampState: "clamp_weights"}
_KINDS = {PruneState: "mask", QuantizeState: "grid", ClampState: "bound"}
_EMPTY = 10  # a leaf counts as nearly empty if it keeps one unit where its pool would keep so many of as many


class Violation(NamedTuple):
    """A leaf that is not in the set of a transformation.

    Attributes:
      path: of the leaf; "" for all of them.
      rule: the transformation, named as in `report`: "prune_mask", a second one "prune_mask_1".
      kind: "mask": weights that a mask removes are not 0; "bound": weights beyond a bound; "grid": weights between the
        levels of a grid; "projection": weights that a projection of `project` moves; "nearly empty": a mask keeps one
        unit of the leaf where it would keep ten or more at the rate of all leaves; "stalled": `skip_spikes` left out as
        many updates in a row as its `patience` says; "unchecked": the state does not show whether the constraint holds.
      entries: how many weights; kept units for "nearly empty", updates in a row for "stalled", at least 1.
      distance: the largest |P(w) - w|, in the unit of a weight; 0 where it is not known.
    """

    path: str
    rule: str
    kind: str
    entries: int
    distance: float

    def __str__(self) -> str:
        return f"{self.rule} at {self.path!r}: {self.kind}, {self.entries} entries, distance {self.distance:.3g}"


class _Row(NamedTuple):
    """What is found out about one leaf: static names, and two arrays."""

    path: str
    rule: str
    kind: str
    entries: jax.Array
    distance: jax.Array


def check(
    params: Tree, opt_state: State, tx: optax.GradientTransformation | None = None, *, raise_: bool = False
) -> list[Violation]:
    r"""Find the leaves on which a constraint does not hold; an empty list says that all hold.

    A constraint is lost where something behind it changes the weights again: an optimizer or a weight decay chained
    behind `prune_mask`, an average over updates (EMA), another checkpoint. `report` does not see this, since it reads
    the state alone. With P the projection of a transformation, a weight w is in its set if

    .. math:: |P(w) - w| \le 2\, \epsilon\, |w|

    ε being the spacing of floats at 1 in the dtype of the params. On a grid, :math:`2 \epsilon_{32} \max |w|` more are
    allowed, ε₃₂ being that of f32: a weight that jumped to less than half of itself may be a little beside its level
    until the next update. For a projection of whole arrays it is :math:`2 \epsilon \max |w|` more. Weights that are
    not finite are left out, as they are by the transformations. Before its `start` a transformation promises nothing,
    and nothing is checked.

    Args:
      params: a tree of concrete arrays; call `check` outside of jit.
      opt_state: the optimizer state after the update that gave these params.
      tx: the optimizer. With it every transformation projects the params with the state that it has, a projection of
        your own too, and none of the optimizers in it takes a step. Without it, masks, grids and bounds are read from
        the state; what it does not show has the kind "unchecked".
      raise_: raise instead of returning a list that has anything but "unchecked" and "nearly empty" in it.

    Returns:
      A `Violation` (path, rule, kind, entries, distance) for each leaf and transformation.

    Raises:
      ValueError: with `raise_`, naming every leaf; where the state does not belong to `tx` or to the params.
      TypeError: for a `tx` that is no transformation, and a state of another one.

    Example:
      >>> import clipjax, jax.numpy as jnp, optax
      >>> tx = optax.chain(clipjax.prune_mask(0.5), optax.sgd(0.1))  # the wrong order
      >>> params = {"kernel": jnp.array([[1.0, 0.25]])}
      >>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
      >>> for violation in check(optax.apply_updates(params, updates), state, tx):
      ...     print(violation)
      prune_mask at 'kernel': mask, 1 entries, distance 0.275

    References:
      D2, section 2.2, step 3: pruned weights stay pruned.
    """
    arguments.transformation(tx, "tx")
    rows = _of_state(params, opt_state) if tx is None else _of_optimizer(params, opt_state, tx)
    rows += _stalled(opt_state, {})
    found = [Violation(row.path, row.rule, row.kind, int(row.entries), float(row.distance)) for row in rows]
    found = [violation for violation in found if violation.entries or violation.kind == "unchecked"]
    broken = [str(violation) for violation in found if violation.kind not in ("unchecked", "nearly empty")]
    if raise_ and broken:
        raise ValueError(
            "`params` must be in the sets that the optimizer holds them in, got\n  "
            + "\n  ".join(broken)
            + "\nChain weight transformations last, or project these params once with `clipjax.hold_once`."
        )
    return found


def _of_optimizer(params: Tree, opt_state: State, tx: optax.GradientTransformation) -> list[_Row]:
    """The rows of all transformations that a visit reaches; of the state where it does not reach all of them."""
    arrays, traced = _program(tx) if arguments.hashable(tx) else _program.__wrapped__(tx)
    params, opt_state = trees.pure(params), trees.pure(opt_state)
    try:
        visiting.require_fit(tx, params, opt_state, {})
        found = arrays(params, opt_state)
        labels, visits = traced[_shapes(params, opt_state)]
    except jax.errors.UnexpectedTracerError:  # a wrapper calls its transformation in a branch of its own
        found, labels, visits = [], [], -1
    if visits != len(states(opt_state)):
        return [*_of_state(params, opt_state), _unchecked("", "tx")]
    return [_Row(*label, *pair) for label, pair in zip(labels, found, strict=True)]


_Traced: TypeAlias = dict[tuple[object, ...], tuple[list[tuple[str, str, str]], int]]


def _shapes(*trees_: Tree) -> tuple[object, ...]:
    """What a program is compiled for."""
    leaves, treedef = jax.tree.flatten(trees_)
    return treedef, *[(jnp.shape(x), x.dtype if hasattr(x, "dtype") else jnp.result_type(x)) for x in leaves]


@functools.lru_cache(maxsize=4)
def _program(
    tx: optax.GradientTransformation,
) -> tuple[Callable[[Tree, State], list[tuple[jax.Array, jax.Array]]], _Traced]:
    """The numbers of all rows as one program, compiled once for an optimizer; and by shapes its labels and visits."""
    traced: _Traced = {}

    @jax.jit
    def arrays(params: Tree, opt_state: State) -> list[tuple[jax.Array, jax.Array]]:
        found: list[Visited] = []
        times: dict[str, int] = {}

        def look(visited: Visited) -> State:
            found.append(visited)
            return visited.state

        visiting.visit(tx, look, params, opt_state, {})
        # Numbered as in `report`: in the order of the state, not in that in which a wrapper calls its groups.
        places = {id(state.count): i for i, state in enumerate(states(opt_state))}
        found.sort(key=lambda visited: places.get(id(visited.state.count), len(places)))
        rows = [row for visited in found for row in _missed(visited, _numbered(visited.constraint.name, times))]
        labels = [(row.path, row.rule, row.kind) for row in rows]
        traced[_shapes(params, opt_state)] = labels, sum(times.values())
        return [(row.entries, row.distance) for row in rows]

    return arrays, traced


def _missed(visited: Visited, rule: str) -> list[_Row]:
    """What one transformation finds, projecting the params as it did at the last update."""
    constraint, state, context = visited.constraint, visited.state, visited.context
    before = state.count - 1
    last = context._replace(count=before, key=random_draws.key_at(visited.key, before), refresh=False)
    kind = _KINDS.get(constraint.state, "projection")
    named = trees.governed(context.params)
    leaves = dict(named)
    for path in _own_paths(state.projection):
        _leaf(leaves, path)
    if not constraint.checkable or (constraint.tolerance and not state.carry):
        return [_unchecked(path, rule) for path, _ in named]

    def projected(weights: Tree) -> list[jax.Array]:
        return jax.tree.leaves(latents.rounded(constraint.frozen(weights, state.projection, last), context.params))

    # A weight is held if it is its own projection, or that of its latent weight (`latents.current`).
    images = projected(jax.tree.map(dtypes.widened, context.params))
    if state.carry:
        nearer = lambda p, q, z: jnp.where(jnp.abs(q - p) <= jnp.abs(z - p), q, z)  # noqa: E731
        images = [nearer(p, q, z) for (_, p), q, z in zip(named, images, projected(visited.latents), strict=True)]
    active = (state.count > visited.start) & constraint.fitted(state.projection)
    rows = []
    for (path, p), q in zip(named, images, strict=True):
        whole = kind == "projection" or constraint.tolerance > 0
        slack = landing.late(p, p.dtype if whole else q.dtype) if whole or kind == "grid" else 0.0
        entries, distance = landing.missed(p, q, slack)
        rows.append(_Row(path, rule, kind, jnp.where(active, entries, 0), jnp.where(active, distance, 0)))
    return [*rows, *_nearly_empty(state.projection, rule)]


def _of_state(params: Tree, opt_state: State) -> list[_Row]:
    """The rows that states show by themselves."""
    leaves = dict(trees.governed(params))
    times: dict[str, int] = {}
    rows: list[_Row] = []
    for state in states(opt_state):
        held = state.projection
        rule = _numbered(_NAMES.get(type(held), "project"), times)
        if isinstance(held, PruneState):
            masks = trees.governed(held.mask)  # one array without a path where no leaf is picked
            rows += [_zeros(path, rule, mask, _leaf(leaves, path)) for path, mask in masks if path or "" in leaves]
            rows += _nearly_empty(held, rule)
        elif isinstance(held, QuantizeState):
            rows += [_levels(path, rule, held, _leaf(leaves, path)) for path in quantize_state.paths(held)]
        elif isinstance(held, ClampState):
            rows += _bounds(rule, held, leaves)
        else:
            rows.append(_unchecked("", rule))
    return rows


def _own_paths(held: State) -> list[str]:
    """The leaves that a mask or grids are kept for; one array without a path is left out."""
    if isinstance(held, QuantizeState):
        return quantize_state.paths(held)
    return [path for path, _ in trees.governed(held.mask) if path] if isinstance(held, PruneState) else []


def states(opt_state: State) -> list[ProjectState]:
    """The state of every weight transformation, those of an `inner=` first."""
    outer = trees.find(opt_state, ProjectState)
    return [s for state in outer for s in (*states(state.inner), state)]


def _leaf(leaves: dict[str, jax.Array], path: str) -> jax.Array:
    trees.check_state(path in leaves, f"{path!r}, which the params do not have")
    return leaves[path]


def _zeros(path: str, rule: str, mask: jax.Array, leaf: jax.Array) -> _Row:
    """A mask and its leaf; the mask of blocks does not say how large they are."""
    if any(a not in (1, b) for a, b in zip(mask.shape, leaf.shape, strict=True)):
        return _unchecked(path, rule)
    kept = jnp.where(mask, dtypes.widened(leaf), 0)
    return _Row(path, rule, "mask", *landing.missed(leaf, kept))


def _levels(path: str, rule: str, state: QuantizeState, leaf: jax.Array) -> _Row:
    if not quantize_state.fitted(state):
        return _Row(path, rule, "grid", jnp.zeros(()), jnp.zeros(()))
    return _Row(path, rule, "grid", *leaf_levels.missed(state, path, leaf))


def _bounds(rule: str, state: ClampState, leaves: dict[str, jax.Array]) -> list[_Row]:
    """Where no leaf is beyond the bound of all of them it holds; else the state does not say which it governs."""
    low, high = state.bound
    floats = [(path, p) for path, p in leaves.items() if picked_leaves.floating(p)]
    if bool(low > high):  # not known, or not the same for all
        return [_unchecked(path, rule) for path, _ in floats]
    missed = [(path, landing.missed(p, intervals.limit(dtypes.widened(p), low, high))) for path, p in floats]
    return [_Row(path, rule, "unchecked", *found) for path, found in missed if int(found[0])]


def _nearly_empty(state: State, rule: str) -> list[_Row]:
    """Leaves of which a mask keeps one unit, though the rate of all leaves would keep many."""
    if not isinstance(state, PruneState):
        return []
    masks = trees.governed(state.mask)
    kept = [jnp.sum(mask, dtype=jnp.float32) for _, mask in masks]
    rate = sum(kept, jnp.zeros(())) / max(sum(mask.size for _, mask in masks), 1)
    flags = [(k <= 1) & (rate * mask.size >= _EMPTY) for k, (_, mask) in zip(kept, masks, strict=True)]
    zero = jnp.zeros(())
    return [
        _Row(path, rule, "nearly empty", jnp.where(flag, jnp.maximum(k, 1), zero), zero)
        for (path, _), k, flag in zip(masks, kept, flags, strict=True)
    ]


def _stalled(opt_state: State, times: dict[str, int]) -> list[_Row]:
    """What has run out of patience, those inside of another one first."""

    def waits(x: object) -> bool:
        return isinstance(x, tuple) and "stalled" in getattr(x, "_fields", ())

    rows = []
    for state in filter(waits, jax.tree.leaves(opt_state, is_leaf=waits)):
        rows += _stalled(state.inner, times)
        rule = _numbered("skip_spikes", times)
        stalled, streak = trees.unboxed((state.stalled, state.streak))
        if not isinstance(streak, tuple):
            rows.append(_Row("", rule, "stalled", jnp.where(stalled, jnp.maximum(streak, 1), 0), jnp.zeros(())))
    return rows


def _unchecked(path: str, rule: str) -> _Row:
    return _Row(path, rule, "unchecked", jnp.zeros(()), jnp.zeros(()))


def _numbered(name: str, times: dict[str, int]) -> str:
    """The name of a transformation as in `report`: the second of a kind has a number."""
    number = times.get(name, 0)
    times[name] = number + 1
    return f"{name}_{number}" if number else name
