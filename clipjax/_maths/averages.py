"""Moving averages and deviations of norms, which begin as plain ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax._arrays import elementwise
from clipjax.typing import Number


class Moments(NamedTuple):
    """How many norms there were (i32), and their mean and standard deviation (f32)."""

    added: jax.Array
    mean: jax.Array
    deviation: jax.Array


class Average(NamedTuple):
    """How many norms there were (i32), and their moving average (f32)."""

    added: jax.Array
    average: jax.Array


def followed(state: Moments, norm: jax.Array, clipped: jax.Array, decay: Number, warm: jax.Array) -> Moments:
    """The moments with one norm more: itself while they are warmed up, afterwards what a clip leaves of it."""
    added, mean, deviation = state
    # warm-up (Welford), r = 1 / (number of norms): μ' = μ + r (n - μ), σ'² = (1 - r) σ² + r (1 - r) (n - μ)²
    rate = 1 / (added.astype(norm.dtype) + 1)
    first = mean + rate * (norm - mean), _mixed(deviation, norm - mean, rate, 1 - rate)
    new_mean = mean + (1 - decay) * (clipped - mean)
    later = _mixed(deviation, clipped - new_mean, 1 - decay)
    moments = jnp.where(warm, first[0], new_mean), jnp.where(warm, first[1], later)
    return Moments(optax.safe_increment(added), *moments)


def _mixed(deviation: jax.Array, off: jax.Array, rate: Number, weight: Number = 1) -> jax.Array:
    """The root of (1 - rate) deviation² + rate weight off², without a square that could overflow."""
    unit = jnp.maximum(deviation, jnp.abs(off))
    unit = jnp.where(unit > 0, unit, 1.0)
    old, new = jnp.square(deviation / unit), jnp.square(off / unit) * weight
    return unit * elementwise.root(old + rate * (new - old))
