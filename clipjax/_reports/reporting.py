"""Metrics of every clipjax transformation inside any optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from clipjax._arrays import trees
from clipjax._gradients import threshold_state
from clipjax._gradients.clipping import ClipState
from clipjax._gradients.norm_clipping import ClipNormState
from clipjax._gradients.scaling_to_norm import ScaleState
from clipjax._gradients.skipping import SkipState
from clipjax._weights import quantize_state
from clipjax._weights.clamping import ClampState
from clipjax._weights.logit_clipping import ClipLogitsState
from clipjax._weights.projecting import ProjectState
from clipjax._weights.quantize_state import QuantizeState, RateState
from clipjax._weights.zeros import PruneState
from clipjax.typing import State

Metrics: TypeAlias = dict[str, jax.Array]


def report(opt_state: State, per_leaf: bool = False) -> Metrics:
    """Returns scalar metrics from every clipjax transformation in the state, for TensorBoard or a progress bar.

    A key has the name of the transformation and that of the metric: `prune_mask/sparsity`, `clip_norm/norm_pre`. A
    second transformation of the same name is `prune_mask_1/…`. Transformations in an `inner=` come before the one
    around them. `report` works in jit and scan. It reads the state alone: a sparsity is that of the mask, bits and step
    are those of the grid, `format_bits` those of formats with their scales, 0 before there is one. Whether the params
    keep to them is what `check` finds out. With `roundings.rate` there are its λ (`lam`) and, as of the last refresh,
    `bytes`, an estimate of what `save` makes of the params, and by leaf the `rate`, bits of a code on average, and the
    `distortion`, the mean squared error of a weight.

    Args:
      opt_state: any optimizer state, that of an `nnx.Optimizer` included.
      per_leaf: add metrics for each leaf: `prune_mask/sparsity/encoder/kernel`.

    Returns:
      A dict of scalars; empty where the state has no clipjax transformation.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> tx = clipjax.prune_mask(0.5)
      >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> {key: float(x) for key, x in report(state).items()}
      {'prune_mask/sparsity': 0.5, 'prune_mask/removed': 1.0}
    """
    metrics: Metrics = {}
    times: dict[str, int] = {}
    for state in _states(opt_state):
        name, measure = _KINDS[type(state)]
        number = times.get(name, 0)
        times[name] = number + 1
        prefix = f"{name}_{number}" if number else name
        metrics |= {f"{prefix}/{key}": value for key, value in measure(state, per_leaf).items()}
    return metrics


def _states(opt_state: State) -> Iterator[State]:
    """The state of every clipjax transformation, in the order in which they act: those inside another one first."""
    outer = (ClipState, ClipNormState, ScaleState, SkipState, ClipLogitsState, ProjectState)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, outer)):
        if not isinstance(state, outer):
            continue
        if isinstance(state, SkipState | ProjectState):
            yield from _states(state.inner)
            state = state._replace(inner=())
        if isinstance(state, ProjectState) and type(state.projection) in _KINDS:
            state = state.projection  # what `clamp_weights`, `prune_mask` and `fake_quantize` give to `project`
        yield trees.unboxed(state)


def _clip(state: ClipState, per_leaf: bool) -> Metrics:
    """The threshold, NaN for a rule, which has one for every entry."""
    return {"threshold": jnp.where(state.threshold < 0, jnp.nan, _threshold(state.threshold))}


def _threshold(threshold: jax.Array) -> jax.Array:
    """What a state records, infinite where nothing is clipped."""
    return jnp.where(threshold_state.unlimited(threshold), jnp.inf, threshold)


def _clip_norm(state: ClipNormState, per_leaf: bool) -> Metrics:
    """With per="leaf" the means over the leaves that had a gradient; NaN for a leaf that had none."""
    values = {
        "norm_pre": state.norm_pre,
        "threshold": _threshold(state.threshold),
        "coefficient": state.coefficient,
        "norm_post": state.norm_pre * state.coefficient,
    }
    metrics = _of_norms(state, values, per_leaf)
    fraction = state.clipped / jnp.maximum(state.count, 1)
    return metrics | {"clipped": state.clipped, "fraction_clipped": fraction, "nonfinite": state.nonfinite}


def _scale(state: ScaleState, per_leaf: bool) -> Metrics:
    """As `_clip_norm`."""
    values = {"norm_pre": state.norm_pre, "coefficient": state.coefficient}
    return _of_norms(state, values, per_leaf) | {"nonfinite": state.nonfinite}


def _of_norms(state: ClipNormState | ScaleState, values: Metrics, per_leaf: bool) -> Metrics:
    given = ~(state.norm_pre < 0)
    count = jnp.maximum(jnp.sum(given), 1)
    metrics = {
        key: value if value.ndim == 0 else jnp.sum(jnp.where(given, value, 0)) / count.astype(value.dtype)
        for key, value in values.items()
    }
    if per_leaf and isinstance(state.place, dict):
        paths = [path for path, _ in trees.governed(state.place)]
        for key, value in values.items():
            metrics |= {f"{key}/{path}": x for path, x in zip(paths, jnp.where(given, value, jnp.nan), strict=True)}
    return metrics


def _skip(state: SkipState, per_leaf: bool) -> Metrics:
    fraction = state.skipped / jnp.maximum(state.count, 1)
    metrics = {"norm_pre": state.norm_pre, "threshold": _threshold(state.threshold), "skipped": state.skipped}
    metrics |= {"fraction_skipped": fraction, "nonfinite": state.nonfinite}
    return metrics if isinstance(state.streak, tuple) else metrics | {"streak": state.streak, "stalled": state.stalled}


def _logits(state: ClipLogitsState, per_leaf: bool) -> Metrics:
    return {key: getattr(state, key) for key in ("max_logit", "threshold", "clipped", "nonfinite")}


def _clamp(state: ClampState, per_leaf: bool) -> Metrics:
    """The interval, infinite where nothing is limited; NaN before the first update and where it differs by leaf."""
    low, high = state.bound
    known = low <= high
    low, high = -_threshold(-low), _threshold(high)
    return {"low": jnp.where(known, low, jnp.nan), "high": jnp.where(known, high, jnp.nan)}


def _prune(state: PruneState, per_leaf: bool) -> Metrics:
    """Of the mask, in weights, or in units where units are removed."""
    masks = [(path, m) for path, m in trees.governed(state.mask) if m.dtype == bool]
    removed = [jnp.sum(~m, dtype=jnp.float32) for _, m in masks]
    size = sum(m.size for _, m in masks)
    total = sum(removed, jnp.zeros(()))
    metrics = {"sparsity": total / float(max(size, 1)), "removed": total}
    if per_leaf:
        metrics |= {f"sparsity/{path}": r / float(m.size) for (path, m), r in zip(masks, removed, strict=True)}
    return metrics


def _quantize(state: QuantizeState, per_leaf: bool) -> Metrics:
    """The mean over the leaves, each of which counts once; 0 before the first refresh.

    Leaves on a grid have `bits` and `step`, those on a format `format_bits`, of a weight and its share of the scales.
    """
    fitted = quantize_state.fitted(state)
    bits = {path: jnp.where(fitted, b, 0).astype(jnp.float32) for path, b in _by_path(state.bits).items()}
    formed = {path: bits.pop(path) for path in _by_path(state.format)}
    steps = {path: jnp.where(fitted, s.mean(), 0) for path, s in _by_path(state.step).items()}
    kinds = {"bits": bits, "step": steps} if steps or not formed else {}
    kinds |= {"format_bits": formed} if formed else {}
    metrics = {key: sum(of.values(), jnp.zeros(())) / max(len(of), 1) for key, of in kinds.items()}
    if per_leaf:
        metrics |= {f"format_bits/{path}": b for path, b in formed.items()}
        metrics |= {f"bits/{path}": b for path, b in bits.items()}
        metrics |= {f"step/{path}": s for path, s in steps.items()}
    return metrics | (_rate(state.rate, per_leaf) if isinstance(state.rate, RateState) else {})


def _rate(state: RateState, per_leaf: bool) -> Metrics:
    """Of `roundings.rate`, as of the last refresh."""
    metrics = {"lam": state.lam, "bytes": state.bytes}
    if per_leaf:
        metrics |= {f"rate/{path}": x for path, x in _by_path(state.bits).items()}
        metrics |= {f"distortion/{path}": x for path, x in _by_path(state.error).items()}
    return metrics


def _by_path(field: object) -> dict[str, jax.Array]:
    """A field of a `QuantizeState`, which is a lone array where no leaf is quantized."""
    return dict(trees.governed(field)) if isinstance(field, dict) else {}


def _project(state: ProjectState, per_leaf: bool) -> Metrics:
    return {"count": state.count}


_KINDS: dict[type, tuple[str, Callable[[Any, bool], Metrics]]] = {
    ClipState: ("clip", _clip),
    ClipNormState: ("clip_norm", _clip_norm),
    ScaleState: ("scale_to_norm", _scale),
    ClipLogitsState: ("clip_logits", _logits),
    SkipState: ("skip_spikes", _skip),
    ClampState: ("clamp_weights", _clamp),
    PruneState: ("prune_mask", _prune),
    QuantizeState: ("fake_quantize", _quantize),
    ProjectState: ("project", _project),
}
