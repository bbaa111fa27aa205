"""Claim: half of all units cut out by `shrink` give the same outputs with fewer FLOPs. In how much less time?

A CNN, an MLP and a GPT (`analyzing.gpt`) of plain functions, random weights, f32. `analyze` finds the groups; half of
all units, at random and over all groups of more than 8 units together, so that heads are left, are set to zero and cut:
as they come, and with `round_to=8`, which leaves multiples of 8 in every group. FLOPs are XLA's own count of the
compiled program. Times are medians of the three in turns, dense / cut, of a forward pass and of a train step with Adam.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import analyzing
import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipjax
from clipjax.structures import unit

ADAM = optax.adam(1e-3)


def conv(p, x):
    return (
        jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        + p["bias"]
    )


def cnn(params, x):
    """Three convolutions, each with a pool behind it, and two dense layers."""
    for p in params["convs"]:
        x = jax.nn.relu(conv(p, x))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return mlp(params["dense"], x.reshape(len(x), -1))


def mlp(layers, x):
    for p in layers[:-1]:
        x = jax.nn.relu(x @ p["kernel"] + p["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def layer(*shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32), "bias": jax.ShapeDtypeStruct(shape[-1:], jnp.float32)}


def dense(*widths):
    return [layer(*pair) for pair in itertools.pairwise(widths)]


CONVS = [layer(3, 3, *pair) for pair in ((3, 64), (64, 128), (128, 128))]
MODELS = {  # the function, shapes of its params, the shape of a batch
    "CNN 64 128 128, 256": (cnn, {"convs": CONVS, "dense": dense(4 * 4 * 128, 256, 10)}, (64, 32, 32, 3)),
    "MLP 1024 1024": (mlp, dense(784, 1024, 1024, 10), (256, 784)),
    "GPT, 4 layers of 256, 1024": (
        analyzing.gpt,
        analyzing.gpt_params(4, d=256, heads=8, kv_heads=4, head=32, inner=1024, tokens=512),
        (8, 128),
    ),
}


def drawn(shapes, batch):
    """Random params and a random batch: tokens where it has two axes and the params are a GPT's."""
    rng = np.random.default_rng(0)

    def values(path, leaf):
        name = jax.tree_util.keystr(path)
        if leaf.ndim > 1:
            fan_in = (
                1 if "embedding" in name else np.prod(leaf.shape[: -1 if name.endswith(("kernel']", "out']")) else 1])
            )
            return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)
        return jnp.full(leaf.shape, 1.0 if "norm" in name else 0.1, jnp.float32)

    params = jax.tree_util.tree_map_with_path(values, shapes)
    tokens = isinstance(shapes, dict) and "embedding" in shapes
    x = rng.integers(0, len(params["embedding"]), batch) if tokens else rng.normal(size=batch)
    return params, jnp.asarray(x, jnp.int32 if tokens else jnp.float32)


def cut(apply, params, groups, x, round_to):
    """Half of the units cut, at random; the outputs are compared with those of zeros."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    scores = treedef.unflatten([jax.random.uniform(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
    masks = clipjax.make_mask(scores, 0.5, structure=unit(groups=groups, round_to=round_to))
    zeroed = jax.tree.map(lambda w, m: w if m is None else w * m, params, masks, is_leaf=lambda m: m is None)
    return clipjax.shrink(zeroed, groups, round_to=round_to, verify=(apply, x))


def programs(apply, params, x):
    """A compiled forward pass and a compiled train step, as calls without arguments, and the FLOPs of each."""

    def step(params, state, x):
        updates, state = ADAM.update(jax.grad(lambda p: jnp.mean(apply(p, x) ** 2))(params), state, params)
        return optax.apply_updates(params, updates), state

    state = ADAM.init(params)
    compiled = jax.jit(apply).lower(params, x).compile(), jax.jit(step).lower(params, state, x).compile()
    flops = [program.cost_analysis()["flops"] for program in compiled]
    return [lambda: compiled[0](params, x), lambda: compiled[1](params, state, x)], flops


def medians(calls, repeats):
    """The median time of each call, taken in turns."""
    times = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, mine in zip(calls, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            mine.append(time.perf_counter() - begin)
    return [statistics.median(mine[1:]) for mine in times]


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
    print(
        "| model | cut | params left | widths | forward: FLOPs, x | time, x | train step: FLOPs, x | time, x | change |"
    )
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    gained = []
    for name, (apply, shapes, batch) in MODELS.items():
        params, x = drawn(shapes, batch)
        groups = [group for group in clipjax.analyze(apply, params, x).groups if group.units > 8]
        found = {n: cut(apply, params, groups, x, n) for n in (None, 8)}
        made = [programs(apply, variables, x) for variables in (params, *(s.variables for s in found.values()))]
        whole = sum(leaf.size for leaf in jax.tree.leaves(params))
        times = [medians([calls[kind] for calls, _ in made], options.repeats) for kind in (0, 1)]
        for i, (n, shrunk) in enumerate(found.items(), start=1):
            left = sum(leaf.size for leaf in jax.tree.leaves(shrunk.variables)) / whole
            cells = [
                cell
                for kind in (0, 1)
                for cell in (f"{made[0][1][kind] / made[i][1][kind]:.1f}", f"{times[kind][0] / times[kind][i]:.2f}")
            ]
            firsts = [(group.members[0].path, group.members[0].axis) for group in groups]
            sizes = {shrunk.widths.get(first, shrunk.widths.get(first[0])) for first in firsts}
            widths = " ".join(map(str, sorted(sizes)))
            how = "as they come" if n is None else f"`round_to={n}`"
            print(f"| {name} | {how} | {left:.0%} | {widths} | {' | '.join(cells)} | {shrunk.change:.0e} |")
            if n:
                gained.append(min(times[kind][0] / times[kind][i] for kind in (0, 1)))
    verdict = "holds" if min(gained) > 1 else "FAILS"
    print(f"With `round_to=8` all are faster than dense, forward and step: {verdict}, {min(gained):.2f} x at least")


if __name__ == "__main__":
    main()
