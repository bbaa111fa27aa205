"""What digits.py measures on the params that a training leaves, and the promises that it asserts of them."""

from typing import Any, NamedTuple

import jax
import numpy as np

import clipjax


class Promise(NamedTuple):
    """What a row's chain guarantees of its final params. ``None`` promises nothing."""

    bound: float | None = None
    sparsity: float | None = None
    units: float | None = None
    bits: int | None = None
    interval: tuple[float, float] | None = None


def kernels(params: Any) -> list[np.ndarray]:
    """Returns the arrays of rank >= 2, which pruning and quantizing pick by default."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]


def sparsity(params: Any) -> float:
    """Returns the fraction of exact zeros among the kernels' entries."""
    picked = kernels(params)
    return sum(int((kernel == 0).sum()) for kernel in picked) / sum(kernel.size for kernel in picked)


def units(params: Any) -> tuple[int, int]:
    """Counts the output units whose incoming weights are all zero, and all the units."""
    dead = [(kernel == 0).reshape(-1, kernel.shape[-1]).all(0) for kernel in kernels(params)]
    return sum(int(leaf.sum()) for leaf in dead), sum(leaf.size for leaf in dead)


def file_size(params: Any) -> int:
    """Counts the bytes of the file that holds the params."""
    return len(clipjax.pack(params))


def check(params: Any, opt_state: Any, promise: Promise) -> str:
    """Asserts everything that `promise` says of the final params, and returns in words what held."""
    held = []
    if promise.bound is not None:
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(params))
        assert largest <= np.float32(promise.bound), f"a weight of {largest} exceeds {promise.bound}"
        held.append(f"max |w| {largest:.4f} <= {promise.bound}")
    if promise.sparsity is not None:
        total = sum(kernel.size for kernel in kernels(params))
        zeros, wanted = round(sparsity(params) * total), round(promise.sparsity * total)
        assert zeros >= wanted, f"{zeros} zeros, {wanted} promised"
        held.append(f"{zeros} >= {wanted} exact zeros")
    if promise.units is not None:
        removed, total = units(params)
        assert removed >= promise.units, f"{removed} units removed, {promise.units} promised"
        held.append(f"{removed} of {total} units exactly zero")
    if promise.bits is not None:
        held.append(_check_grid(params, opt_state, promise))
    return ", ".join(held)


def _check_grid(params: Any, opt_state: Any, promise: Promise) -> str:
    """Asserts that every kernel is codes * step bit for bit, with few enough levels, inside the interval."""

    def is_quantized(leaf):
        return isinstance(leaf, clipjax.Quantized)

    leaves = jax.tree.leaves(clipjax.quantized(params, opt_state), is_leaf=is_quantized)
    pairs = [pair for pair in zip(leaves, jax.tree.leaves(params), strict=True) if is_quantized(pair[0])]
    assert len(pairs) == len(kernels(params)), f"{len(pairs)} leaves quantized, {len(kernels(params))} kernels"
    for grid, leaf in pairs:
        codes, values = np.asarray(grid.codes), clipjax.dequantize(grid)
        assert (np.asarray(values) == np.asarray(leaf)).all(), "a weight is off its grid"
        assert np.abs(codes).max() < 2 ** (promise.bits - 1), f"code {np.abs(codes).max()} needs more bits"
        if promise.interval is not None:
            low, high = promise.interval
            assert low <= np.min(leaf) and np.max(leaf) <= high, f"a unit leaves {promise.interval}"
    inside = "" if promise.interval is None else " inside [{}, {}]".format(*promise.interval)
    return f"{len(pairs)} kernels on {promise.bits}-bit grids{inside}"
