"""Projections: sets that parameters are held in, for `clipjax.project`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments
from clipjax._maths import intervals, norms
from clipjax.typing import Number, Projection, Tree

__all__ = ["Projection", "clamp", "identity", "max_norm", "stateless", "unit_norm"]


def __dir__() -> list[str]:
    return __all__


def stateless(fn: Callable[[Tree], Tree]) -> Projection:
    """The projection that a plain function of the parameters is.

    Args:
      fn: params -> params.

    Returns:
      A `Projection` without a state.

    Example:
      >>> import jax.numpy as jnp
      >>> stateless(jnp.abs).apply(jnp.array([-1.0, 2.0]), (), None)[0].tolist()
      [1.0, 2.0]
    """
    return Projection(lambda params: (), lambda target, state, context: (fn(target), state))


def identity() -> Projection:
    """All parameters: nothing moves.

    With `carry=True` this gives f32 master weights for bf16 params: the latent weights take every update in f32, and
    the params are the latent weights rounded to bf16.

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


def clamp(bound: Number | tuple[Number, Number]) -> Projection:
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
    arguments.scalar(bound, "bound", "All norms have the same bound.")
    arguments.non_negative(bound, "bound", "A norm is at least 0.")

    def scale(x: jax.Array) -> jax.Array:
        scaled, largest, norm = _norm(x, axis)
        return jnp.where((norm * largest > bound) & jnp.isfinite(x), scaled * (bound / norm), x)

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
        scaled, _, norm = _norm(x, axis)
        return jnp.where(jnp.isfinite(x), scaled / norm, x)

    return stateless(lambda tree: jax.tree.map(scale, tree))


def _norm(x: jax.Array, axis: int | tuple[int, ...] | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The finite entries over the largest of them, that one, and the norm of the former: no square overflows."""
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    largest = jnp.max(jnp.abs(finite), axis=axis, keepdims=True, initial=0)
    unit, part = norms.divisor(largest)
    scaled = finite * part / unit
    norm = jnp.sqrt(jnp.sum(jnp.square(scaled), axis=axis, keepdims=True))
    return scaled, largest, jnp.where(norm > 0, norm, jnp.ones_like(norm))
