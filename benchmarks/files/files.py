"""Claims: save and load take 20 million params a second or more; a file is at most 1.02 x the entropy bound + 1 KB.

Nets of four square f32 or bf16 leaves, whose values are what training leaves: dense floats, pruned floats, k * s with
one step or one a column, dense or 90 % zeros, and zeros in rows and columns of unlike density, as dead inputs and dead
units make them. The bound is the order-0 entropy of each leaf's bit patterns with each distinct pattern once. Times are
medians, to and from a file in the page cache, `fsync` included; every load is compared bit for bit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import clipjax
from clipjax import steps


def dense(rng, side):
    """What no constraint shapes: nothing to save."""
    return rng.normal(size=(side, side)).astype(np.float32)


def pruned(rng, side):
    """Floats, 90 % zeros."""
    return np.where(rng.random((side, side)) < 0.9, 0, dense(rng, side)).astype(np.float32)


def quantized(bits, axis=None, dtype=np.float32, zeros=0.0):
    """Values k * s with the step that `fake_quantize` takes, optionally a share of zeros."""

    def make(rng, side):
        x = jnp.asarray(np.where(rng.random((side, side)) < zeros, 0, dense(rng, side)).astype(np.float32))
        step = clipjax.choose_step(x, bits, step=steps.mse(), axis=axis)
        return np.asarray(clipjax.dequantize(clipjax.quantize(x, step, bits), step, dtype))

    return make


def lines(rng, side):
    """4 bits, 90 % zeros, a fifth of the rows dead, columns of unlike density."""
    density = 0.125 * rng.gamma(2, 0.5, (1, side)) * (rng.random((side, 1)) > 0.2)
    x = quantized(4)(rng, side)
    return np.where(rng.random((side, side)) < density, x, np.float32(0))


NETS = {
    "dense f32": dense,
    "dense bf16": lambda rng, side: dense(rng, side).astype(jnp.bfloat16),
    "pruned 90 %": pruned,
    "4 bit": quantized(4),
    "8 bit": quantized(8),
    "4 bit, a step a column": quantized(4, axis=-1),
    "4 bit, bf16": quantized(4, dtype=jnp.bfloat16),
    "pruned 90 %, 4 bit": quantized(4, zeros=0.9),
    "pruned by rows and columns, 4 bit": lines,
}


def seconds(call, repeats):
    """The median time of a call, and what it returns."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times), result


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1600, help="of the four leaves")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, 4 leaves of {options.side} x {options.side}")
    print(f"{'':34s} {'raw MB':>8s} {'file MB':>8s} {'bound MB':>9s} {'/ bound':>8s} {'save M/s':>9s} {'load M/s':>9s}")
    slowest, worst, below = {"save": np.inf, "load": np.inf}, 0.0, False
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "net")
        for name, make in NETS.items():
            net = {f"layer{i}": {"kernel": jnp.asarray(make(rng, options.side))} for i in range(4)}
            million = sum(x.size for x in jax.tree.leaves(net)) / 1e6
            save, _ = seconds(lambda net=net: clipjax.save(path, net), options.repeats)
            load, back = seconds(lambda: clipjax.load(path), options.repeats)
            for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(back), strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), "a bit is lost"
            total, size = clipjax.summarize(net).to_dict()["total"], os.path.getsize(path)
            bound = total["entropy_bytes"]
            columns = f"{total['bytes'] / 1e6:8.2f} {size / 1e6:8.3f} {bound / 1e6:9.3f} {size / bound:8.4f}"
            print(f"{name:34s} {columns} {million / save:9.1f} {million / load:9.1f}")
            slowest = {"save": min(slowest["save"], million / save), "load": min(slowest["load"], million / load)}
            worst, below = max(worst, (size - 1024) / bound), below or size < bound
    for name, speed in slowest.items():
        print(f"slowest {name}: {speed:.1f} million params/s (at least 20): {'holds' if speed >= 20 else 'FAILS'}")
    print(f"largest (file - 1 KB) / bound = {worst:.4f} (at most 1.02): {'holds' if worst <= 1.02 else 'FAILS'}")
    print(f"below the bound where rows and columns differ: {'holds' if below else 'FAILS'}")


if __name__ == "__main__":
    main()
