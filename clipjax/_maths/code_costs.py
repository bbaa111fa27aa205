"""What codes cost in a file, and codes that are chosen by their error and their cost together.

The weight r, in units of the step, takes the level l of least (r - l)² + λ c(l), c(l) being what the level costs in
bits. As a function of r the best level never falls, so that a leaf needs one threshold between each two of its levels,
and a weight of b bits, which halves them at each, b comparisons: no table is read weight by weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax._arrays import elementwise

FAR = 2.0**60
"""A threshold that no weight passes, in steps; finite for those who have JAX look for infinities."""


def bits(counts: jax.Array, usable: jax.Array) -> jax.Array:
    r"""Bits of each level: :math:`-\log_2 \frac{n_l + 1/2}{n + L/2}`, finite for a level that no weight has.

    Zero costs no more than any other level, so that a weight is at 0 where 0 is the nearest, as one that a mask holds
    there. On a fine grid the levels beside it are nearly as frequent, and one that is the most frequent by chance would
    draw all small weights to itself.

    Args:
      counts: n_l, how many weights have the level, f32[levels], 0 being the one in the middle.
      usable: bool[levels], the L levels that there are.
    """
    counts = jnp.where(usable, counts, 0)
    total = jnp.sum(counts) + jnp.sum(usable) / 2
    found = jnp.log2(total) - jnp.log2(counts + 0.5)
    zero = jnp.arange(counts.size) == counts.size // 2
    return jnp.where(zero, jnp.min(jnp.where(usable, found, jnp.inf)), found)


def information(counts: jax.Array) -> jax.Array:
    """Bits that weights of these levels take together, each level being coded as often as it occurs."""
    total = jnp.maximum(jnp.sum(counts), 1)
    return jnp.sum(jnp.where(counts > 0, counts * (jnp.log2(total) - jnp.log2(jnp.maximum(counts, 1))), 0))


def thresholds(levels: jax.Array, bits: jax.Array, usable: jax.Array, lam: jax.Array) -> jax.Array:
    """Above which weight the level is a higher one: f32[levels - 1], never falling, `FAR` away where there is none.

    Two levels l > i cost the same at r = (l + i) / 2 + λ (c(l) - c(i)) / (2 (l - i)). The level is above the j-th one
    where one of the levels above it beats all those up to it.

    Args:
      levels: in units of the step, rising.
      bits: of each level.
      usable: bool, the levels that there are.
      lam: λ, squared steps a bit.
    """
    upper, lower = levels[:, None], levels[None, :]
    apart = jnp.where(upper > lower, upper - lower, 1)
    even = (upper + lower) / 2 + lam * (bits[:, None] - bits[None, :]) / (2 * apart)
    even = jnp.where(usable[None, :], even, -FAR)  # a level that there is not is beaten everywhere,
    even = jnp.where(usable[:, None], even, FAR)  # and beats none
    best_up_to = jax.lax.cummax(even, axis=1)
    above = jnp.arange(levels.size)[:, None] > jnp.arange(levels.size)[None, :]
    found = jnp.min(jnp.where(above, best_up_to, FAR), axis=0)[:-1].astype(jnp.float32)
    # With a threshold just below, a weight on it has the upper level, where that is even: halves go to the even one.
    found = jnp.where((levels[1:] % 2 == 0) & usable[1:], jnp.nextafter(found, -jnp.float32(FAR)), found)
    return jax.lax.cummin(found, reverse=True)  # those of a level that is the best nowhere were equal


def nearest(levels: jax.Array, usable: jax.Array) -> jax.Array:
    """The thresholds of levels that cost nothing."""
    return thresholds(levels, jnp.zeros_like(levels), usable, jnp.zeros((), jnp.float32))


def chosen(ratio: jax.Array, thresholds: jax.Array, lowest: float) -> jax.Array:
    """The code of every weight, as floats from `lowest` on: how many thresholds it passes, of 2^b - 2 for b bits."""
    # The bits of that number from the highest one on: each halves the thresholds that are left to look at.
    left: list[jax.Array] = [jnp.full((), -FAR, ratio.dtype), *thresholds.astype(ratio.dtype)]  # 2^b - 1 of them
    code, bit = jnp.full_like(ratio, lowest - 1), (len(left) + 1) / 2
    while left:
        middle = len(left) // 2
        above = ratio > jnp.broadcast_to(left[middle], ratio.shape)
        code = elementwise.where(above, code + bit, code)
        pairs = zip(left[middle + 1 :], left[:middle], strict=True)
        left = [elementwise.where(above, *(jnp.broadcast_to(t, ratio.shape) for t in pair)) for pair in pairs]
        bit /= 2
    return code


def histogram(codes: jax.Array, lowest: float, size: int) -> jax.Array:
    """How many of the codes are `lowest`, `lowest` + 1, ...: f32[size], exact below 2^24."""
    # The codes are stored once, and read once for each: fused, XLA would choose all of them anew for each.
    codes = jax.lax.optimization_barrier(codes)
    of = lambda i: jnp.sum(codes == lowest + i, dtype=jnp.uint32)  # noqa: E731
    return jax.lax.map(of, jnp.arange(size, dtype=jnp.float32)).astype(jnp.float32)
