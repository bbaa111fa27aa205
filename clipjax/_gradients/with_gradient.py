"""`with_gradient`: the incoming gradient as an extra argument for every transformation of a chain."""

from __future__ import annotations

import optax

from clipjax._arrays import arguments
from clipjax.typing import State, Tree


def with_gradient(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Pass the incoming gradient to every transformation of a chain as the extra argument `grad`.

    Behind an optimizer a transformation receives updates, but gradient scores need the gradient itself. Where the
    caller of `update` passes `grad=`, that is used instead.

    Args:
      inner: the whole chain.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: for an `inner` that is no transformation.

    Example:
      >>> import clipjax, jax.numpy as jnp, optax
      >>> score = clipjax.scores.gradient()
      >>> tx = with_gradient(optax.chain(optax.adam(0.1), clipjax.prune_mask(0.5, score=score)))
      >>> params = {"kernel": jnp.ones((1, 2))}
      >>> updates, _ = tx.update({"kernel": jnp.array([[1.0, 2.0]])}, tx.init(params), params)
      >>> [round(x, 2) for x in optax.apply_updates(params, updates)["kernel"][0].tolist()]
      [0.0, 0.9]

    References:
      D2, section 2.2, step 1.
    """
    if inner is None:
        raise TypeError("`inner` must be an optax.GradientTransformation, got None. Give the whole chain.")
    arguments.transformation(inner, "inner")
    inside = optax.with_extra_args_support(inner)

    def update_fn(updates: Tree, state: State, params: Tree | None = None, **extra: object) -> tuple[Tree, State]:
        return inside.update(updates, state, params, **{"grad": updates, **extra})

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
