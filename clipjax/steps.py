"""How the step s of a grid follows from the distribution of an array, or from a given interval (D0, D4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import _arguments as arguments
from clipjax import _grids as grids

_ROUNDS, _POINTS = 4, 8  # the passes of a least-squares fit


class Step(NamedTuple):
    """A rule for the step of a grid.

    Attributes:
      fit: `fit(x, bits, axes) -> s`: f32 array `x`, zeros being entries to ignore; `bits` may be traced where >= 2; the
        axes that share a step are kept with size 1. Where all entries are zero, any value may come out: the caller
        takes 1.
      follows: False for a step that no distribution changes.
      limits: for an interval, its two ends: the codes are those whose values lie inside.
    """

    fit: Callable[[jax.Array, Any, tuple[int, ...]], jax.Array]
    follows: bool = True
    limits: tuple[Any, Any] | None = None


def fixed(step: Any) -> Step:
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
    grids.check_step(step)

    def fit(x: jax.Array, bits: Any, axes: tuple[int, ...]) -> jax.Array:
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        scalar = len(axes) == x.ndim
        return jnp.full(() if scalar else shape, jnp.asarray(step, jnp.float32))

    return Step(fit, follows=False)


def interval(lo: float, hi: float) -> Step:
    r"""A grid inside the given interval, zero on it: D0's "every node's values lie in a given interval".

    .. math:: s = (hi - lo) / (2^b - 2)

    and the codes are those whose values lie in [lo, hi].

    Args:
      lo: lower end, at most 0.
      hi: upper end, at least 0, above `lo`.

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
    ok = arguments.finite((lo, hi)) and lo <= 0 <= hi and lo < hi
    remedy = "The grid holds 0, so that a pruned weight is on it: lo <= 0 <= hi and lo < hi."
    arguments.require(ok, "lo, hi", "be finite and enclose 0", (lo, hi), remedy)

    def fit(x: jax.Array, bits: Any, axes: tuple[int, ...]) -> jax.Array:
        if isinstance(bits, int) and bits == 1:  # no zero: the levels -s and s must both lie inside
            spread = np.minimum(-np.float32(lo), np.float32(hi))
            remedy = "Use bits >= 2, or ends on both sides of 0."
            arguments.require(spread > 0, "lo, hi", "enclose 0 on both sides for bits=1", (lo, hi), remedy)
        else:
            spread = (np.float32(hi) - np.float32(lo)) / (2 * grids.top(bits))
        return fixed(spread).fit(x, bits, axes)

    return Step(fit, follows=False, limits=(float(np.float32(lo)), float(np.float32(hi))))


def absmax() -> Step:
    r"""The smallest step that reaches every weight: s = max|w| / (2^(b-1) - 1).

    Returns:
      A `Step`.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> float(clipjax.choose_step(jnp.array([0.5, -1.75]), 4, step=absmax()))
      0.25
    """

    def fit(x: jax.Array, bits: Any, axes: tuple[int, ...]) -> jax.Array:
        return _over(jnp.max, jnp.abs(x), axes) / grids.top(bits)

    return Step(fit)


def mse() -> Step:
    r"""The step of least squared error over the nonzero weights.

    .. math:: s^* = \arg\min_s \sum_{w \neq 0} (Q_s(w) - w)^2

    For one bit s* = mean|w| in closed form. Else the error is scanned over 8 steps between those that clip at half the
    root mean square and at max|w|, and three more times around the best so far. Each trial is one pass, 32 in all.

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
    return Step(_least_squares)


def _least_squares(x: jax.Array, bits: Any, axes: tuple[int, ...]) -> jax.Array:
    size = jnp.abs(x)
    count = jnp.maximum(_over(jnp.sum, (size > 0).astype(jnp.float32), axes), 1)
    if isinstance(bits, int) and bits == 1:
        return _over(jnp.sum, size, axes) / count
    high = _over(jnp.max, size, axes)
    unit = jnp.where(high > 0, high, jnp.ones_like(high))
    rms = unit * jnp.sqrt(_over(jnp.sum, jnp.square(size / unit), axes) / count)
    top = grids.top(bits)
    low = jnp.minimum(0.5 * rms, high)

    def error(reach: jax.Array) -> jax.Array:
        """Squared error, in units of max|w|, of the grid that ends at `reach`."""
        step = jnp.where(reach > 0, reach, unit) / top
        code = jnp.minimum(jnp.round(size / step), top)
        return _over(jnp.sum, jnp.square((size - code * step) / unit), axes)

    def trial(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """One pass: the next of `_POINTS` reaches, spaced by `ratio` from `first`; each round closes in on the best."""
        first, ratio, least, best = state
        fresh = jnp.asarray((i % _POINTS == 0) & (i > 0))
        first = jnp.where(fresh, best / ratio, first)
        ratio = jnp.where(fresh, ratio ** (2 / (_POINTS - 1)), ratio)
        reach = jnp.minimum(first * ratio ** jnp.asarray(i % _POINTS, jnp.float32), high)
        e = error(reach)
        return first, ratio, jnp.minimum(least, e), jnp.where(e < least, reach, best)

    ratio = jnp.where(low > 0, high / jnp.where(low > 0, low, unit), jnp.ones_like(low)) ** (1 / (_POINTS - 1))
    start = (low, ratio, jnp.full_like(high, jnp.inf), high)
    return jax.lax.fori_loop(0, _ROUNDS * _POINTS, trial, start)[3] / top


def _over(reduce: Callable[..., jax.Array], x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Reduce over the shared axes: a scalar for all of them, else size 1 in each."""
    return reduce(x) if len(axes) == x.ndim else reduce(x, axis=axes, keepdims=True)


def as_step(step: Any) -> Step:
    """A step rule; a number means `fixed`."""
    if isinstance(step, Step):
        return step
    if callable(step) or isinstance(step, str) or step is None:
        raise TypeError(
            f"`step` must be a number or a rule from `clipjax.steps`, got {step!r}. Call the factory: `steps.mse()`."
        )
    return fixed(step)


def fit(rule: Step, x: jax.Array, bits: Any, axes: tuple[int, ...], limit: Any = None) -> jax.Array:
    """The step of a rule, at most `limit`, 1 for all-zero arrays; short unless it is a number that the caller gave."""
    step = rule.fit(x, bits, axes)
    if limit is not None and rule.follows:
        step = jnp.minimum(step, limit)
    if rule.follows or rule.limits is not None:
        step = grids.short(step, bits)
    return jnp.where(step > 0, step, jnp.ones_like(step))


def choose_step(
    x: jax.Array, bits: int, *, step: Step | float | None = None, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """The step that `fake_quantize` would take for this array, before any run.

    Args:
      x: float array; zeros and non-finite entries are ignored.
      bits: 1 to 16.
      step: a rule of `clipjax.steps`, `mse()` by default, or a number.
      axis: the axis or axes that keep a step of their own; None for one step in all.

    Returns:
      f32, a scalar for `axis=None`, else with size 1 in every other axis, so that it broadcasts to `x`.

    Raises:
      ValueError: for bits outside 1 to 16 or an axis that does not exist.

    Example:
      >>> import jax.numpy as jnp
      >>> choose_step(jnp.array([[0.5, 3.0], [-0.25, 0.0]]), 2, step=absmax(), axis=-1).tolist()
      [[0.5, 3.0]]

    References:
      D4, section 2.2, steps 1 and 2.
    """
    arguments.bits(bits)
    x = jnp.asarray(x).astype(jnp.float32)
    axes = grids.reduced_axes(x.ndim, axis)
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    return fit(as_step(mse() if step is None else step), finite, bits, axes)
