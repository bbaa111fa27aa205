"""Computing dtypes, and rounding to the values of a narrower one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """The dtype in which a leaf is computed: f64 for f64, else f32. Not jnp's lattice: strict promotion refuses it."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widest(arrays: list[Any]) -> Any:
    """The computing dtype of several arrays together."""
    return wide(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


def largest(dtype: Any) -> float:
    """The largest finite number of a dtype."""
    return float(jnp.finfo(dtype).max)


def widened(leaf: jax.Array) -> jax.Array:
    """A leaf in its computing dtype."""
    return leaf.astype(wide(leaf.dtype))


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` rounded to values of a narrower dtype, still in the dtype of `x`.

    For 16 bits it is not a conversion there and back, which XLA is free to drop for the sake of precision, and on GPUs
    does.
    """
    info = jnp.finfo(dtype)
    if x.dtype == dtype or info.bits < 16:  # 8 bits: each format has its own infinity, or none
        return x.astype(dtype).astype(x.dtype)
    near = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp == jnp.finfo(x.dtype).nexp:
        return near
    tiny, lowest = (jnp.asarray(limit, x.dtype) for limit in (info.smallest_normal, info.smallest_subnormal))
    below = jax.lax.round(x / lowest, jax.lax.RoundingMethod.TO_NEAREST_EVEN) * lowest  # to which the above gives 0
    return jnp.where(jnp.abs(x) < tiny, below, near)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def truncated(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` rounded toward zero to values of a narrower dtype, still in the dtype of `x`; its derivative is 1."""
    if x.dtype == dtype:
        return x
    near = narrowed(x, dtype)
    lower = jnp.nextafter(near.astype(dtype), jnp.zeros((), dtype)).astype(x.dtype)
    return jnp.where(jnp.abs(near) > jnp.abs(x), lower, near)


@truncated.defjvp
def _truncated_slope(dtype: Any, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return truncated(*primals, dtype), tangents[0]
