"""Norms of gradient trees, accumulated in f32 or f64 over all leaves, right wherever a float can hold the norm."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import dtypes, elementwise, sharding

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
    over = ((),) * len(arrays) if axes is None else tuple(tuple(at) for at in axes)
    return _compiled(arrays, ord, over, each)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _norm(arrays: list[jax.Array], ord: float, over: tuple[tuple[str, ...], ...], each: bool) -> jax.Array:
    dtype = dtypes.widest(arrays)
    wide = [x.astype(dtype) for x in arrays]

    def total(part: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return _added([part(x) for x in wide], over, each)

    if ord == 2:
        # inside of `shard_map`: the axes along which devices have sums of their own
        vary = {name for x, at in zip(arrays, over, strict=True) for name in sharding.varies(x) if name not in at}
        return _two_norm(total, dtype.name, tuple(sorted(vary)))
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


def _added(parts: list[jax.Array], over: tuple[tuple[str, ...], ...], each: bool) -> jax.Array:
    """The sum of a number of each array over all arrays (or of each) and all shards."""
    parts = [jax.lax.psum(part, at) if at else part for part, at in zip(parts, over, strict=True)]
    return jnp.stack(parts) if each else jnp.stack(parts).sum()


@_norm.defjvp
def _slope(
    ord: float,
    over: tuple[tuple[str, ...], ...],
    each: bool,
    primals: tuple[list[jax.Array]],
    tangents: tuple[list[jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """The norm n and its derivative, the sum of sign(x) (|x| / n)^(p - 1) dx: 0 where n is 0.

    By itself JAX would differentiate the scaled sums of `_two_norm`, also those that are not used and overflow.
    """
    (arrays,), (moves,) = primals, tangents
    norm = _norm(arrays, ord, over, each)
    unit, part = divisor(norm)
    units = list(zip(unit, part, strict=True)) if each else [(unit, part)] * len(arrays)
    shares = [x.astype(norm.dtype) * part / unit for x, (unit, part) in zip(arrays, units, strict=True)]
    if np.isinf(ord):  # the largest entries share it
        slopes = [jnp.where(jnp.abs(share) == 1, share, 0.0) for share in shares]
        ties = _added([jnp.sum(jnp.abs(slope)) for slope in slopes], over, each)
    else:
        slopes, ties = [_power(share, ord - 1) for share in shares], jnp.ones_like(norm)
    moved = [jnp.sum(slope * dx.astype(norm.dtype)) for slope, dx in zip(slopes, moves, strict=True)]
    return norm, _added(moved, over, each) / jnp.maximum(ties, 1)


# Outside of jit it is compiled once for arrays of the same shapes; inside, no call of it is left in the program.
_compiled = jax.jit(_norm, static_argnums=(1, 2, 3), inline=True)


def _power(share: jax.Array, exponent: float) -> jax.Array:
    """sign(x) |x|^e, 0 for x = 0 whatever e is."""
    size = jnp.where(share == 0, jnp.ones_like(share), jnp.abs(share))
    return share if exponent == 1 else jnp.sign(share) * size**exponent


def divisor(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(unit, part) such that x * part / unit = x / largest; x itself where `largest` is 0 or not finite.

    XLA may turn a division by the unit into a product with 1 / unit, which the largest floats would make a denormal and
    flush to 0. Above 1 both are therefore a quarter of their plain values, `largest` and 1.
    """
    part = jnp.where(largest > 1, 0.25, 1.0).astype(largest.dtype)
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest)) * part, part


def _two_norm(
    total: Callable[[Callable[[jax.Array], jax.Array]], jax.Array], dtype: str, varying: tuple[str, ...]
) -> jax.Array:
    """The 2-norm from the sums of x², (x / c)² and (x c)² for a large c, or from one of wider floats.

    One of the three is right wherever a float can hold the norm: x² overflows to infinity for entries from 1e19 (f32)
    and underflows to 0 for entries below 1e-23, so that a plain norm would be infinite, or 0, long before the norm is.
    A TPU reads x once for all three sums (XLA fuses them), and that costs no more than one of them. The CPU backend
    reads x for every sum. There the plain sum is taken alone, and a second one, with the scale that is needed, only
    where the first has left the range in which it is right. On a GPU a branch waits for the host, and three sums took
    longer than Optax's one (`update.py`): there squares are added up in f64, which has room for those of every f32.
    """
    shrink, grow, floor = (table[dtype] for table in (_SHRINK, _GROW, _FLOOR))

    def squares(scale: Any) -> jax.Array:
        scales = itertools.repeat(scale) if np.ndim(scale) == 0 else iter(scale)
        return total(lambda x: _squares(x, next(scales)))

    def pick(plain: jax.Array) -> jax.Array:
        shrunk, grown = squares(shrink), squares(grow)
        safe = jnp.where(jnp.isinf(plain), jnp.sqrt(shrunk) * grow, jnp.sqrt(plain))
        return jnp.where((plain < floor) & ~jnp.isinf(grown), jnp.sqrt(grown) * shrink, safe)

    def once_or_twice() -> jax.Array:
        def right(sums: jax.Array) -> jax.Array:
            return (sums >= floor) & ~jnp.isinf(sums)

        def again(done: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            turn, sums, _ = done
            scale = jnp.where(jnp.isinf(sums), shrink, jnp.where(sums < floor, grow, sums.dtype.type(1)))
            scale = jnp.where(turn == 0, jnp.ones_like(scale), scale)
            return turn + 1, squares(scale), scale

        # The first turn is the plain sum: the loop holds the code of one sum, where a branch would hold that of two.
        like = jax.eval_shape(squares, None)
        none = jnp.zeros(like.shape, like.dtype)
        none = jax.lax.pcast(none, varying, to="varying") if varying else none
        begun = (jnp.zeros((), jnp.int32), none, none)
        _, sums, scale = jax.lax.while_loop(lambda x: (x[0] == 0) | ((x[0] == 1) & ~jnp.all(right(x[1]))), again, begun)
        undo = jnp.where(scale == shrink, grow, jnp.where(scale == grow, shrink, scale.dtype.type(1)))
        return jnp.sqrt(sums) * undo

    def three() -> jax.Array:
        return pick(squares(None))

    def wide() -> jax.Array:
        with jax.enable_x64(True):
            return jnp.sqrt(total(lambda x: _squares(x.astype(jnp.float64), None))).astype(dtype)

    of_gpus = three if dtype == "float64" else wide
    return jax.lax.platform_dependent(cpu=once_or_twice, cuda=of_gpus, rocm=of_gpus, default=three)


@elementwise.leafwise
def _squares(x: jax.Array, scale: Any) -> jax.Array:
    if scale is not None:
        # XLA would reassociate (x c)^2 of a lone entry into x^2 c^2, and c^2 is 0 or infinite
        x = jax.lax.optimization_barrier(x * scale) if x.size == 1 else x * scale
    return jnp.sum(jnp.square(x))
