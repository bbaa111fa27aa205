"""Norms of gradient trees: accumulated in at least f32 across leaves, right wherever the norm is representable."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import _trees as trees

_SHRINK, _GROW = np.float32(2.0**-90), np.float32(2.0**90)


def sums(x: jax.Array) -> jax.Array:
    """f[3]: the sums of x^2, (x 2^-90)^2 and (x 2^90)^2 in one pass; one is right wherever the norm is a float."""
    x = trees.widened(x)
    scales = (x.dtype.type(1), _SHRINK.astype(x.dtype), _GROW.astype(x.dtype))
    if x.size > 1:
        return jnp.stack([jnp.sum(jnp.square(x * scale)) for scale in scales])
    # XLA would reassociate (x c)^2 of a lone entry into x^2 c^2, and c^2 is 0 or infinite
    return jnp.stack([jnp.sum(jnp.square(jax.lax.optimization_barrier(x * scale))) for scale in scales])


def from_sums(total: jax.Array) -> jax.Array:
    """The 2-norm of everything that went into the sums."""
    plain, shrunk, grown = total[..., 0], total[..., 1], total[..., 2]
    floor = np.float32(2.0**-100)
    small = jnp.sqrt(grown) * _SHRINK
    large = jnp.sqrt(shrunk) * _GROW
    safe = jnp.where(jnp.isinf(plain), large, jnp.sqrt(plain))
    return jnp.where(plain < floor, jnp.where(jnp.isinf(grown), safe, small), safe)


def norm(arrays: list[jax.Array], ord: float = 2) -> jax.Array:
    """The p-norm of all arrays together, f32 (f64 where one is); 0 for none."""
    arrays = [x for x in arrays if x.size]
    if not arrays:
        return jnp.zeros(())
    dtype = trees.widest(arrays)
    if ord == 2:
        parts: Any = jnp.stack([sums(x.astype(dtype)) for x in arrays])
        return from_sums(parts.sum(axis=0))
    sizes = [jnp.abs(x.astype(dtype)) for x in arrays]
    largest = jnp.stack([x.max() for x in sizes]).max()
    if np.isinf(ord):
        return largest
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    return unit * jnp.stack([jnp.sum((x / unit) ** ord) for x in sizes]).sum() ** (1 / ord)
