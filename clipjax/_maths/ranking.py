"""Exact selection of the k lowest scores without a sort, a gather or a flattened copy.

A float's bits, reordered, compare like the float. The k-th smallest of any number of arrays is then found digit by
digit: one counting pass settles three bits, and seven scalars a pass cross devices. Ties are settled by position
with a second bisection, on the linear index, only when the boundary falls inside a run of equal scores.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import dtypes

Keys = list[jax.Array]
MOST = 2**32 - 1  # the largest count
_DIGIT = 3  # bits of the threshold that one pass settles


def order(scores: jax.Array, *, gone: jax.Array | None = None) -> jax.Array:
    """Unsigned keys that compare like the scores; -0 equals 0, NaN is lower, `gone` lowest of all."""
    scores = dtypes.widened(scores)
    width = scores.dtype.itemsize * 8
    kind = jnp.dtype(f"uint{width}")
    bits = jax.lax.bitcast_convert_type(scores, kind)
    sign = kind.type(1 << (width - 1))
    bits = jnp.where(bits == sign, kind.type(0), bits)  # -0 -> 0, also where denormals flush
    keys = jnp.where(bits >= sign, ~bits, bits | sign)
    infinity = kind.type(np.asarray(np.inf, scores.dtype).view(kind))
    keys = jnp.where((bits & ~sign) > infinity, kind.type(1), keys)  # NaN
    return keys if gone is None else jnp.where(gone, kind.type(0), keys)


def protect(keys: jax.Array, protected: jax.Array) -> jax.Array:
    """Keys that are never among the lowest, as long as no more than the others are asked for."""
    return jnp.where(protected, _highest(keys), keys)


def open_count(keys: Keys) -> jax.Array:
    """u32[leaves], how many keys of each array are not protected."""
    top = jnp.full((2, len(keys)), _highest(keys[0]))
    return _below(keys, top)[0]


def _highest(keys: jax.Array) -> Any:
    return keys.dtype.type(np.iinfo(keys.dtype).max)


@functools.partial(jax.jit, static_argnames="pooled", inline=True)
def keep(keys: Keys, k: jax.Array, *, pooled: bool) -> Keys:
    """Masks that are False at the `k` lowest keys; of equal keys the earlier ones are kept.

    Called outside of jit it compiles once for arrays of the same shapes; inside no call is left.

    Args:
      keys: unsigned arrays of one dtype, from `order`.
      k: u32[leaves], how many to remove: from all together (`pooled`, every entry the same) or from each.
      pooled: compare all arrays together, or each alone.
    """
    cut, surplus = _threshold(keys, k, pooled)
    below = _below(keys, jnp.stack([cut, cut + cut.dtype.type(1)]))
    ends = _tie_ends(keys, cut, below[1] - below[0], surplus, pooled)
    return [(key > c) | ((key == c) & (_index(key.shape) < end)) for key, c, end in zip(keys, cut, ends, strict=True)]


def _counts(masks: Keys) -> jax.Array:
    return jnp.stack([jnp.sum(mask, dtype=jnp.uint32) for mask in masks])


def _threshold(keys: Keys, k: jax.Array, pooled: bool) -> tuple[jax.Array, jax.Array]:
    """The k-th smallest key of each pool, and how many of its equals are among the k lowest."""
    kind = keys[0].dtype
    width = kind.itemsize * 8
    digits = np.arange(1, 2**_DIGIT, dtype=kind)[:, None]

    def unsettled(carry: Any) -> jax.Array:
        place, _, low = carry
        return (place >= 0) & jnp.any(low != k)

    def narrow(carry: Any) -> Any:
        # invariant: low = #(key < cut) <= k, and #(key < cut + 2^(place + _DIGIT)) > k; settled where low = k
        place, cut, low = carry
        shift = place.astype(kind)
        above = (digits << shift) >> shift != digits  # beyond the last key, in the first pass
        trials = cut[None] + (digits << shift)
        counts = _below(keys, trials)
        if pooled:
            counts = jnp.broadcast_to(counts.sum(axis=1, keepdims=True, dtype=jnp.uint32), counts.shape)
        fits = (counts <= k[None]) & ~above
        digit = jnp.sum(fits, axis=0, dtype=kind)  # counts grow with the digit
        reached = jnp.max(jnp.where(fits, counts, np.uint32(0)), axis=0)
        settled = low == k
        cut = jnp.where(settled, cut, cut + (digit << shift))
        return place - _DIGIT, cut, jnp.where(settled | (digit == 0), low, reached)

    first = np.int32((width - 1) // _DIGIT * _DIGIT)
    start = (jnp.asarray(first), jnp.zeros(len(keys), kind), jnp.zeros(len(keys), jnp.uint32))
    _, cut, low = jax.lax.while_loop(unsettled, narrow, start)
    return cut, k - low


def _below(keys: Keys, trials: jax.Array) -> jax.Array:
    """u32[trials, leaves], how many keys of each array are below each of its trials, in one pass over the arrays.

    A reduction with several results is one pass on every backend, and on CPU the only integer reduction that XLA
    vectorizes; across devices it would gather the partial counts instead of adding them up.
    """
    columns = []
    for key, cuts in zip(keys, trials.T, strict=True):
        masks = [(key < cut).astype(jnp.uint32) for cut in cuts]
        if jax.device_count() == 1 and key.ndim:
            zeros, axes = (np.uint32(0),) * len(masks), tuple(range(key.ndim))
            columns.append(jnp.stack(jax.lax.reduce(tuple(masks), zeros, _add, axes)))
        else:
            columns.append(jnp.stack([jnp.sum(mask, dtype=jnp.uint32) for mask in masks]))
    return jnp.stack(columns, axis=1)


def _add(a: Any, b: Any) -> Any:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _tie_ends(keys: Keys, cut: jax.Array, counts: jax.Array, surplus: jax.Array, pooled: bool) -> jax.Array:
    """The linear index in each array before which its ties are kept, the latest `surplus` ones being removed."""
    before = jnp.cumsum(counts[::-1], dtype=jnp.uint32)[::-1] - counts  # ties in the later arrays
    removed = jnp.minimum(surplus - jnp.minimum(surplus, before), counts) if pooled else surplus
    quota = counts - removed
    last = np.uint32(2**32 - 1)

    def search(bit_and_end: Any) -> Any:
        bit, end = bit_and_end
        trial = end | bit
        at = jax.lax.optimization_barrier(cut)  # or XLA would store the ties of all arrays ahead of the loop
        ties = [(key == c) & (_index(key.shape) < t) for key, c, t in zip(keys, at, trial, strict=True)]
        return bit >> 1, jnp.where(_counts(ties) <= quota, trial, end)

    split = jnp.any((removed > 0) & (quota > 0))
    start = (jnp.where(split, jnp.uint32(1 << 31), 0).astype(jnp.uint32), jnp.zeros_like(quota))
    _, end = jax.lax.while_loop(lambda carry: carry[0] > 0, search, start)
    return jnp.where(removed == 0, last, jnp.where(quota == 0, 0, end))


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Row-major linear index of every entry, as an elementwise expression that a sharded array can compute."""
    strides = np.cumprod((1, *shape[:0:-1]))[::-1]
    index = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides[: len(shape)]):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
    return index
