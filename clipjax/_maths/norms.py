"""Norms of gradient trees: accumulated in at least f32 across leaves, right wherever the norm is representable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import dtypes, elementwise, trees
from clipjax.typing import PerLeaf

# Powers of two that keep the squares of the largest and of the smallest floats in range, and what is small.
_SHRINK: dict[str, Any] = {"float32": np.float32(2.0**-90), "float64": np.float64(2.0**-600)}


_GROW: dict[str, Any] = {"float32": np.float32(2.0**90), "float64": np.float64(2.0**600)}


_FLOOR: dict[str, Any] = {"float32": np.float32(2.0**-100), "float64": np.float64(2.0**-900)}


def norm(
    arrays: list[jax.Array], ord: float = 2, *, axes: Sequence[tuple[str, ...]] | None = None, each: bool = False
) -> jax.Array:
    """The p-norm of all arrays together, or f[arrays] with the one of each; f32, f64 where an array is.

    Args:
      arrays: of any shapes; none have the norm 0.
      ord: p > 0, infinity included.
      axes: for each array, the axes of a surrounding `shard_map` that it is sharded over, to add up across.
      each: one norm per array instead of one for all.
    """
    if not arrays:
        return jnp.zeros((0,) if each else ())
    dtype = dtypes.widest(arrays)
    wide = [x.astype(dtype) for x in arrays]
    over = [()] * len(arrays) if axes is None else list(axes)

    def total(part: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The sum of a part of every array, over all its shards."""
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
    unit, part = divisor(largest)
    parts = iter(zip(unit, part, strict=True)) if each else itertools.repeat((unit, part))

    def powers(x: jax.Array) -> jax.Array:
        unit, part = next(parts)
        return jnp.sum((jnp.abs(x) * part / unit) ** ord)

    return unit / part * total(powers) ** (1 / ord)


def divisor(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(unit, part) such that x * part / unit is at most 1 for |x| <= largest; 1 where that is 0 or not finite.

    They are a quarter of what they would be for large values: the reciprocal of the unit, with which XLA may multiply
    instead, is then a normal number.
    """
    part = jnp.where(largest > 1, 0.25, 1.0).astype(largest.dtype)
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest)) * part, part


def _two_norm(total: Callable[[Callable[[jax.Array], jax.Array]], jax.Array], dtype: str) -> jax.Array:
    """The 2-norm from the sums of x², (x/c)² and (x c)² for a large c: one is right wherever the norm is a float.

    Accelerators take the three in one pass. A CPU would pass three times, so it takes a second only where the first has
    left the range in which it is right, with the scale that it needs.
    """
    shrink, grow, floor = (table[dtype] for table in (_SHRINK, _GROW, _FLOOR))

    def squares(scale: Any) -> jax.Array:
        scales = itertools.repeat(scale) if np.ndim(scale) == 0 else iter(scale)
        return total(lambda x: _squares(x, next(scales)))

    def pick(plain: jax.Array) -> jax.Array:
        shrunk, grown = squares(shrink), squares(grow)
        safe = jnp.where(jnp.isinf(plain), jnp.sqrt(shrunk) * grow, jnp.sqrt(plain))
        return jnp.where((plain < floor) & ~jnp.isinf(grown), jnp.sqrt(grown) * shrink, safe)

    def rescue(plain: jax.Array) -> jax.Array:
        right = (plain >= floor) & ~jnp.isinf(plain)
        return jax.lax.cond(jnp.all(right), jnp.sqrt, again, plain)

    def again(plain: jax.Array) -> jax.Array:
        large, small = jnp.isinf(plain), plain < floor
        scaled = jnp.sqrt(squares(jnp.where(large, shrink, jnp.where(small, grow, plain.dtype.type(1)))))
        return jnp.where(large, scaled * grow, jnp.where(small, scaled * shrink, scaled))

    return jax.lax.platform_dependent(squares(None), cpu=rescue, default=pick)


@elementwise.leafwise
def _squares(x: jax.Array, scale: Any) -> jax.Array:
    if scale is not None:
        # XLA would reassociate (x c)^2 of a lone entry into x^2 c^2, and c^2 is 0 or infinite
        x = jax.lax.optimization_barrier(x * scale) if x.size == 1 else x * scale
    return jnp.sum(jnp.square(x))


def check_real(updates: Any) -> None:
    """Refuse gradients that have no norm here."""
    for path, g in zip(trees.paths(updates), trees.flatten(updates)[0], strict=True):
        if g is not None and not jnp.issubdtype(g.dtype, jnp.floating):
            raise TypeError(
                f"`updates` must be real floats, got {g.dtype} at {path!r}. Split complex gradients with"
                " `optax.contrib.split_real_and_imaginary`, and mask integer leaves with `optax.masked`."
            )


def sharded_over(axis_name: Any, paths: list[str], leaves: list[jax.Array]) -> list[tuple[str, ...]]:
    """The axes of a surrounding `shard_map` that each leaf is sharded over, of those that `axis_name` names."""

    def names(value: Any) -> tuple[str, ...]:
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)

    if isinstance(axis_name, PerLeaf):
        return [names(axis_name.fn(path, x)) for path, x in zip(paths, leaves, strict=True)]
    told = {name for name in names(axis_name) if name in _varies(jax.lax.axis_index(name))}
    return [tuple(n for n in names(axis_name) if n not in told or n in _varies(x)) for x in leaves]


def _varies(x: jax.Array) -> frozenset[str]:
    """The manual axes over which an array is known to differ."""
    return jax.typeof(x).mat.varying
