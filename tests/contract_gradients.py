"""The rows of the contract's table for the gradient side."""

from contract_row import KEY, row

import clipjax
from clipjax import selections, thresholds


def ruled(name, rule, build=clipjax.clip_norm, **numbers):
    """A transformation whose threshold follows a rule with these numbers."""
    return row(name, "gradient", lambda _, **given: build(rule(**given)), **numbers)


def element_carry(rule):
    return clipjax.clip(rule, carry=True)


def leaf_norms(rule):
    return clipjax.clip_norm(rule, per="leaf")


GRADIENT_SIDE = [
    row("clip", "gradient", lambda _, threshold: clipjax.clip(threshold), threshold=(0.05, 0.5)),
    row("clip_schedule", "gradient", lambda _: clipjax.clip(lambda count: 0.05 * (1 + count))),
    row(
        "clip_random",
        "gradient",
        lambda _, threshold, p, key: clipjax.clip(threshold, select=selections.bernoulli(p, key=key)),
        threshold=(0.05, 0.5),
        p=(0.5, 0.9),
        key=KEY,
    ),
    row("clip_leaves", "gradient", lambda _, key: clipjax.clip(0.05, select=selections.leaves(0.5, key=key)), key=KEY),
    row("clip_largest", "gradient", lambda _: clipjax.clip(0.05, select=selections.largest(0.25))),
    row(
        "clip_norm",
        "gradient",
        lambda _, threshold, eps: clipjax.clip_norm(threshold, eps=eps),
        threshold=(0.1, 1.0),
        eps=(0.0, 1e-3),
    ),
    row(
        "clip_norm_leaf",
        "gradient",
        lambda _, threshold: clipjax.clip_norm(threshold, per="leaf"),
        threshold=(0.1, 1.0),
    ),
    row("clip_norm_schedule", "gradient", lambda _: clipjax.clip_norm(lambda count: 0.1 * (1 + count), ord=1)),
    ruled(
        "clip_norm_zscore",
        lambda z, decay, eps: thresholds.zscore(z, decay, warmup=1, eps=eps),
        z=(0.5, 1.5),
        decay=(0.5, 0.9),
        eps=(1e-6, 1e-2),
    ),
    ruled("clip_norm_zscore_mean", lambda z: thresholds.zscore(z, warmup=2, mode="mean"), z=(0.5, 1.5)),
    ruled("clip_norm_zscore_fixed", lambda z: thresholds.zscore(z, warmup=1, mode="percentile"), z=(0.5, 1.5)),
    ruled(
        "clip_norm_ema_ratio_leaf",
        lambda ratio, warmup: thresholds.ema_ratio(ratio, 0.5, warmup, warmup_max=0.2),
        leaf_norms,
        ratio=(1.05, 1.5),
        warmup=(1, 2),
    ),
    ruled("clip_norm_percentile", lambda q: thresholds.percentile(q, window=2), q=(25.0, 75.0)),
    ruled("clip_norm_percentile_leaf", lambda q: thresholds.percentile(q, window=4), leaf_norms, q=(25.0, 75.0)),
    ruled("clip_norm_mean_sigma", lambda k: thresholds.mean_sigma(k, window=2), k=(0.1, 1.0)),
    ruled(
        "clip_norm_quantile_track",
        lambda q, init, lr: thresholds.quantile_track(q, init, lr),
        q=(0.5, 0.9),
        init=(1.0, 0.1),
        lr=(0.2, 1.0),
    ),
    ruled("clip_norm_relative", lambda ratio: thresholds.relative(ratio), ratio=(0.1, 0.5)),
    ruled("clip_norm_relative_leaf", lambda ratio: thresholds.relative(ratio), leaf_norms, ratio=(0.1, 0.5)),
    ruled("clip_spam", lambda theta: thresholds.spam(theta, decay=0.5), clipjax.clip, theta=(1.5, 5000.0)),
    ruled("clip_spam_carry", lambda theta: thresholds.spam(theta, decay=0.5), element_carry, theta=(1.5, 5000.0)),
    row("clip_carry", "gradient", lambda _, threshold: clipjax.clip(threshold, carry=True), threshold=(0.05, 0.5)),
    row(
        "clip_norm_carry",
        "gradient",
        lambda _, threshold: clipjax.clip_norm(threshold, carry=True),
        threshold=(0.1, 1.0),
    ),
    row(
        "clip_norm_largest",
        "gradient",
        lambda _, threshold: clipjax.clip_norm(threshold, select=selections.largest(0.25)),
        threshold=(0.1, 1.0),
    ),
    row(
        "clip_norm_random",
        "gradient",
        lambda _, key: clipjax.clip_norm(0.1, select=selections.bernoulli(0.5, key=key)),
        key=KEY,
    ),
    row(
        "clip_norm_rms_leaf",
        "gradient",
        lambda _, threshold: clipjax.clip_norm(threshold, per="leaf", ord="rms"),
        threshold=(0.1, 1.0),
    ),
    row(
        "scale_to_norm",
        "gradient",
        lambda _, target, gamma: clipjax.scale_to_norm(target, gamma),
        target=(0.1, 1.0),
        gamma=(0.0, 0.5),
    ),
    row("scale_to_norm_leaf", "gradient", lambda _: clipjax.scale_to_norm(0.5, per="leaf")),
    row("skip_spikes", "around", lambda opt, threshold: clipjax.skip_spikes(opt, threshold), threshold=(10.0, 2.5)),
    row(
        "skip_spikes_zscore",
        "around",
        lambda opt, z: clipjax.skip_spikes(opt, thresholds.zscore(z, warmup=1)),
        z=(0.5, 2.5),
    ),
    row(
        "skip_spikes_relative",
        "around",
        lambda opt, ratio: clipjax.skip_spikes(opt, thresholds.relative(ratio), patience=2, reset_moments=True),
        ratio=(0.7, 0.3),
    ),
]
