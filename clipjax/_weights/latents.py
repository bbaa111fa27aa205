"""Latent weights: the float weights behind a constraint, when the state's are used, and when one is dropped."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from clipjax._arrays import dtypes, elementwise, trees
from clipjax._weights.constraints import Constraint, Update
from clipjax.typing import Context, Leaf, State, Tree


def begin(p: Leaf) -> jax.Array:
    """A copy of a param in computing dtype, with its sharding; a buffer of its own, as both may be donated.

    A `ShapeDtypeStruct` has no values: zeros stand for them, which the params replace at the first update.
    """
    zeros = jnp.zeros_like(p, dtype=dtypes.wide(p.dtype))
    return zeros if isinstance(p, jax.ShapeDtypeStruct) else zeros + p.astype(zeros.dtype)


def current(
    constraint: Constraint,
    stored: Tree,
    state: State,
    weights: Tree,
    params: Tree,
    then: Context,
    begun: jax.Array | None,
) -> Tree:
    """The latent weights of an update: the stored ones where the params are still their projection, else the params.

    Args:
      constraint: what the params are held to.
      stored: the latent weights in the state.
      state: the projection's state of the last update.
      weights: the params in computing dtype.
      params: the params in their own dtype.
      then: the context of the last update.
      begun: bool, False before the first projection; None where that was before the last update anyway.
    """
    z = trees.place(stored, weights)
    projected = constraint.frozen(z, state, then._replace(landed=z, refresh=False))
    projected = jax.tree.map(functools.partial(elementwise.keep, begun), projected, z)
    same = lambda tree: jax.tree.map(lambda _: constraint.tolerance, tree)  # noqa: E731
    tolerances = (constraint.tolerances or same)(params)
    choose = lambda tolerance, *leaves: _latent_or_param(tolerance or None, *leaves)  # noqa: E731
    return jax.tree.map(choose, tolerances, z, rounded(projected, params), weights)


@elementwise.leafwise
def _latent_or_param(tolerance: float | None, z: jax.Array, projected: jax.Array, w: jax.Array) -> jax.Array:
    # z finite | w = P(z) | w = 0 | used
    # no       | any      | any   | w
    # yes      | yes      | any   | z
    # yes      | no       | yes   | z: a transformation before holds the weight at 0, and may let it go
    # yes      | no       | no    | w: it was edited, or loaded from elsewhere
    off = projected != w if tolerance is None else jnp.abs(projected - w) > tolerance * jnp.abs(w)
    edited = off & (w != 0)
    return jax.lax.select(edited | ~jnp.isfinite(z), w, z)


def drop(constraint: Constraint, update: Update, new: Tree, projected: State) -> Tree:
    """The targets, 0 where the transformations before set a weight to 0 that the projection would move away from it."""
    if constraint.surely_zero is None:
        zero = jax.tree.map(lambda n: n == 0, new)
    else:  # asked of floats - weights, which is the target where u = -p, and known before u is
        known = update.target if constraint.refits else jax.tree.map(jnp.subtract, update.floats, update.weights)
        zero = constraint.surely_zero(known, projected, update.context)
    dropped = functools.partial(_drop_leaf, update.active)
    return jax.tree.map(dropped, update.target, update.emptied, zero)


@elementwise.leafwise
def _drop_leaf(active: jax.Array | None, z: jax.Array, emptied: jax.Array, zero: jax.Array) -> jax.Array:
    # u = -p | P(z) = 0 | latent weight
    # no     | any      | z
    # yes    | yes      | z: the weight is 0 either way, and z may bring it back later
    # yes    | no       | 0: with z the weight would not be 0
    return elementwise.keep(active, jax.lax.select(emptied & ~zero, jnp.zeros_like(z), z), z)


def rounded(new: Tree, params: Tree) -> Tree:
    """Projected values rounded to what the dtype of the param represents, in computing dtype."""
    return jax.tree.map(lambda n, p: dtypes.narrowed(n, p.dtype), new, params)
