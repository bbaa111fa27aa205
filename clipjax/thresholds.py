"""Rules: thresholds for `clip_norm`, `skip_spikes` and `clip` that follow the history of norms.

A `Rule` is a pair of pure functions, written for one norm. The transformation that gets it keeps a state for each norm
that it measures, of the whole tree or of every leaf, and `clip` one for the magnitude of every entry. Norms that are 0
or not finite are never added to a history. A threshold that is not positive clips nothing.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import arguments, elementwise
from clipjax._maths import averages, ring_buffers
from clipjax.typing import Count, Number, Rule

__all__ = ["Rule", "ema_ratio", "mean_sigma", "percentile", "quantile_track", "relative", "spam", "zscore"]

_Mode: TypeAlias = Literal["adaptive", "mean", "percentile"]


def __dir__() -> list[str]:
    return __all__


def zscore(
    z: Number = 2.5, decay: Number = 0.97, warmup: Count = 25, eps: Number = 1e-6, mode: _Mode = "adaptive"
) -> Rule:
    r"""Clip norms that lie z standard deviations above their moving average (ZClip).

    .. math:: \zeta = (n - \mu) / (\sigma + \epsilon), \quad
        C = \mu + (z^2 / \zeta)\, \sigma \ \text{where}\ \zeta > z

    n is the norm, C the threshold, μ and σ are moving average and deviation of the norms. The first `warmup` norms pass
    unclipped and give the first μ and σ², their mean and population variance. Then, with
    :math:`\tilde n = \min(n, C)`, :math:`\mu \leftarrow \beta \mu + (1 - \beta) \tilde n` and
    :math:`\sigma^2 \leftarrow \beta \sigma^2 + (1 - \beta) (\tilde n - \mu)^2` against the new μ.

    Args:
      z: z > 0, standard deviations; may be traced, as may `decay`, `warmup` and `eps`.
      decay: β in [0, 1), the weight of the past in both averages.
      warmup: number of norms before the first clip, at least 1.
      eps: ε >= 0, added to σ in the quotient.
      mode: "adaptive" as above: the larger :math:`\zeta`, the lower C. "mean": C = μ where :math:`\zeta > z`.
        "percentile": C = μ + z σ always. Static.

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
    arguments.in_range(z, "z", "be a number > 0", "It counts standard deviations; 2.5 is usual.")
    arguments.in_range(decay, "decay", "lie in [0, 1)", "It is the weight of the past, e.g. 0.97.")
    arguments.in_range(warmup, "warmup", "be a whole number >= 1", "The first mean needs a norm.")
    arguments.in_range(eps, "eps", "be a number >= 0", "It is added to a standard deviation.")
    arguments.choice(mode, "mode", ("adaptive", "mean", "percentile"))

    def limit(norm: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
        if mode == "percentile":
            return mean + z * deviation
        # ζ > z, without its division: σ + ε may be 0, and a quotient that is not used has a derivative all the same
        excess, spread = norm - mean, z * (deviation + eps)
        over = excess > spread
        outlier = mean if mode == "mean" else mean + z * deviation * (spread / jnp.where(over, excess, 1.0))
        return jnp.where(over, outlier, jnp.inf)

    def update(norm: jax.Array, state: averages.Moments) -> tuple[jax.Array, averages.Moments]:
        warm = state.added < warmup
        threshold = jnp.where(warm, jnp.inf, limit(norm, state.mean, state.deviation))
        clipped = jnp.minimum(norm, threshold)
        return threshold, averages.followed(state, norm, clipped, decay, warm)

    return Rule(lambda: averages.Moments(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(())), update)


def ema_ratio(ratio: Number = 1.05, decay: Number = 0.98, warmup: Count = 100, warmup_max: Number = 1.0) -> Rule:
    r"""Clip norms to a multiple of their moving average (AdaGC, with ``per="leaf"``).

    .. math:: C = \lambda \gamma, \quad \gamma \leftarrow \beta \gamma + (1 - \beta) \min(n, C)

    n is the norm, C the threshold. During the warm-up C is `warmup_max`, and γ is the smallest clipped norm so far.

    Args:
      ratio: λ > 0; may be traced, as may the others.
      decay: β in [0, 1), the weight of the past.
      warmup: number of norms in the warm-up, at least 1.
      warmup_max: C > 0 during the warm-up, in the unit of the norm; infinity clips nothing there.

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
    arguments.in_range(ratio, "ratio", "be a number > 0", "It multiplies the average norm; 1.05 is usual.")
    arguments.in_range(decay, "decay", "lie in [0, 1)", "It is the weight of the past, e.g. 0.98.")
    arguments.in_range(warmup, "warmup", "be a whole number >= 1", "The average starts from the norms of the warm-up.")
    arguments.in_range(warmup_max, "warmup_max", "be a number > 0", "It is C of the warm-up; use math.inf for none.")

    def update(norm: jax.Array, state: averages.Average) -> tuple[jax.Array, averages.Average]:
        added, average = state
        warm = added < warmup
        threshold = jnp.where(warm, warmup_max, ratio * average)
        clipped = jnp.minimum(norm, threshold)
        least = jnp.where(added == 0, clipped, jnp.minimum(average, clipped))
        return threshold, averages.Average(
            optax.safe_increment(added), jnp.where(warm, least, average + (1 - decay) * (clipped - average))
        )

    return Rule(lambda: averages.Average(jnp.zeros((), jnp.int32), jnp.zeros(())), update)


def percentile(q: Number = 10.0, window: int = 1000) -> Rule:
    """Clip norms to a percentile of their history (AutoClip).

    The threshold is the q-th percentile, linearly interpolated, of the last `window` norms before the clip, the current
    one included.

    Args:
      q: the percentile, 0 to 100; may be traced.
      window: length of the history in updates, at least 1; costs 8 bytes each. Static.

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
    arguments.in_range(q, "q", "lie in [0, 100]", "AutoClip uses 10.")
    window = _length(window)

    def update(norm: jax.Array, state: ring_buffers.Sorted) -> tuple[jax.Array, ring_buffers.Sorted]:
        state = ring_buffers.insert(state, norm)
        return ring_buffers.percentile(state, q), state

    return Rule(lambda: ring_buffers.Sorted(ring_buffers.empty(window), ring_buffers.empty(window).norms), update)


def mean_sigma(k: Number = 3.0, window: int = 128) -> Rule:
    r"""Clip norms to :math:`\mu + k \sigma` of the norms before them (Levanter's window).

    μ and σ are mean and population standard deviation of the last `window` norms before the clip, the current one
    excluded. Nothing is clipped until the window is full.

    Args:
      k: number of standard deviations, at least 0; may be traced.
      window: length of the history in updates, at least 1; costs 4 bytes each. Static.

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
    arguments.in_range(k, "k", "be a number >= 0", "It counts standard deviations.")
    window = _length(window)

    def update(norm: jax.Array, state: ring_buffers.Window) -> tuple[jax.Array, ring_buffers.Window]:
        full = state.added >= window
        mean, sigma = ring_buffers.moments(state)
        return jnp.where(full, mean + k * sigma, jnp.inf), ring_buffers.push(state, norm)

    return Rule(lambda: ring_buffers.empty(window), update)


def quantile_track(q: Number, init: Number = 1.0, lr: Number = 0.2) -> Rule:
    r"""Move the threshold until a fraction q of the norms lies within it (Andrew et al.).

    .. math:: C \leftarrow C \exp(-\eta (b - q)), \quad b = [n \le C]

    n is the norm and C the threshold. The state is the logarithm of C; no norms are kept.

    Args:
      q: fraction of norms to leave unclipped, 0 to 1; may be traced, as may the others.
      init: the first C > 0, in the unit of the norm.
      lr: η > 0, the step in log C.

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
    arguments.in_range(q, "q", "lie in [0, 1]", "It is the fraction left unclipped.")
    arguments.in_range(init, "init", "be a number > 0", "It is the first threshold.")
    arguments.in_range(lr, "lr", "be a number > 0", "It is the step in the logarithm of the threshold; 0.2 is usual.")

    def update(norm: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        log, rest = state  # log C + rest is exact: rest is the rounding error of the last sum (Kahan)
        threshold = jnp.exp(log)
        step = rest - lr * ((norm <= threshold).astype(norm.dtype) - q)
        return threshold, (log + step, step - ((log + step) - log))

    def start() -> tuple[jax.Array, jax.Array]:
        log = jnp.log(init) if arguments.traced(init) else jnp.asarray(math.log(float(init)), float)
        return log, jnp.zeros_like(log)

    return Rule(start, update)


def spam(theta: Number = 5000.0, decay: Number = 0.999) -> Rule:
    r"""Clip entries far above their own second moment (SPAM's spike-aware clipping), for `clip`.

    .. math:: |g| \le \sqrt{\theta v}, \quad v \leftarrow \beta v + (1 - \beta) \tilde g^2

    g is an entry of the gradient, g̃ the same after the clip, v the moving average of g̃²: Adam's second moment without
    bias correction. v starts at 0, and the first nonzero gradient passes unclipped. Costs 4 bytes a parameter.

    Args:
      theta: θ > 0, the largest ratio of g² to v; may be traced, as may `decay`.
      decay: β in [0, 1), the weight of the past.

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
    arguments.in_range(theta, "theta", "be a number > 0", "It multiplies the second moment; SPAM uses 5000.")
    arguments.in_range(decay, "decay", "lie in [0, 1)", "It is the weight of the past, e.g. 0.999.")

    def update(norm: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        threshold = elementwise.root(theta * state)
        clipped = jnp.where(threshold > 0, jnp.minimum(norm, threshold), norm)
        return threshold, state + (1 - decay) * (jnp.square(clipped) - state)

    return Rule(lambda: jnp.zeros(()), update)


def relative(ratio: Number | Rule) -> Rule:
    r"""Clip norms to a fraction of the norm of the weights, of the same leaves and entries (AGC).

    .. math:: C = \lambda \lVert w \rVert \quad\text{or}\quad C = \lVert w \rVert\, C_r(n / \lVert w \rVert)

    n is the norm, C the threshold, and :math:`C_r` another rule, which then follows the norms in units of those of the
    weights. Norms of weights are taken as those of gradients are: of all arrays or of each (`per`), of the selected
    entries, and with the same `ord`. Weights that are all 0 clip nothing. `update` must be given the params.

    Args:
      ratio: λ > 0; may be traced. Or a rule, such as ``zscore()``.

    Returns:
      A `Rule` for `clip_norm` and for `skip_spikes`.

    Raises:
      ValueError: for a ratio that is not positive, and a rule that is relative already.

    Example:
      >>> import clipjax
      >>> tx = clipjax.clip_norm(relative(0.01), per="leaf")
      >>> params = {"w": jnp.array([30.0, 40.0]), "new": jnp.zeros(2)}
      >>> grads = {"w": jnp.array([3.0, 4.0]), "new": jnp.ones(2)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> [round(x, 4) for x in updates["w"].tolist()], updates["new"].tolist()
      ([0.3, 0.4], [1.0, 1.0])

    References:
      Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (AGC), 2021,
      https://arxiv.org/abs/2102.06171; `optax.adaptive_grad_clip` does it for each unit, with a least norm of the
      weights. D3, section 5.
    """
    if isinstance(ratio, Rule):
        remedy = "It is a rule of the norms themselves: `relative(zscore())`."
        arguments.require(ratio.reference is None, "ratio", "be no relative rule", ratio, remedy)
        return ratio._replace(reference=lambda norm: norm)
    arguments.in_range(ratio, "ratio", "be a number > 0", "AGC uses 0.01.")
    return Rule(tuple, lambda norm, state: (jnp.asarray(ratio, norm.dtype), state), lambda norm: norm)


def _length(window: int) -> int:
    arguments.static(window, "window")
    arguments.whole(window, "window", low=1, remedy="It is the number of norms to remember.")
    return int(window)
