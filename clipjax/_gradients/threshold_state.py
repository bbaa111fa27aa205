"""The one module that interprets `threshold=`: a number, a schedule and a rule become the same two functions.

A rule is written for one f32 norm. Here it gets a state for every norm, or for every entry of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, dtypes, trees
from clipjax.typing import Rule, State, Threshold, Tree


class NormThresholds(NamedTuple):
    """A threshold for an array of norms.

    Attributes:
      init: `init(norms) -> state`: the state of a rule for each norm; () for a number or a schedule.
      update: `update(count, norms, state) -> (thresholds, state)`: C for each norm, f32 like the norms.
    """

    init: Callable[[jax.Array], State]
    update: Callable[[jax.Array, jax.Array, State], tuple[jax.Array, State]]


class EntryThresholds(NamedTuple):
    """A threshold for the magnitude of every entry of a gradient.

    Attributes:
      init: `init(params) -> (shared, state)`: an f32 scalar, the C that all entries share, infinite before the first
        update and NaN for a rule; and the state of a rule for each entry, () for a number or a schedule.
      update: `update(count, gradients, shared, state) -> (thresholds, shared, state)`: for each leaf an f32 array that
        broadcasts to it, and the next of both.
    """

    init: Callable[[Tree], tuple[jax.Array, State]]
    update: Callable[[jax.Array, Tree, jax.Array, State], tuple[Tree, jax.Array, State]]


def for_norms(threshold: Threshold) -> NormThresholds:
    """The functions of a `threshold=` that norms are compared with; norms of 0 enter no history.

    Scalars of a rule's state get the shape, and eagerly the sharding, of the norms.
    """
    rule = _rule(threshold)
    if rule is None:
        return NormThresholds(lambda norms: (), lambda count, norms, state: (_constant(threshold, count, norms), ()))
    return NormThresholds(
        lambda norms: jax.tree.map(lambda x: _spread(x, norms), rule.init()),
        lambda count, norms, state: _follow(rule, norms, state, zeros=False),
    )


def for_entries(threshold: Threshold) -> EntryThresholds:
    """The functions of a `threshold=` that magnitudes of entries are compared with; unlike norms, these may be 0."""
    rule = _rule(threshold)
    if rule is not None:
        return _rule_for_entries(rule)

    def update(count: jax.Array, gradients: Tree, shared: jax.Array, state: State) -> tuple[Tree, jax.Array, State]:
        new = recorded(shared, _constant(threshold, count, shared))
        return jax.tree.map(lambda g: new, gradients), new, ()

    return EntryThresholds(lambda params: (jnp.asarray(jnp.inf, jnp.float32), ()), update)


def _rule_for_entries(rule: Rule) -> EntryThresholds:
    """One rule for every entry: its own tree of numbers, with a tree like the params in the place of each number."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(rule.init())]
    remedy = "Every entry keeps a state of its own: use a rule of scalars such as `spam()`, or `clip_norm`."
    arguments.require(not any(shapes), "threshold", "remember single numbers", shapes, remedy)

    def init(params: Tree) -> tuple[jax.Array, State]:
        def every(number: jax.Array) -> Tree:
            # an empty leaf keeps one number: Orbax saves no empty arrays
            return jax.tree.map(lambda p: _spread(number, p if np.size(p) else jnp.zeros(())), params)

        return jnp.asarray(jnp.nan, jnp.float32), jax.tree.map(every, rule.init())

    def update(count: jax.Array, gradients: Tree, shared: jax.Array, state: State) -> tuple[Tree, jax.Array, State]:
        # transposed: from a tree of leaves for each number of the rule to the numbers of each leaf, and back
        numbers: State = jax.tree.structure(rule.init())
        fields = [trees.flatten(field) for field in numbers.flatten_up_to(state)]
        leaves, treedef = trees.flatten(gradients)
        rows = zip(leaves, *(values for values, _ in fields), strict=True)
        followed = [_follow_leaf(rule, g, numbers.unflatten(row)) for g, *row in rows]
        columns = [numbers.flatten_up_to(new) for _, new in followed]
        values = [layout.unflatten([column[i] for column in columns]) for i, (_, layout) in enumerate(fields)]
        return treedef.unflatten([limit for limit, _ in followed]), shared, numbers.unflatten(values)

    return EntryThresholds(init, update)


def _follow_leaf(rule: Rule, g: jax.Array | None, state: State) -> tuple[jax.Array | None, State]:
    """The thresholds of one leaf's entries; a leaf without a gradient or without entries keeps its state."""
    if g is None:
        return None, state
    if not g.size:
        return jnp.asarray(jnp.inf, jnp.float32), state
    return _follow(rule, jnp.abs(g), state, zeros=True)


def _follow(rule: Rule, measured: jax.Array, state: State, *, zeros: bool) -> tuple[jax.Array, State]:
    """The rule's threshold for every norm or magnitude, and the states after them.

    Non-finite values are never added to the history, nor is 0 unless `zeros`: their states stay as they were. A
    threshold that is not positive is replaced by infinity.
    """
    finite = jnp.isfinite(measured)
    usable = finite if zeros else finite & (measured > 0)
    one = rule.update
    for _ in range(measured.ndim):
        one = jax.vmap(one)
    # a rule gets finite f32 only; what it returns for a value that was not finite is dropped below
    largest = float(jnp.finfo(jnp.float32).max)
    values = jnp.where(finite, jnp.minimum(dtypes.widened(measured), largest), largest).astype(jnp.float32)
    limit, new_state = one(values, state)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        at = usable.reshape(usable.shape + (1,) * (old.ndim - usable.ndim))
        return jnp.where(at, new.astype(old.dtype), old)

    return jnp.where(limit > 0, limit, jnp.inf).astype(jnp.float32), jax.tree.map(keep, new_state, state)


def _rule(threshold: Threshold) -> Rule | None:
    """The rule, or None for a number >= 0 or a schedule; anything else raises."""
    if isinstance(threshold, Rule):
        return threshold
    if threshold is None or isinstance(threshold, str | bool):
        raise TypeError(
            f"`threshold` must be a number, a schedule or a rule, got {threshold!r}."
            " Give C >= 0, or call a factory: `thresholds.zscore()`."
        )
    arguments.non_negative(threshold, "threshold", "Use math.inf to record without clipping.")
    return None


def _constant(threshold: Threshold, count: jax.Array, like: jax.Array) -> jax.Array:
    """A number, or a schedule's number at this count, for every norm."""
    return jnp.full_like(like, arguments.schedule(threshold)(count), dtype=jnp.float32)


def _spread(number: jax.Array, like: jax.Array) -> jax.Array:
    """A copy of one array of a rule's state for every entry of `like`."""
    number = jnp.asarray(number)
    if number.ndim:
        return jnp.broadcast_to(number, like.shape + number.shape) + jnp.zeros((), number.dtype)
    return jnp.zeros_like(like, dtype=number.dtype) + number


def recorded(old: jax.Array, new: jax.Array) -> jax.Array:
    """`new` in the place of `old`, a number of the state that no update reads.

    JAX drops an argument that nothing reads from the program and hands out donated buffers in order, so every scalar
    behind it would be copied into its neighbour's buffer. XLA removes the select.
    """
    return jnp.where(jnp.isnan(old), new, new)
