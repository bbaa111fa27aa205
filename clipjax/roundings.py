"""Roundings: weights that move onto the grid by and by, or that choose codes which cost less in the file."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments
from clipjax._maths import intervals
from clipjax.typing import Number, Rounding, Schedule

__all__ = ["Rounding", "binary_relax", "parq", "rate"]


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


def rate(lam: Number | Schedule | None = None, budget: Number | Schedule | None = None) -> Rounding:
    r"""Codes that are worth their bytes: a weight pays for the bits that its code takes in the file.

    .. math::
        k(w) = \arg\min_{k} \left(\frac{w}{s} - k\right)^2 + \lambda\, c(k),\qquad
        c(k) = -\log_2 \frac{n_k + 1/2}{n + L/2}

    over the L codes k of the leaf, of whose n weights n_k have the code k; c(0) is at most the least of the others.
    Codes that are rare cost more and become rarer, and most of what is small becomes 0: the file of `clipjax.save`,
    whose code takes about c(k) bits for a k, gets smaller at each refresh until training holds against it. No code is
    ever too dear to come back. With λ = 0 this is "nearest".

    How often codes occur is counted at the refreshes of `fake_quantize`; thresholds between codes then stay in the
    state until the next one, and an update finds the code of each weight in b comparisons. Where step groups have
    levels of their own, codes beyond them are limited to them at last. Formats among the widths have roundings of
    their own, and are left as they are.

    Args:
      lam: λ ≥ 0, squared steps that a bit is worth: 0.01 changes little, 0.1 prunes much. A number, which may be
        traced, or a schedule of the updates since `start`, that is evaluated at refreshes.
      budget: instead of λ, how many bytes the params may take in a file, as `report` estimates them: all params that
        the transformation is given, those that it does not quantize with all their bytes. A number or a schedule.
        Every refresh then looks for the least λ of at most 2^8 that fits, and counts all codes 14 times for it.

    Returns:
      A `Rounding`. It needs the latent weights of ``carry=True`` and widths of at most 8 bits.

    Raises:
      ValueError: for both or neither of λ and a budget, and for negative ones.

    Example:
      >>> import clipjax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.array([[0.9, 0.1], [0.6, 0.2], [-0.1, 0.0], [0.1, 0.2]])}
      >>> for lam in (0.0, 1.0):
      ...     tx = clipjax.fake_quantize(bits=3, step=0.25, rounding=rate(lam))
      ...     clipjax.hold_once(tx, params)[0]["kernel"].ravel().tolist()
      [0.75, 0.0, 0.5, 0.25, 0.0, 0.0, 0.0, 0.25]
      [0.75, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]

    References:
      D4, section 2.2: the trade of bits and error. Entropy-constrained quantization: Chou, Lookabaugh and Gray, 1989.
      Wiedemann et al., "DeepCABAC", 2019, https://arxiv.org/abs/1907.11900, section III. Becking et al., "ECQˣ", 2021,
      https://arxiv.org/abs/2109.04236.
    """
    one = (lam is None) != (budget is None)
    remedy = "Give λ, or the bytes that the file may take: `rate(0.05)`, `rate(budget=5_000)`."
    arguments.require(one, "lam", "be given or `budget`, and not both", (lam, budget), remedy)
    for value, name in ((lam, "lam"), (budget, "budget")):
        if value is not None and not callable(value):
            arguments.non_negative(value, name, "Give a number of at least 0, or a schedule of it.")
        elif value is not None:
            arguments.check_schedule(value, name, "a number or a schedule")
    return Rounding(None, lam, budget)


def _check_updates(updates: int) -> None:
    arguments.static(updates, "updates")
    arguments.whole(updates, "updates", low=1, remedy="Give the number of updates from `start` until the grid is hard.")
