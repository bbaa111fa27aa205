"""Projections: sets that parameters are held in, as pairs of pure functions, for `clipjax.project`.

A `Projection` is to parameters what a `GradientTransformation` is to updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments
from clipjax._maths import intervals, norms
from clipjax.typing import Projection, Tree


def stateless(fn: Callable[[Tree], Tree]) -> Projection:
    """A projection from a plain function of the parameters."""
    return Projection(lambda params: (), lambda target, state, context: (fn(target), state))


def as_projection(projection: Any) -> Projection:
    """A projection; a plain `params -> params` function means `stateless`."""
    if isinstance(projection, Projection):
        return projection
    if callable(projection):
        return stateless(projection)
    raise TypeError(
        f"`projection` must be a Projection or a function params -> params, got {projection!r}."
        " Call the factory: `projections.identity()`."
    )


def identity() -> Projection:
    """All parameters: nothing moves.

    With `carry=True` the parameters still have to be values of their dtype, so what rounding removes comes back:
    f32 master weights for bf16 params.

    Returns:
      A `Projection`.

    Example:
      >>> import clipjax, jax.numpy as jnp, optax
      >>> params = jnp.ones((), jnp.bfloat16)
      >>> tx = clipjax.project(identity(), carry=True, inner=optax.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params)  # plain bf16 stays at 1.0
      0.9921875
    """
    return stateless(lambda target: target)


def clamp(bound: Any) -> Projection:
    """Entries in [-T, T], or in [lo, hi].

    Args:
      bound: T >= 0 or a pair (lo, hi).

    Returns:
      A `Projection`.

    Raises:
      ValueError: for a negative or NaN bound or lo > hi.

    Example:
      >>> import jax.numpy as jnp
      >>> clamp(1.0).apply(jnp.array([2.0]), (), None)[0].tolist()
      [1.0]
    """
    intervals.interval(bound)
    return stateless(lambda tree: jax.tree.map(lambda x: intervals.clamp(x, bound), tree))


def max_norm(bound: float, *, axis: int | tuple[int, ...] | None = None) -> Projection:
    r"""Norms of at most the bound: :math:`w \leftarrow w \min(1, C / \lVert w \rVert_2)`.

    Args:
      bound: C > 0.
      axis: the axes that one norm is taken over, e.g. 0 for the incoming weights of each unit of a Dense kernel;
        None for the whole array. Leaves of too small a rank are refused by the reduction.

    Returns:
      A `Projection`.

    Raises:
      ValueError: for a negative or NaN bound.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(x, 4) for x in max_norm(1.0).apply(jnp.array([3.0, 4.0]), (), None)[0].tolist()]
      [0.6, 0.8]

    References:
      Srivastava et al., "Dropout", 2014, section 5.1.
    """
    arguments.non_negative(bound, "bound", "A norm is at least 0.")

    def scale(x: jax.Array) -> jax.Array:
        part, largest, norm = _norm(x, axis)
        return jnp.where((norm * largest > bound) & jnp.isfinite(x), part * (bound / norm), x)

    return stateless(lambda tree: jax.tree.map(scale, tree))


def unit_norm(*, axis: int | tuple[int, ...] | None = None) -> Projection:
    r"""Norms of exactly 1, up to rounding: :math:`w \leftarrow w / \lVert w \rVert_2`; zero stays zero.

    Args:
      axis: the axes that one norm is taken over; None for the whole array.

    Returns:
      A `Projection`.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(x, 4) for x in unit_norm().apply(jnp.array([3.0, 4.0]), (), None)[0].tolist()]
      [0.6, 0.8]
    """

    def scale(x: jax.Array) -> jax.Array:
        part, _, norm = _norm(x, axis)
        return jnp.where(jnp.isfinite(x), part / norm, x)

    return stateless(lambda tree: jax.tree.map(scale, tree))


def _norm(x: jax.Array, axis: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The finite entries over the largest of them, that one, and the norm of the former: no square overflows."""
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    largest = jnp.max(jnp.abs(finite), axis=axis, keepdims=True, initial=0)
    unit, share = norms.divisor(largest)
    part = finite * share / unit
    norm = jnp.sqrt(jnp.sum(jnp.square(part), axis=axis, keepdims=True))
    return part, largest, jnp.where(norm > 0, norm, jnp.ones_like(norm))
