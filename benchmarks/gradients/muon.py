"""Question: does a clip of the global norm stall Muon, as Megatron-LM 5394 reports, and what helps?

    python benchmarks/gradients/muon.py [--times 1e11]

Two towers of one model, 16-64-1, learn from the same inputs. The targets of the first are in units that make its
gradients some 1e11 times larger than the other's, as happens where one layer has far larger gradients than the rest.
Muon does not mind: it makes each matrix of its gradient orthogonal, whatever its size. A clip of the norm of all
gradients divides those of the second tower by 1e11 too, far below the eps that Muon adds when it normalizes and Adam
adds when it divides.

Printed is what is left of the second tower's loss after 300 updates, over the variance of its targets, mean and
standard deviation of five seeds; and the size of the updates of its first matrix, the median over the training. A tower
stalls where they are less than a hundredth of those without a clip.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clipjax
from clipjax import thresholds

STEPS, SEEDS = 300, 5
OPTIMIZERS = {"Muon": lambda rate: optax.contrib.muon(rate), "AdamW": optax.adamw}
RATES = {"Muon": 0.02, "AdamW": 3e-3}
CLIPS = {
    "no clip": optax.identity(),
    "optax.clip_by_global_norm(1)": optax.clip_by_global_norm(1.0),
    "clip_norm(1)": clipjax.clip_norm(1.0),
    'clip_norm(1, per="leaf")': clipjax.clip_norm(1.0, per="leaf"),
    'clip_norm(ema_ratio, per="leaf")': clipjax.clip_norm(thresholds.ema_ratio(), per="leaf"),
    'scale_to_norm(1, per="leaf")': clipjax.scale_to_norm(1.0, per="leaf"),
}


def tower(params: Any, x: jax.Array) -> jax.Array:
    """Two matrices."""
    return jnp.tanh(x @ params["first"]) @ params["second"]


def training(tx: optax.GradientTransformation, times: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The share of the second tower's variance that is left, and the median of its first matrix's updates, rms."""
    inputs, *draws = jax.random.split(key, 6)
    x = jax.random.normal(inputs, (512, 16))

    def init(key: jax.Array) -> dict[str, jax.Array]:
        first, second = jax.random.split(key)
        shapes = {"first": (first, (16, 64)), "second": (second, (64, 1))}
        return {name: jax.random.normal(k, shape) / shape[0] ** 0.5 for name, (k, shape) in shapes.items()}

    wanted = {"large": times * tower(init(draws[0]), x), "small": tower(init(draws[1]), x)}
    params = {"large": init(draws[2]), "small": init(draws[3])}

    def losses(params: Any) -> dict[str, jax.Array]:
        return {name: jnp.mean((tower(params[name], x) - wanted[name]) ** 2) for name in wanted}

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        updates, state = tx.update(jax.grad(lambda p: sum(losses(p).values()))(params), state, params)
        return (optax.apply_updates(params, updates), state), jnp.std(updates["small"]["first"])

    (params, _), moved = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    return losses(params)["small"] / wanted["small"].var(), jnp.median(moved)


def main() -> None:
    """Prints the table, and which arms stall."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=float, default=1e11, help="how much larger the first tower's gradients are")
    times = parser.parse_args().times
    print("| optimizer | clip | loss left | an update, rms |\n| --- | --- | ---: | ---: |")
    stalled: list[str] = []
    for name, optimizer in OPTIMIZERS.items():
        free = None
        for clip, limit in CLIPS.items():
            tx = optax.chain(limit, optimizer(RATES[name]))
            run = jax.jit(jax.vmap(lambda key, tx=tx: training(tx, times, key)))
            left, moved = map(np.asarray, run(jax.random.split(jax.random.key(0), SEEDS)))
            print(f"| {name} | {clip} | {left.mean():.3f} ± {left.std(ddof=1):.3f} | {moved.mean():.1e} |")
            free = free or float(moved.mean())
            stalled += [f"{name} behind {clip}"] * bool(moved.mean() < free / 100)
    print(f"\nStalled: {', '.join(stalled) or 'none'}.")


if __name__ == "__main__":
    main()
