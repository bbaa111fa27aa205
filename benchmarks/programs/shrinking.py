"""Claim: half of all units pruned, then cut out by `shrink`, give the same outputs with fewer FLOPs. In less time?

Two networks on scikit-learn's digits, enlarged to 32 x 32: a CNN with BatchNorm and a flattened Dense, and residual
blocks. Each trains with `prune_mask(structure=unit(groups=...))` and is cut by the same groups. FLOPs are XLA's own
count; times are medians of whole and small in turns. The last line is `shrink`'s error for a unit with a bias.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import clipjax
from clipjax.structures import unit


def norm(name: str, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)


class Cnn(nn.Module):
    """Two convolutions, each normalized, and two dense layers."""

    widths: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, x, train=False):
        """Maps images f32[n, height, width, 1] to logits f32[n, 10]."""
        for i, width in enumerate(self.widths[:2]):
            x = nn.Conv(width, (3, 3), name=f"conv{i}")(x)
            x = nn.max_pool(nn.relu(norm(f"norm{i}", train)(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.widths[2], name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="logits")(x)


class Residual(nn.Module):
    """A stem and two residual blocks: the widths are the stream's and those inside the blocks."""

    widths: tuple[int, ...] = (32, 32, 32)

    @nn.compact
    def __call__(self, x, train=False):
        """Maps images f32[n, height, width, 1] to logits f32[n, 10]."""
        x = nn.Conv(self.widths[0], (3, 3), strides=2, name="stem")(x)
        for i, width in enumerate(self.widths[1:]):
            y = nn.relu(norm(f"norm{i}", train)(nn.Conv(width, (3, 3), name=f"in{i}")(x)))
            x = nn.relu(x + nn.Conv(self.widths[0], (3, 3), name=f"out{i}")(y))
        return nn.Dense(10, name="logits")(x.mean(axis=(1, 2)))


def owned(name: str, normed: str | None, then: dict[str, int]) -> dict[str, int]:
    """The group of a layer's units: its kernel and bias, the BatchNorm behind it, and who reads them."""
    group = {f"{name}/kernel": -1, f"{name}/bias": 0} | then
    return group | {f"{normed}/{x}": 0 for x in ("scale", "bias", "mean", "var") if normed}


GROUPS: dict[type[nn.Module], list[dict[str, int]]] = {
    Cnn: [
        owned("conv0", "norm0", {"conv1/kernel": 2}),
        owned("conv1", "norm1", {"hidden/kernel": 0}),
        owned("hidden", None, {"logits/kernel": 0}),
    ],
    Residual: [
        owned("stem", None, {"logits/kernel": 0})
        | {f"{kind}{i}/{x}": a for i in (0, 1) for kind, x, a in (("out", "kernel", -1), ("out", "bias", 0))}
        | {f"in{i}/kernel": 2 for i in (0, 1)},
        *(owned(f"in{i}", f"norm{i}", {f"out{i}/kernel": 2}) for i in (0, 1)),
    ],
}


def trained(model: nn.Module, groups: list[dict[str, int]], x: jax.Array, y: jax.Array, steps: int) -> Any:
    """Variables and optimizer state after some steps, half of the units of all groups gone."""
    variables = model.init(jax.random.key(0), x[:1])
    ramp = optax.polynomial_schedule(0.0, 0.5, 3, steps // 2)
    mask = clipjax.prune_mask(ramp, every=10, stop=steps // 2, structure=unit(groups=groups))
    tx = optax.chain(optax.adamw(2e-3), mask)

    def step(carry, key):
        params, stats, state = carry
        batch = jax.random.randint(key, (64,), 0, len(x))

        def loss_fn(params):
            seen = {"params": params, "batch_stats": stats}
            logits, new = model.apply(seen, x[batch], train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean(), new["batch_stats"]

        grads, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    carry = variables["params"], variables["batch_stats"], tx.init(variables["params"])
    once = jax.jit(step)  # not in a scan, where XLA's CPU convolutions are many times slower
    for key in jax.random.split(jax.random.key(1), steps):
        carry = once(carry, key)
    params, stats, state = carry
    return {"params": params, "batch_stats": stats}, state


def milliseconds(calls: list[Any], repeats: int) -> list[float]:
    """The median time of each call, taken in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, mine in zip(calls, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            mine.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(mine) for mine in times]


def main() -> None:
    """Print the table and the refusal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    small_images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
    x, y = jax.image.resize(small_images, (len(images), 32, 32, 1), "bilinear"), jnp.asarray(labels)
    print(f"jax {jax.__version__}, {jax.devices()[0].platform}, a batch of 64")
    print("| network | units | params | MFLOP a batch | ms a batch | accuracy | largest difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for kind, groups in GROUPS.items():
        variables, state = trained(kind(), groups, x, y, options.steps)
        less, _, widths = clipjax.shrink(variables, groups, state)
        models = kind(), kind(tuple(widths[next(iter(group))] for group in groups))
        trees = variables, less
        programs = [jax.jit(m.apply).lower(v, x[:64]).compile() for m, v in zip(models, trees, strict=True)]
        calls = [lambda p=p, v=v: p(v, x[:64]) for p, v in zip(programs, trees, strict=True)]
        whole, cut = (np.asarray(m.apply(v, x)) for m, v in zip(models, trees, strict=True))
        apart = [0.0, float(np.abs(whole - cut).max() / np.abs(whole).max())]
        assert apart[1] < 1e-5, apart
        cost = [program.cost_analysis()["flops"] / 1e6 for program in programs]
        times = milliseconds(calls, options.repeats)
        for i, out in enumerate((whole, cut)):
            size = sum(leaf.size for leaf in jax.tree.leaves(trees[i]["params"]))
            right = float((out.argmax(-1) == labels).mean())
            name = f"{kind.__name__}, {('whole', 'shrunk')[i]}"
            print(
                f"| {name} | {' '.join(map(str, models[i].widths))} | {size:,} | {cost[i]:.1f} | {times[i]:.2f}"
                f" | {right:.3f} | {apart[i]:.1e} |"
            )
        print(f"{kind.__name__}: {cost[0] / cost[1]:.1f} x fewer FLOPs, {times[0] / times[1]:.1f} x less time")
    group = GROUPS[Residual][1]
    name = next(iter(group)).split("/")[0]
    variables["params"][name]["bias"] = jnp.ones_like(variables["params"][name]["bias"])
    try:
        clipjax.shrink(variables, [group])
    except ValueError as error:
        print(f"a living bias: ValueError: {error}")
    else:
        raise SystemExit("shrink cut a unit whose bias lives on")


if __name__ == "__main__":
    main()
