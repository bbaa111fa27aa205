"""The one reading of `bits`: which leaves it picks, the width of each, and how widths follow from the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from clipjax._arrays import arguments, picked_leaves, trees
from clipjax._maths import known_formats, levels
from clipjax.typing import Bits, Format, PerLeaf, Step, Tree, Where, Width

Kinds: TypeAlias = tuple[int, ...] | Format
"""The widths that a leaf may have: one where it is fixed, none for unbounded codes. Or its format."""

Chooser = Callable[[list[int], jax.Array, jax.Array], jax.Array]


class Widths(NamedTuple):
    """A `bits=` argument, read.

    Attributes:
      allowed: `allowed(tree)`, by path the widths that a governed leaf may have, or its format.
      choose: the rule that chooses among them, see `Width`; None where all are fixed.
      picks: `picks(where) -> where` without the leaves that the argument leaves out.
      default: the `where` without a caller's own: embeddings are left out unless they have a width of their own.
      form: the format of all leaves, where they have one.
      check: `check(params)` raises where the argument names a leaf that the params do not have.
    """

    allowed: Callable[[Tree], Mapping[str, Kinds]]
    choose: Chooser | None = None
    picks: Callable[[Where], Where] = lambda where: where
    default: Where = picked_leaves.layers
    form: Format | None = None
    check: Callable[[Tree], object] = lambda params: None


def resolve(bits: Bits, step: Step) -> Widths:
    """Read `bits` for a rule of steps.

    Raises:
      ValueError: for a width outside 1 to 16, and for None, unbounded codes, without a given step.
      TypeError: for traced widths, and for a schedule.
    """
    arguments.static(bits, "bits")
    if isinstance(bits, Width):
        return _chosen(bits)
    if isinstance(bits, Format):
        form = known_formats.register(bits)
        return Widths(lambda tree: _same(form, tree), form=form)
    if bits is None:
        remedy = "Unbounded codes need a number: `step=0.05`."
        arguments.require(step.levels is levels.as_given, "step", "be a number when `bits` is None", step, remedy)
        return Widths(lambda tree: _same((), tree))
    if isinstance(bits, bool | int | float | str | np.number):
        arguments.bits(bits)
        return Widths(lambda tree: _same((int(bits),), tree))
    arguments.called(bits, "bits", "a width or a rule of `clipjax.widths`")
    if arguments.is_schedule(bits):
        raise TypeError(f"`bits` must be static, got a schedule {bits!r}. Mark a function of the leaf by `per_leaf`.")
    return _leaf_by_leaf(bits)


def _chosen(width: Width) -> Widths:
    """Widths that a rule chooses at every refresh."""
    allowed = tuple(kind for kind in width.allowed if not isinstance(kind, Format))
    remedy = "Call `choose_bits(params, budget=…, allowed=…)`, and pass the tree that it returns."
    got = [kind.name for kind in width.allowed if isinstance(kind, Format)]
    arguments.require(not got, "bits", "choose among formats before a run", got, remedy)
    return Widths(lambda tree: _same(allowed, tree), width.choose)


def _same(allowed: Kinds, tree: Tree) -> dict[str, Kinds]:
    return {path: allowed for path, _ in trees.governed(tree)}


def _leaf_by_leaf(bits: PerLeaf | Tree) -> Widths:
    """Widths that differ by leaf; leaves without one are left out."""

    def kinds(width: object) -> Kinds:
        if isinstance(width, Format):
            return known_formats.register(width)
        arguments.bits(width)
        return (int(width),)  # type: ignore[call-overload]

    def allowed(tree: Tree) -> dict[str, Kinds]:
        found = picked_leaves.values(bits, tree).items()
        return {path: kinds(width) for path, width in found if width is not None}

    if isinstance(bits, PerLeaf):
        fn = bits.fn
        picks = lambda where: lambda path, leaf: where(path, leaf) and fn(path, leaf) is not None  # noqa: E731
        return Widths(allowed, picks=picks, default=picked_leaves.weights)
    named = dict(trees.governed(bits))

    def check(params: Tree) -> None:
        """Every width must belong to a leaf, unless a wrapper has masked that leaf away."""
        found = {path for path, _ in trees.governed(params)}
        left = [path for path in named if path not in found]
        masked = trees.find(params, optax.MaskedNode)
        remedy = "Take the tree from `choose_bits(params)`."
        arguments.require(not left or masked or not found, "bits", "match the params by path", left, remedy)

    return Widths(allowed, picks=lambda where: lambda path, leaf: path in named, check=check)
