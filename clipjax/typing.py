"""What may be passed to clipjax: names for kinds of arguments, and the interfaces of which users write their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np

Tree: TypeAlias = Any
"""A pytree of arrays; leaves that a transformation does not govern are None."""

State: TypeAlias = Any
"""A pytree of arrays that belongs to whoever made it."""

Leaf: TypeAlias = jax.Array | jax.ShapeDtypeStruct
"""An array, or at init under `jax.eval_shape` its shape and dtype."""

Number: TypeAlias = float | int | np.number | jax.Array
"""A number; arrays may be traced, which makes one `vmap` a sweep."""

Count: TypeAlias = int | np.integer | jax.Array
"""A number of updates; arrays may be traced."""

Schedule: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike]
"""`schedule(count) -> value`, as in Optax; a bare callable always means a schedule."""

Where: TypeAlias = Callable[[str, Leaf], bool]
"""`where(path, leaf) -> bool` picks leaves; a path reads `"encoder/lin/kernel"`."""


class PerLeaf(NamedTuple):
    """A static value that differs by leaf; `clipjax.per_leaf` makes one.

    Attributes:
      fn: `fn(path, leaf) -> value`.
    """

    fn: Callable[[str, Leaf], Any]


class Rule(NamedTuple):
    """A threshold that follows the norms it sees.

    Attributes:
      init: `init() -> state`, a tree of arrays of fixed shape.
      update: `update(norm, state) -> (threshold, state)`, for f32 scalars: the norm before the clip, and the threshold
        that it is held against. After the clip it is `min(norm, threshold)`.
    """

    init: Callable[[], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, Any]]


class Selection(NamedTuple):
    """Which entries may be touched.

    Attributes:
      choose: `choose(tree, key) -> tree` of bool masks that broadcast to the arrays of `tree`.
      key: a PRNG key of its own, or None to use the member's. Folded with the count at every use.
    """

    choose: Callable[[Tree, jax.Array], Tree]
    key: Any = None


class Context(NamedTuple):
    """What a projection may look at besides its target.

    Trees hold None at leaves that are not governed.

    Attributes:
      count: i32, updates before this one.
      params: the visible parameters, in their own dtype.
      landed: the weights that the members before would land on: weights seen + updates, without carry.
      grad: the incoming gradient where `with_gradient` or a caller's `grad=` provides it, else None.
      key: a PRNG key of this update.
      refresh: None to follow the life cycle by count; a static bool to force or forbid a refresh.
      again: `again() -> (target, landed)`, computed anew. Inside a `lax.cond` this keeps the branch from holding on to
        arrays that the program would otherwise never store.
    """

    count: jax.Array  # type: ignore[assignment]
    params: Tree
    landed: Tree
    grad: Tree | None
    key: jax.Array
    refresh: bool | None = None
    again: Callable[[], tuple[Tree, Tree]] | None = None


class Projection(NamedTuple):
    """A set of parameters.

    Attributes:
      init: `init(params) -> state`.
      apply: `apply(target, state, context) -> (new, state)`: the target moved into the set. Targets are f32 (f64 for
        f64 parameters), None where a leaf is not governed.
      hold: `hold(target, state, context) -> new`: the same with the set as the state has it, nothing refreshed.
        Optional; without it `apply` is called and its state dropped.
      vanishes: `vanishes(target, state, context) -> bool tree`: True only where P sends the target to 0: a cheaper
        answer than `hold`. Optional.
      survives: `survives(target, before, after)` -> masks that broadcast to the target, from the state before and after
        the update, for a P that keeps these entries and sets all others to 0, which needs no landing. The moments of an
        inner optimizer are set to 0 with them.
      near: the relative difference up to which params count as what P made of the carried weights; 0 for a P whose
        values are exact in floating point, so that two compiled programs agree on them.
    """

    init: Callable[[Tree], Any]
    apply: Callable[[Tree, Any, Context], tuple[Tree, Any]]
    hold: Callable[[Tree, Any, Context], Tree] | None = None
    vanishes: Callable[[Tree, Any, Context], Tree] | None = None
    survives: Callable[[Tree, Any, Any], Tree] | None = None
    near: float = 0.0


class Score(NamedTuple):
    """A saliency.

    Attributes:
      init: `init(params) -> state`.
      observe: `observe(target, state, context) -> state`, at every update.
      score: `score(target, state, context) -> tree` of arrays like the target, at a refresh.
    """

    init: Callable[[Tree], Any]
    observe: Callable[[Tree, Any, Context], Any]
    score: Callable[[Tree, Any, Context], Tree]


class Structure(NamedTuple):
    """A way to cut the arrays of a tree into units that live and die together.

    Trees hold None at leaves that take no part. An array of units stands where the leaf stands that owns them.

    Attributes:
      reduce: `reduce(scores) -> tree` of unit scores, from the scores of the leaves that vote.
      check: `check(params, voters)` raises where the leaves cannot be cut so.
      expand: `expand(units, tree) -> tree` of arrays that broadcast to the leaves: each entry has its unit's value.
      owners: `owners(tree) -> tree` without the leaves that own no units.
      holds: `holds(path, leaf) -> bool`, the leaves that have entries of the units; the score is then of those among
        them that `where` picks. None where both are the same.
      min_keep: how many units every array of units keeps whatever the scores say.
      whole: True where every weight is a unit of its own.
      keep: for a structure that fixes the sparsity, `keep(keys) -> mask` of unsigned keys, the lowest of which go;
        None where the sparsity is free.
    """

    reduce: Callable[[Tree], Tree]
    check: Callable[[Tree, Tree], None]
    expand: Callable[[Tree, Tree], Tree]
    owners: Callable[[Tree], Tree] = lambda tree: tree
    holds: Where | None = None
    min_keep: int = 0
    whole: bool = False
    keep: Callable[[jax.Array], jax.Array] | None = None


class Step(NamedTuple):
    """A rule for the step of a grid.

    Attributes:
      fit: `fit(x, bits, axes) -> s`: f32 array `x`, zeros being entries to ignore; `bits` may be traced where >= 2; the
        axes that share a step are kept with size 1. Where all entries are zero, any value may come out: the caller
        takes 1.
      follows: False for a step that no distribution changes.
      limits: for an interval, its two ends: the codes are those whose values lie inside.
      affine: True where the levels reach from the lowest weight to the highest instead of as far to both sides.
      power_of_two: True for a step that is moved to a power of two.
    """

    fit: Callable[[jax.Array, Any, tuple[int, ...]], jax.Array]
    follows: bool = True
    limits: tuple[Any, Any] | None = None
    affine: bool = False
    power_of_two: bool = False


class Width(NamedTuple):
    """A rule for the widths of all arrays.

    Attributes:
      allowed: the widths to choose from, rising.
      choose: `choose(sizes, energy, noise) -> index`: the number of weights of every array, f32[arrays] its sum of
        squares, f32[arrays, widths] its squared error on the grid of each width; i32[arrays], which width it gets.
    """

    allowed: tuple[int, ...]
    choose: Callable[[list[int], jax.Array, jax.Array], jax.Array]


class Rounding(NamedTuple):
    """A rounding that changes with time.

    Attributes:
      soften: `soften(ratio, code, below, above, since) -> level`, all in units of the step: the weight, its nearest
        level, the levels on its two sides (its own at the ends of the grid), and the updates since `start`.
    """

    soften: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


Threshold: TypeAlias = Number | Schedule | Rule
"""What a norm or an entry is limited to: a number C >= 0, a schedule of it, or a rule that follows the history."""

Bound: TypeAlias = Number | tuple[Number, Number] | Schedule | PerLeaf
"""An interval for weights: T >= 0 for [-T, T], a pair (lo, hi), a schedule of either, or `per_leaf`."""

Sparsity: TypeAlias = Number | Schedule | PerLeaf | Tree | None
"""A fraction of zeros in [0, 1): a number, a schedule, `per_leaf`, or a tree of fractions by path."""

Bits: TypeAlias = int | np.integer | PerLeaf | Width | Tree | None
"""A bit width, 1 to 16: a number, `per_leaf`, a tree from `choose_bits`, or a rule; None for unbounded codes."""

StepSize: TypeAlias = Number | Step
"""The distance of two levels: a number s > 0, or a rule of `clipjax.steps`."""

Axis: TypeAlias = int | tuple[int, ...] | None
"""The axis or axes that keep a step of their own; None for one step in all."""

RoundingMode: TypeAlias = Literal["nearest", "half_away", "stochastic"] | Rounding
"""How a quotient becomes a whole number: a name, or a rule of `clipjax.roundings` that hardens with time."""

Groups: TypeAlias = Sequence[Mapping[str, int | tuple[int, ...]]]
"""Leaves that share units: dicts path -> axis, or a tuple of axes; the first leaf of each dict owns its units."""
