"""Types of the arguments of clipjax: names for unions, and the interfaces that users may implement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from clipjax._format import Format, Pack, Quantize, Scales

__all__ = [
    "Axis",
    "Bits",
    "Bound",
    "Context",
    "Count",
    "Format",
    "Groups",
    "Index",
    "Leaf",
    "LeafThreshold",
    "Levels",
    "Number",
    "Pack",
    "PerLeaf",
    "Projection",
    "Quantize",
    "Rename",
    "Rounding",
    "RoundingMode",
    "Rule",
    "Scales",
    "Schedule",
    "Score",
    "Selection",
    "Sides",
    "Sparsity",
    "State",
    "Step",
    "StepSize",
    "Structure",
    "Threshold",
    "Tree",
    "UnitAxes",
    "ValueTree",
    "Where",
    "Width",
]


def __dir__() -> list[str]:
    return __all__


Tree: TypeAlias = optax.Params
"""A pytree of arrays; leaves that a transformation does not govern are None."""

State: TypeAlias = optax.OptState
"""A pytree of arrays that belongs to whoever made it."""

Leaf: TypeAlias = jax.Array | jax.ShapeDtypeStruct
"""An array, or at init under `jax.eval_shape` its shape and dtype."""

# NumPy's own type of a scalar has an Any inside.
Number: TypeAlias = float | int | np.number | jax.Array  # type: ignore[explicit-any]
"""A number; arrays may be traced, which makes one `vmap` a sweep."""

Count: TypeAlias = int | jax.Array
"""A number of updates; arrays may be traced."""

Schedule: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike]
"""`schedule(count) -> value`, as in Optax; a bare callable always means a schedule."""

Where: TypeAlias = Callable[[str, jax.Array], bool] | Callable[[str, Leaf], bool]
"""`where(path, leaf) -> bool` picks leaves; a path reads `"encoder/lin/kernel"`."""


class PerLeaf(NamedTuple):
    """A static value that differs by leaf; `clipjax.per_leaf` makes one.

    Attributes:
      fn: `fn(path, leaf) -> value`.
    """

    fn: Callable[[str, Leaf], object]


class Rule(NamedTuple):
    """A threshold that follows the norms.

    Attributes:
      init: `init() -> state`, a tree of arrays of fixed shape; its f32 arrays are kept in f64 where norms are f64.
      update: `update(norm, state) -> (threshold, state)`, for scalars, f32 (f64 for f64 gradients): the norm before the
        clip, and the threshold that it is held against. After the clip it is `min(norm, threshold)`.
      reference: `reference(norm) -> unit`, of the norm of the weights: what `update` is given is the gradient's norm in
        these units, and so is what it returns. Where the unit is 0 or not finite nothing is clipped, and the history
        stays. None for norms as they are.
    """

    init: Callable[[], State]
    update: Callable[[jax.Array, State], tuple[jax.Array, State]]
    reference: Callable[[jax.Array], jax.Array] | None = None


class Selection(NamedTuple):
    """Which entries may be touched.

    Attributes:
      choose: `choose(tree, key) -> tree` of bool masks that broadcast to the arrays of `tree`.
      key: a PRNG key of its own, or None to use that of the transformation. Folded with the count at every use.
    """

    choose: Callable[[Tree, jax.Array], Tree]
    key: jax.Array | None = None


class Context(NamedTuple):
    """The facts of one update that a projection may use besides its target.

    Trees have None at leaves that are not governed.

    Attributes:
      count: i32, updates before this one.
      params: the params, in their own dtype.
      landed: params + updates, the values that the params would take without this projection; latent weights do not
        enter.
      grad: the incoming gradient where `with_gradient` or a caller's `grad=` provides it, else None.
      key: a PRNG key of this update.
      refresh: None to refresh by count; a static bool to force or forbid it.
      memory: `memory() -> target`: what would be projected if the updates were 0. It reads only what lies in memory
        before the update, so that a branch of `lax.cond` that calls it does not make the program store the updates.
      known: for each leaf of the params what the transformations of clipjax that are chained before make of other
        values of it, where that is known: they are bounded, or set to 0.
    """

    count: jax.Array  # type: ignore[assignment]
    params: Tree
    landed: Tree
    grad: Tree | None
    key: jax.Array
    refresh: bool | None = None
    memory: Callable[[], Tree] | None = None
    known: Tree = ()


class Projection(NamedTuple):
    """A set that parameters are held in; to parameters what a `GradientTransformation` is to updates.

    Attributes:
      init: `init(params) -> state`.
      apply: `apply(target, state, context) -> (new, state)` moves the target into the set. Targets are f32 (f64 for
        f64 params), None where a leaf is not governed.
      apply_frozen: `apply_frozen(target, state, context) -> new` does the same for the set that the state describes,
        and refreshes nothing. It is optional and for speed: latent weights are projected up to three times an update,
        and without it `apply` is called and its new state dropped.
      outward: `outward(new, context) -> tree` of bool arrays: where a projected value that floating point cannot reach
        in one update is rounded away from zero. It is optional: everywhere else weights land between the value and
        zero, as a set that holds w / 2 with every w wants it, and an interval without 0 does not.
    """

    init: Callable[[Tree], State]
    apply: Callable[[Tree, State, Context], tuple[Tree, State]]
    apply_frozen: Callable[[Tree, State, Context], Tree] | None = None
    outward: Callable[[Tree, Context], Tree | None] | None = None


class Score(NamedTuple):
    """How much each weight matters; the lowest scores are pruned first.

    Attributes:
      init: `init(params) -> state`.
      observe: `observe(target, state, context) -> state`, called at every update.
      score: `score(target, state, context) -> scores`, called at a refresh: a tree of arrays like the target.
      of_weights: `of_weights(weights) -> scores` of one array, for a score that follows from the weights of the array
        alone. It is optional and for speed: a refresh may call it once for all arrays that are alike, under `jax.vmap`.
    """

    init: Callable[[Tree], State]
    observe: Callable[[Tree, State, Context], State]
    score: Callable[[Tree, State, Context], Tree]
    of_weights: Callable[[jax.Array], jax.Array] | None = None


class Structure(NamedTuple):
    """A way to divide the arrays of a tree into units, each of which is kept or removed as a whole.

    Trees have None at leaves that take no part. A leaf is scored if its entries have scores; a leaf owns units if the
    array with one value for each of these units lies at its place in a tree.

    Attributes:
      reduce: `reduce(scores) -> units`: from the scores of entries, None at leaves that are not scored, those of units.
      check: `check(params, scored)` raises where the leaves cannot be divided; `scored` is the tree without leaves that
        are not scored.
      expand: `expand(units, tree) -> tree` of arrays that broadcast to the leaves: each entry has its unit's value.
      owners: `owners(tree) -> tree` without the leaves that own no units.
      holds: `holds(path, leaf) -> bool`, which leaves have entries of the units; of these the ones that `where` picks
        are scored. None where both are the leaves that `where` picks.
      min_keep: how many units of every array of units are kept, whatever their scores.
      whole: True where every weight is a unit of its own.
      keep: for a structure that fixes the sparsity, `keep(keys) -> mask`: from unsigned keys, of which the lowest are
        removed, True where an entry is kept. None where the sparsity is free.
      kind: a number that says which `keep` this is: a mask that was made by another one is made anew.
      layers: the axes of an array of units along which layers are stacked, all of which lose the same number; () where
        an array is one layer. `PerLeaf`, of the leaf that owns the units, where arrays differ.
      axes: `axes(path, leaf)`, the axes, counted from 0, along which `keep` compares the entries of a leaf: it is then
        called as `keep(keys, axes)`. None for a `keep` of the keys alone.
      round_to: the number of units that stay in each layer of an array is a multiple of this one, or that of all.
    """

    reduce: Callable[[Tree], Tree]
    check: Callable[[Tree, Tree], None]
    expand: Callable[[Tree, Tree], Tree]
    owners: Callable[[Tree], Tree] = lambda tree: tree
    holds: Where | None = None
    min_keep: int = 0
    whole: bool = False
    keep: Callable[[jax.Array], jax.Array] | Callable[[jax.Array, tuple[int, ...]], jax.Array] | None = None
    kind: float = 0.0
    layers: tuple[int, ...] | PerLeaf = ()
    axes: Callable[[str, Leaf], tuple[int, ...]] | None = None
    round_to: int = 1


class Levels(NamedTuple):
    """The levels of a grid, k * step for low <= k <= high, for each group of weights that shares a step.

    Attributes:
      step: f32, the distance of two levels, positive.
      low: f32, the smallest multiple that is a level, at most 0.
      high: f32, the largest one.
      zero_point: i32, the code of 0.
    """

    step: jax.Array
    low: jax.Array
    high: jax.Array
    zero_point: jax.Array


Sides: TypeAlias = tuple[jax.Array, jax.Array]
"""Two magnitudes for each group of weights that shares a step: below zero, and above."""


class Step(NamedTuple):
    """A rule for the step of a grid, and for the levels that it has.

    A rule of your own needs `fit` alone: its grid is symmetric.

    Attributes:
      fit: `fit(x, bits, axes) -> s`: an f32 array `x`, in which zeros are entries to ignore; `bits`, which may be
        traced where it is at least 2; the axes that share a step, kept with size 1. Where all entries are zero any
        value may come out: the step is then 1.
      levels: `levels(s, bits, extents, max_level) -> Levels`, from the fitted step, how far the weights extend below
        and above zero, and how far levels may; None for as many levels below zero as above.
      sides: `sides(x)`, a tuple of arrays whose largest entries are how far weights extend: (|x|,), or below zero and
        above, (-x, x); None for the former.
      min_bits: the smallest width that the rule allows.
      covers: False for a rule that clips large weights by design, so that weights on its grid get a smaller one.
    """

    fit: Callable[[jax.Array, int | jax.Array, tuple[int, ...]], jax.Array]
    levels: Callable[[jax.Array, int | jax.Array, Sides, Sides], Levels] | None = None
    sides: Callable[[jax.Array], tuple[jax.Array, ...]] | None = None
    min_bits: int = 1
    covers: bool = True


class Width(NamedTuple):
    """A rule for the widths of all arrays.

    Attributes:
      allowed: the widths to choose from, rising; or formats.
      choose: `choose(sizes, energy, noise) -> index`: the number of weights of every array, f32[arrays] its sum of
        squares, f32[arrays, widths] its squared error on the grid of each width; i32[arrays], which width it gets.
      choose_formats: the same among formats, for `choose_bits`, with a fourth argument: for every array a list of the
        bits a weight that each takes, infinite where a format does not fit. None for a rule of widths alone.
    """

    allowed: tuple[int | Format, ...]
    choose: Callable[[list[int], jax.Array, jax.Array], jax.Array]
    choose_formats: Callable[[list[int], jax.Array, jax.Array, list[list[float]]], jax.Array] | None = None


class Rounding(NamedTuple):
    """A rounding that changes with time, or one that looks at what codes cost.

    Attributes:
      soften: `soften(ratio, code, below, above, since) -> level`, all in units of the step: the weight, its nearest
        level, the levels on its two sides (twice the outermost one for a weight beyond it), and the updates since
        `start`. None for a rounding that is hard from the start.
      rate: λ, squared steps that a bit of the file is worth; None where codes are chosen by their error alone.
      budget: bytes of the file, for which λ is found; None where it is given.
    """

    soften: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] | None
    rate: Number | Schedule | None = None
    budget: Number | Schedule | None = None


ValueTree: TypeAlias = Mapping[str, object] | Sequence[object]
"""A tree with a value for each leaf, found by path; trees of other kinds, as Equinox models, work too."""

Threshold: TypeAlias = Number | Schedule | Rule
"""What a norm or an entry is limited to: a number C >= 0, a schedule of it, or a rule that follows the history."""

LeafThreshold: TypeAlias = Threshold | PerLeaf | ValueTree
"""A threshold, or thresholds that differ by leaf: `per_leaf`, or a tree of numbers and schedules by path."""

Bound: TypeAlias = Number | Sequence[Number] | Schedule | Callable[[jax.Array], tuple[Number, Number]] | PerLeaf
"""An interval for weights: T >= 0 for [-T, T], a pair (lo, hi), a schedule of either, or `per_leaf`."""

Sparsity: TypeAlias = Number | Schedule | PerLeaf | ValueTree | None
"""A fraction of zeros in [0, 1): a number, a schedule, `per_leaf`, or a tree of fractions by path."""

Bits: TypeAlias = int | Format | PerLeaf | Width | ValueTree | None
"""A bit width, 1 to 16, or a format: `per_leaf`, a tree from `choose_bits`, or a rule; None for unbounded codes."""

StepSize: TypeAlias = Number | Step
"""The distance of two levels: a number s > 0, or a rule of `clipjax.steps`."""

Axis: TypeAlias = int | tuple[int, ...] | None
"""The axis or axes that keep a step of their own; None for one step in all."""

RoundingMode: TypeAlias = Literal["nearest", "half_away", "stochastic"] | Rounding
"""How a quotient becomes a whole number: a name, or a rule of `clipjax.roundings` that hardens with time."""

UnitAxes: TypeAlias = int | tuple[int, ...] | Mapping[int, int]
"""The axis, or axes, along which a leaf has units; or a dict axis -> how many entries of it each unit has."""

Groups: TypeAlias = Sequence[Mapping[str, UnitAxes]]
"""Leaves that share units: dicts path -> axis, or axes; the first leaf of each dict owns its units."""

# The type of a slice has an Any inside.
Index: TypeAlias = int | slice | tuple[int, slice] | None  # type: ignore[explicit-any]
"""Which part of a leaf: all, a layer along its first axis, a range of the outputs flattened in order, or both."""

Rename: TypeAlias = Callable[
    [str, Leaf], str | Sequence[tuple[str, Index, Sequence[int] | jax.typing.ArrayLike | None]] | None
]
"""`rename(path, leaf)`: the name of a leaf in a file, or a list of (name, index, permutation of the rows); None leaves
it out."""
