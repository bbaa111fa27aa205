"""Thresholds that follow the history of what they limit, for `clip_norm`, `skip_spikes` and `clip`.

A `Rule` is a pair of pure functions on a norm. Written for one norm, it serves the norm of the whole tree, of every
leaf, or the magnitude of every entry: the member keeps a state for each and maps the rule over them. The member also
keeps norms that are not finite, and norms of exactly 0, out of every history, and reads a threshold that is not
positive as none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments
from clipjax._maths import ring_buffers
from clipjax.typing import Rule


class _Moments(NamedTuple):
    """Mean and standard deviation of the norms so far, and how many there were."""

    seen: jax.Array
    mean: jax.Array
    deviation: jax.Array


def zscore(z: Any = 2.5, decay: Any = 0.97, warmup: Any = 25, eps: Any = 1e-6, mode: str = "adaptive") -> Rule:
    r"""Clip norms that lie z standard deviations above their moving average (ZClip).

    .. math:: \zeta = (n - \mu) / (\sigma + \epsilon), \quad
        C = \mu + (z^2 / \zeta)\, \sigma \ \text{where}\ \zeta > z

    The first `warmup` norms pass unclipped; μ and σ² start as their mean and population variance. Then, with
    :math:`\tilde n = \min(n, C)`, :math:`\mu \leftarrow \beta \mu + (1 - \beta) \tilde n` and
    :math:`\sigma^2 \leftarrow \beta \sigma^2 + (1 - \beta) (\tilde n - \mu)^2` against the new μ.

    Args:
      z: z > 0, standard deviations; may be traced, as may `decay`, `warmup` and `eps`.
      decay: β in [0, 1).
      warmup: norms before the first clip, at least 1.
      eps: added to σ in the quotient.
      mode: "adaptive" as above: the further out, the harder; "mean" clips outliers to μ; "percentile" always holds
        norms below μ + z σ.

    Returns:
      A `Rule`.

    Raises:
      ValueError: for z <= 0, a decay outside [0, 1), warmup < 1, a negative eps, or an unknown mode.

    Example:
      >>> rule = zscore(z=2.0, warmup=2)
      >>> state = rule.init()
      >>> for norm in (1.0, 3.0, 6.0):
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      >>> round(float(threshold), 4)  # μ = 2, σ = 1, ζ = 4: 2 + (2²/4) 1
      3.0

    References:
      Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, https://arxiv.org/abs/2504.02507.
      D3, section 5: which values to clip.
    """
    _positive(z, "z", "It counts standard deviations; 2.5 is usual.")
    _decay(decay, "It is the weight of the past, e.g. 0.97.")
    _warmup(warmup, "The first mean needs a norm.")
    _number(eps, "eps", lambda n: n >= 0, "be a number >= 0", "It is added to a standard deviation.")
    arguments.choice(mode, "mode", ("adaptive", "mean", "percentile"))

    def limit(norm: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
        if mode == "percentile":
            return mean + z * deviation
        score = (norm - mean) / (deviation + eps)
        outlier = mean if mode == "mean" else mean + z * (z * deviation / jnp.where(score > z, score, 1.0))
        return jnp.where(score > z, outlier, jnp.inf)

    def update(norm: jax.Array, state: _Moments) -> tuple[jax.Array, _Moments]:
        seen, mean, deviation = state
        warm = seen < warmup
        threshold = jnp.where(warm, jnp.inf, limit(norm, mean, deviation))
        clipped = jnp.minimum(norm, threshold)
        share = 1 / (seen.astype(norm.dtype) + 1)
        first = mean + share * (norm - mean), _mixed(deviation, norm - mean, share, 1 - share)
        new_mean = mean + (1 - decay) * (clipped - mean)
        later = _mixed(deviation, clipped - new_mean, 1 - decay)
        moments = jnp.where(warm, first[0], new_mean), jnp.where(warm, first[1], later)
        return threshold, _Moments(_more(seen), *moments)

    return Rule(lambda: _Moments(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(())), update)


def _mixed(deviation: jax.Array, off: jax.Array, share: Any, weight: Any = 1) -> jax.Array:
    """The root of (1 - share) deviation² + share weight off², without a square that could overflow."""
    unit = jnp.maximum(deviation, jnp.abs(off))
    unit = jnp.where(unit > 0, unit, 1.0)
    old, new = jnp.square(deviation / unit), jnp.square(off / unit) * weight
    return unit * jnp.sqrt(old + share * (new - old))


class _Average(NamedTuple):
    """A moving average, and how many norms went into it."""

    seen: jax.Array
    average: jax.Array


def ema_ratio(ratio: Any = 1.05, decay: Any = 0.98, warmup: Any = 100, warmup_max: Any = 1.0) -> Rule:
    r"""Hold norms below a multiple of their moving average (AdaGC, with ``per="leaf"``).

    .. math:: C = \lambda \gamma, \quad \gamma \leftarrow \beta \gamma + (1 - \beta) \min(n, C)

    During the warm-up C is `warmup_max`, and γ the smallest clipped norm so far.

    Args:
      ratio: λ > 0; may be traced, as may the others.
      decay: β in [0, 1).
      warmup: norms in the warm-up, at least 1.
      warmup_max: C > 0 during the warm-up; infinity clips nothing there.

    Returns:
      A `Rule`.

    Raises:
      ValueError: for a ratio or `warmup_max` that is not positive, a decay outside [0, 1), or warmup < 1.

    Example:
      >>> rule = ema_ratio(ratio=1.5, decay=0.5, warmup=1)
      >>> state = rule.init()
      >>> for norm in (0.5, 2.0):
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      >>> float(threshold), float(state.average)
      (0.75, 0.625)

    References:
      Wang et al., "AdaGC: Improving Training Stability for LLM Pretraining", 2025, https://arxiv.org/abs/2502.11034.
      D3, section 5.
    """
    _positive(ratio, "ratio", "It multiplies the average norm; 1.05 is usual.")
    _decay(decay, "It is the weight of the past, e.g. 0.98.")
    _number(
        warmup,
        "warmup",
        lambda n: (n >= 1) & (n == n // 1),
        "be a whole number >= 1",
        "The average starts from the norms of the warm-up.",
    )
    _positive(warmup_max, "warmup_max", "It is the threshold of the warm-up; use math.inf for none.")

    def update(norm: jax.Array, state: _Average) -> tuple[jax.Array, _Average]:
        seen, average = state
        warm = seen < warmup
        threshold = jnp.where(warm, warmup_max, ratio * average)
        clipped = jnp.minimum(norm, threshold)
        least = jnp.where(seen == 0, clipped, jnp.minimum(average, clipped))
        return threshold, _Average(_more(seen), jnp.where(warm, least, average + (1 - decay) * (clipped - average)))

    return Rule(lambda: _Average(jnp.zeros((), jnp.int32), jnp.zeros(())), update)


def percentile(q: Any = 10.0, window: int = 1000) -> Rule:
    """Hold norms below a percentile of their history (AutoClip).

    C is the q-th percentile, linearly interpolated, of the last `window` norms before the clip, the current one
    included.

    Args:
      q: 0 to 100; may be traced.
      window: length of the history, at least 1; 8 bytes each. Static.

    Returns:
      A `Rule`.

    Raises:
      ValueError: for q outside [0, 100] or window < 1.

    Example:
      >>> rule = percentile(50, window=10)
      >>> state = rule.init()
      >>> for norm in (1.0, 2.0, 9.0):
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      >>> float(threshold)
      2.0

    References:
      Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks", 2020,
      https://arxiv.org/abs/2007.14469. D3, section 5.
    """
    _number(q, "q", lambda n: (n >= 0) & (n <= 100), "lie in [0, 100]", "AutoClip uses 10.")
    window = _length(window)

    def update(norm: jax.Array, state: ring_buffers.Sorted) -> tuple[jax.Array, ring_buffers.Sorted]:
        state = ring_buffers.insert(state, norm)
        last = jnp.minimum(state.window.seen, window) - 1
        place = last.astype(jnp.float32) * jnp.asarray(q, jnp.float32)  # in hundredths: exact where q is whole
        low = jnp.floor(place / 100).astype(jnp.int32)
        below, above = (ring_buffers.at(state.ordered, i) for i in (low, jnp.minimum(low + 1, last)))
        part = (place - 100 * low.astype(jnp.float32)) / 100
        return below + part * (above - below), state

    return Rule(lambda: ring_buffers.Sorted(ring_buffers.empty(window), ring_buffers.empty(window).norms), update)


def mean_sigma(k: Any = 3.0, window: int = 128) -> Rule:
    r"""Hold norms below :math:`\mu + k \sigma` of the last norms (Levanter's window).

    μ and σ are mean and population standard deviation of the last `window` norms before the clip, the current one not
    among them. Nothing is clipped until the window is full.

    Args:
      k: standard deviations, at least 0; may be traced.
      window: length of the history, at least 1; 4 bytes each. Static.

    Returns:
      A `Rule`.

    Raises:
      ValueError: for a negative k or window < 1.

    Example:
      >>> rule = mean_sigma(k=2.0, window=2)
      >>> state = rule.init()
      >>> for norm in (1.0, 3.0, 9.0):
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      >>> float(threshold)
      4.0

    References:
      Levanter, `levanter.optim.skipstep`, https://github.com/stanford-crfm/levanter. D3, section 5.
    """
    _number(k, "k", lambda n: n >= 0, "be a number >= 0", "It counts standard deviations.")
    window = _length(window)

    def update(norm: jax.Array, state: ring_buffers.Window) -> tuple[jax.Array, ring_buffers.Window]:
        full = state.seen >= window
        past = jnp.where(full, state.norms, 0.0)
        return jnp.where(full, past.mean() + k * past.std(), jnp.inf), ring_buffers.push(state, norm)

    return Rule(lambda: ring_buffers.empty(window), update)


def quantile_track(q: Any, init: Any = 1.0, lr: Any = 0.2) -> Rule:
    r"""Move the threshold until a fraction q of the norms lies within it (Andrew et al.).

    .. math:: C \leftarrow C \exp(-\eta (b - q)), \quad b = [n \le C]

    No history but C itself, kept as its logarithm.

    Args:
      q: fraction of norms to leave unclipped, 0 to 1; may be traced, as may the others.
      init: the first C > 0.
      lr: η > 0.

    Returns:
      A `Rule`.

    Raises:
      ValueError: for q outside [0, 1], or an `init` or `lr` that is not positive.

    Example:
      >>> rule = quantile_track(0.5, init=1.0, lr=0.2)
      >>> threshold, state = rule.update(jnp.float32(3.0), rule.init())
      >>> float(threshold), round(float(jnp.exp(state[0])), 4)  # too low: up by exp(0.2 · 0.5)
      (1.0, 1.1052)

    References:
      Andrew et al., "Differentially Private Learning with Adaptive Clipping", 2021, https://arxiv.org/abs/1905.03871.
    """
    _number(q, "q", lambda n: (n >= 0) & (n <= 1), "lie in [0, 1]", "It is the fraction left unclipped.")
    _positive(init, "init", "It is the first threshold.")
    _positive(lr, "lr", "It is the step in the logarithm of the threshold; 0.2 is usual.")

    def update(norm: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        log, rest = state  # rest: what rounding has left out
        threshold = jnp.exp(log)
        step = rest - lr * ((norm <= threshold).astype(norm.dtype) - q)
        return threshold, (log + step, step - ((log + step) - log))

    return Rule(lambda: (jnp.log(jnp.asarray(init, jnp.float32)), jnp.zeros(())), update)


def spam(theta: Any = 5000.0, decay: Any = 0.999) -> Rule:
    r"""Clip entries far above their own second moment (SPAM's spike-aware clipping), for `clip`.

    .. math:: |g| \le \sqrt{\theta v}, \quad v \leftarrow \beta v + (1 - \beta) \tilde g^2

    v is the average of the squared *clipped* gradient, as Adam would have it, without bias correction; it starts at 0
    and clips nothing until it has seen a gradient. Costs 4 bytes a parameter.

    Args:
      theta: θ > 0; may be traced, as may `decay`.
      decay: β in [0, 1).

    Returns:
      A `Rule`.

    Raises:
      ValueError: for a theta that is not positive or a decay outside [0, 1).

    Example:
      >>> rule = spam(theta=4.0, decay=0.75)
      >>> threshold, state = rule.update(jnp.float32(2.0), jnp.float32(1.0))
      >>> float(threshold), float(state)
      (2.0, 1.75)

    References:
      Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", 2025,
      https://arxiv.org/abs/2501.06842. D3, section 5.
    """
    _positive(theta, "theta", "It multiplies the second moment; SPAM uses 5000.")
    _decay(decay, "It is the weight of the past, e.g. 0.999.")

    def update(norm: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        threshold = jnp.sqrt(theta * state)
        clipped = jnp.where(threshold > 0, jnp.minimum(norm, threshold), norm)
        return threshold, state + (1 - decay) * (jnp.square(clipped) - state)

    return Rule(lambda: jnp.zeros(()), update)


def _more(seen: jax.Array) -> jax.Array:
    """Count up, and stay at the largest number."""
    return jnp.where(seen < jnp.iinfo(jnp.int32).max, seen + 1, seen)


def _length(window: Any) -> int:
    arguments.static(window, "window")
    arguments.whole(window, "window", low=1, remedy="It is the number of norms to remember.")
    return int(window)


def _warmup(value: Any, remedy: str) -> None:
    _number(value, "warmup", lambda n: (n >= 1) & (n == n // 1), "be a whole number >= 1", remedy)


def _decay(value: Any, remedy: str) -> None:
    _number(value, "decay", lambda number: (number >= 0) & (number < 1), "lie in [0, 1)", remedy)


def _positive(value: Any, name: str, remedy: str) -> None:
    _number(value, name, lambda number: number > 0, "be a number > 0", remedy)


def _number(value: Any, name: str, ok: Callable[[Any], Any], rule: str, remedy: str) -> None:
    """Check a number of a rule unless it is traced; None and schedules are none."""
    if not arguments.traced(value):
        number = arguments.numeric(value, name, remedy)
        arguments.require(ok(number), name, rule, value, remedy)
