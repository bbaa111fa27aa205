"""Exact selection of the k lowest scores without a sort, a gather or a flattened copy.

A float's bits, reordered, compare like the float. The k-th smallest of any number of arrays is then found digit by
digit: one counting pass settles three bits, and seven counts a pass cross devices. Ties are settled by position, by the
same search over the index of an entry, and only where the boundary falls inside a run of equal scores.

The keys of leaves that are alike lie in one *stack*, [leaves, ...], so that a program does not grow with their number.
A *row* is what gets a threshold of its own: a leaf, or one layer of a leaf that holds several.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import dtypes
from clipjax._maths import wide
from clipjax._maths.wide import Wide

Keys = list[jax.Array]
_DIGIT = 3  # bits of the threshold that one pass settles


@functools.partial(jax.jit, static_argnames=("pooled", "places", "layers", "round_to"), inline=True)
def keep(
    keys: Keys,
    k: Wide,
    *,
    pooled: bool,
    places: tuple[tuple[int, ...], ...] | None = None,
    layers: tuple[int, ...] | None = None,
    round_to: int = 1,
) -> Keys:
    """Masks that are False at the `k` lowest keys; of equal keys the earlier ones are kept, and protected ones always.

    All layers of a leaf lose the same number. If leaves are compared together, a leaf loses the number of its keys
    below the common threshold, rounded down to a multiple of its layers: of each layer the lowest.

    Called outside of jit it compiles once for arrays of the same shapes; inside no call is left.

    Args:
      keys: stacks of unsigned arrays of one dtype, from `order`.
      k: how many to remove: of all keys (`pooled`, a scalar), or [leaves], of each layer of each leaf.
      pooled: compare all leaves together, or each row alone.
      places: the place in the tree of each leaf of each stack, by which ties are settled; the order of the stacks by
        default.
      layers: how many axes of each stack, after the first, are axes of layers; none by default.
      round_to: what the number of keys that stay in each row is rounded to a multiple of; all may stay, too.
    """
    rows = [1 + n for n in layers or (0,) * len(keys)]
    depths = np.concatenate([np.full(len(x), math.prod(x.shape[1:row])) for x, row in zip(keys, rows, strict=True)])
    free = open_counts(keys, layers)
    if pooled:
        order = np.arange(len(depths)) if places is None else np.concatenate(places)
        cut, inside, k = _shared(keys, k, free, depths, order)
    k = wide.minimum(k, free)
    if round_to > 1:
        sizes = [math.prod(key.shape[row:]) for key, row in zip(keys, rows, strict=True) for _ in key]
        k = _rounded(k, wide.of(sizes), free, np.uint32(round_to))
    k = jax.tree.map(lambda x: _by_row(x, keys, rows), k)
    if not pooled or max(rows) > 1 or round_to > 1:
        below = functools.partial(_below, keys, rows)
        cut, _ = _search(below, k, keys[0].dtype, keys[0].dtype.itemsize * 8)
        inside = below(_neighbours(cut))
    lower, upper = (jax.tree.map(lambda x, i=i: x[i], inside) for i in (0, 1))
    ends = _tie_ends(keys, rows, cut, wide.minus(upper, lower), wide.minus(k, lower))
    masks = []
    for key, row, at, *end in zip(keys, rows, *(_split(x, keys, rows) for x in (cut, *ends)), strict=True):
        masks.append((key > at) | ((key == at) & _precedes(_index(key.shape, row, len(ends)), end)))
    return masks


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
    """Keys that are never among the lowest, whatever is asked for."""
    return jnp.where(protected, _highest(keys.dtype), keys)


def best(keys: jax.Array, layers: int) -> jax.Array:
    """True at the highest key of each row of a stack that is not protected, at the first one of equals."""
    axes = tuple(range(1 + layers, keys.ndim))
    keys = jnp.where(keys == _highest(keys.dtype), keys.dtype.type(0), keys)
    found = keys == jnp.max(keys, axis=axes, keepdims=True, initial=0)
    for index in _index(keys.shape, 1 + layers, 2 if _long(keys.shape[1 + layers :]) else 1):
        place = jnp.maximum(index, (~found).astype(jnp.uint32) * wide.largest())
        found &= place == jnp.min(place, axis=axes, keepdims=True, initial=wide.largest())
    return found


def open_counts(keys: Keys, layers: Sequence[int] | None = None) -> Wide:
    """[leaves], how many keys of each leaf are not protected; in a leaf of several layers, of the layer with fewest."""
    return marked([key != _highest(key.dtype) for key in keys], layers)


def marked(marks: Keys, layers: Sequence[int] | None = None) -> Wide:
    """[leaves], how many entries of each leaf are True; in a leaf of several layers, of the layer with fewest."""
    counts = [_tally([mark], 1 + n) for mark, n in zip(marks, layers or (0,) * len(marks), strict=True)]
    of_layers = [
        jax.tree.map(lambda x, m=mark: x.reshape(len(m), -1), c) for mark, c in zip(marks, counts, strict=True)
    ]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *[wide.least(count, (1,)) for count in of_layers])


def countable(shape: Sequence[int]) -> bool:
    """True for an array whose entries have an index of two words."""
    lead = _long(shape)
    return math.prod(shape[lead:]) < 2**wide.WORD and math.prod(shape[:lead]) < 2 ** (wide.WORD - 2)


def _highest(kind: Any) -> Any:
    return kind.type(np.iinfo(kind).max)


def _shared(keys: Keys, k: Wide, free: Wide, depths: np.ndarray, order: np.ndarray) -> tuple[jax.Array, Wide, Wide]:
    """What each leaf loses of the k lowest of all: cut[leaves], counts[2, leaves] below it and the next key, k[leaves].

    Args:
      keys: stacks.
      k: how many go, a scalar.
      free: [leaves], how many of each layer may.
      depths: [leaves], how many layers each has.
      order: [leaves], their places in the tree.
    """
    layered, depth = bool((depths > 1).any()), depths.astype(np.uint32)
    limit = wide.times(free, depth) if layered else free
    most = jax.tree.map(lambda x: x[None], limit)

    def below(trials: jax.Array) -> Wide:
        counts = _below(keys, [1] * len(keys), jnp.broadcast_to(trials, (len(trials), len(depth))))
        return wide.minimum(wide.multiple(counts, depth[None]), most) if layered else counts

    def together(trials: jax.Array) -> Wide:
        return jax.tree.map(lambda x: x[:, None], wide.total(below(trials), 1))

    k = jax.tree.map(lambda x: x[None], wide.minimum(k, wide.total(limit, 0)))
    cut, low = _search(together, k, keys[0].dtype, keys[0].dtype.itemsize * 8)
    inside = below(_neighbours(cut))
    lower, upper = (jax.tree.map(lambda x, i=i: x[i], inside) for i in (0, 1))
    # Of the leaves whose count grows at the threshold, those of later places lose the surplus first.
    ties, surplus = wide.minus(upper, lower), wide.minus(k, low)
    later = (order[None] > order[:, None]).astype(np.uint32)  # [leaf, leaf after it]
    before = wide.total(jax.tree.map(lambda x: x[None] * later, ties), 1)
    removed = wide.minimum(wide.rest(surplus, before), ties)
    lost = wide.add(lower, removed)
    return jnp.broadcast_to(cut, len(depth)), inside, wide.quotient(lost, depth) if layered else lost


def _rounded(k: Wide, n: Wide, free: Wide, step: Any) -> Wide:
    """How many of n go instead of k if a multiple of `step` stays, the nearest, the larger one of two; or all n.

    Where the smaller multiple is less than the n - free that may not go, the larger one stays.
    """
    stay = wide.minus(n, k)
    down = wide.multiple(stay, step)
    up = wide.minimum(wide.add(down, wide.of(int(step))), n)
    nearer = ~wide.less(wide.minus(stay, down), wide.minus(up, stay))
    return wide.minus(n, wide.where(nearer | wide.less(down, wide.minus(n, free)), up, down))


def _neighbours(cut: jax.Array) -> jax.Array:
    return jnp.stack([cut, cut + cut.dtype.type(1)])


def _search(
    below: Callable[[jax.Array], Wide], k: Wide, kind: Any, bits: int, *, rare: bool = False
) -> tuple[jax.Array, Wide]:
    """The largest value below which at most k lie, or a smaller one below which k do; and how many lie below it.

    Args:
      below: `below(trials[T, n]) -> counts[T, n]`.
      k: [n] counts, all n searched at the same time.
      kind: the unsigned dtype of the values.
      bits: how many bits they have at most.
      rare: k is mostly 0, which takes no pass.
    """
    digits = np.arange(1, 2**_DIGIT, dtype=kind)[:, None]

    def unsettled(carry: Any) -> jax.Array:
        place, _, low = carry
        return (place >= 0) & ~jnp.all(wide.equal(low, k))

    def narrow(carry: Any) -> Any:
        place, cut, low = carry  # low = #(key < cut) <= k < #(key < cut + 2^(place + _DIGIT)); settled where low = k
        shift = place.astype(kind)
        above = (digits << shift) >> shift != digits  # beyond the last key, in the first pass
        counts = below(cut[None] + (digits << shift))
        fits = ~wide.less(jax.tree.map(lambda x: x[None], k), counts) & ~above
        digit = jnp.sum(fits, axis=0, dtype=kind)  # counts grow with the digit
        chosen = (digits == digit[None]).astype(jnp.uint32)
        reached = jax.tree.map(lambda x: jnp.sum(x * chosen, axis=0, dtype=jnp.uint32), counts)
        settled = wide.equal(low, k)
        cut = jnp.where(settled, cut, cut + (digit << shift))
        return place - _DIGIT, cut, wide.where(settled | (digit == 0), low, reached)

    first = np.int32((bits - 1) // _DIGIT * _DIGIT)
    start = (jnp.asarray(first), jnp.zeros(k.low.shape, kind), jax.tree.map(jnp.zeros_like, k))

    def while_needed() -> Any:
        return jax.lax.while_loop(unsettled, narrow, start)[1:]

    def every_digit() -> Any:  # to see whether a loop goes on, a GPU waits for the host at every turn
        return jax.lax.fori_loop(0, first // _DIGIT + 1, lambda _, carry: narrow(carry), start)[1:]

    gpus = while_needed if rare else every_digit
    return jax.lax.platform_dependent(cuda=gpus, rocm=gpus, default=while_needed)


def _below(keys: Keys, rows: Sequence[int], trials: jax.Array) -> Wide:
    """[trials, rows], how many keys of each row are below each of its trials."""
    return _counted(keys, rows, trials, lambda i, trial: keys[i] < trial)


def _counted(keys: Keys, rows: Sequence[int], trials: jax.Array, mark: Callable[[int, jax.Array], jax.Array]) -> Wide:
    """[trials, rows], how many entries of each row `mark(stack, trial)` marks, in one pass over the stacks."""
    split = [_split(trial, keys, rows) for trial in trials]
    counts = [_tally([mark(i, parts[i]) for parts in split], row) for i, row in enumerate(rows)]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *counts)


def _tally(marks: Keys, row: int) -> Wide:
    """[marks, rows], how many entries of each row are True in each array.

    A reduction with several results is one pass on every backend, and on CPU the only integer reduction that XLA
    vectorizes; across devices it would gather the partial counts instead of adding them up.
    """
    shape = marks[0].shape
    lead = _long(shape[row:])
    axes = tuple(range(row + lead, len(shape)))
    if jax.device_count() == 1 and axes:
        zeros = (np.uint32(0),) * len(marks)
        counts = jnp.stack(jax.lax.reduce(tuple(mark.astype(jnp.uint32) for mark in marks), zeros, _add, axes))
    else:
        counts = jnp.stack([jnp.sum(mark, axis=axes, dtype=jnp.uint32) for mark in marks])
    for axis in range(2, 1 + row):
        counts = _loosened(counts, axis)
    found = wide.word(counts)
    found = wide.total(found, tuple(range(1 + row, 1 + row + lead))) if lead else found
    return jax.tree.map(lambda x: x.reshape(len(marks), -1), found)


def _add(a: Any, b: Any) -> Any:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _tie_ends(keys: Keys, rows: Sequence[int], cut: jax.Array, ties: Wide, removed: Wide) -> list[jax.Array]:
    """The index in each row before which its ties are kept, the latest ones being removed, a word after the other."""
    all_stay = wide.equal(removed, wide.of(0))
    quota = wide.where(all_stay, wide.of(0), wide.minus(ties, removed))
    sizes = [key.shape[row:] for key, row in zip(keys, rows, strict=True)]
    leads = [_long(size) for size in sizes]
    bounds = [max(math.prod(size[:lead]) for size, lead in zip(sizes, leads, strict=True))] * any(leads)
    bounds.append(max(math.prod(size[lead:]) for size, lead in zip(sizes, leads, strict=True)))
    ends: list[jax.Array] = []
    for bound in bounds:

        def below(trials: jax.Array, found: list[jax.Array] = ends) -> Wide:
            # Without the barrier XLA would store the ties of all arrays ahead of the loop.
            known = [_split(x, keys, rows) for x in (jax.lax.optimization_barrier(cut), *found)]

            def mark(i: int, trial: jax.Array) -> jax.Array:
                at, *settled = (parts[i] for parts in known)
                index = _index(keys[i].shape, rows[i], len(bounds))
                same = functools.reduce(jnp.logical_and, map(jnp.equal, index, settled), keys[i] == at)
                return same & (index[len(settled)] < trial)

            return _counted(keys, rows, trials, mark)

        end, low = _search(below, quota, jnp.dtype("uint32"), max(bound - 1, 1).bit_length(), rare=True)
        quota, ends = wide.minus(quota, low), [*ends, end]
    return [jnp.where(all_stay, wide.largest(), end) for end in ends]


def _index(shape: Sequence[int], row: int, words: int) -> list[jax.Array]:
    """The row-major index of every entry within its row, in one word or two, in the rank of the stack.

    An elementwise expression, which a sharded array can compute. Two words are the index over the first axes and that
    over the others.
    """
    lead = row + _long(shape[row:])
    parts = [range(lead, len(shape))] if words == 1 else [range(row, lead), range(lead, len(shape))]
    found = []
    for axes in parts:
        index = jnp.zeros([shape[axis] if axis in axes else 1 for axis in range(len(shape))], jnp.uint32)
        for axis in axes:
            stride = np.uint32(math.prod(shape[axis + 1 : axes.stop]))
            index += jax.lax.broadcasted_iota(jnp.uint32, index.shape, axis) * stride
        found.append(index)
    return found


def _precedes(index: list[jax.Array], end: list[jax.Array]) -> jax.Array:
    """True where the index is below the end, in one word or two."""
    before = index[-1] < end[-1]
    return before if len(end) == 1 else (index[0] < end[0]) | ((index[0] == end[0]) & before)


def _long(shape: Sequence[int]) -> int:
    """How many first axes the high word of an index is over."""
    return wide.first_axes(shape, range(len(shape)))


def _split(values: jax.Array, keys: Keys, rows: Sequence[int]) -> Keys:
    """One value for each row, in the ranks of the stacks."""
    shapes = [key.shape[:row] for key, row in zip(keys, rows, strict=True)]
    ends = list(itertools.accumulate(map(math.prod, shapes), initial=0))
    parts = [jax.lax.slice_in_dim(values, *at) for at in itertools.pairwise(ends)]
    parts = [x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)]
    parts = [functools.reduce(_loosened, range(1, x.ndim), x) for x in parts]
    return [jnp.expand_dims(x, tuple(range(x.ndim, key.ndim))) for x, key in zip(parts, keys, strict=True)]


def _loosened(x: jax.Array, axis: int) -> jax.Array:
    """The same values, laid out over devices in a way of their own along an axis.

    Layers may be on several devices. XLA would lay out their counts and thresholds like them, and gather and permute
    these; a sum with ones and zeros gives every device all of them.
    """
    size, behind = x.shape[axis], x.ndim - axis - 1
    own = np.eye(size, dtype=x.dtype).reshape(*[1] * axis, size, size, *[1] * behind)
    return jnp.sum(jnp.expand_dims(x, axis) * own, axis=axis + 1, dtype=x.dtype)


def _by_row(values: jax.Array, keys: Keys, rows: Sequence[int]) -> jax.Array:
    """One value for each leaf, repeated for the layers of each."""
    if max(rows) == 1:
        return values
    parts = _split(values, keys, [1] * len(keys))
    depths = [math.prod(key.shape[1:row]) for key, row in zip(keys, rows, strict=True)]
    repeated = [jnp.broadcast_to(x.reshape(-1, 1), (x.size, d)).reshape(-1) for x, d in zip(parts, depths, strict=True)]
    return jnp.concatenate(repeated)
