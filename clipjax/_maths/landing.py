"""Landing: the updates after which `optax.apply_updates` gives exactly the wanted values.

`jax.lax.select` where nothing is broadcast: `jnp.where` is a call in the program, which takes time to compile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._arrays import dtypes, elementwise
from clipjax.typing import Number


@elementwise.leafwise
def land(p: jax.Array, q: jax.Array, outward: jax.Array | None = None) -> jax.Array:
    """The update u for which p + u is q in floating point, or the nearest value on one side where none is found.

    u = q - p is the float nearest to the exact difference, so no other u comes closer; it is exact for q = 0, for
    q/2 <= p <= 2q (Sterbenz) and between levels of a short step. Where p + u still rounds to beyond q, u moves by one
    unit in its last place: p + u then stays on the side of q, and |p + u| <= |q| holds always; where `outward`,
    |p + u| >= |q|. A weight that must move by more than itself may so land inside the set, and on its value at the
    next update. Infinity and NaN pass. The derivative is that of q - p.
    """
    return _landed(p, q, outward, False)


@elementwise.leafwise
def land_or_stay(p: jax.Array, q: jax.Array, outward: jax.Array | None = None) -> jax.Array:
    """`land`, and 0 where both are equal: of two infinities the difference would be NaN."""
    return _landed(p, q, outward, True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _landed(p: jax.Array, q: jax.Array, outward: jax.Array | None, stay: bool) -> jax.Array:
    size = 8 * p.dtype.itemsize
    signed, unsigned = jnp.dtype(f"int{size}"), jnp.dtype(f"uint{size}")
    # 1. The nearest update. Only the rounding of p + u can be wrong now, by one unit in the last place of q.
    u = q - p
    # 2. Does p + u pass q? It is 0 or has the sign of q, so the larger magnitude has the larger bit pattern.
    reached, wanted = (jax.lax.bitcast_convert_type(x, unsigned) for x in (p + u, q))
    # 3. If so, one unit less. Moving p + u toward zero makes |u| smaller where u and q have the same sign (unit = 1,
    #    the bits go down by one), and larger where they differ (unit = -1, the bits go up by one). Where u and q are
    #    equal (unit = 0), p is 0 and p + u exact.
    move = jax.lax.bitcast_convert_type(u, signed)
    unit = jax.lax.sign(move ^ jax.lax.bitcast_convert_type(q, signed))
    inward = jax.lax.bitcast_convert_type(move - unit, u.dtype)
    landed = jax.lax.select(reached > wanted, inward, u)
    if outward is not None:  # 4. Away from zero it is one unit more where p + u falls short of q.
        more = jax.lax.bitcast_convert_type(move + unit, u.dtype)
        landed = jax.lax.select(outward, jax.lax.select(reached < wanted, more, u), landed)
    return jax.lax.select(p == q, jnp.zeros_like(p), landed) if stay else landed


@_landed.defjvp
def _landed_slope(
    stay: bool,
    primals: tuple[jax.Array, jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, jax.Array, jax.Array | None],
) -> tuple[jax.Array, jax.Array]:
    dp, dq, _ = tangents
    return _landed(*primals, stay), dq - dp


@elementwise.leafwise
def changed(
    u: jax.Array, p: jax.Array, landed: jax.Array, new: jax.Array, q: jax.Array, outward: jax.Array | None = None
) -> jax.Array:
    """`land` where the projection moved a finite target, else the update as it came."""
    return jax.lax.select((new != landed) & jnp.isfinite(landed), land(p, q, outward), u)


@elementwise.leafwise
def emptied(active: jax.Array | None, u: jax.Array, p: jax.Array, landed: jax.Array, kept: jax.Array) -> jax.Array:
    """`changed` for a projection that only sets entries to 0: -p lands exactly, without a correction."""
    gone = ~kept if active is None else ~kept & active
    return jax.lax.select(gone & jnp.isfinite(landed), -p, u)


@jax.jit
def missed(p: jax.Array, q: jax.Array, slack: Number = 0.0) -> tuple[jax.Array, jax.Array]:
    """How many finite values are off their wanted ones by more than two units in the last place, and the largest gap.

    Args:
      p: values in the dtype of a param.
      q: the wanted ones, rounded to that dtype, in computing dtype.
      slack: how much more a value may be off, a number or an array that broadcasts to it.
    """
    wide = p.astype(q.dtype)
    gap = jnp.where(jnp.isfinite(wide), jnp.abs(q - wide), jnp.zeros_like(q))
    off = gap > 2 * float(jnp.finfo(p.dtype).eps) * jnp.abs(wide) + jnp.asarray(slack, q.dtype)
    return jnp.sum(off, dtype=jnp.int32), jnp.max(jnp.where(off, gap, jnp.zeros_like(gap)), initial=0)


def late(p: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Two units in the last place that the largest finite value has in a dtype: what one that was so large may miss."""
    size = jnp.abs(dtypes.widened(p))
    size = jnp.where(jnp.isfinite(size), size, jnp.zeros_like(size))
    return 2 * float(jnp.finfo(dtype).eps) * jnp.max(size, initial=0)
