"""The one module that interprets `threshold=`: a number, a schedule, a rule, or numbers by leaf become two functions.

A rule is written for one norm. Here it gets a state for every norm, or for every entry of a gradient. Where nothing is
clipped C is the largest float of its dtype and not infinity, which `jax_debug_infs` would refuse in a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax.typing import Leaf, LeafThreshold, PerLeaf, Rule, State, Threshold, Tree

Named: TypeAlias = Sequence[tuple[str, Leaf | None]]
"""The leaves that norms are of, with their paths; None without a gradient. Nothing for the norm of all of them."""


class NormThresholds(NamedTuple):
    """A threshold for an array of norms.

    Attributes:
      init: `init(norms) -> state`: the state of a rule for each norm; () without a rule.
      update: `update(count, norms, state, named, weights) -> (thresholds, state)`: C for each norm, in its dtype.
      relative: True where `update` needs the norms of the weights, taken as those of the gradients are.
      check: `check(params)` raises for thresholds of leaves that are none, and where no leaf has one.
    """

    init: Callable[[jax.Array], State]
    update: Callable[[jax.Array, jax.Array, State, Named, jax.Array | None], tuple[jax.Array, State]]
    check: Callable[[Tree], None] = lambda params: None
    relative: bool = False


class EntryThresholds(NamedTuple):
    """A threshold for the magnitude of every entry of a gradient.

    Attributes:
      init: `init(params) -> (shared, state)`: a scalar, the C that all entries share, the largest float before the
        first update and -1 for a rule; and the state of a rule for each entry, () for a number or a schedule.
      update: `update(count, gradients, shared, state) -> (thresholds, shared, state)`: for each leaf an array that
        broadcasts to it, in its computing dtype, and the next of both.
    """

    init: Callable[[Tree], tuple[jax.Array, State]]
    update: Callable[[jax.Array, Tree, jax.Array, State], tuple[Tree, jax.Array, State]]


def for_norms(threshold: LeafThreshold | None, *, each: bool = False) -> NormThresholds:
    """The functions of a `threshold=` that norms are compared with; norms of 0 enter no history.

    Floats of a rule's state get the dtype of the norms, scalars their shape, and eagerly their sharding. With `each`
    the norms are those of leaves, and thresholds may differ by leaf.
    """
    rule = _rule(threshold, by_leaf=each)
    if rule is not None:
        return NormThresholds(
            lambda norms: jax.tree.map(lambda x: _spread(x, norms, norms.dtype), rule.init()),
            lambda count, norms, state, named, weights: _follow_weights(rule, norms, state, weights),
            relative=rule.reference is not None,
        )
    if _differs(threshold):
        return NormThresholds(
            lambda norms: (),
            lambda count, norms, state, named, weights: (_of_leaves(threshold, count, norms, named), ()),
            lambda params: _check_leaves(threshold, params),
        )
    return NormThresholds(
        lambda norms: (),
        lambda count, norms, state, named, weights: (jnp.full_like(norms, _number(threshold, count, norms.dtype)), ()),
    )


def for_entries(threshold: Threshold) -> EntryThresholds:
    """The functions of a `threshold=` that magnitudes of entries are compared with; unlike norms, these may be 0."""
    rule = _rule(threshold, by_leaf=False)
    if rule is not None:
        return _rule_for_entries(rule)

    def update(count: jax.Array, gradients: Tree, shared: jax.Array, state: State) -> tuple[Tree, jax.Array, State]:
        kinds = {dtypes.wide(g.dtype) for g in jax.tree.leaves(gradients)} | {shared.dtype}
        limits = {kind: _number(threshold, count, kind) for kind in kinds}
        own = jax.tree.map(lambda g: limits[dtypes.wide(g.dtype)], gradients)
        return own, recorded(shared, limits[shared.dtype]), ()

    def init(params: Tree) -> tuple[jax.Array, State]:
        dtype = dtypes.widest(jax.tree.leaves(params))
        return jnp.asarray(dtypes.largest(dtype), dtype), ()

    return EntryThresholds(init, update)


def _rule_for_entries(rule: Rule) -> EntryThresholds:
    """One rule for every entry: its own tree of numbers, with a tree like the params in the place of each number."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(rule.init())]
    remedy = "Every entry keeps a state of its own: use a rule of scalars such as `spam()`, or `clip_norm`."
    arguments.require(not any(shapes), "threshold", "remember single numbers", shapes, remedy)
    remedy = "Entries are compared with nothing of their weights: use `clip_norm`."
    arguments.require(rule.reference is None, "threshold", "not be relative to weights", rule, remedy)

    def init(params: Tree) -> tuple[jax.Array, State]:
        def every(number: jax.Array) -> Tree:
            def own(p: Leaf) -> jax.Array:
                # an empty leaf keeps one number: Orbax saves no empty arrays
                return _spread(number, p if math.prod(p.shape) else jnp.zeros(()), dtypes.wide(p.dtype))

            return jax.tree.map(own, params)

        return jnp.asarray(-1, jnp.float32), jax.tree.map(every, rule.init())

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
        dtype = dtypes.wide(g.dtype)
        return jnp.asarray(dtypes.largest(dtype), dtype), state
    return _follow(rule, jnp.abs(g), state, zeros=True)


def _follow_weights(rule: Rule, norms: jax.Array, state: State, weights: jax.Array | None) -> tuple[jax.Array, State]:
    """`_follow` in the units that a rule makes of the norms of weights."""
    if rule.reference is None or weights is None:
        return _follow(rule, norms, state, zeros=False)
    one = rule.reference
    for _ in range(norms.ndim):
        one = jax.vmap(one)
    unit = one(weights.astype(norms.dtype))
    usable = (unit > 0) & jnp.isfinite(unit)
    unit = jnp.where(usable, unit, jnp.ones_like(unit))
    # 0 enters no history
    limit, new_state = _follow(rule, jnp.where(usable, norms / unit, jnp.zeros_like(norms)), state, zeros=False)
    largest = jnp.full_like(limit, dtypes.largest(limit.dtype))
    return jnp.where(usable & (limit < largest / jnp.maximum(unit, 1)), limit * unit, largest), new_state


def _follow(rule: Rule, measured: jax.Array, state: State, *, zeros: bool) -> tuple[jax.Array, State]:
    """The rule's threshold for every norm or magnitude, and the states after them.

    Non-finite values are never added to the history, nor is 0 unless `zeros`: their states stay as they were. A
    threshold that is not positive is replaced by the largest float.
    """
    if any(map(arguments.traced, (measured, *jax.tree.leaves(state)))):
        return _followed(_Same(rule), measured, state, zeros)
    return _compiled(_Same(rule), measured, state, zeros)


class _Same:
    """A rule that is equal to itself alone, whatever its functions hold: what is compiled is found by it."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __hash__(self) -> int:
        return id(self.rule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.rule is other.rule


def _followed(same: _Same, measured: jax.Array, state: State, zeros: bool) -> tuple[jax.Array, State]:
    _check_state(same.rule, measured, state)
    finite = jnp.isfinite(measured)
    usable = finite if zeros else finite & (measured > 0)
    one = same.rule.update
    for _ in range(measured.ndim):
        one = jax.vmap(one)
    # a rule gets finite numbers only; what it returns for a value that was not finite is dropped below
    wide = dtypes.widened(measured)
    largest = jnp.full_like(wide, dtypes.largest(wide.dtype))
    limit, new_state = one(jnp.where(finite, wide, largest), jax.tree.map(lambda x: _as_norms(x, wide.dtype), state))
    limit = jnp.asarray(limit).astype(wide.dtype)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        at = usable.reshape(usable.shape + (1,) * (old.ndim - usable.ndim))
        return jnp.where(at, new.astype(old.dtype), old)

    return jnp.where(limit > 0, jnp.minimum(limit, largest), largest), jax.tree.map(keep, new_state, state)


def _check_state(rule: Rule, measured: jax.Array, state: State) -> None:
    """Raise for the state of another rule, or of one with another window."""
    wanted = jax.tree.map(lambda x: measured.shape + x.shape, jax.eval_shape(rule.init))
    found = jax.tree.map(jnp.shape, state)
    trees.check_state(found == wanted, f"the history {found} of another rule, which should be {wanted}")


# Outside of jit one program, found again at the next update; its infinities are no concern of `jax_debug_infs`.
_compiled = jax.jit(_followed, static_argnums=(0, 3))


def _rule(threshold: LeafThreshold | None, *, by_leaf: bool) -> Rule | None:
    """The rule, or None for numbers >= 0 and schedules; anything else raises."""
    arguments.called(threshold, "threshold", "a number, a schedule or a rule")
    if isinstance(threshold, Rule):
        return threshold
    if _differs(threshold):
        if not by_leaf:
            raise TypeError(
                f"`threshold` must be one number, schedule or rule, got {threshold!r}."
                ' For thresholds that differ by leaf use `clip_norm(..., per="leaf")`.'
            )
    elif threshold is None or isinstance(threshold, str | bool):
        raise TypeError(
            f"`threshold` must be a number, a schedule or a rule, got {threshold!r}."
            " Give C >= 0, or call a factory: `thresholds.zscore()`."
        )
    else:
        _check_number(threshold)
    return None


def _differs(threshold: object) -> bool:
    """True for numbers by leaf: `per_leaf`, or a tree."""
    return isinstance(threshold, PerLeaf) or (not isinstance(threshold, Rule) and arguments.is_tree(threshold))


def _check_number(threshold: object) -> None:
    arguments.non_negative(threshold, "threshold", "Use math.inf to record without clipping.")
    if not callable(threshold):
        remedy = 'For a threshold of each leaf give `per_leaf` or a dict path -> C to `clip_norm(..., per="leaf")`.'
        one = threshold if isinstance(threshold, jax.Array) else arguments.numeric(threshold, "threshold", remedy)
        arguments.require(one.ndim == 0, "threshold", "be one number", threshold, remedy)


def _number(threshold: object, count: jax.Array, dtype: DTypeLike) -> jax.Array:
    """C: a number, or a schedule's number at this count. Below 0, which only a traced number can be, it counts as 0."""
    largest = dtypes.largest(dtype)
    if arguments.known(threshold):
        return jnp.asarray(min(arguments.numeric(threshold, "threshold", "").item(), largest), dtype)
    value = jnp.asarray(arguments.schedule(threshold)(count))
    remedy = "Return a scalar from the schedule."
    arguments.require(value.ndim == 0, "threshold", "give one number", f"shape {value.shape}", remedy)
    value = value.astype(dtype)
    value = elementwise.where(value < 0, jnp.zeros_like(value), value)
    return elementwise.where(value > largest, jnp.full_like(value, largest), value)


def _given(threshold: object, named: Named) -> list[object]:
    """The thresholds of the leaves, None for those without one."""
    if isinstance(threshold, PerLeaf):
        return [None if leaf is None else threshold.fn(path, leaf) for path, leaf in named]
    by_path = dict(trees.governed(threshold))
    return [by_path.get(path) for path, _ in named]


def _check_leaves(threshold: object, params: Tree) -> None:
    named = trees.governed(params)
    values = [value for value in _given(threshold, named) if value is not None]
    rules = [x for x in (*values, *_leaves(threshold)) if isinstance(x, Rule)]
    if rules:
        raise TypeError(
            "`threshold` must give each leaf a number or a schedule, got a rule. Pass one rule for all:"
            ' with per="leaf" it keeps a history of each leaf.'
        )
    arguments.require(values or not named, "threshold", "have a value for a leaf", threshold, "Keys are paths: 'a/b'.")
    left = (
        [] if isinstance(threshold, PerLeaf) else {path for path, _ in trees.governed(threshold)} - dict(named).keys()
    )
    masked = trees.find(params, optax.MaskedNode)  # leaves of another group, which may have a threshold too
    arguments.require(
        not left or masked, "threshold", "name leaves of the params", sorted(left), "Keys are paths: 'a/b'."
    )
    for value in values:
        arguments.called(value, "threshold", "a number or a schedule for each leaf")
        _check_number(value)


def _leaves(threshold: object) -> list[object]:
    return jax.tree.leaves(threshold, is_leaf=lambda x: isinstance(x, Rule))


def _of_leaves(threshold: object, count: jax.Array, norms: jax.Array, named: Named) -> jax.Array:
    """C for each leaf; the largest float, which clips nothing, for one without a threshold."""
    largest = dtypes.largest(norms.dtype)
    values = (largest if value is None else value for value in _given(threshold, named))
    return jnp.stack([_number(value, count, norms.dtype) for value in values])


def _as_norms(number: jax.Array, dtype: DTypeLike) -> jax.Array:
    """An array of a rule's state in the dtype of the norms, where it is f32 or f64."""
    return number.astype(dtype) if number.dtype in (jnp.float32, jnp.float64) else number


def _spread(number: jax.Array, like: Leaf, dtype: DTypeLike) -> jax.Array:
    """A copy of one array of a rule's state for every entry of `like`; f32 and f64 become `dtype`."""
    number = jnp.asarray(number)
    number = _as_norms(number, dtype)
    if number.ndim:
        return jnp.broadcast_to(number, like.shape + number.shape) + jnp.zeros((), number.dtype)
    return jnp.zeros_like(like, dtype=number.dtype) + number


def unlimited(threshold: jax.Array) -> jax.Array:
    """Where a threshold of a state clips nothing."""
    return threshold >= dtypes.largest(threshold.dtype)


@elementwise.leafwise
def recorded(old: jax.Array, new: jax.Array) -> jax.Array:
    """`new` in the place of `old`, a number of the state that no update reads, in its dtype.

    JAX drops an argument that nothing reads from the program and hands out donated buffers in order, so every scalar
    behind it would be copied into its neighbour's buffer. XLA removes the select.
    """
    if new.dtype != old.dtype:  # f64 gradients of f32 params
        new = elementwise.where(unlimited(new), jnp.full_like(old, dtypes.largest(old.dtype)), new.astype(old.dtype))
    return jnp.where(jnp.isnan(old), new, new)
