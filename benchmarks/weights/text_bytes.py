"""Question: how good is a language model whose file may take 25, 50, 100 or 200 kB, and who spends the bytes best?

    python benchmarks/weights/text_bytes.py --text tinyshakespeare.txt   # about a minute a run; what is saved is kept
    python benchmarks/weights/text_bytes.py --table                      # what is saved, without training

The decoder of spikes.py in several widths, every leaf on a grid that is trained (vectors at 8 bits), 1,000 steps of
AdamW.

- rate: 4 bits, `roundings.rate(budget=)`, the budget falling to the size over the first 60 %.
- plain: 2, 3 or 4 bits, the file of `clipjax.save`.
- brotli: the same nets, their codes packed and compressed by brotli -11 with the steps, without names or shapes.
- pruned: 3 bits, zeros by movement on the usual schedule.

Half of the held-out windows decide which setting of an arm is shown at a size, of those that fit into it; the other
half give the bits a byte. Mean and standard deviation of three seeds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import brotli
import jax
import jax.numpy as jnp
import lenet_chains as chains
import lenet_training as training
import numpy as np
import optax
from lenet import Store, file_bytes, markdown, spread
from rich.progress import track

import clipjax
from clipjax import roundings, scores

sys.path.append(str(Path(__file__).parents[1] / "gradients"))
sys.path.append(str(Path(__file__).parents[1] / "files"))
import coders
import spikes

SIZES, SEEDS, STEPS, RATE = (25_000, 50_000, 100_000, 200_000), (0, 1, 2), 1_000, 4e-3
EVERY, SPARE = 50, 0.97  # updates between refreshes; the share of a size that a budget asks for


class Setting(NamedTuple):
    """One way to train: its arm, the width of the model, bits of matrices, share of zeros, and bytes of a budget."""

    arm: str
    width: int
    bits: int
    zeros: float = 0.0
    budget: int = 0

    def key(self, seed: int, text: str) -> str:
        """Names a run."""
        return ", ".join(f"{k} {v}" for k, v in self._asdict().items()) + f", seed {seed}, {text}"


WIDTHS = {25_000: (48, 64, 96), 50_000: (64, 96, 128), 100_000: (96, 128, 160), 200_000: (128, 160, 192)}
SETTINGS = (
    *(Setting("rate", width, 4, budget=size) for size in SIZES for width in WIDTHS[size]),
    *(Setting("plain", width, bits) for width in (32, 48, 64, 96, 128) for bits in (2, 3, 4)),
    *(Setting("plain", width, 2) for width in (160, 192)),
    *(Setting("pruned", 128, 3, zeros) for zeros in (0.5, 0.75, 0.9, 0.95)),
    *(Setting("pruned", 192, 3, zeros) for zeros in (0.5, 0.75)),
)


def chain(setting: Setting, course: training.Course) -> optax.GradientTransformation:
    """AdamW, perhaps a mask, inside of a grid for all leaves."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 10, STEPS)
    inner = optax.adamw(schedule)
    if setting.zeros:
        kernels = lambda path, leaf: leaf.ndim > 1 and "kernel" in path  # noqa: E731
        inner = optax.chain(inner, chains.gradual(course, score=scores.movement(0.9999), where=kernels))

    def budget(count: jax.Array) -> jax.Array:
        return SPARE * setting.budget * (1 + 4 * jnp.maximum(1 - count / (chains.LAST * STEPS), 0))

    grid = clipjax.fake_quantize(
        clipjax.per_leaf(lambda path, leaf: setting.bits if leaf.ndim > 1 else 8),
        rounding=roundings.rate(budget=budget) if setting.budget else "nearest",
        where=lambda path, leaf: True,
        every=EVERY,
        stop=int(0.9 * STEPS),
        inner=inner,
    )
    return clipjax.with_gradient(grid)


def trainer(text: spikes.Text, setting: Setting) -> Callable[..., Any]:
    """Compiles a training: `train(seed)` is params, opt_state, and nats a character to tune on and to show."""
    model = spikes.Decoder(text.letters, setting.width)

    def loss_fn(params: Any, windows: jax.Array) -> jax.Array:
        logits = model.apply(params, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    @jax.jit
    def train(seed: jax.Array) -> Any:
        key = jax.random.key(seed)
        params = model.init(key, text.windows[:1, :-1])
        tx = chain(setting, training.Course(jnp.float32(setting.zeros), STEPS, key, params, lambda params: 0.0))

        def step(carry: Any, count: jax.Array) -> Any:
            params, state = carry
            last = len(text.train) - spikes.CONTEXT
            starts = jax.random.randint(jax.random.fold_in(key, count), (spikes.BATCH, 1), 0, last)
            grads = jax.grad(loss_fn)(params, text.train[starts + jnp.arange(spikes.CONTEXT + 1)])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))
        return params, state, loss_fn(params, text.windows[::2]), loss_fn(params, text.windows[1::2])

    return train


def brotli_bytes(params: Any, opt_state: Any) -> int:
    """Packed codes and steps under brotli -11."""
    grids = jax.tree.leaves(clipjax.quantized(params, opt_state), is_leaf=lambda x: isinstance(x, clipjax.Quantized))
    codes = b"".join(coders.packed(np.asarray(grid.codes)) for grid in grids)
    steps = b"".join(np.asarray(grid.step, np.float32).tobytes() for grid in grids)
    return len(brotli.compress(codes + steps, quality=11))


def train(text: spikes.Text, store: Store) -> None:
    """Trains what is missing."""
    program = functools.cache(functools.partial(trainer, text))
    jobs = [(s, seed) for seed, s in itertools.product(SEEDS, SETTINGS) if s.key(seed, text.name) not in store.runs]
    for setting, seed in track(jobs, description="trainings"):
        params, state, tuning, shown = program(setting)(seed)
        for grid, leaf in zip(
            jax.tree.leaves(clipjax.quantized(params, state), is_leaf=lambda x: isinstance(x, clipjax.Quantized)),
            jax.tree.leaves(params),
            strict=True,
        ):
            assert (clipjax.dequantize(grid) == leaf).all(), "a leaf is off its grid"
        facts = {"bytes": file_bytes(params), "brotli": brotli_bytes(params, state), "said": None}
        if setting.budget:
            facts["said"] = float(clipjax.report(state)["fake_quantize/bytes"])
        bits = {"tuning": float(tuning) / np.log(2), "shown": float(shown) / np.log(2)}
        store.add(setting.key(seed, text.name), facts | bits)


def show(name: str, store: Store) -> None:
    """Prints the table of bits a byte, and who wins at each size."""
    found: dict[Setting, list[dict[str, Any]]] = {}
    for setting, seed in itertools.product(SETTINGS, SEEDS):
        if (key := setting.key(seed, name)) in store.runs:
            found.setdefault(setting, []).append(store.runs[key])
    arms = {"rate": "bytes", "plain": "bytes", "brotli": "brotli", "pruned": "bytes"}
    table, wins = [["arm", *(f"{size // 1000} kB" for size in SIZES)]], []
    best: dict[tuple[str, int], list[float]] = {}
    for arm, column in arms.items():
        line = [arm]
        for size in SIZES:
            mine = {s: r for s, r in found.items() if s.arm == (arm if arm != "brotli" else "plain")}
            fit = {s: r for s, r in mine.items() if max(run[column] for run in r) <= size}
            if not fit:
                line.append("none fits")
                continue
            chosen = min(fit, key=lambda s: np.mean([run["tuning"] for run in fit[s]]))
            best[arm, size] = [run["shown"] for run in fit[chosen]]
            of = f"{chosen.width} wide, {np.mean([run[column] for run in fit[chosen]]) / 1000:.1f} kB"
            line.append(f"{spread(best[arm, size], 3)} ({of}, {chosen.bits} bits)")
        table.append(line)
    print(markdown(table))
    for size in SIZES:
        others = [best[arm, size] for arm in arms if arm != "rate" and (arm, size) in best]
        if ("rate", size) in best and others:
            mine, rival = best["rate", size], min(others, key=np.mean)
            noise = max(np.std(mine, ddof=len(mine) > 1), np.std(rival, ddof=len(rival) > 1))
            wins.append(np.mean(mine) <= np.mean(rival) + noise)
            print(f"{size:,} bytes: rate {np.mean(mine):.3f}, the best other {np.mean(rival):.3f} bits a byte")
    print(f"rate is on or below every other at {sum(wins)} of {len(wins)} sizes (goal 3 of 4)")
    off = [abs(run["said"] - run["bytes"]) / run["bytes"] for runs in found.values() for run in runs if run["said"]]
    if off:
        print(f"bytes that `report` said are off those of the file by at most {100 * max(off):.1f} %")


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="an ASCII text of 200,000 characters or more; else optax's source")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the file of the runs")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is saved")
    options = parser.parse_args()
    store = Store(options.out)
    if options.table:
        names = {key.rpartition(", ")[2] for key in store.runs}
        for name in sorted(names):
            show(name, store)
        return
    text = spikes.read(options.text)
    train(text, store)
    show(text.name, store)


if __name__ == "__main__":
    main()
