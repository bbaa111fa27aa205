"""Claims: outside of jit nothing is compiled twice; a clip costs at most 10 times Optax's, a constraint 20 times adam.

Notebooks begin without `jax.jit`. All variants in one process, in turns of one update of each; ratios of medians, of
updates behind the first, refreshes among them. "programs" are those compiled after the first update, "MB" what the
process has grown by in 1,000 more updates of the chain.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import optax

import clipjax

COMPILED = "/jax/core/compile/backend_compile_duration"
RAMP = optax.polynomial_schedule(0.0, 0.8, 3, 100)
CHAIN = (
    clipjax.clip_norm(1.0),
    optax.adam(1e-2),
    clipjax.clamp_weights(0.5),
    clipjax.prune_mask(RAMP, every=10, stop=100),
    clipjax.fake_quantize(4, every=10),
)
# peer, times the peer's update at most
VARIANTS = {
    "optax.adam": (optax.adam(1e-2), None, 0),
    "optax.clip_by_global_norm": (optax.clip_by_global_norm(1.0), None, 0),
    "clip_norm": (CHAIN[0], "optax.clip_by_global_norm", 10),
    "skip_spikes(sgd)": (clipjax.skip_spikes(optax.sgd(1e-2), 1.0), "optax.clip_by_global_norm", 10),
    "clamp_weights": (CHAIN[2], "optax.adam", 20),
    "project(max_norm)": (clipjax.project(clipjax.projections.max_norm(1.0)), "optax.adam", 20),
    "prune_mask": (CHAIN[3], "optax.adam", 20),
    "prune_mask, every update": (clipjax.prune_mask(0.5, every=1), "optax.adam", 20),
    "fake_quantize": (clipjax.fake_quantize(4, every=10), "optax.adam", 20),
    "fake_quantize, every update": (clipjax.fake_quantize(4, every=1), "optax.adam", 20),
    "README's chain": (optax.chain(*CHAIN), "optax.adam", 20),
}


def resident() -> float:
    """MB of memory that the process has; the most that it ever had where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class Run:
    """One transformation, its params, and the seconds of its updates."""

    def __init__(self, tx: optax.GradientTransformation, params: optax.Params) -> None:
        """Nothing has run yet."""
        self.tx, self.params, self.state = tx, params, tx.init(params)
        self.grads = jax.tree.map(lambda p: 0.01 * p + 0.01, params)
        self.times: list[float] = []

    def update(self) -> None:
        """One update, timed without its application."""
        begin = time.perf_counter()
        updates, self.state = jax.block_until_ready(self.tx.update(self.grads, self.state, self.params))
        self.times.append(time.perf_counter() - begin)
        self.params = optax.apply_updates(self.params, updates)


def main() -> None:
    """Print the table and the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, nargs="*", default=[4, 20], help="half of them kernels")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    programs: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: programs.append(event))
    for leaves in options.leaves:
        keys = [jax.random.key(i) for i in range(leaves // 2)]
        params = {
            f"layer{i}": {"kernel": jax.random.normal(k, (16, 8)), "bias": jnp.zeros(8)} for i, k in enumerate(keys)
        }
        runs = {name: Run(tx, params) for name, (tx, _, _) in VARIANTS.items()}
        for run in runs.values():
            run.update()
        again = dict.fromkeys(runs, 0)
        for _ in range(options.repeats):
            for name, run in runs.items():
                programs.clear()
                run.update()
                again[name] += programs.count(COMPILED)
        chain = runs["README's chain"]
        for _ in range(500):  # the heap settles
            chain.update()
        before = resident()
        for _ in range(1000):
            chain.update()
        grown = resident() - before
        print(f"jax {jax.__version__}, {jax.devices()[0].platform}, {leaves} leaves")
        print(f"{'variant':30s} {'first, s':>9s} {'ms':>8s} {'ratio':>7s} {'programs':>9s}")
        for name, (_, peer, most) in VARIANTS.items():
            first, *rest = runs[name].times[: options.repeats + 1]
            row = f"{name:30s} {first:9.2f} {1e3 * statistics.median(rest):8.2f}"
            if peer is None:
                print(row)
                continue
            ratio = statistics.median(rest) / statistics.median(runs[peer].times[1:])
            holds = ratio <= most and not again[name]
            print(f"{row} {ratio:7.2f} {again[name]:9d}  at most {most} x {peer}: {'holds' if holds else 'FAILS'}")
        verdict = "holds" if grown <= 10 else "FAILS"
        print(f"1,000 more updates of the chain: {grown:.1f} MB more, at most 10: {verdict}")


if __name__ == "__main__":
    main()
