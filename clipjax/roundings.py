"""Roundings that harden: weights move onto the grid by and by, for `fake_quantize(rounding=...)`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments
from clipjax._maths import intervals
from clipjax.typing import Number, Rounding

__all__ = ["Rounding", "binary_relax", "parq"]


def __dir__() -> list[str]:
    return __all__


def parq(updates: int, steepness: float = 10.0) -> Rounding:
    r"""PARQ's proximal map: flat at the levels, steep between them, ever steeper.

    .. math::
        Q(w) = \mathrm{clip}\left(m + \frac{w - m}{\rho},\ q_-,\ q_+\right),\quad
        \rho = \frac{\varsigma(t) - \varsigma(1)}{\varsigma(0) - \varsigma(1)},\quad
        \varsigma(t) = \frac{1}{1 + e^{\kappa (t - 1/2)}}

    q₋ and q₊ being the levels on both sides of w, m their mean, t the share of the annealing that is over. At first
    (ρ = 1) every weight inside the grid is itself; from t = 1 on this is the nearest level. A weight beyond the
    outermost level is that level throughout, as PARQ's regularizer is infinite there.

    Args:
      updates: how many, from `start`, the annealing takes.
      steepness: κ > 0 of the sigmoid schedule.

    Returns:
      A `Rounding`. Until it has hardened, weights are between levels, and `quantized` raises.

    Raises:
      ValueError: for fewer than one update or a steepness that is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> soften = parq(updates=100).soften
      >>> [round(float(soften(jnp.float32(0.4), 0.0, 0.0, 1.0, jnp.float32(t))), 2) for t in (0, 50, 70, 100)]
      [0.4, 0.3, 0.0, 0.0]

    References:
      Jin et al., "PARQ: Piecewise-Affine Regularized Quantization", 2025, https://arxiv.org/abs/2503.15748, equation 14
      and section 5.
    """
    _check_updates(updates)
    arguments.check_positive(steepness, "steepness", "10 is the usual value.")

    def sigmoid(t: Number) -> jax.Array:
        return jax.nn.sigmoid(jnp.asarray(steepness * (0.5 - t), jnp.float32))

    def soften(ratio: jax.Array, code: jax.Array, below: jax.Array, above: jax.Array, since: jax.Array) -> jax.Array:
        t = jnp.clip(since / updates, 0, 1)
        inverse_slope = (sigmoid(t) - sigmoid(1.0)) / (sigmoid(0.0) - sigmoid(1.0))
        middle = (below + above) / 2
        moved = middle + (ratio - middle) / jnp.where(t < 1, inverse_slope, 1.0).astype(ratio.dtype)
        return jnp.where(t < 1, intervals.limit(moved, below, above), code)

    return Rounding(soften)


def binary_relax(updates: int) -> Rounding:
    r"""BinaryRelax: a mean of the float weight and its nearest level, which moves to the level.

    .. math:: Q(w) = (1 - t)\,w + t\,q

    t being the share of the annealing that is over; a weight beyond the outermost level starts as itself too. In a
    chain, constraints of the transformations before still hold: of the mean beyond a bound the bound is shown.

    Args:
      updates: how many, from `start`, the annealing takes.

    Returns:
      A `Rounding`.

    Raises:
      ValueError: for fewer than one update.

    Example:
      >>> import jax.numpy as jnp
      >>> soften = binary_relax(updates=100).soften
      >>> [round(float(soften(jnp.float32(0.4), 0.0, 0.0, 1.0, jnp.float32(t))), 2) for t in (0, 50, 100)]
      [0.4, 0.2, 0.0]

    References:
      Yin et al., "BinaryRelax", 2018, https://arxiv.org/abs/1801.06313.
    """
    _check_updates(updates)

    def soften(ratio: jax.Array, code: jax.Array, below: jax.Array, above: jax.Array, since: jax.Array) -> jax.Array:
        t = jnp.clip(since / updates, 0, 1).astype(ratio.dtype)
        return jnp.where(t < 1, (1 - t) * ratio + t * code, code)

    return Rounding(soften)


def _check_updates(updates: int) -> None:
    arguments.static(updates, "updates")
    arguments.whole(updates, "updates", low=1, remedy="Give the number of updates from `start` until the grid is hard.")
