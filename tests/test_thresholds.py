"""Rules against their published code: thresholds on hand-made histories of norms, run in every way that JAX runs them.

The references are plain Python floats, one function for each source. They return the threshold that every norm of a
history was held against, infinite where nothing can be clipped.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipjax
from clipjax import thresholds

pytestmark = pytest.mark.usefixtures("strict")


def zclip(norms, z=2.5, decay=0.97, warmup=25, eps=1e-6, mode="adaptive"):
    """Kumar et al., 2025, arXiv 2504.02507, `zclip.py`, without its `max_grad_norm`."""
    buffer, out, mean, var = [], [], None, None
    for n in norms:
        if mean is None:
            buffer.append(n)
            if len(buffer) == warmup:
                mean = sum(buffer) / len(buffer)
                var = sum((x - mean) ** 2 for x in buffer) / len(buffer)
            out.append(math.inf)
            continue
        std, score = var**0.5, (n - mean) / (var**0.5 + eps)
        limit = math.inf
        if mode == "percentile":
            limit = mean + z * std
        elif score > z:
            limit = mean if mode == "mean" else mean + z * std / (score / z)
        clipped = min(n, limit)
        mean = decay * mean + (1 - decay) * clipped
        var = decay * var + (1 - decay) * (clipped - mean) ** 2  # against the new mean
        out.append(limit)
    return out


def adagc(norms, ratio=1.05, decay=0.98, warmup=100, warmup_max=1.0):
    """Wang et al., 2025, arXiv 2502.11034, algorithm 1, one leaf."""
    out, gamma = [], math.inf
    for i, n in enumerate(norms):
        limit = warmup_max if i < warmup else ratio * gamma
        clipped = min(n, limit)
        gamma = min(gamma, clipped) if i < warmup else decay * gamma + (1 - decay) * clipped
        out.append(limit)
    return out


def autoclip(norms, q=10.0, window=1000):
    """Seetharaman et al., 2020, arXiv 2007.14469, `autoclip.py`, with a window: appended first, then the percentile."""
    return [float(np.percentile(norms[max(0, i + 1 - window) : i + 1], q)) for i in range(len(norms))]


def levanter(norms, k=3.0, window=128):
    """Levanter, `levanter/optim/skipstep.py`: past norms alone, here from a full window on and of its length."""
    past = [norms[i - window : i] for i in range(len(norms))]
    return [math.inf if i < window else np.mean(past[i]) + k * np.std(past[i]) for i in range(len(norms))]


def andrew(norms, q, init=1.0, lr=0.2):
    """Andrew et al., 2021, arXiv 1905.03871, section 2, without noise and with one client."""
    out, limit = [], init
    for n in norms:
        out.append(limit)
        limit *= math.exp(-lr * ((1.0 if n <= limit else 0.0) - q))
    return out


def spam(norms, theta=5000.0, decay=0.999):
    """Huang et al., 2025, arXiv 2501.06842, `SPAM.py`, from its first step on; v = 0 clips nothing there too."""
    out, v = [], 0.0
    for n in norms:
        limit = math.sqrt(theta * v)
        clipped = min(n, limit) if v > 0 else n
        v = decay * v + (1 - decay) * clipped**2
        out.append(limit)
    return out


RULES = {
    "zscore": (thresholds.zscore, zclip, {"z": 1.75, "decay": 0.9, "warmup": 6}),
    "zscore_mean": (thresholds.zscore, zclip, {"z": 1.75, "decay": 0.9, "warmup": 6, "mode": "mean"}),
    "zscore_percentile": (thresholds.zscore, zclip, {"z": 1.0, "decay": 0.8, "warmup": 3, "mode": "percentile"}),
    "zscore_one_norm": (thresholds.zscore, zclip, {"z": 0.5, "decay": 0.5, "warmup": 1, "eps": 0.5}),
    "ema_ratio": (thresholds.ema_ratio, adagc, {"ratio": 1.25, "decay": 0.75, "warmup": 5, "warmup_max": 2.0}),
    "ema_ratio_free": (thresholds.ema_ratio, adagc, {"ratio": 0.9, "decay": 0.5, "warmup": 1, "warmup_max": math.inf}),
    "percentile": (thresholds.percentile, autoclip, {"q": 62.5, "window": 12}),
    "percentile_one_norm": (thresholds.percentile, autoclip, {"q": 10.0, "window": 1}),
    "percentile_unfilled": (thresholds.percentile, autoclip, {"q": 30.0, "window": 64}),
    "mean_sigma": (thresholds.mean_sigma, levanter, {"k": 2.0, "window": 8}),
    "mean_sigma_one_norm": (thresholds.mean_sigma, levanter, {"k": 2.0, "window": 1}),
    "quantile_track": (thresholds.quantile_track, andrew, {"q": 0.75, "init": 3.0, "lr": 0.25}),
    "spam": (thresholds.spam, spam, {"theta": 6.0, "decay": 0.8}),
}
DEFAULTS = {
    "zscore": (thresholds.zscore, zclip, {}),
    "zscore_mean": (thresholds.zscore, zclip, {"mode": "mean"}),
    "zscore_percentile": (thresholds.zscore, zclip, {"mode": "percentile"}),
    "ema_ratio": (thresholds.ema_ratio, adagc, {}),
    "percentile": (thresholds.percentile, autoclip, {"q": 10.0, "window": 100}),
    "mean_sigma": (thresholds.mean_sigma, levanter, {}),
    "quantile_track": (thresholds.quantile_track, andrew, {"q": 0.9}),
    "spam": (thresholds.spam, spam, {"theta": 50.0}),
}

RNG = np.random.default_rng(3)


def noisy(length, *spikes):
    norms = np.exp(RNG.normal(size=length) * 0.4)
    norms[list(spikes)] *= 30.0
    return norms


HISTORIES = {
    "noisy": noisy(40),
    "spikes": noisy(40, 0, 9, 20, 21, 22, 39),
    "plateaus": np.repeat([2.0, 2.5, 0.5, 8.0], 10),
    "falling": 5.0 * 0.9 ** np.arange(40),
    "two_values": np.tile([1.0, 1.0, 3.0, 1.0], 10),
    "scales": noisy(40) * 10.0 ** np.tile([0, 3, -3, 6, -6], 8),
    "far": noisy(40, 11) * 1e12,
    "near_zero": noisy(40, 11) * 1e-12,
}
LONG = {
    "noisy": noisy(300),
    "spikes": noisy(300, 3, 40, 130, 131, 299),
    "warming": np.linspace(0.1, 4.0, 300) * noisy(300, 200),
    "still": np.full(300, 0.7),
}


def eager(update, state, norms):
    out = []
    for norm in norms:
        limit, state = update(norm, state)
        out.append(limit)
    return jnp.stack(out)


def scanned(rule, norms):
    def step(state, norm):
        limit, state = rule.update(norm, state)
        return state, limit

    return jax.lax.scan(step, rule.init(), norms)[1]


def run(rule, histories, how):
    """The thresholds of several histories, f64[histories, norms]."""
    if how == "vmap":
        return np.asarray(jax.jit(jax.vmap(functools.partial(scanned, rule)))(jnp.stack(histories)), np.float64)
    one = {
        "eager": lambda norms: eager(rule.update, rule.init(), norms),
        "jit": functools.partial(eager, jax.jit(rule.update), rule.init()),
        "scan": jax.jit(functools.partial(scanned, rule)),
    }[how]
    return np.stack([np.asarray(one(norms), np.float64) for norms in histories])


def compare(case, histories, how):
    factory, reference, numbers = case
    if how == "eager":
        histories = {name: histories[name] for name in ("spikes", "plateaus")}
    norms = [np.asarray(h, np.float32) for h in histories.values()]
    got = run(factory(**numbers), [jnp.asarray(x) for x in norms], how)
    for name, x, limits in zip(histories, norms, got, strict=True):
        expected = reference([float(n) for n in x], **numbers)
        # 300 steps of quantile_track add up an f32 learning rate
        rtol = 3e-6 if factory is thresholds.quantile_track and len(x) > 100 else 1e-6
        np.testing.assert_allclose(limits, expected, rtol=rtol, err_msg=f"{name}, {how}")


@pytest.mark.parametrize("how", ["eager", "jit", "scan", "vmap"])
@pytest.mark.parametrize("name", RULES)
def test_thresholds_are_those_of_the_published_code(name, how):
    compare(RULES[name], HISTORIES, how)


@pytest.mark.parametrize("how", ["scan", "vmap"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_thresholds_of_300_norms_with_the_defaults(name, how):
    compare(DEFAULTS[name], LONG, how)


# Worked by hand.
INF, RISING = math.inf, [1, 3, 6, 2.5, 10]
EXAMPLES = {
    # μ = 2, σ = 1 | ζ = 4: 2 + 2²/4 | μ = 2.5, σ² = .625 | σ² = .3125: 2.5 + 4 · .3125 / 7.5
    "zscore": (thresholds.zscore(2.0, 0.5, 2, 0.0), RISING, [INF, INF, 3, INF, 8 / 3]),
    "zscore_mean": (thresholds.zscore(2.0, 0.5, 2, 0.0, "mean"), RISING, [INF, INF, 2, INF, 2.25]),
    # μ + 2σ: 2 + 2 | 3 + 2 | 2.75 + 2 √.53125
    "zscore_percentile": (thresholds.zscore(2.0, 0.5, 2, 0.0, "percentile"), RISING, [INF, INF, 4, 5, 4.20773794]),
    # γ = 1 | .5 | (.5 + .75) / 2 | (.625 + .25) / 2
    "ema_ratio": (thresholds.ema_ratio(1.5, 0.5, 2), [4, 0.5, 2, 0.25, 1], [1, 1, 0.75, 0.9375, 0.65625]),
    "percentile": (thresholds.percentile(25.0, 3), [1, 2, 9, 4], [1, 1.25, 1.5, 3]),
    "mean_sigma": (thresholds.mean_sigma(2.0, 2), [1, 3, 9, 5], [INF, INF, 4, 12]),
    # a norm equal to C counts as unclipped
    "quantile_track": (thresholds.quantile_track(0.5, 1.0, math.log(4)), [3, 1, 1, 9], [1, 2, 1, 0.5]),
    "spam": (thresholds.spam(4.0, 0.75), [2, 1, 5, 0], [0, 2, 2, math.sqrt(7)]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example(name):
    rule, norms, expected = EXAMPLES[name]
    np.testing.assert_allclose(run(rule, [jnp.asarray(norms, jnp.float32)], "scan")[0], expected, rtol=1e-6)


@functools.cache
def percentile_of_twelve(window):
    return jax.jit(lambda q, norms: scanned(thresholds.percentile(q, window), norms))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 5, 12]),
    st.sampled_from([0.0, 10.0, 33.0, 50.0, 97.5, 100.0]),
    st.lists(st.sampled_from([0.25, 1.0, 2.0, 3.0, 1e6, 3e38]), min_size=12, max_size=12),
)
def test_percentile_with_ties_at_any_window_is_numpys(window, q, norms):
    got = percentile_of_twelve(window)(jnp.float32(q), jnp.asarray(norms, jnp.float32))
    kept = [float(np.float32(n)) for n in norms]
    np.testing.assert_allclose(np.asarray(got, np.float64), autoclip(kept, q, window), rtol=1e-6)


def test_percentile_100_never_clips_and_0_gives_the_smallest():
    norms = jnp.asarray(LONG["spikes"], jnp.float32)
    assert (run(thresholds.percentile(100.0, 7), [norms], "scan")[0] >= np.asarray(norms)).all()
    lowest = [norms[max(0, i - 6) : i + 1].min() for i in range(300)]
    np.testing.assert_array_equal(run(thresholds.percentile(0.0, 7), [norms], "scan")[0], lowest)


@pytest.mark.parametrize("mode", ["adaptive", "mean", "percentile"])
@pytest.mark.parametrize("value", [1.0, 0.1, 100.1, 3e-7])
def test_zscore_plateau_holds_no_norm_below_itself(value, mode):
    """1000 equal norms: rounding of the average must not look like an outlier."""
    limits = run(thresholds.zscore(mode=mode), [jnp.full(1000, value, jnp.float32)], "scan")[0]
    assert (limits >= np.float32(value) * (1 - 3e-7)).all()


@pytest.mark.parametrize("name", DEFAULTS)
def test_huge_finite_norm_spoils_no_history(name):
    """1e25 is a float, its square is not: 200 norms later the thresholds are those of the published code."""
    factory, reference, numbers = DEFAULTS[name]
    norms = np.concatenate([[1.0, 2.0, 1e25], LONG["noisy"], [1e25]]).astype(np.float32)
    expected = reference([float(n) for n in norms], **numbers)
    got = run(factory(**numbers), [jnp.asarray(norms)], "scan")[0]
    np.testing.assert_allclose(got[200:], expected[200:], rtol=1e-5)


# Arguments.
BAD = [
    (thresholds.zscore, {"z": 0.0}, "`z` must be a number > 0, got 0.0. .*2.5 is usual"),
    (thresholds.zscore, {"z": math.nan}, "`z` must be a number > 0, got nan. .*2.5 is usual"),
    (thresholds.zscore, {"decay": 1.0}, r"`decay` must lie in \[0, 1\), got 1.0. .*0.97"),
    (thresholds.zscore, {"warmup": 0}, "`warmup` must be a whole number >= 1, got 0. The first mean needs a norm"),
    (thresholds.zscore, {"warmup": 2.5}, "`warmup` must be a whole number >= 1, got 2.5. The first"),
    (thresholds.zscore, {"eps": -1e-6}, "`eps` must be a number >= 0, got -1e-06. It is added"),
    (thresholds.zscore, {"mode": "median"}, "`mode` must be one of 'adaptive', 'mean', 'percentile', got 'median'"),
    (thresholds.ema_ratio, {"ratio": -1.0}, "`ratio` must be a number > 0, got -1.0. .*1.05 is usual"),
    (thresholds.ema_ratio, {"decay": 2.0}, r"`decay` must lie in \[0, 1\), got 2.0. .*0.98"),
    (thresholds.ema_ratio, {"warmup": 0}, "`warmup` must be a whole number >= 1, got 0. The average starts"),
    (thresholds.ema_ratio, {"warmup_max": 0}, "`warmup_max` must be a number > 0, got 0. .*math.inf"),
    (thresholds.percentile, {"q": 101}, r"`q` must lie in \[0, 100\], got 101. AutoClip uses 10"),
    (thresholds.percentile, {"q": math.nan}, r"`q` must lie in \[0, 100\], got nan. AutoClip uses 10"),
    (thresholds.percentile, {"window": 0}, "`window` must be a whole number >= 1, got 0. .*norms to remember"),
    (thresholds.mean_sigma, {"k": -1}, "`k` must be a number >= 0, got -1. It counts"),
    (thresholds.mean_sigma, {"window": 1.5}, "`window` must be a whole number >= 1, got 1.5. .*norms to remember"),
    (thresholds.quantile_track, {"q": 1.5}, r"`q` must lie in \[0, 1\], got 1.5. It is the fraction"),
    (thresholds.quantile_track, {"q": 0.5, "init": 0.0}, "`init` must be a number > 0, got 0.0. .*first threshold"),
    (thresholds.quantile_track, {"q": 0.5, "lr": -1.0}, "`lr` must be a number > 0, got -1.0. .*0.2 is usual"),
    (thresholds.spam, {"theta": 0}, "`theta` must be a number > 0, got 0. .*5000"),
    (thresholds.spam, {"decay": 1}, r"`decay` must lie in \[0, 1\), got 1. .*0.999"),
]


@pytest.mark.parametrize(("factory", "numbers", "message"), BAD)
def test_bad_number_raises_with_its_name_and_a_remedy(factory, numbers, message):
    with pytest.raises(ValueError, match=message):
        factory(**numbers)


NUMBERS = [(factory, name) for factory, _, numbers in RULES.values() for name in numbers]
NUMBERS = sorted({pair for pair in NUMBERS if pair[1] not in ("mode", "window")}, key=str)


@pytest.mark.parametrize("bad", ["high", None, lambda count: 2.0], ids=["string", "none", "schedule"])
def test_what_is_no_number_raises_in_the_factory(bad):
    """Rule 9: what needs only arguments is checked before the first update."""
    accepted = []
    for factory, name in NUMBERS:
        try:
            factory(**{"q": 0.5} | {name: bad} if factory is thresholds.quantile_track else {name: bad})
            accepted.append(f"{factory.__name__}({name}=...)")
        except TypeError as error:
            assert f"`{name}` must be a number" in str(error)
    assert not accepted


@pytest.mark.parametrize("factory", [thresholds.percentile, thresholds.mean_sigma])
def test_window_is_static_and_three_whole_norms_are_three(factory):
    with pytest.raises(TypeError, match=r"`window` must be .*inject_hyperparams\(.*static_args=\('window',\)"):
        jax.eval_shape(lambda w: factory(window=w) and w, jnp.int32(3))
    jax.tree.map(np.testing.assert_array_equal, factory(window=3.0).init(), factory(window=3).init())


# A rule of the user's own.


def doubling():
    """At most twice the largest norm so far; the first one passes."""

    def update(norm, largest):
        limit = 2 * largest
        return limit, jnp.maximum(largest, jnp.where(limit > 0, jnp.minimum(norm, limit), norm))

    return clipjax.Rule(lambda: jnp.zeros(()), update)


@pytest.mark.parametrize("per", ["global", "leaf"])
def test_rule_written_by_a_user_works_in_clip_norm(per):
    tx = clipjax.clip_norm(doubling(), per=per)
    grads = {"a": np.float32([3, 4]), "b": np.float32([12.0])}
    state, largest = tx.init(grads), {}
    for scale in (1.0, 1.5, 5.0, 0.25, 100.0):
        now = jax.tree.map(lambda g, s=scale: g * np.float32(s), grads) | {"b": grads["b"] * np.float32(scale**2)}
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.asarray, now), state)
        for group in ["ab"] if per == "global" else ["a", "b"]:
            norm = math.sqrt(sum(float(np.sum(np.float64(now[k]) ** 2)) for k in group))
            clipped = min(norm, 2 * largest.get(group, math.inf))
            largest[group] = max(largest.get(group, 0.0), clipped)
            for k in group:
                np.testing.assert_allclose(updates[k], now[k] * np.float32(clipped / norm), rtol=1e-6)
