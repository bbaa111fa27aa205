"""The chains of claims.py: transformations alone and merged, thresholds, and a mask that sorts as others do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lenet_chains as chains
import optax
from jax.flatten_util import ravel_pytree
from lenet_training import Course

import clipjax
from clipjax import structures

Chain = Callable[[Course], Any]

# What each transformation does alone, and the mergers (D1, D3, D4).

MEMBERS = ("clip", "clamp", "prune", "quantize")
ROWS = (
    "dense",
    *MEMBERS,
    *("clip + clamp", "clip + quantize", "clamp + quantize", "prune + quantize"),
    *("clip + clamp + quantize", "clip + clamp + prune + quantize"),
)
SPARSITY, BITS = 0.9, 4


@functools.cache
def merger(row: str) -> Chain:
    def chain(course: Course) -> Any:
        transformations = {
            "clip": clipjax.clip(chains.LIMIT),
            "optimizer": chains.adam(course),
            "clamp": clipjax.clamp_weights(chains.BOUND),
            "prune": chains.gradual(course),
            "quantize": clipjax.fake_quantize(BITS, start=int(0.6 * course.steps) + 1, stop=int(0.9 * course.steps)),
        }
        return optax.chain(*(tx for name, tx in transformations.items() if name == "optimizer" or name in row))

    return chain


# Thresholds from loose to strangling (D3).


class Sweep(NamedTuple):
    """One transformation's thresholds, and the chain around an optimizer; the threshold is the course's `level`."""

    limits: tuple[float, ...]
    chain: Chain


def sgd(course: Course) -> optax.GradientTransformation:
    """D3's optimizer, at a rate that suits three epochs."""
    return optax.sgd(optax.cosine_decay_schedule(0.3, course.steps))


SWEEPS = {
    "C, SGD": Sweep(
        (float("inf"), 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
        lambda course: optax.chain(clipjax.clip(course.level), sgd(course)),
    ),
    "C, AdamW": Sweep(
        (float("inf"), 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12),
        lambda course: optax.chain(clipjax.clip(course.level), chains.adam(course)),
    ),
    "T, AdamW": Sweep(
        (float("inf"), 0.3, 0.1, 0.05, 0.02, 0.01, 0.003),
        lambda course: optax.chain(chains.adam(course), clipjax.clamp_weights(course.level)),
    ),
}


# The usual mask, which sorts (D2).

LAST = 99  # the last refresh


class Sorted(NamedTuple):
    """State of `argsort_mask`: updates so far, and the masks of the kernels, True keeps."""

    count: jax.Array
    masks: list[jax.Array]


def argsort_mask(sparsity: optax.Schedule, every: Any) -> optax.GradientTransformation:
    """The usual way to prune: every few updates all magnitudes are sorted, and the lowest ranks go."""

    def kernels(tree: Any) -> list[jax.Array]:
        return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim >= 2]

    def ranked(weights: list[jax.Array], count: jax.Array) -> list[jax.Array]:
        flat, back = ravel_pytree(weights)
        rank = jnp.zeros(flat.size, jnp.int32).at[jnp.argsort(jnp.abs(flat))].set(jnp.arange(flat.size))
        keep = rank >= jnp.round(sparsity(count) * flat.size)
        return [mask != 0 for mask in back(keep.astype(flat.dtype))]

    def init_fn(params: Any) -> Sorted:
        return Sorted(jnp.zeros((), jnp.int32), [jnp.ones(k.shape, bool) for k in kernels(params)])

    def update_fn(updates: Any, state: Sorted, params: Any = None) -> tuple[Any, Sorted]:
        moved = kernels(optax.apply_updates(params, updates))
        due = (state.count % every == 0) | (state.count == LAST)
        masks = jax.lax.cond(due, lambda: ranked(moved, state.count), lambda: state.masks)
        held = iter(masks)
        updates = jax.tree.map(lambda u, p: jnp.where(next(held), u, -p) if p.ndim >= 2 else u, updates, params)
        return updates, Sorted(state.count + 1, masks)

    return optax.GradientTransformation(init_fn, update_fn)


def _pruned(course: Course, mask: Callable[[Any, Any], Any]) -> Any:
    ramp = optax.polynomial_schedule(0.0, 0.95, 3, LAST)
    return optax.chain(chains.adam(course), mask(ramp, course.level.astype(jnp.int32)))


MASKS: dict[str, Chain] = {
    "none": chains.adam,
    "prune_mask": lambda c: _pruned(c, lambda ramp, every: clipjax.prune_mask(ramp, every=every, stop=LAST)),
    "argsort": lambda c: _pruned(c, argsort_mask),
}


# Dense, pruned by weights, pruned by units (D0): a sparsity and a chain each.

GROUPS = [
    {"Dense_0/kernel": -1, "Dense_0/bias": 0, "Dense_1/kernel": 0},
    {"Dense_1/kernel": -1, "Dense_1/bias": 0, "Dense_2/kernel": 0},
]
KINDS: dict[str, tuple[float, Chain]] = {
    "dense": (0.0, chains.adam),
    "95 % of weights": (0.95, lambda c: optax.chain(chains.adam(c), chains.gradual(c))),
    "80 % of units": (
        0.8,
        lambda c: optax.chain(
            chains.adam(c), chains.gradual(c, structure=structures.unit(groups=GROUPS), scope="leaf")
        ),
    ),
}
