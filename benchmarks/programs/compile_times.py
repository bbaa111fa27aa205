"""Claims: a chain with its refreshes takes at most 5 times as long to trace and compile as adam, at any depth.

CPU seconds of all threads, which other programs on the machine change less than the clock, with empty caches; each row
is the least of several turns, beside adam alone in the same turns. `--only` picks of four parts:
"kernels": 100 equal kernels of 64 x 64 with biases.
"growth": what a chain adds when 24 of these become 200, against what adam adds.
"transformer": 12 layers in Linen and in NNX.
"leaves": 1,000 kernels, each transformation without refreshes, against optax's nearest.
"""

from __future__ import annotations

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import clipjax

ADAM = optax.adam(1e-3)
RAMP = optax.polynomial_schedule(0.0, 0.9, 3, 1000)


def prune():
    return clipjax.prune_mask(RAMP, every=100, stop=1000)


def chain():
    """The chain of README."""
    return optax.chain(
        clipjax.clip_norm(clipjax.thresholds.zscore()),
        optax.adamw(1e-3),
        clipjax.clamp_weights(1.0),
        prune(),
        clipjax.fake_quantize(4, start=900, stop=1000),
    )


GOALS = {  # x adam alone
    "adam": (ADAM, None),
    "adam, prune_mask": (optax.chain(ADAM, prune()), 3.0),
    "adam, fake_quantize": (optax.chain(ADAM, clipjax.fake_quantize(4, stop=1000)), 3.0),
    "README's chain": (chain(), 5.0),
}
FROZEN = (clipjax.clip(0.01), ADAM, clipjax.clamp_weights(0.1), prune(), clipjax.fake_quantize(4, stop=1000))
PAIRS = {
    "clip": (optax.chain(*FROZEN[:2]), optax.chain(optax.clip(0.01), ADAM), 1.5),
    "clip_norm": (optax.chain(clipjax.clip_norm(1.0), ADAM), optax.chain(optax.clip_by_global_norm(1.0), ADAM), 1.5),
    "clamp": (optax.chain(*FROZEN[1:3]), optax.chain(ADAM, optax.keep_params_nonnegative()), 1.5),
    "prune": (optax.chain(ADAM, FROZEN[3]), optax.chain(ADAM, optax.keep_params_nonnegative()), 1.5),
    "whole chain": (optax.chain(*FROZEN), optax.chain(optax.clip(0.01), ADAM, optax.keep_params_nonnegative()), 2.5),
}


def seconds(tx, params, refresh=None):
    """CPU seconds to trace and lower an update and its application, and to compile it."""
    tx = optax.with_extra_args_support(tx)
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, refresh=refresh)
        return optax.apply_updates(params, updates), state

    jax.clear_caches()
    begin = time.process_time()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    middle = time.process_time()
    lowered.compile()
    return middle - begin, time.process_time() - middle


def least(transformations, params, repeats, refresh=None):
    """The least seconds of each, in turns."""
    turns = [[seconds(tx, params, refresh) for tx in transformations] for _ in range(repeats)]
    return [min(found, key=sum) for found in zip(*turns, strict=True)]


def kernels(layers, side=64, bias=True):
    """Equal layers."""
    arrays = {"kernel": (side, side)} | ({"bias": (side,)} if bias else {})
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in arrays.items()}
    return {f"layer{i}": layer for i in range(layers)}


class LinenBlock(nn.Module):
    """A layer of a transformer."""

    @nn.compact
    def __call__(self, x):
        """Attention and an MLP, each behind a norm."""
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))


class Linen(nn.Module):
    """Twelve of them between an embedding and a head."""

    @nn.compact
    def __call__(self, tokens):
        """Logits."""
        x = nn.Embed(128, 64)(tokens)
        for _ in range(12):
            x = LinenBlock()(x)
        return nn.Dense(128)(nn.LayerNorm()(x))


class NnxBlock(nnx.Module):
    """A layer of a transformer."""

    def __init__(self, rngs):
        """Attention and an MLP, each behind a norm."""
        self.before, self.between = nnx.LayerNorm(64, rngs=rngs), nnx.LayerNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 64, rngs=rngs)


class Nnx(nnx.Module):
    """Twelve of them between an embedding and a head."""

    def __init__(self, rngs):
        """The layers; only their shapes are needed."""
        self.embed, self.head = nnx.Embed(128, 64, rngs=rngs), nnx.Linear(64, 128, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(12)])
        self.norm = nnx.LayerNorm(64, rngs=rngs)


def transformers():
    """Shapes of the params in both libraries."""
    linen = jax.eval_shape(Linen().init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return {"Linen": linen, "NNX": jax.eval_shape(lambda: nnx.state(Nnx(nnx.Rngs(0)), nnx.Param))}


def table(title, params, names, repeats):
    """Print one row for each transformation; returns what each takes in all."""
    print(f"\n| {title} | trace s | compile s | x adam |\n| --- | ---: | ---: | ---: |")
    found = least([GOALS[name][0] for name in names], params, repeats)
    for name, (trace, compile) in zip(names, found, strict=True):
        ratio = (trace + compile) / sum(found[0])
        goal = GOALS[name][1]
        verdict = "" if goal is None else f" (at most {goal:g}: {'holds' if ratio <= goal else 'FAILS'})"
        print(f"| {name} | {trace:.2f} | {compile:.2f} | {ratio:.2f}{verdict} |", flush=True)
    return [sum(pair) for pair in found]


def many_leaves(repeats):
    """Print 1,000 leaves against optax's nearest."""
    print("\n| 1,000 leaves | trace s | compile s | optax: trace s | compile s | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    params = kernels(1000, 8, bias=False)
    for name, (ours, theirs, goal) in PAIRS.items():
        a, b = least([ours, theirs], params, repeats, refresh=False)
        ratio = sum(a) / sum(b)
        verdict = f"(at most {goal:g}: {'holds' if ratio <= goal else 'FAILS'})"
        print(f"| {name} | {a[0]:.2f} | {a[1]:.2f} | {b[0]:.2f} | {b[1]:.2f} | {ratio:.2f} {verdict} |", flush=True)


def main() -> None:
    """Print the parts and their verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["kernels", "growth", "transformer", "leaves"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].platform}")
    seconds(optax.sgd(0.1), kernels(2))  # what is loaded once
    if "kernels" in options.only:
        table("100 kernels and biases", kernels(100), list(GOALS), options.repeats)
    if "growth" in options.only:
        few, many = (table(f"{n} kernels and biases", kernels(n), list(GOALS), options.repeats) for n in (24, 200))
        added = [b - a for a, b in zip(few, many, strict=True)]
        for name, more in list(zip(GOALS, added, strict=True))[1:]:
            ratio = more / added[0]
            verdict = "holds" if ratio <= 1.5 else "FAILS"
            print(f"{name}, 24 to 200: {ratio:.2f} x what adam adds (at most 1.5: {verdict})")
    if "transformer" in options.only:
        for name, params in transformers().items():
            table(f"transformer, 12 layers, {name}", params, ["adam", "README's chain"], options.repeats)
    if "leaves" in options.only:
        many_leaves(options.repeats)


if __name__ == "__main__":
    main()
