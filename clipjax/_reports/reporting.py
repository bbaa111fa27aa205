"""Telemetry of every clipjax member inside any optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from clipjax._arrays import trees
from clipjax._gradients.clipping import ClipNormState, ClipState
from clipjax._gradients.skipping import SkipState
from clipjax._weights.clamping import ClampState
from clipjax._weights.projecting import ProjectState
from clipjax._weights.pruning import PruneState
from clipjax._weights.quantizing import QuantizeState

Entries = dict[str, jax.Array]


def report(opt_state: Any, per_leaf: bool = False) -> Entries:
    """Scalars that tell what the members do, for a progress bar, TensorBoard or a scan.

    Keys read `prune_mask/sparsity`, `clip_norm/norm_pre`; a second member of a kind is `prune_mask_1/…`. Members inside
    an `inner=` come before the one that owns them. Works in jit and scan.

    Args:
      opt_state: any optimizer state, boxed ones of `nnx.Optimizer` included.
      per_leaf: add an entry for each leaf: `prune_mask/sparsity/encoder/kernel`.

    Returns:
      dict of scalars; empty where the state holds no member of clipjax.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> tx = clipjax.prune_mask(0.5)
      >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> {key: float(x) for key, x in report(state).items()}
      {'prune_mask/sparsity': 0.5, 'prune_mask/removed': 1.0}
    """
    entries: Entries = {}
    seen: dict[str, int] = {}
    for kind, state in _members(opt_state):
        number = seen.get(kind, 0)
        seen[kind] = number + 1
        prefix = f"{kind}_{number}" if number else kind
        entries |= {f"{prefix}/{key}": value for key, value in _ENTRIES[kind](state, per_leaf).items()}
    return entries


def _members(opt_state: Any) -> Iterator[tuple[str, Any]]:
    """Every member's own state with its kind, in the order in which they act."""
    kinds = (ClipState, ClipNormState, SkipState, ProjectState)
    for found in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(found, ProjectState):
            yield from _members(found.inner)
            kind = _PROJECTIONS.get(type(found.projection), "project")
            state = found if kind == "project" else found.projection
            yield kind, jax.tree.map(jnp.asarray, state)
        elif isinstance(found, kinds):
            if isinstance(found, SkipState):
                yield from _members(found.inner)
                found = found._replace(inner=())
            yield _GRADIENT[type(found)], jax.tree.map(jnp.asarray, found)


_GRADIENT: dict[type, str] = {ClipState: "clip", ClipNormState: "clip_norm", SkipState: "skip_spikes"}


_PROJECTIONS: dict[type, str] = {
    ClampState: "clamp_weights",
    PruneState: "prune_mask",
    QuantizeState: "fake_quantize",
}


def _clip(state: ClipState, per_leaf: bool) -> Entries:
    return {"threshold": state.threshold}


def _clip_norm(state: ClipNormState, per_leaf: bool) -> Entries:
    values = {
        "norm_pre": state.norm_pre,
        "threshold": state.threshold,
        "coefficient": state.coefficient,
        "norm_post": state.norm_pre * state.coefficient,
    }
    entries = {key: value if value.ndim == 0 else value.mean() for key, value in values.items()}
    if per_leaf:
        wide = {key: value for key, value in values.items() if value.ndim}
        entries |= {f"{key}/{i}": x for key, value in wide.items() for i, x in enumerate(value)}
    share = state.clipped / jnp.maximum(state.count, 1)
    return entries | {"clipped": state.clipped, "fraction_clipped": share, "nonfinite": state.nonfinite}


def _skip(state: SkipState, per_leaf: bool) -> Entries:
    share = state.skipped / jnp.maximum(state.count, 1)
    entries = {"norm_pre": state.norm_pre, "threshold": state.threshold, "skipped": state.skipped}
    return entries | {"fraction_skipped": share, "nonfinite": state.nonfinite}


def _clamp(state: ClampState, per_leaf: bool) -> Entries:
    return {"low": state.bound[0], "high": state.bound[1]}


def _prune(state: PruneState, per_leaf: bool) -> Entries:
    """Of weights, or of units where they are what is removed."""
    masks = [(path, m) for path, m in trees.governed(state.mask) if m.dtype == bool]
    removed = [jnp.sum(~m, dtype=jnp.float32) for _, m in masks]
    total = sum(m.size for _, m in masks)
    gone = sum(removed, jnp.zeros(()))
    entries = {"sparsity": gone / float(max(total, 1)), "removed": gone}
    if per_leaf:
        entries |= {f"sparsity/{path}": r / float(m.size) for (path, m), r in zip(masks, removed, strict=True)}
    return entries


def _quantize(state: QuantizeState, per_leaf: bool) -> Entries:
    bits = {path: b.astype(jnp.float32) for path, b in trees.governed(_leaves(state.bits))}
    steps = {path: s.mean() for path, s in trees.governed(_leaves(state.step))}
    count = max(len(bits), 1)
    entries = {
        "bits": sum(bits.values(), jnp.zeros(())) / count,
        "step": sum(steps.values(), jnp.zeros(())) / count,
    }
    if per_leaf:
        entries |= {f"bits/{path}": b for path, b in bits.items()}
        entries |= {f"step/{path}": s for path, s in steps.items()}
    return entries


def _leaves(by_path: Any) -> Any:
    """The entries of a dict of paths; nothing where a member governs nothing."""
    return by_path if isinstance(by_path, dict) else {}


def _project(state: ProjectState, per_leaf: bool) -> Entries:
    return {"count": state.count}


_ENTRIES: dict[str, Any] = {
    "clip": _clip,
    "clip_norm": _clip_norm,
    "skip_spikes": _skip,
    "clamp_weights": _clamp,
    "prune_mask": _prune,
    "fake_quantize": _quantize,
    "project": _project,
}
