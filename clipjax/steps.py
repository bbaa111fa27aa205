"""Rules for the step s of a grid: from the distribution of an array, or from a given interval (D0, D4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._maths import grids, levels, step_fitting
from clipjax.typing import Number, Step

__all__ = [
    "Step",
    "absmax",
    "fixed",
    "interval",
    "minmax",
    "mse",
    "percentile",
    "power_of_two",
    "sigma",
    "twn",
]


def __dir__() -> list[str]:
    return __all__


def fixed(step: Number) -> Step:
    """A given step, whatever the distribution.

    Args:
      step: s > 0; may be traced. A float given as `step=` means the same.

    Returns:
      A `Step`.

    Raises:
      ValueError: for a step that is not positive and finite.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> float(clipjax.choose_step(jnp.ones(3), 4, step=fixed(0.25)))
      0.25
    """
    return levels.given(step)


def interval(lo: float, hi: float) -> Step:
    r"""A grid inside the given interval, zero on it: D0's "every node's values lie in a given interval".

    .. math:: s = (hi - lo) / (2^b - 2)

    and the codes are those whose values lie in [lo, hi].

    Args:
      lo: lower end, at most 0. Static.
      hi: upper end, at least 0, above `lo`. Static.

    Returns:
      A `Step`.

    Raises:
      ValueError: for NaN or infinite ends, lo >= hi, or an interval without 0.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> round(float(clipjax.choose_step(jnp.ones(3), 4, step=interval(-0.7, 0.7))), 4)
      0.1

    References:
      D0, section 2.2, step 3.
    """
    for name, end in (("lo", lo), ("hi", hi)):
        arguments.static(end, name)
    ok = arguments.finite((lo, hi)) and lo <= 0 <= hi and lo < hi
    remedy = "The grid holds 0, so that a pruned weight is on it: lo <= 0 <= hi and lo < hi."
    arguments.require(ok, "lo, hi", "be finite and enclose 0", (lo, hi), remedy)

    def fit(x: jax.Array, bits: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
        if not arguments.traced(bits) and bits == 1:  # no zero: the levels -s and s must both lie inside
            spread = np.minimum(-np.float32(lo), np.float32(hi))
            remedy = "Use bits >= 2, or ends on both sides of 0."
            arguments.require(spread > 0, "lo, hi", "enclose 0 on both sides for bits=1", (lo, hi), remedy)
        else:
            spread = (np.float32(hi) - np.float32(lo)) / (2 * grids.top(bits))
        return step_fitting.given(spread, x, axes)

    return Step(fit, levels.between(lo, hi))


def absmax() -> Step:
    r"""The smallest step that reaches every weight: s = max|w| / (2^(b-1) - 1).

    The step has 24 - b significant bits, so that all levels are exact in f32. From 12 bits on, where these are few, the
    next larger step is taken where its last level comes closer to max|w|, though it has fewer levels.

    Returns:
      A `Step`.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> float(clipjax.choose_step(jnp.array([0.5, -1.75]), 4, step=absmax()))
      0.25
    """

    def fit(x: jax.Array, bits: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return step_fitting.over(jnp.max, jnp.abs(x), axes) / grids.top(bits)

    return Step(fit, levels.covering)


def mse() -> Step:
    r"""The step of least squared error over the nonzero weights.

    .. math:: s^* = \arg\min_s \sum_{w \neq 0} (Q_s(w) - w)^2

    For one bit s* = mean|w| in closed form. Else steps are tried, each in one pass over the weights that gives the best
    step for its codes k too, s = Σ|w|k / Σk². Large arrays take about 40 passes. The error of a small group changes by
    fits and starts with the step: groups of 32 at 4 bits take about 120 passes, at 8 bits 400. Weights that are
    multiples k s of any step, within the width, are found to be so and stay as they are.

    Returns:
      A `Step`.

    Example:
      >>> import clipjax, jax, jax.numpy as jnp
      >>> x = jax.random.normal(jax.random.key(0), (100_000,))
      >>> abs(float(clipjax.choose_step(x, 4)) - 0.3534) < 0.01
      True

    References:
      Max, "Quantizing for minimum distortion", 1960. D4, section 2.2: choose from the distribution.
    """
    return Step(step_fitting.least_squares)


def percentile(q: float = 99.9) -> Step:
    r"""The step whose largest level is the q-th percentile of the nonzero magnitudes; larger weights are clipped to it.

    .. math:: s = |w|_{(r)} / (2^{b-1} - 1),\quad r = \mathrm{round}(q\,n/100)

    without interpolation, exact and without a sort, by 32 counting passes. As it cuts the tail, weights on its grid get
    a smaller grid when it is fitted to them again, as by refreshes without latent weights: see `fake_quantize`.

    Args:
      q: percent, in (0, 100]; 100 is `absmax`. Static.

    Returns:
      A `Step`.

    Raises:
      ValueError: for q outside (0, 100].

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> float(clipjax.choose_step(jnp.arange(1.0, 101.0), 2, step=percentile(90)))
      90.0
    """
    step_fitting.check_percent(q, "q")

    def fit(x: jax.Array, bits: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return step_fitting.order_statistic(x, q, axes) / grids.top(bits)

    return absmax() if q == 100 else Step(fit, covers=False)


def sigma(k: float = 3.0) -> Step:
    r"""The step whose largest level is k standard deviations: s = k σ / (2^(b-1) - 1).

    σ is the root mean square of the nonzero weights, the deviation from 0, where the grid is centred. As it cuts the
    tail, weights on its grid get a smaller grid when it is fitted to them again, see `percentile`.

    Args:
      k: a number > 0.

    Returns:
      A `Step`.

    Raises:
      ValueError: for k that is not positive and finite.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> float(clipjax.choose_step(jnp.array([1.0, -1.0, 0.0]), 2, step=sigma(2.0)))
      2.0
    """
    arguments.check_positive(k, "k", "It counts standard deviations, e.g. 3.")

    def fit(x: jax.Array, bits: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return k * step_fitting.root_mean_square(x, axes)[0] / grids.top(bits)

    return Step(fit, covers=False)


def twn() -> Step:
    r"""The scale of ternary weight networks: s = mean(|w| : |w| > Δ), Δ = 0.7 mean|w|.

    For bits=2; a wider grid would end at the mean, and cut. Weights between Δ and s/2 go to 0 here, the nearest level;
    TWN sends them to s, for a larger error.

    Returns:
      A `Step`.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> float(clipjax.choose_step(jnp.array([0.1, -1.0, 0.5]), 2, step=twn()))
      0.75

    References:
      Li et al., "Ternary Weight Networks", 2016, https://arxiv.org/abs/1605.04711.
    """

    def fit(x: jax.Array, bits: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
        large = jnp.abs(x) > 0.7 * step_fitting.mean_size(x, axes)
        return step_fitting.mean_size(x, axes, large) / grids.top(bits)

    return Step(fit)


def minmax() -> Step:
    r"""An affine grid from the lowest weight to the highest, 0 on it.

    .. math:: s = \max_i \min\left(\frac{\max(-\min w, 0)}{i},\ \frac{\max(w, 0)}{2^b - 2 - i}\right)

    for weights of which one side is longer than the other: of the 2^b - 1 levels i lie below zero, so that they reach
    as far as they can on both sides and none lies outside. A bound (lo, hi) set by `clamp_weights` survives. Needs two
    bits. From 12 bits on a few levels may be left out, see `absmax`.

    Returns:
      A `Step`.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> float(clipjax.choose_step(jnp.array([-0.5, 1.0]), 3, step=minmax()))
      0.25
    """

    def fit(x: jax.Array, bits: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
        below, above = (jnp.maximum(step_fitting.over(jnp.max, side, axes), 0) for side in (-x, x))
        return grids.share(below, above, 2 * grids.top(bits))

    return Step(fit, levels.affine, sides=lambda x: (-x, x), min_bits=2)


def power_of_two(step: Step | None = None) -> Step:
    """The step of another rule, moved to the nearest power of two on the logarithmic scale: products become shifts.

    Where all weights are multiples of a power of two of which the width has as many, it is the largest such power.

    Args:
      step: the rule, `mse()` by default.

    Returns:
      A `Step`.

    Raises:
      ValueError: for a rule that fixes the ends of the grid.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> float(clipjax.choose_step(jnp.array([0.5, -1.75]), 4, step=power_of_two(absmax())))
      0.25

    References:
      Miyashita et al., 2016, https://arxiv.org/abs/1603.01025.
    """
    rule = levels.resolve(step, mse())
    free = rule.levels in (None, levels.covering, levels.as_given, levels.power_of_two)
    arguments.require(free, "step", "leave the ends of the grid free", step, "Use mse(), absmax() or percentile().")

    def fit(x: jax.Array, bits: int | jax.Array, axes: tuple[int, ...]) -> jax.Array:
        common, high = step_fitting.common_power(x, axes), step_fitting.over(jnp.max, jnp.abs(x), axes)
        near = step_fitting.power_of_two(rule.fit(x, bits, axes))
        return jnp.where(high <= grids.top(bits) * common, common, near)

    return rule._replace(fit=fit, levels=levels.power_of_two)
