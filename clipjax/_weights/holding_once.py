"""`hold_once`: the weight transformations of an optimizer, applied once to given params."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax._maths import random_draws
from clipjax._weights import allowed_values, checking, latents, visiting
from clipjax._weights.projecting import ProjectState
from clipjax._weights.visiting import Visited
from clipjax.typing import State, Tree

_LATE = 2**30  # a count at which every schedule without a known end has come to rest


def hold_once(
    tx: optax.GradientTransformation, params: Tree, opt_state: State = None, **extra: object
) -> tuple[Tree, State]:
    r"""Apply the weight transformations of an optimizer to given params, once: a trained model, an average, an import.

    Each transformation acts as it does at its `stop`: schedules have their final values, and `start` is ignored. With
    P_1, ..., P_k in the order of the chain, those of an `inner=` first, the result is

    .. math:: P_k(\dots P_1(w))

    itself, exactly. Optimizers take no step and decay nothing, and gradients play no part: a zero-gradient update of
    the same chain would decay the weights instead, and, since weights move by updates, leave many beside their grid.

    Args:
      tx: the optimizer, with weight transformations such as `prune_mask` and `fake_quantize` in it.
      params: a tree of arrays.
      opt_state: the state of a run, whose masks and grids are then used as they are, for instance for an average of its
        params (EMA). What was not chosen yet in that run is chosen now. Without it all are chosen for these params.
      **extra: what `tx.update` takes besides, such as `grad=` for gradient scores.

    Returns:
      The params, and a state that belongs to them, for `check`, `quantized` and `save`, or to go on with: masks and
      grids are those of the last refresh, latent weights are the given params, and all else is as in `opt_state`, or
      in `tx.init(params)`.

    Raises:
      ValueError: where `tx` has no weight transformation that can be reached, as inside of `optax.MultiSteps` or
        `optax.apply_if_finite`, which call their transformation in a branch.
      TypeError: for a `tx` that is no transformation.

    Example:
      >>> import clipjax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.adamw(1e-3), clipjax.prune_mask(0.5), clipjax.fake_quantize(2, step=0.5, start=100))
      >>> params, state = hold_once(tx, {"kernel": jnp.array([[0.7, 0.1, -0.4, 0.2]])})
      >>> params["kernel"].tolist(), clipjax.check(params, state, tx)
      ([[0.5, 0.0, -0.5, 0.0]], [])

    References:
      D2, section 2.2: prune a trained network. D4, section 2.2: quantize one.
    """
    arguments.transformation(tx, "tx")
    _require_reached(tx is not None, None)
    given = opt_state is not None
    cached = not extra and arguments.hashable(tx)
    hold = _program(tx, given) if cached else _holding(tx, given, extra)
    state = opt_state if given else tx.init(params)
    try:
        if given:
            visiting.require_fit(tx, trees.pure(params), trees.pure(state), extra)
        held = hold(trees.pure(params), trees.pure(state))
        return trees.with_boxes(held[0], params), trees.with_boxes(held[1], state)
    except jax.errors.UnexpectedTracerError:
        _require_reached(False, "some in a branch")
        raise


def _holding(
    tx: optax.GradientTransformation, given: bool, extra: dict[str, object]
) -> Callable[[Tree, State], tuple[Tree, State]]:
    """The compiled program: params and a state in, those that are held out."""

    @jax.jit
    def hold(params: Tree, opt_state: State) -> tuple[Tree, State]:
        found: _Found = {path: (p, ()) for path, p in trees.governed(params)}
        times = 0

        def act(visited: Visited) -> State:
            nonlocal times
            times += 1
            return _held(visited, found, given)

        new_state = visiting.visit(tx, act, params, _at_rest(opt_state), extra)
        _require_reached(times == len(checking.states(opt_state)) > 0, times)
        return trees.map_with_path(lambda path, p: found[path][0], params), _merged(opt_state, new_state)

    return hold


@functools.lru_cache(maxsize=4)
def _program(tx: optax.GradientTransformation, given: bool) -> Callable[[Tree, State], tuple[Tree, State]]:
    """The program of an optimizer without extra arguments, found again at its next call."""
    return _holding(tx, given, {})


_Found: TypeAlias = dict[str, tuple[jax.Array, allowed_values.Facts]]
"""By path the value that a leaf has so far, and what the transformations so far make of any other."""


def _require_reached(ok: bool, got: object) -> None:
    remedy = "Pass the transformation inside of `MultiSteps`, `apply_if_finite` or your own wrapper, and its state."
    arguments.require(ok, "tx", "have weight transformations that a call of it reaches", got, remedy)


def _held(visited: Visited, found: _Found, given: bool) -> State:
    """Project the values found so far; returns the state after the last refresh."""
    constraint, state, context = visited.constraint, visited.state, visited.context
    params = trees.map_with_path(lambda path, p: found[path][0], context.params)
    target = jax.tree.map(dtypes.widened, params)
    known = [found[path][1] if path in found else () for path in trees.paths(context.params)]
    last = jnp.asarray(_LATE if visited.stop is None else visited.stop, jnp.int32)
    context = context._replace(
        count=last,
        key=random_draws.key_at(visited.key, last),
        params=params,
        landed=target,
        refresh=True,
        memory=lambda: target,
        known=known,
    )
    _, projected = constraint.projection.apply(target, state.projection, context)
    if given:  # masks and grids of the run, where it has chosen them
        kept = jnp.asarray(constraint.fitted(state.projection))
        keep = lambda old, new: elementwise.where(kept, old, new)  # noqa: E731
        projected = jax.tree.map(keep, state.projection, projected)
    made = constraint.frozen if given or constraint.once is None else constraint.once
    new = latents.rounded(made(target, projected, context._replace(refresh=False)), params)
    finite = jax.tree.map(lambda n, z: elementwise.where(jnp.isfinite(z), n, z), new, target)
    governed = trees.governed(params)
    own: list[allowed_values.Fact | None] = [None] * len(governed)
    if constraint.facts is not None:
        own = list(constraint.facts(target, state.projection, projected, context))
    for (path, p), value, fact in zip(governed, jax.tree.leaves(finite), own, strict=True):
        found[path] = value.astype(p.dtype), found[path][1] + (() if fact is None else (fact,))
    carry = target if jax.tree.leaves(state.carry) else state.carry
    end = jnp.asarray(visited.start if visited.stop is None else visited.stop, jnp.int32)
    return state._replace(count=jnp.maximum(state.count, end + 1), carry=carry, projection=projected)


def _at_rest(opt_state: State) -> State:
    """The state with the schedules of `optax.inject_hyperparams` at counts at which they have come to rest."""

    def late(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        names = [getattr(key, "name", None) for key in path]
        return jnp.full_like(leaf, _LATE) if "hyperparams_states" in names and names[-1] == "count" else leaf

    return jax.tree_util.tree_map_with_path(late, opt_state)


def _merged(old: State, new: State) -> State:
    """The states of the weight transformations from a visit, all others as they were."""

    def merge(before: State, after: State) -> State:
        if not isinstance(before, ProjectState):
            return before
        return after._replace(inner=_merged(before.inner, after.inner))

    return jax.tree.map(merge, old, new, is_leaf=lambda x: isinstance(x, ProjectState))
