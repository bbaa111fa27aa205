"""The constraint to the zeros of a mask: its state, what it makes of any values, and masks that are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import arguments, elementwise, picked_leaves, trees
from clipjax._weights import masks
from clipjax._weights.allowed_values import Fact
from clipjax._weights.constraints import Constraint
from clipjax.typing import Context, Projection, State, Tree, Where


class PruneState(NamedTuple):
    """State of `prune_mask` inside its `ProjectState`.

    Attributes:
      mask: bool arrays, True keeps, one entry per unit (they broadcast to the weights); None at leaves not governed.
      asked: f32, the constant sparsity that the mask was made for, that of a schedule at `stop`, or one for each leaf;
        -1 before the first refresh; 0 for a given mask, and for a schedule whose values are traced; the `kind` of a
        structure that fixes the sparsity.
      score: the state of the score.
      grow: the state of the score by which removed weights grow again; () without `regrow`.
    """

    mask: Tree
    asked: jax.Array
    score: State
    grow: State


NEVER, OTHER = -1.0, -2.0  # the sparsity of a mask that was never chosen, or for another kind of sparsity


def zeroed(target: Tree, kept: Tree) -> Tree:
    """Weights, 0 where they are not kept."""
    return jax.tree.map(lambda w, m: elementwise.where(m, w, jnp.zeros_like(w)), target, kept)


def _facts(kept: Callable[[Tree, State, State], Tree]) -> Callable[[Tree, State, State, Context], list[Fact]]:
    """What a mask makes of any values: 0 where it removes the weight."""

    def facts(target: Tree, before: State, after: State, context: Context) -> list[Fact]:
        return [Fact(zeroed, mask, zeros=True) for mask in jax.tree.leaves(kept(target, before, after))]

    return facts


def constraint(projection: Projection, kept: Callable[[Tree, State, State], Tree]) -> Constraint:
    """The constraint of a projection that keeps some entries and sets all others to 0."""
    chosen = lambda state: jnp.all(state.asked != NEVER)  # noqa: E731
    return Constraint(projection, PruneState, "prune_mask", fitted=chosen, kept=kept, facts=_facts(kept))


def given(mask: Tree) -> Constraint:
    """The constraint to the zeros of a given mask."""

    def init_fn(params: Tree) -> PruneState:
        _check_named(mask, params)
        masked = trees.map_with_path(masks.as_mask, params, trees.match(mask, params))
        return PruneState(masked, jnp.zeros(()), (), ())

    def kept(target: Tree, before: PruneState, after: PruneState) -> Tree:
        return trees.place(after.mask, target)

    def frozen_fn(target: Tree, state: PruneState, context: Context) -> Tree:
        return zeroed(target, kept(target, state, state))

    def apply_fn(target: Tree, state: PruneState, context: Context) -> tuple[Tree, PruneState]:
        return frozen_fn(target, state, context), state

    return constraint(Projection(init_fn, apply_fn, frozen_fn), kept)


def _check_named(mask: Tree, params: Tree) -> None:
    """Every mask must belong to a leaf, unless a wrapper has masked that leaf away."""
    found = trees.paths(params)
    left = [path for path, m in trees.governed(mask) if m is not True and path not in found]
    masked = trees.find(params, optax.MaskedNode)
    remedy = "Build it from the params: `jax.tree.map(lambda p: p != 0, params)`."
    arguments.require(
        not left or masked or not trees.governed(params), "mask", "match the params by path", left, remedy
    )


def masked_leaves(mask: Tree, where: Where | None) -> Where:
    """The leaves for which a mask is given."""
    given = {path for path, m in trees.governed(mask) if m is not True}
    picked = picked_leaves.resolve(where, picked_leaves.everything)
    return lambda path, leaf: path in given and picked(path, leaf)
