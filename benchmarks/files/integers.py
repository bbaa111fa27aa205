"""Claim: codes and steps from the file give the float forward to 1e-5 relative, with integer products alone (D4).

`load(dequantize=False)` returns int8 codes and a step a column. Activations are put on 8 bits too, so that the product
of a layer is int8 x int8 -> int32, times two steps. It stands beside the float product of the same values, and beside
int8 weights that are widened on the fly; all compiled, in turns; ratios of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import clipjax
from clipjax import steps


@jax.jit
def floats(x, weight):
    """What the dequantized file computes."""
    return jnp.dot(x, weight, precision="highest")


@jax.jit
def integers(x, x_step, codes, step):
    """int8 x int8 -> int32, then the steps."""
    return jnp.dot(x, codes, preferred_element_type=jnp.int32).astype(jnp.float32) * (x_step * step)


@jax.jit
def widened(x, codes, step):
    """Float activations, int8 weights widened in the product."""
    return jnp.dot(x, codes.astype(jnp.float32), precision="highest") * step


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    worst = 0.0
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, weights {options.side} x {options.side}")
    heads = ("float ms", "int8 ms", "/ float", "widened ms", "/ float", "error")
    print(f"{'batch':>5s} " + " ".join(f"{head:>10s}" for head in heads))
    for batch in (1, 16, 128):
        kernel = jnp.asarray(rng.normal(size=(options.side, options.side)), jnp.float32)
        step = clipjax.choose_step(kernel, 8, step=steps.mse(), axis=-1)
        kernel = clipjax.dequantize(clipjax.quantize(kernel, step, 8), step)
        data = clipjax.pack({"kernel": kernel})
        weight, q = clipjax.unpack(data)["kernel"], clipjax.unpack(data, dequantize=False)["kernel"]
        assert q.codes.dtype == jnp.int8 and (weight == kernel).all()
        x = jnp.asarray(rng.normal(size=(batch, options.side)), jnp.float32)
        x_step = clipjax.choose_step(x, 8, step=steps.absmax())
        x_codes = clipjax.quantize(x, x_step, 8)
        x = clipjax.dequantize(x_codes, x_step)
        runs = {
            "float": lambda x=x, w=weight: floats(x, w),
            "int8": lambda x=x_codes, s=x_step, q=q: integers(x, s, q.codes, q.step),
            "widened": lambda x=x, q=q: widened(x, q.codes, q.step),
        }
        want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(options.repeats + 1):
            for name, run in runs.items():
                begin = time.perf_counter()
                jax.block_until_ready(run())
                times[name] += [time.perf_counter() - begin] * bool(repeat)
        error = max(np.linalg.norm(run() - want) / np.linalg.norm(want) for run in runs.values())
        worst = max(worst, error)
        t = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        int8, wide = t["int8"] / t["float"], t["widened"] / t["float"]
        print(
            f"{batch:5d} {t['float']:9.2f} {t['int8']:9.2f} {int8:8.2f} {t['widened']:11.2f} {wide:8.2f} {error:9.1e}"
        )
    print(f"largest relative error = {worst:.1e} (at most 1e-5): {'holds' if worst <= 1e-5 else 'FAILS'}")


if __name__ == "__main__":
    main()
