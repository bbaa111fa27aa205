"""Norms of gradient trees, accumulated in f32 or f64 over all leaves, right wherever a float can hold the norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import dtypes, elementwise

# Powers of two: x * shrink has a square in range for the largest floats, x * grow for the smallest. A sum of squares
# below the floor may have lost squares to underflow.
_SHRINK: dict[str, Any] = {"float32": np.float32(2.0**-90), "float64": np.float64(2.0**-600)}
_GROW: dict[str, Any] = {"float32": np.float32(2.0**90), "float64": np.float64(2.0**600)}
_FLOOR: dict[str, Any] = {"float32": np.float32(2.0**-100), "float64": np.float64(2.0**-900)}


def norm(
    arrays: list[jax.Array], ord: float = 2, *, axes: Sequence[tuple[str, ...]] | None = None, each: bool = False
) -> jax.Array:
    """The p-norm of all arrays together, or f[arrays], the norm of each; f32, or f64 where an array is f64.

    Args:
      arrays: of any shapes; the norm of no arrays is 0.
      ord: p > 0, infinity included.
      axes: for each array, the axes of a surrounding `shard_map` that it is sharded over, to add up across.
      each: one norm for each array instead of one for all.
    """
    if not arrays:
        return jnp.zeros((0,) if each else ())
    dtype = dtypes.widest(arrays)
    wide = [x.astype(dtype) for x in arrays]
    over = [()] * len(arrays) if axes is None else list(axes)

    def total(part: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The sum of `part(x)` over all arrays (or for each) and all shards."""
        parts = [jax.lax.psum(part(x), at) if at else part(x) for x, at in zip(wide, over, strict=True)]
        return jnp.stack(parts) if each else jnp.stack(parts).sum()

    if ord == 2:
        return _two_norm(total, dtype.name)
    if ord <= 1:  # the powers leave the range of floats only where the norm does: one pass
        return total(lambda x: jnp.sum(jnp.abs(x) ** ord)) ** (1 / ord)
    tops = [jnp.max(jnp.abs(x), initial=0) for x in wide]
    tops = [jax.lax.pmax(top, at) if at else top for top, at in zip(tops, over, strict=True)]
    largest = jnp.stack(tops) if each else jnp.stack(tops).max()
    if np.isinf(ord):
        return largest
    # (sum |x|^p)^(1/p) = m (sum |x / m|^p)^(1/p): with m = max |x| no power overflows, and the largest is 1
    unit, part = divisor(largest)
    parts = iter(zip(unit, part, strict=True)) if each else itertools.repeat((unit, part))

    def powers(x: jax.Array) -> jax.Array:
        unit, part = next(parts)
        return jnp.sum((jnp.abs(x) * part / unit) ** ord)

    return unit / part * total(powers) ** (1 / ord)


def divisor(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(unit, part) such that x * part / unit = x / largest; x itself where `largest` is 0 or not finite.

    XLA may turn a division by the unit into a product with 1 / unit, which the largest floats would make a denormal and
    flush to 0. Above 1 both are therefore a quarter of their plain values, `largest` and 1.
    """
    part = jnp.where(largest > 1, 0.25, 1.0).astype(largest.dtype)
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest)) * part, part


def _two_norm(total: Callable[[Callable[[jax.Array], jax.Array]], jax.Array], dtype: str) -> jax.Array:
    """The 2-norm from the sums of x², (x / c)² and (x c)² for a large c.

    One of the three is right wherever a float can hold the norm: x² overflows to infinity for entries from 1e19 (f32)
    and underflows to 0 for entries below 1e-23, so that a plain norm would be infinite, or 0, long before the norm is.
    An accelerator reads x once for all three sums (XLA fuses them), and that costs no more than one of them. The CPU
    backend reads x for every sum. There the plain sum is taken alone, and a second one, with the scale that is needed,
    only where the first has left the range in which it is right.
    """
    shrink, grow, floor = (table[dtype] for table in (_SHRINK, _GROW, _FLOOR))

    def squares(scale: Any) -> jax.Array:
        scales = itertools.repeat(scale) if np.ndim(scale) == 0 else iter(scale)
        return total(lambda x: _squares(x, next(scales)))

    def pick(plain: jax.Array) -> jax.Array:
        shrunk, grown = squares(shrink), squares(grow)
        safe = jnp.where(jnp.isinf(plain), jnp.sqrt(shrunk) * grow, jnp.sqrt(plain))
        return jnp.where((plain < floor) & ~jnp.isinf(grown), jnp.sqrt(grown) * shrink, safe)

    def plain_or_again(plain: jax.Array) -> jax.Array:
        right = (plain >= floor) & ~jnp.isinf(plain)
        return jax.lax.cond(jnp.all(right), jnp.sqrt, again, plain)

    def again(plain: jax.Array) -> jax.Array:
        large, small = jnp.isinf(plain), plain < floor
        scaled = jnp.sqrt(squares(jnp.where(large, shrink, jnp.where(small, grow, plain.dtype.type(1)))))
        return jnp.where(large, scaled * grow, jnp.where(small, scaled * shrink, scaled))

    return jax.lax.platform_dependent(squares(None), cpu=plain_or_again, default=pick)


@elementwise.leafwise
def _squares(x: jax.Array, scale: Any) -> jax.Array:
    if scale is not None:
        # XLA would reassociate (x c)^2 of a lone entry into x^2 c^2, and c^2 is 0 or infinite
        x = jax.lax.optimization_barrier(x * scale) if x.size == 1 else x * scale
    return jnp.sum(jnp.square(x))
