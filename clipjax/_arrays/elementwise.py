"""Elementwise maths that leaves no call in the compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import sharding


def leafwise(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The maths of one leaf, traced once for all leaves of a shape and inlined: no call is left in the program."""
    return jax.jit(fn, inline=True)


def where(mask: jax.Array | bool, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.where` without the call that it leaves in the program, which takes time to compile; scalars broadcast.

    Under explicit mesh axes the result is sharded as x, y or the mask is, along the most axes; constants are not.
    """
    if isinstance(mask, bool):
        return x if mask else y
    if not all(isinstance(v, jax.Array) for v in (mask, x, y)) or x.dtype != y.dtype or mask.dtype != bool:
        return jnp.where(mask, x, y)
    whole = x if x.ndim else y
    x, y = (sharding.filled(v, whole) if v.ndim == 0 else v for v in (x, y))
    if x.shape != y.shape or np.broadcast_shapes(mask.shape, x.shape) != x.shape:
        return jnp.where(mask, x, y)
    mask = jnp.broadcast_to(mask, x.shape) if mask.ndim else mask
    placed = max((x, y, mask), key=lambda v: sum(names is not None for names in jax.typeof(v).sharding.spec))
    mask, x, y = (sharding.laid_as(v, placed) if v.ndim else v for v in (mask, x, y))
    return jax.lax.select(mask, x, y)


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """The square root, with the derivative 0 at 0: an infinite one, times 0, would be NaN."""
    return jnp.sqrt(x)


@root.defjvp
def _root_slope(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = root(x)
    return y, jnp.where(y > 0, dx / jnp.where(y > 0, 2 * y, 1.0), 0.0)


@jax.custom_jvp
def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """The quotient x / y, with a derivative that stays in the range of floats where y² would not."""
    return x / y


@quotient.defjvp
def _quotient_slope(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (_, y), (dx, dy) = primals, tangents
    value = quotient(*primals)
    return value, dx / y - value * (dy / y)


def keep(active: jax.Array | None, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` where `active`, which is None for always, else `old`."""
    return new if active is None else where(active, new, old)
