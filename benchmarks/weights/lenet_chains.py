"""Every way to prune that lenet.py compares, each as one chain, and the settings that were tried for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from lenet_training import Course

import clipjax
from clipjax import scores
from clipjax.typing import Score

LIMIT, BOUND = 1e-3, 0.35  # D3's C and T
TARGET_DB = 15.0  # D4: the signal to noise that a chosen bit width must reach
LAST = 0.6  # the part of a training after which no mask changes any more


class Method(NamedTuple):
    """`chain(course, optimizer, **setting)` makes the chain; `tried` are the settings it was chosen among."""

    chain: Callable[..., optax.GradientTransformation]
    setting: dict[str, Any]
    tried: tuple[dict[str, Any], ...]


def build(course: Course, method: str, setting: dict[str, Any], limits: bool, bits: Any) -> Any:
    """A method's chain; with D3's two clippings, and quantized to some bits, or to "chosen" ones, as D4 asks."""
    optimizer = adam(course)
    if limits:
        optimizer = optax.chain(clipjax.clip(LIMIT), optimizer, clipjax.clamp_weights(BOUND))
    tx = METHODS[method].chain(course, optimizer, **setting)
    if bits is None:
        return tx
    widths = clipjax.widths.sqnr(TARGET_DB) if bits == "chosen" else bits
    start, stop = int(LAST * course.steps) + 1, int(0.9 * course.steps)
    return optax.chain(tx, clipjax.fake_quantize(widths, start=start, stop=stop))


def adam(course: Course, rate: float = 6e-3) -> optax.GradientTransformation:
    """The optimizer of every row: Adam, its rate decaying to 0 on a cosine."""
    return optax.adamw(optax.cosine_decay_schedule(rate, course.steps), weight_decay=0.05)


def gradual(course: Course, *, begin: float = 0.1, end: float = LAST, **options: Any) -> Any:
    """Zeros from none to the level on the cubic schedule of Zhu and Gupta, in 40 refreshes."""
    start, stop = int(begin * course.steps), int(end * course.steps)
    schedule = optax.polynomial_schedule(0.0, course.level, 3, stop - start)
    every = max(1, (stop - start) // 40)
    return clipjax.prune_mask(schedule, start=start, stop=stop, every=every, key=course.key, **options)


def by(score: Callable[..., Score]) -> Callable[..., optax.GradientTransformation]:
    """Gradual pruning by a score, behind the optimizer."""

    def chain(course: Course, optimizer: Any, decay: float | None = None, **pruning: Any) -> Any:
        values = score() if decay is None else score(decay)
        return clipjax.with_gradient(optax.chain(optimizer, gradual(course, score=values, **pruning)))

    return chain


def snip(course: Course, optimizer: Any, **pruning: Any) -> optax.GradientTransformation:
    """All zeros at step 0, by the sensitivity of the first loss, and never again."""
    score = scores.external(clipjax.snip(course.loss, course.params))
    return optax.chain(optimizer, clipjax.prune_mask(course.level, score=score, **pruning))


def rigl(course: Course, optimizer: Any, share: float, every: int, **pruning: Any) -> Any:
    """Sparse from step 0; refreshes exchange a share of what is kept, by gradient."""
    stop = int(LAST * course.steps)
    regrow = optax.cosine_decay_schedule(share, stop)
    return clipjax.prune_mask(course.level, every=every, stop=stop, regrow=regrow, inner=optimizer, **pruning)


def straight_through(course: Course, optimizer: Any, inside: bool, **pruning: Any) -> optax.GradientTransformation:
    """Gradual pruning whose float weights keep learning, so that a weight can come back."""
    if inside:
        return gradual(course, inner=optimizer, **pruning)
    return optax.chain(optimizer, gradual(course, **pruning))


def dense(course: Course, optimizer: Any) -> optax.GradientTransformation:
    return optimizer


def among(chain: Callable[..., Any], setting: dict[str, Any] | None = None, **choices: Any) -> Method:
    """A method whose setting was chosen among every combination of some choices; the first by default."""
    tried = tuple(dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
    setting = setting or tried[0]
    assert setting in tried, setting
    return Method(chain, setting, tried)


SCOPES = ("erk", "global")
DECAYS = (0.9, 0.99, 0.999, 0.9999)
METHODS = {
    "dense": among(dense),
    "random": among(by(scores.random), scope=SCOPES),
    "magnitude": among(by(scores.magnitude), scope=SCOPES),
    "relative magnitude": among(by(scores.relative_magnitude), scope=SCOPES),
    "gradient, one batch": among(by(scores.gradient), scope=SCOPES, decay=(0.0,)),
    "gradient, smoothed": among(by(scores.gradient), scope=SCOPES, decay=DECAYS),
    "Taylor": among(by(scores.taylor), scope=SCOPES, decay=DECAYS),
    "movement": among(
        by(scores.movement),
        {"scope": "erk", "carry": False, "decay": 0.9999},
        scope=SCOPES,
        carry=(False, True),
        decay=DECAYS,
    ),
    "SNIP": among(snip, scope=SCOPES),
    "RigL": among(
        rigl, {"scope": "global", "share": 0.5, "every": 50}, scope=SCOPES, share=(0.3, 0.5), every=(50, 200)
    ),
    "straight-through": among(straight_through, carry=(True,), scope=SCOPES, inside=(False, True)),
}
