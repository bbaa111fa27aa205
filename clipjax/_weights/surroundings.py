"""What Optax may put around a weight transformation, and what may be inside: the rest is refused by its name."""

from __future__ import annotations

import sys

import optax

from clipjax._arrays import trees
from clipjax._weights import moments
from clipjax.typing import State, Tree

_CONDITIONAL = optax.apply_if_finite.__module__


def check_inner(inner: optax.GradientTransformation, state: State, params: Tree, *, clears: bool) -> None:
    """Refuse, at init, an `inner` that would fail at its first update.

    Args:
      inner: with extra arguments.
      state: that of its init.
      params: what it updates.
      clears: True where its moments are cleared at removed weights.

    Raises:
      ValueError: for `optax.lookahead`, and for an optimizer whose moments cannot be found.
    """
    if trees.find(state, optax.LookaheadState):
        raise ValueError(
            "`inner` must update the params that it is given, got `optax.lookahead`, which updates pairs of fast and"
            " slow ones. Give the optimizer that it wraps."
        )
    if clears:
        moments.check(inner, state, params)


def check_outer(updates: Tree, emitted: Tree) -> None:
    """Refuse a conditional wrapper whose other branch cannot return what this one returns.

    `optax.apply_if_finite` and its kind return zeros in the dtype of the gradient at a step that they skip. Updates of
    narrow params are f32, as landing needs, and the two branches of such a wrapper would differ. Neither argument nor
    state shows the wrapper: only the stack of calls does, and only while an update is traced or run.

    Raises:
      TypeError: inside of such a wrapper, where dtypes differ.
    """
    both = zip(trees.flatten(updates)[0], trees.flatten(emitted)[0], strict=True)
    changed = next((u.dtype for u, e in both if u is not None and e is not None and u.dtype != e.dtype), None)
    frame = sys._getframe() if changed is not None else None
    while frame is not None and frame.f_globals.get("__name__") != _CONDITIONAL:
        frame = frame.f_back
    if frame is not None:
        wrapper = f"optax.{frame.f_code.co_qualname.split('.')[0]}"
        raise TypeError(
            f"`{wrapper}` must not hold weight transformations where gradients are narrower than f32, got {changed}:"
            f" their updates are f32, and a skipped step has {changed}. Put it around the optimizer alone:"
            f" `optax.chain({wrapper}(optimizer, ...), clipjax.prune_mask(...))`; constraints then hold on skipped"
            " steps too."
        )
