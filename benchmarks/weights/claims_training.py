"""What claims.py measures: a name for every measurement, and the function that takes it."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lenet_chains as chains
import lenet_training as training
import measuring
import numpy as np
import optax
from claims_chains import BITS, GROUPS, KINDS, MASKS, ROWS, SPARSITY, SWEEPS, Chain, merger
from lenet import Facts, file_bytes
from measuring import Promise

import clipjax

sys.path.append(str(Path(__file__).parents[1] / "gradients"))
import spikes

SEEDS = (0, 1, 2)
NETWORK = "LeNet-300-100"
EPOCHS, DROPOUT = 3, 0.1


class Lab(NamedTuple):
    """What measurements share, each made when the first one needs it.

    Attributes:
      data: () -> MNIST.
      program: (chain, images or None for all) -> a compiled training, as `lenet_training.trainer` makes it.
      text: () -> the characters.
      decoder: (prune, quantize) -> a compiled training of the text transformer.
    """

    data: Callable[[], training.Data]
    program: Callable[..., Callable[..., Any]]
    text: Callable[[], spikes.Text]
    decoder: Callable[[bool, bool], Callable[..., Any]]


def lab(folder: Path, text: Path | None) -> Lab:
    """The data of two folders."""

    @functools.cache
    def data() -> training.Data:
        return training.load(folder, validate=False)

    @functools.cache
    def program(chain: Chain, images: int | None = None) -> Callable[..., Any]:
        given, lesson = data(), training.Lesson(1 if images else EPOCHS, dropout=DROPOUT)
        return training.trainer(NETWORK, given._replace(x=given.x[:images], y=given.y[:images]), chain, lesson)

    characters = functools.cache(lambda: spikes.read(text))
    return Lab(data, program, characters, functools.cache(lambda *arm: decoder(characters(), *arm)))


def jobs() -> Iterator[tuple[str, Callable[[Lab], Facts]]]:
    """The name of every measurement, and how to take it. Seeds are the outermost loop where rows are compared."""
    for seed, row in itertools.product(SEEDS, ROWS):
        yield f"row|{row}|{seed}", functools.partial(merged, row=row, seed=seed)
    for seed, sweep in itertools.product(SEEDS, SWEEPS):
        for limit in SWEEPS[sweep].limits:
            yield f"{sweep}|{limit:g}|{seed}", functools.partial(limited, sweep=sweep, limit=limit, seed=seed)
    for turn, every, kind in itertools.product(range(TURNS), EVERY, MASKS):
        yield f"mask|{kind}|{every}|{turn}", functools.partial(masked, kind=kind, every=every)
    for seed, gain, arm in itertools.product(SEEDS, GAINS, DEEP):
        yield f"deep|{arm}|{gain:g}|{seed}", functools.partial(deep, gain=gain, arm=arm, seed=seed)
    for seed in SEEDS:
        yield f"small|{seed}", functools.partial(small, seed=seed)
    for turn in range(TURNS):
        yield f"time|{turn}", functools.partial(timed, turn=turn)
    for seed, arm in itertools.product(SEEDS, TEXT):
        yield f"text|{arm}|{seed}", functools.partial(written, arm=arm, seed=seed)


def outcome(params: Any, data: training.Data) -> Facts:
    """What every trained LeNet is asked: error, bytes of the real file, weights that are 0."""
    wrong = training.answers(NETWORK, params, data.x_test).argmax(-1) != data.y_test
    return {"error": 100 * float(wrong.mean()), "bytes": file_bytes(params), "zeros": 100 * measuring.sparsity(params)}


# What each transformation does alone, and the mergers (D1, D3, D4).


def merged(lab: Lab, row: str, seed: int) -> Facts:
    """One row; asserts that the params satisfy its constraints."""
    params, state, _ = lab.program(merger(row))(SPARSITY, seed)
    bound, sparsity, bits = (
        value if name in row else None
        for name, value in (("clamp", chains.BOUND), ("prune", SPARSITY), ("quantize", BITS))
    )
    measuring.check(params, state, Promise(bound=bound, sparsity=sparsity, bits=bits))
    return outcome(params, lab.data())


# Thresholds from loose to strangling (D3).


def limited(lab: Lab, sweep: str, limit: float, seed: int) -> Facts:
    """One threshold."""
    params, _, _ = lab.program(SWEEPS[sweep].chain)(limit, seed)
    return outcome(params, lab.data())


# The time of a training whose masks are sorted (D2).

TURNS, EVERY, IMAGES = 3, (1, 10, 50), 100 * training.BATCH


def masked(lab: Lab, kind: str, every: int) -> Facts:
    """Seconds of a hundred steps; the level is how many updates lie between two refreshes."""
    params, _, seconds = lab.program(MASKS[kind], IMAGES)(every, 0)
    return {"seconds": seconds, "zeros": sum(int((k == 0).sum()) for k in measuring.kernels(params))}


# Gradients that explode and vanish with depth (D3).

GAINS, DEPTH, WIDTH, STEPS = (1.4, 1.0, 0.5), 20, 64, 600
DEEP = {
    "SGD": (optax.identity(), optax.sgd(0.1)),
    "clip": (clipjax.clip(0.01), optax.sgd(0.1)),
    "clip_norm": (clipjax.clip_norm(1.0), optax.sgd(0.1)),
    "Adam": (optax.identity(), optax.adam(1e-3)),
}


def deep(lab: Lab, gain: float, arm: str, seed: int) -> Facts:
    """A plain ReLU net, its first weights `gain` times He's: gradient norms of every layer, and where training ends."""
    data = lab.data()
    norms, clipped, loss, wrong = jax.device_get(_deep_program(arm)(gain, seed, data))
    return {"norms": norms.tolist(), "clipped": clipped.tolist(), "loss": float(loss), "error": 100 * float(wrong)}


@functools.cache
def _deep_program(arm: str) -> Callable[..., Any]:
    limit, optimizer = DEEP[arm]
    tx = optax.chain(limit, optimizer)
    sizes = [784] + [WIDTH] * (DEPTH - 1) + [10]

    def logits(params: Any, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for kernel in params[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ params[-1]

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    @jax.jit
    def train(gain: jax.Array, seed: jax.Array, data: training.Data) -> Any:
        keys = jax.random.split(jax.random.key(seed), DEPTH)
        shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
        params = [gain * np.sqrt(2 / n) * jax.random.normal(key, (n, m)) for key, n, m in shapes]
        grads = jax.grad(loss_fn)(params, data.x[:128], data.y[:128])
        clipped = limit.update(grads, limit.init(params), params)[0]

        def step(carry: Any, number: jax.Array) -> Any:
            params, state = carry
            batch = number % 100 * 128 + jnp.arange(128)
            loss, grads = jax.value_and_grad(loss_fn)(params, data.x[batch], data.y[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))
        wrong = (logits(params, data.x_test).argmax(-1) != data.y_test).mean()
        lengths = (jnp.stack([jnp.linalg.norm(g) for g in tree]) for tree in (grads, clipped))
        return *lengths, losses[-20:].mean(), wrong

    return train


# How good and how fast the small model is (D0).

SHRUNK = (60, 20)  # the units that 80 % of zeros leave


@jax.jit
def forward(params: Any, x: jax.Array) -> jax.Array:
    """LeNet-300-100 of any widths."""
    for name in ("Dense_0", "Dense_1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"][None]


def small(lab: Lab, seed: int) -> Facts:
    """Error and bytes: dense, pruned by weights, pruned by units, and shrunk to the units that are left."""
    data = lab.data()
    nets = {name: lab.program(chain)(level, seed)[0] for name, (level, chain) in KINDS.items()}
    facts = {name: outcome(params, data) for name, params in nets.items()}
    whole, x = nets["80 % of units"], data.x_test.reshape(-1, 784)
    shrunk, _, widths = clipjax.shrink(whole, GROUPS)
    assert tuple(widths.values()) == SHRUNK and np.allclose(forward(shrunk, x), forward(whole, x), atol=1e-4)
    wrong = np.asarray(forward(shrunk, x).argmax(-1)) != data.y_test
    return facts | {"shrunk": {"error": 100 * float(wrong.mean()), "bytes": file_bytes(shrunk)}}


def timed(lab: Lab, turn: int) -> Facts:
    """Microseconds of a forward pass, least of 300 in turns: of these shapes and zeros, which values do not change."""
    keys = jax.random.split(jax.random.key(turn), 3)

    def net(*widths: int) -> Any:
        sizes = zip(keys, (784, *widths), (*widths, 10), strict=True)
        layers = [{"kernel": jax.random.normal(k, (n, m)), "bias": jnp.zeros(m)} for k, n, m in sizes]
        return {f"Dense_{i}": layer for i, layer in enumerate(layers)}

    dense = net(300, 100)
    pruned = jax.tree.map(lambda w: w * clipjax.make_mask(jnp.abs(w), 0.95) if w.ndim == 2 else w, dense)
    nets = {"dense": dense, "95 % of weights": pruned, "shrunk": net(*SHRUNK)}
    facts: Facts = {name: {} for name in nets}
    for batch in (1, 256):
        x = lab.data().x_test.reshape(-1, 784)[:batch]
        for name in [*nets] * 301:
            begin = time.perf_counter()
            jax.block_until_ready(forward(nets[name], x))
            micros = 1e6 * (time.perf_counter() - begin)
            facts[name][f"us {batch}"] = min(micros, facts[name].get(f"us {batch}", micros))
    return facts


# A text transformer, pruned and quantized.

TEXT = {"dense": (False, False), "80 % zeros": (True, False), "80 % zeros + 4 bits": (True, True)}
RATE, TEXT_STEPS = 4e-3, 600  # AdamW's stable range in spikes.py is 0.0005 to 0.016


def written(lab: Lab, arm: str, seed: int) -> Facts:
    """The decoder of spikes.py: validation loss, and bytes of the real file."""
    text, (prune, quantize) = lab.text(), TEXT[arm]
    params, state, loss = lab.decoder(prune, quantize)(seed)
    # Attention's biases have rank 2, and no part in it.
    flat = jax.tree_util.tree_map_with_path(lambda path, x: x.ravel() if path[-1].key == "bias" else x, params)
    measuring.check(flat, state, Promise(sparsity=0.8 if prune else None, bits=BITS if quantize else None))
    raw = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"loss": float(loss), "bytes": file_bytes(params), "raw": raw, "text": text.name}


def decoder(text: spikes.Text, prune: bool, quantize: bool) -> Callable[..., Any]:
    """Compiles a training of it: `train(seed)` is params, opt_state and the validation loss."""
    model = spikes.Decoder(text.letters)
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, TEXT_STEPS // 10, TEXT_STEPS)
    start, stop = int(chains.LAST * TEXT_STEPS) + 1, int(0.9 * TEXT_STEPS)

    def loss_fn(params: Any, windows: jax.Array) -> jax.Array:
        logits = model.apply(params, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    @jax.jit
    def train(seed: jax.Array) -> Any:
        key = jax.random.key(seed)
        params = model.init(key, text.windows[:1, :-1])
        tx = optax.chain(
            optax.adamw(rate),
            *[chains.gradual(training.Course(jnp.float32(0.8), TEXT_STEPS, key, params, loss_fn))] * prune,
            *[clipjax.fake_quantize(BITS, start=start, stop=stop)] * quantize,
        )

        def step(carry: Any, count: jax.Array) -> Any:
            params, state = carry
            last = len(text.train) - spikes.CONTEXT
            starts = jax.random.randint(jax.random.fold_in(key, count), (spikes.BATCH, 1), 0, last)
            grads = jax.grad(loss_fn)(params, text.train[starts + jnp.arange(spikes.CONTEXT + 1)])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(TEXT_STEPS))
        return params, state, loss_fn(params, text.windows)

    return train
