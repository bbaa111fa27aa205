"""Bytes of a code that knows how many zeros the rows and the columns of a matrix have, as `clipjax.save` writes it.

The small file puts rows, and columns, into classes of like density, and codes zeros by the density of each pair of
classes (`_files/zero_densities.py`). What that takes follows from counts: here it is computed inside of a compiled
program, by the same splits, from how many lines have how many nonzeros.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from clipjax._arrays import sharding
from clipjax._maths import code_costs

_DEPTH = 4  # there are at most 2^4 classes
_WORTH = 16.0  # bits that a split must save

_times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # of counts: bf16 holds them to 256 alone


def size(alive: jax.Array) -> jax.Array:
    """Bytes of the classes of a matrix and of where its nonzeros are, f32; of what they are it says nothing.

    Args:
      alive: f32[rows, columns], 1 where an entry is not 0.
    """
    classes = [_classes(alive.sum(axis), alive.shape[axis]) for axis in (1, 0)]
    ones = [jax.nn.one_hot(c, 1 << _DEPTH, dtype=jnp.float32) for c in classes]
    nowhere = sharding.respecified(alive, lambda spec: (None, None))
    fine = jnp.einsum("rc,ri,cj->ij", alive, *ones, precision=jax.lax.Precision.HIGHEST, out_sharding=nowhere)
    numbers = [one.sum(0) for one in ones]
    depths = jnp.stack(jnp.meshgrid(*[jnp.arange(_DEPTH + 1)] * 2), -1).reshape(-1, 2)
    return jnp.min(jax.lax.map(lambda depth: _merged(fine, numbers, depth), depths))


def _merged(fine: jax.Array, numbers: list[jax.Array], depth: jax.Array) -> jax.Array:
    """The bytes where the finest classes of rows and of columns are merged down to 2^depth."""
    places = jnp.arange(1 << _DEPTH)
    merge = [jax.nn.one_hot(places >> (_DEPTH - d), 1 << _DEPTH, dtype=jnp.float32) for d in depth]
    lines = [_times(n, m) for n, m in zip(numbers, merge, strict=True)]
    known = _bits(_times(_times(merge[0].T, fine), merge[1]), lines[0][:, None] * lines[1][None, :])
    classes = jnp.exp2(depth.astype(jnp.float32))
    tables = [jnp.where(d > 0, _information(n) / 8 + 1 + c, 0) for n, d, c in zip(lines, depth, classes, strict=True)]
    return jnp.sum(known) / 8 + 2 + 2 * jnp.prod(classes) + tables[0] + tables[1]


def _information(counts: jax.Array) -> jax.Array:
    share = counts / jnp.maximum(counts.sum(), 1)
    return -jnp.sum(jnp.where(counts > 0, counts * jnp.log2(jnp.where(counts > 0, share, 1.0)), 0.0))


def _classes(alive: jax.Array, width: int) -> jax.Array:
    """The class of every line by how many of its `width` entries are alive, i32: bit by bit the best split."""
    have = code_costs.histogram(alive, 0.0, width + 1)  # how many lines have 0, 1, 2, ... nonzeros
    ones = have * jnp.arange(width + 1, dtype=jnp.float32)
    lines, total = (jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(x)]) for x in (have, ones))
    place = jnp.arange(width + 2)

    def split(ends: jax.Array) -> jax.Array:
        """Both halves of the lines whose numbers of nonzeros lie in [begin, end); all of them, and none, unsplit."""
        begin, end = ends[0], ends[1]

        def cost(a: jax.Array, b: jax.Array) -> jax.Array:
            return _bits(total[b] - total[a], (lines[b] - lines[a]) * width)

        inside = (place >= begin) & (place <= end)
        costs = jnp.where(inside, cost(begin, place) + cost(place, end), jnp.inf)
        at = jnp.argmin(costs).astype(jnp.int32)
        at = jnp.where((ends[2] > 0) & (cost(begin, end) - costs[at] > _WORTH), at, end)
        again = (at < end).astype(jnp.int32)
        return jnp.stack([jnp.stack([begin, at, again]), jnp.stack([at, end, again])])

    # Of the 2^4 parts the first one has all lines; at each step those that there are leave half of theirs to the part
    # half as far away as before. So the place of a part, shifted right, is that of the part it was split from.
    slots = jnp.arange(1 << _DEPTH)
    whole = jnp.array([0, width + 1, 1], jnp.int32)
    parts = jnp.where(slots[:, None] == 0, whole, jnp.array([width + 1, width + 1, 0], jnp.int32))

    def halve(step: jax.Array, parts: jax.Array) -> jax.Array:
        away = (1 << (_DEPTH - 1)) >> step
        halves = jax.vmap(split)(parts)
        first, second = slots % (2 * away) == 0, slots % (2 * away) == away
        other = jnp.roll(halves[:, 1], away, axis=0)
        return jnp.where(first[:, None], halves[:, 0], jnp.where(second[:, None], other, parts))

    ends = jax.lax.fori_loop(0, _DEPTH, halve, parts)[:, 1]
    return jnp.sum((alive[:, None] >= ends) & (ends < width + 1), axis=1)


def _bits(alive: jax.Array, cells: jax.Array) -> jax.Array:
    """The information of that many ones among so many cells."""
    p = alive / jnp.maximum(cells, 1)
    inner = jnp.clip(p, 1e-7, 1 - 1e-7)
    bits = -cells * (p * jnp.log2(inner) + (1 - p) * jnp.log2(1 - inner))
    return jnp.where((alive <= 0) | (alive >= cells), 0.0, bits)
