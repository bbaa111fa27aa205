"""What plots show, as NumPy arrays: the leaves that are drawn, their grids and latent weights, norms by update."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from clipjax._arrays import arguments, picked_leaves, trees
from clipjax._maths import split_axes, step_groups
from clipjax._weights import checking, leaf_grid, quantize_state
from clipjax._weights.quantize_state import QuantizeState
from clipjax.typing import Number, State, Tree, Where

Report: TypeAlias = Mapping[str, Number | np.ndarray]
"""Metrics by key, as `report` returns them."""


def picked(params: Tree, where: Where | None) -> dict[str, Any]:
    """The leaves to draw by path: by default those of rank >= 2 that are no biases and no scales."""
    picks = picked_leaves.pick(picked_leaves.resolve(where, picked_leaves.weights), params)
    found = dict(trees.governed(picked_leaves.restrict(params, picks)))
    remedy = "The default is float arrays of rank >= 2 with entries: pass `where=lambda path, leaf: True` for all."
    arguments.require(found, "where", "pick a leaf", trees.paths(params)[:8], remedy)
    return found


def alike(tree: Tree, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree at the paths of others, of the same shapes."""
    found = dict(trees.governed(tree))
    for path, leaf in leaves.items():
        have = np.shape(found[path]) if path in found else None
        remedy = f"It must have the leaves that are drawn, and {path!r} has the shape {leaf.shape}."
        arguments.require(have == leaf.shape, "before", f"have {path!r} in its shape", have, remedy)
    return found


def numbers(leaf: Any) -> np.ndarray:
    """The entries of a leaf, f64, in which histograms of tiny and of huge weights have bins."""
    return np.asarray(leaf).astype(np.float64)


def latent(params: Tree, opt_state: State) -> dict[str, Any]:
    """The latent weights behind grids and formats by path; checks that the state belongs to the params."""
    found: dict[str, Any] = {}
    for state in checking.states(opt_state):
        if isinstance(state.projection, QuantizeState):
            trees.check_named(quantize_state.paths(state.projection), params)
            found |= dict(trees.governed(state.carry))
    return found


class DrawnGrid(NamedTuple):
    """The grid of a leaf.

    Attributes:
      step: f64, what the leaf is divided by: a scalar, or an array that broadcasts to it.
      levels: f64, in steps, rising.
    """

    step: np.ndarray
    levels: np.ndarray


def grid(opt_state: State, path: str, leaf: Any) -> DrawnGrid | None:
    """The grid of one leaf; None where the state has none or none yet, and for a format."""
    for state in trees.find(opt_state, QuantizeState):
        if path not in quantize_state.paths(state) or not quantize_state.fitted(state):
            continue
        if quantize_state.leaf_scales(state, path) is not None:
            return None
        own = leaf_grid.at(state, path)
        leaf_step = split_axes.spread(step_groups.per_block(own.step, leaf.shape), leaf.shape)
        step, bits = np.asarray(leaf_step, np.float64), int(own.bits)
        step = step.reshape(()) if step.size == 1 else step
        if not bits:  # unbounded codes: those that occur
            return DrawnGrid(step, np.unique(codes(numbers(leaf), step)))
        levels = np.arange(np.min(own.low), np.max(own.high) + 1, dtype=np.float64)
        return DrawnGrid(step, levels[levels != 0] if bits == 1 else levels)
    return None


def codes(w: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The multiples of a step to which finite weights are nearest."""
    quotients = w / step
    return np.rint(quotients[np.isfinite(quotients)])


_NORM = re.compile(r"((?:clip_norm|skip_spikes)(?:_\d+)?)/norm_pre(/.*)?")


def norms(history: Report | Sequence[Report]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Norms and thresholds f64[n] by the name of the transformation, followed by that of the leaf if they are apart."""
    if not isinstance(history, Mapping):
        several = jax.device_get(list(history))
        history = {key: np.array([report[key] for report in several]) for key in (several[0] if several else {})}
    keys = [found for key in history if (found := _NORM.fullmatch(key))]
    apart = {found[1] for found in keys if found[2]}
    kept = [found for found in keys if found[2] or found[1] not in apart]
    remedy = "Give the reports of a chain with `clip_norm` or `skip_spikes`; `clip_norm(math.inf)` clips nothing."
    arguments.require(kept, "history", "have norms", sorted(history)[:8], remedy)
    return {key[1] + (key[2] or ""): _run(history, *key.groups(default="")) for key in kept}


def _run(history: Report, name: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Norm and threshold of one transformation, NaN where there was no gradient."""
    pair = (history[f"{name}/{field}{path}"] for field in ("norm_pre", "threshold"))
    norm, threshold = (np.array(jax.device_get(x), np.float64) for x in pair)
    remedy = "Give a report of each update, of one run: `jax.tree.map(lambda x: x[0], history)` takes the first."
    fits = norm.ndim == 1 and norm.size and norm.shape == threshold.shape
    arguments.require(fits, "history", f"have a `{name}/norm_pre{path}` of shape [updates]", norm.shape, remedy)
    norm[norm < 0] = np.nan
    return norm, threshold
