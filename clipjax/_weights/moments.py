"""The moments of an inner optimizer, cleared where weights are removed: what grows again starts without any."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import elementwise
from clipjax.typing import State, Tree


def check(inner: optax.GradientTransformation, state: State, params: Tree) -> None:
    """Refuse an optimizer in whose state the moments of each param cannot be found."""
    _mapped(inner, lambda moment, p: moment, state, params)


def cleared(
    inner: optax.GradientTransformation, state: State, params: Tree, kept: Tree, active: jax.Array | None
) -> State:
    """The state with moments of 0 where `kept` is False: a mask, or True, at every leaf of the params.

    Factored moments, of another shape than their param, stay.
    """

    def clear(moment: jax.Array, keep: jax.Array | bool, p: jax.Array) -> jax.Array:
        if isinstance(moment, optax.MaskedNode) or keep is True or jnp.shape(moment) != p.shape:
            return moment
        gone = jnp.logical_not(keep)
        return elementwise.where(gone if active is None else gone & active, jnp.zeros_like(moment), moment)

    return _mapped(inner, clear, state, kept, params)


def _mapped(
    inner: optax.GradientTransformation,
    fn: Callable[[jax.Array, jax.Array | bool, jax.Array], jax.Array] | Callable[[jax.Array, jax.Array], jax.Array],
    state: State,
    *rest: Tree,
) -> State:
    """Map over the arrays of an optimizer's state that belong to params."""
    try:
        return optax.tree.map_params(inner, fn, state, *rest, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    except Exception as error:
        raise ValueError(
            "`inner` must be an optimizer in whose state `optax.tree.map_params` finds the moments of each param,"
            f" got {_named(state)}, where it fails: {error}. Chain `prune_mask` behind it instead."
        ) from error


def _named(state: State) -> str:
    """The names of the states in a state, by which users know an optimizer."""
    found: list[str] = []

    def visit(node: object) -> bool:
        named = isinstance(node, tuple) and hasattr(node, "_fields")
        if named:
            found.append(type(node).__name__)
        return named

    jax.tree.leaves(state, is_leaf=visit)
    return " and ".join(dict.fromkeys(name for name in found if name != "EmptyState")) or "an optimizer without state"
