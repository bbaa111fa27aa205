"""Claims: a chain's cost grows in proportion to the parameters.

All in one process, in turn, random data; ratios. `--only` picks of two parts:
"step": the update beside optax alone and beside torch, where torch 2.13.0 is installed (eager and `torch.compile`:
clip_grad_norm_, Adam, clamp, mask, rounding with a given step and without a carry, so that torch does less); medians.
"growth": 1e5 to 1e8 parameters in 4 leaves, ten steps in a call, the least of several calls, with a figure.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import pathlib
import statistics
import time

import jax
import numpy as np
import optax

import clipjax


def weights():
    """The transformations behind adam, as they are once the schedule has ended."""
    prune = clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.9, 3, 2), every=1, stop=2)
    return clipjax.clamp_weights(0.1), prune, clipjax.fake_quantize(4, every=1, stop=2)


ADAM = optax.adam(1e-3)
CHAIN = optax.chain(clipjax.clip(0.01), ADAM, *weights())
NORM_CHAIN = optax.chain(clipjax.clip_norm(1.0), ADAM, *weights())
STEPS = {
    "optax: adam": ADAM,
    "optax: clip_by_global_norm, adam": optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "clip_norm, adam": optax.chain(clipjax.clip_norm(1.0), ADAM),
    "clip, adam, clamp, prune, quantize": CHAIN,
    "clip_norm, adam, clamp, prune, quantize": NORM_CHAIN,
}


def update(tx, refresh=False, times=1):
    """A donated, jitted update and application, without refreshes; several of them in one call."""
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        def once(_, now):
            updates, state = tx.update(grads, now[1], now[0], refresh=refresh)
            return optax.apply_updates(now[0], updates), state

        return jax.lax.fori_loop(0, times, once, (params, state)) if times > 1 else once(0, (params, state))

    return step


def make(size, leaves):
    """Params of about this size, and gradients."""
    side = round(math.sqrt(size / leaves))
    keys = jax.random.split(jax.random.key(0), leaves)
    params = {f"layer{i}": {"kernel": 0.05 * jax.random.normal(k, (side, side))} for i, k in enumerate(keys)}
    return params, jax.tree.map(lambda x: 0.1 * x, params)


class Run:
    """An update that is run again and again on its own params and state."""

    def __init__(self, tx, size, leaves, times=1):
        """Past the last refresh, and compiled, with several steps in a call."""
        self.params, self.grads = make(size, leaves)
        self.state = tx.init(self.params)
        self.step, self.times = update(tx, None), 1
        for _ in range(4):
            self()
        self.step, self.times = update(tx, times=times), times
        self()

    def __call__(self):
        """Seconds of one step."""
        begin = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, self.grads))
        return (time.perf_counter() - begin) / self.times


def torch_runs(size, leaves):
    """The same in torch, each a function that returns the seconds of one step."""
    import torch

    def build(wrap, **options):
        tensors = [torch.from_numpy(np.array(p)) for p in jax.tree.leaves(make(size, leaves)[0])]
        masks = [(torch.rand_like(t) < 0.1).to(t.dtype) for t in tensors]
        for t in tensors:
            t.requires_grad_()
            t.grad = 0.1 * t.detach()
        adam = torch.optim.Adam(tensors, lr=1e-3, **options)

        def once():
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            adam.step()
            with torch.no_grad():
                for t, mask in zip(tensors, masks, strict=True):
                    t.clamp_(-0.1, 0.1)
                    t.mul_(mask)
                    t.div_(0.0143).round_().clamp_(-7, 7).mul_(0.0143)  # fake_quantize_per_tensor_affine takes longer

        once = wrap(once)

        def timed():
            begin = time.perf_counter()
            once()
            return time.perf_counter() - begin

        for _ in range(4):
            timed()
        return timed

    runs = {}
    for name, wrap, options in (
        ("torch eager, foreach", lambda f: f, {"foreach": True}),
        ("torch eager, fused", lambda f: f, {"fused": True}),
        ("torch.compile", torch.compile, {"foreach": True}),
    ):
        try:
            runs[name] = build(wrap, **options)
        except Exception as error:
            print(f"{name}: does not run here ({type(error).__name__})")
    return runs


def medians(runs, repeats):
    """Median seconds of each, in turns of four steps of which the first is not counted."""
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name] += [run() for _ in range(4)][1:]
    return {name: statistics.median(found) for name, found in times.items()}


def side_by_side(repeats):
    """Print the step of each chain, beside torch's."""
    size, leaves = 1.6e7, 16
    runs = {name: Run(tx, size, leaves) for name, tx in STEPS.items()}
    if importlib.util.find_spec("torch"):
        runs |= torch_runs(size, leaves)
    else:
        print("torch is not installed: `pip install torch==2.13.0` lets it join.")
    found = medians(runs, repeats)
    ours = found["clip_norm, adam, clamp, prune, quantize"]
    print(f"\n| {size:.1e} params, {leaves} leaves | ms | x adam | x our chain |\n| --- | ---: | ---: | ---: |")
    for name, seconds in found.items():
        print(f"| {name} | {1e3 * seconds:.1f} | {seconds / found['optax: adam']:.2f} | {seconds / ours:.2f} |")


def growth(repeats, folder):
    """Print and draw the step's time against the parameters: in logarithms its slope is 1 where it is proportional."""
    sizes, seconds = (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8), {"adam": [], "whole chain": []}
    print("\n| params | adam ms | whole chain ms | ns a parameter |\n| ---: | ---: | ---: | ---: |")
    for size in sizes:
        for name, tx in (("adam", ADAM), ("whole chain", CHAIN)):
            run = Run(tx, size, 4, times=10)
            seconds[name].append(min(run() for _ in range(repeats)))
            del run
        a, c = seconds["adam"][-1], seconds["whole chain"][-1]
        print(f"| {size:.0e} | {1e3 * a:.3f} | {1e3 * c:.3f} | {1e9 * c / size:.2f} |", flush=True)
    slopes = {name: np.polyfit(np.log(sizes), np.log(found), 1)[0] for name, found in seconds.items()}
    draw(sizes, seconds, slopes, folder)
    print("\nslope " + ", ".join(f"{name} {slope:.3f}" for name, slope in slopes.items()))
    ok = abs(slopes["whole chain"] - 1) <= 0.05
    print(f"whole chain: slope {slopes['whole chain']:.3f} (1.0 within 0.05): {'holds' if ok else 'FAILS'}")


def draw(sizes, seconds, slopes, folder):
    """The log-log figure."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for name, found in seconds.items():
        axes.loglog(sizes, [1e3 * s for s in found], "o-", label=f"{name}, slope {slopes[name]:.2f}")
    axes.set(xlabel="parameters", ylabel="ms a step (update and application)")
    axes.legend()
    figure.savefig(pathlib.Path(folder, "scale.png"), dpi=110)


def main() -> None:
    """Print the parts and their verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["step", "growth"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", default="out", help="where the figure goes")
    options = parser.parse_args()
    pathlib.Path(options.folder).mkdir(exist_ok=True)
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].platform}")
    if "step" in options.only:
        side_by_side(options.repeats)
    if "growth" in options.only:
        growth(options.repeats, options.folder)


if __name__ == "__main__":
    main()
