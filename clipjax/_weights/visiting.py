"""Visits: each weight transformation of an optimizer in turn is looked at, in place of an update.

An optimizer is a pair of functions: what it is made of shows only in its update. A visit is therefore a call of that
update with a static extra argument, which reaches the transformations in a chain, a mask, a partition or an `inner=`.
Gradients and optimizers run on zeros, and what they return is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax._weights.constraints import Constraint
from clipjax.typing import Context, Count, State, Tree

_ARGUMENT = "clipjax_visit"


class Visited(NamedTuple):
    """One weight transformation.

    Attributes:
      constraint: what the weights are held to.
      state: its `ProjectState`.
      context: of the update that the visit takes the place of; its `params` have None at leaves not governed, and are
        latent weights inside of an `inner=` that has some.
      latents: the latent weights that belong to the params, () without `carry`.
      start: the first update that projects.
      stop: the last one that refreshes, None for no end.
      key: its PRNG key, None for the default.
    """

    constraint: Constraint
    state: State
    context: Context
    latents: Tree
    start: Count
    stop: Count | None
    key: jax.Array | None


Visit = Callable[[Visited], State]
"""Looks at a transformation and returns the state that it has from then on."""


def of(extra: dict[str, object]) -> Visit | None:
    """The visit that an update is, None for a real update."""
    visit: Visit | None = extra.get(_ARGUMENT)  # type: ignore[assignment]
    return visit


def require_fit(tx: optax.GradientTransformation, params: Tree, opt_state: State, extra: dict[str, object]) -> None:
    """Refuse the state of other options. It is known here: inside of the jit of a visit, only its shapes are."""
    jax.eval_shape(lambda: visit(tx, lambda visited: visited.state, params, opt_state, extra))


def visit(
    tx: optax.GradientTransformation, visit: Visit, params: Tree, opt_state: State, extra: dict[str, object]
) -> State:
    """Visit the weight transformations of an optimizer, those of an `inner=` first; returns the state after it.

    Only the states of these transformations mean anything in what is returned.
    """
    zeros = jax.tree.map(jnp.zeros_like, params)
    # some transformations refuse an update without a loss
    arguments = {"value": jnp.zeros(()), **extra, _ARGUMENT: visit}
    return optax.with_extra_args_support(tx).update(zeros, opt_state, params, **arguments)[1]
