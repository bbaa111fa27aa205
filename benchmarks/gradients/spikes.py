"""Question: what should be limited to make training better: gradients, updates, weights or logits; for which optimizer?

A small decoder-only transformer (Flax, characters) is trained at learning rates from too low to too high, with a
constant threshold, rules that follow the history, and subsets. Layer norms follow the residual sums and the warm-up
is a tenth of the run, because there the unclipped run does break at high rates: it spikes and falls back to
predicting letter frequencies, and with SGD it overflows at higher ones. The rates decay to 0. SGD and AdamW are tried
with every arm of spike_arms.py, Muon with nine.

Every arm that has a setting has three candidates for it, tried on a seed of their own at two rates, one that no
clipping survives and one that it does not; the best by validation loss goes to the grid. Constants are multiples of the
median norm that the same chain records at the lowest rate, clipping nothing. Histories start after 10 steps, as the
runs are short.

**loss**: final validation loss in nats, mean over seeds; a run that ends worse than guessing evenly counts as that.
**stable**: the widest unbroken stretch of learning rates whose loss is within 0.1 nats of the best that no clipping
reaches at any rate; "within by" is what the worst of them has to spare. The rest is over the whole grid, the rates that
are too high included. **spikes**: times in a run that the train loss jumps 0.3 nats above the median of its last 20
steps; steps in a row are one spike. **steps lost**: those at which the median loss of the last 10 stands more than 0.1
nats above its lowest so far. **failed**: runs that end less than 0.05 nats below letter frequencies.

`--width 64 --arms "no clip" sphere` trains some arms of a narrower model. Where two widths are there, a last table
says at which rate each arm is best at either width, and what it loses where it takes the other's.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import spike_figures
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from spike_arms import ARMS, OPTIMIZERS, Arm, Course, Optimizer

import clipjax
import clipjax.flax

BATCH, CONTEXT, WIDTH, LAYERS, HEADS = 8, 64, 128, 2, 4
WIDTHS = (WIDTH // 2, WIDTH)
SEEDS, TUNING_SEED = (0, 1, 2), 100
MARGIN, JUMP = 0.1, 0.3  # nats

Runs = dict[str, dict[str, Any]]  # by optimizer, arm, setting, learning rate and seed; choices by optimizer and arm


class Text(NamedTuple):
    """Characters i32[n] to train on, windows i32[128, context + 1] to validate on, and what letter frequencies cost."""

    name: str
    train: jax.Array
    windows: jax.Array
    letters: int
    frequencies: float
    digest: str


def read(path: Path | None) -> Text:
    """The text of a file, or the source of optax, which everyone who runs this has; nine tenths are to train on."""
    name = path.name if path else f"the source of optax {optax.__version__}"
    files = [path] if path else sorted(Path(optax.__file__).parent.rglob("*.py"))
    content = b"".join(file.read_bytes() for file in files).decode("ascii", errors="ignore")[:2_000_000]
    if len(content) < 200_000:
        raise SystemExit(f"{name} has {len(content):,} ASCII characters. Give `--text` a file of 200,000 or more.")
    letters, codes = np.unique(list(content), return_inverse=True)
    train, rest = np.split(codes.astype(np.int32), [9 * len(codes) // 10])
    windows = rest[np.linspace(0, len(rest) - CONTEXT - 1, 128).astype(int)[:, None] + np.arange(CONTEXT + 1)]
    shares = (np.bincount(train, minlength=len(letters)) + 1) / (len(train) + len(letters))
    frequencies = float(-np.log(shares[windows[:, 1:]]).mean())
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Text(name, jnp.asarray(train), jnp.asarray(windows), len(letters), frequencies, digest)


class Decoder(nn.Module):
    """A decoder-only transformer whose layer norms follow the residual sums; it sows its logits with `watched`."""

    letters: int
    width: int = WIDTH
    watched: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps i32[batch, context] to logits f32[batch, context, letters]."""
        place = self.param("place", nn.initializers.normal(0.02), (CONTEXT, self.width))
        x = nn.Embed(self.letters, self.width)(tokens) + place[None]
        for _ in range(LAYERS):
            options = {"attention_fn": clipjax.flax.attention} if self.watched else {}
            attend = nn.MultiHeadDotProductAttention(HEADS, **options)
            seen = attend(x, mask=nn.make_causal_mask(tokens), sow_weights=self.watched)
            x = nn.LayerNorm()(x + seen)
            x = nn.LayerNorm()(x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(x))))
        return nn.Dense(self.letters)(x)


class Setup(NamedTuple):
    """What all runs of a folder have in common: they are kept under its hash."""

    steps: int
    width: int

    def digest(self, text: Text) -> str:
        """A name for what is trained on what."""
        shape = (text.digest, self.steps, BATCH, CONTEXT, self.width, LAYERS, HEADS)
        return hashlib.sha256(repr(shape).encode()).hexdigest()[:12]


def trainer(
    text: Text, optimizer: Optimizer, arm: Arm, setup: Setup, watched: bool
) -> Callable[..., tuple[jax.Array, ...]]:
    """One program for an arm: `train(c, lr, seed)` is losses f32[steps], the median norm and the final loss."""
    steps, width = setup
    model = Decoder(text.letters, width, watched)
    share = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    blank = model.init(jax.random.key(0), text.windows[:1, :-1])["params"]
    plain = Decoder(text.letters, width)
    analysis = clipjax.analyze(lambda params, x: plain.apply({"params": params}, x), blank, text.windows[:1, :-1])
    pairs = {f"{name}/query/kernel": f"{name}/key/kernel" for name in blank if name.startswith("MultiHead")}

    def loss_fn(params, windows):
        logits, sown = model.apply({"params": params}, windows[:, :-1], mutable=["intermediates"])
        largest = clipjax.flax.max_logits(sown["intermediates"]) if watched else {}
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(), largest

    @jax.jit
    def train(c, lr, seed):
        key = jax.random.key(seed)
        params = model.init(key, text.windows[:1, :-1])["params"]
        course = Course(optimizer.direction(), lambda count: lr * share(count), analysis, pairs)
        tx = optax.with_extra_args_support(arm.chain(c, course))

        def step(carry, count):
            params, state = carry
            starts = jax.random.randint(jax.random.fold_in(key, count), (BATCH, 1), 0, len(text.train) - CONTEXT)
            batch = text.train[starts + jnp.arange(CONTEXT + 1)]
            (loss, largest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
            updates, state = tx.update(grads, state, params, max_logits=largest)
            return (optax.apply_updates(params, updates), state), (loss, optax.tree.get(state, "norm_pre", 0.0))

        (params, _), (losses, norms) = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        return losses, jnp.median(jnp.asarray(jax.tree.leaves(norms))), loss_fn(params, text.windows)[0]

    return train


def measure(
    text: Text, plan: dict[str, Optimizer], arms: list[str], setup: Setup, runs: Runs, save: Callable[[], None]
) -> Iterator[str]:
    """Train what is missing, and say after each run of the grid what it was for."""
    for (name, optimizer), arm_name in itertools.product(plan.items(), arms):
        if arm_name not in optimizer.arms:
            continue
        arm, prefix = ARMS[arm_name], f"{name}|{arm_name}"
        train = trainer(text, optimizer, arm, setup, watched=arm_name == "logits")

        def run(c, lr, seed, train=train, prefix=prefix):
            key = f"{prefix}|{c:g}|{lr:g}|{seed}"
            if key not in runs:
                begin = time.perf_counter()
                losses, norm, final = jax.device_get(train(c, lr, seed))
                facts = {"final": float(final), "norm": float(norm), "seconds": time.perf_counter() - begin}
                runs[key] = facts | {"losses": [round(float(x), 3) for x in losses]}
                save()
            return runs[key]

        unit = 1.0
        if arm.relative:
            unit = run(math.inf, optimizer.rates[0], TUNING_SEED)["norm"]
        scores = dict.fromkeys((float(f"{unit * c:.3g}") for c in arm.candidates), 0.0)
        for c, lr in itertools.product(scores, optimizer.tuning if len(scores) > 1 else ()):
            scores[c] += ended(run(c, lr, TUNING_SEED), text)
        best = min(scores, key=scores.__getitem__)
        for lr, seed in itertools.product(optimizer.rates, SEEDS):
            run(best, lr, seed)
            yield prefix
        runs[prefix] = {"setting": best, "candidates": list(scores)}
        save()


def ended(run: dict[str, Any], text: Text) -> float:
    """The final loss, at most that of guessing evenly, which is also what NaN counts as."""
    return float(np.fmin(run["final"], math.log(text.letters)))


def spikes(losses: np.ndarray) -> int:
    """Times that the loss jumps above what it was."""
    above = [bool(x > np.median(losses[i : i + 20]) + JUMP or np.isinf(x)) for i, x in enumerate(losses[20:])]
    return sum(now and not before for before, now in itertools.pairwise([False, *above]))


def steps_lost(losses: np.ndarray) -> int:
    """Steps at which the smoothed loss stands above its lowest so far."""
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(losses, 10), axis=-1)
    return int((smooth > np.minimum.accumulate(smooth) + MARGIN).sum())


class Row(NamedTuple):
    """What an arm came to: loss and its deviation f64[rates], cells of the table, stable rates and their width."""

    loss: np.ndarray
    deviation: np.ndarray
    cells: list[str]
    stable: tuple[float, ...]
    width: float


def rows(text: Text, name: str, optimizer: Optimizer, runs: Runs) -> dict[str, Row]:
    """The rows of the arms that are complete."""
    table: dict[str, Row] = {}
    for arm in (arm for arm in ARMS if f"{name}|{arm}" in runs):
        c, candidates = runs[f"{name}|{arm}"].values()
        grid = [runs[f"{name}|{arm}|{c:g}|{lr:g}|{seed}"] for lr, seed in itertools.product(optimizer.rates, SEEDS)]
        ends = np.array([ended(run, text) for run in grid]).reshape(-1, len(SEEDS))
        loss, best = ends.mean(axis=1), (table["no clip"].loss if table else ends.mean(axis=1)).min()
        stable, stretch = (), ()
        for lr, x in zip(optimizer.rates, loss, strict=True):
            stretch = (*stretch, lr) if x <= best + MARGIN else ()
            stable = max(stable, stretch, key=len)
        width = round(stable[-1] / stable[0], 3) if stable else 0.0
        losses = [np.nan_to_num(run["losses"], nan=np.inf, posinf=np.inf) for run in grid]
        cells = [
            arm,
            f"{c:g} of {', '.join(f'{x:g}' for x in candidates)}" if candidates[1:] else "",
            *(f"{x:.3f}" for x in loss),
            f"{stable[0]:g} to {stable[-1]:g} ({width:g}x)" if stable else "none",
            f"{np.mean([spikes(x) for x in losses]):.1f}",
            f"{np.mean([steps_lost(x) for x in losses]):.0f}",
            f"{(ends > text.frequencies - 0.05).sum()} / {ends.size}",
        ]
        table[arm] = Row(loss, ends.std(axis=1, ddof=1), cells, stable, width)
    return table


def render(table: dict[str, Row], name: str, rates: tuple[float, ...]) -> tuple[str, str]:
    """The table of an optimizer, and the verdict."""
    head = ["arm", "setting", *(f"lr {lr:g}" for lr in rates), "stable", "spikes", "steps lost", "failed"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *(r.cells for r in table.values())]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    none, top = table["no clip"], max(r.width for r in table.values())
    noise = np.median([r.deviation[rates.index(lr)] for r in table.values() for lr in r.stable])
    spare = {a: none.loss.min() + MARGIN - r.loss[np.isin(rates, r.stable)].max(initial=0) for a, r in table.items()}
    within = {a: f"within by {x:.3f}{', less than the seeds deviate' if x < noise else ''}" for a, x in spare.items()}
    widest = [f"{arm} ({within[arm]})" for arm, r in table.items() if r.width == top]
    cut = any({rates[0], rates[-1]} & {*r.stable} for r in table.values() if r.width == top)
    narrow = [arm for arm, r in table.items() if r.width <= none.width and r is not none]
    lowest = min(table, key=lambda arm: table[arm].loss.min())
    least, where = table[lowest].loss.min(), rates[int(table[lowest].loss.argmin())]
    verdict = [
        f"{name}: widest stable range {top:g}x{' or more, the grid ends there' if cut else ''}: {', '.join(widest)}"
        f"{', a tie' if widest[1:] else ''}; seeds deviate by {noise:.3f} nats, median of the stable cells.",
        f"{name}: no wider than no clip ({none.width:g}x, {within['no clip']}): {', '.join(narrow) or 'none of them'}.",
        f"{name}: lowest loss {least:.3f}, {lowest} at lr {where:g}; no clip reaches {none.loss.min():.3f}.",
    ]
    return f"### {name}\n\n{body}", "\n".join(verdict)


def transfer(text: Text, name: str, optimizer: Optimizer, widths: dict[int, Runs]) -> str:
    """Of each arm the best rate at both widths, and what the wider model loses by that of the narrower one."""
    small, large = (rows(text, name, optimizer, runs) for runs in widths.values())
    lines = [f"| {name}: arm | best rate, width {', '.join(map(str, widths))} | loss there | loss at the narrower's |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for arm in [arm for arm in large if arm in small]:
        first, second = (int(table[arm].loss.argmin()) for table in (small, large))
        loss, rates = large[arm].loss, optimizer.rates
        lines.append(f"| {arm} | {rates[first]:g}, {rates[second]:g} | {loss[second]:.3f} | {loss[first]:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and print the tables and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="plain text to train on; the source of optax by default")
    parser.add_argument("--out", type=Path, help="folder of the results, out/spikes or out/spikes-quick by default")
    parser.add_argument("--quick", action="store_true", help="SGD only, three learning rates, half the steps")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the model")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="these alone; and no clip")
    parser.add_argument("--print", action="store_true", help="train nothing, print what is there")
    options = parser.parse_args()
    if options.text and not options.text.is_file():
        parser.error(f"--text: no file {options.text}. Give a plain text file, or leave --text out.")
    text, plan, steps = read(options.text), OPTIMIZERS, 200
    if options.quick:
        plan, steps = {"SGD": OPTIMIZERS["SGD"]._replace(rates=(0.05, 0.2, 0.8), tuning=(0.2,))}, 100
    out = options.out or Path(__file__).parents[2] / "out" / ("spikes-quick" if options.quick else "spikes")
    out.mkdir(parents=True, exist_ok=True)
    arms = list(dict.fromkeys(["no clip", *options.arms]))
    training = Setup(steps, options.width)
    setup = training.digest(text)
    path, fresh = out / "runs.json", out / f"runs.{os.getpid()}"
    runs: Runs = {}

    def save() -> None:
        saved = json.loads(path.read_text()) if path.exists() else {}
        runs.update(saved.get(setup, {}) | runs)
        fresh.write_text(json.dumps(saved | {setup: runs}))
        os.replace(fresh, path)  # a kill leaves the old file or the new one

    save()  # which loads what is there
    if not options.print:
        columns = TextColumn("{task.description:26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns) as progress:
            grid = [(rate, arm) for o in plan.values() for rate in o.rates for arm in arms if arm in o.arms]
            bar = progress.add_task("", total=len(grid) * len(SEEDS))
            for doing in measure(text, plan, arms, training, runs, save):
                progress.update(bar, advance=1, description=doing.replace("|", ", "))

    tables = {name: table for name, o in plan.items() if (table := rows(text, name, o, runs))}
    if not tables:
        raise SystemExit(f"{out} holds no arm of this setup whose runs are all there. Run without --print first.")
    shapes = jax.eval_shape(Decoder(text.letters, options.width).init, jax.random.key(0), text.windows[:1, :-1])
    parts = [render(table, name, plan[name].rates) for name, table in tables.items()]
    head = (
        f"{sum(x.size for x in jax.tree.leaves(shapes)):,} params, {steps} steps of {BATCH} x {CONTEXT} characters of "
        f"{text.name}, {len(SEEDS)} seeds, jax {jax.__version__} on {jax.devices()[0].platform}, "
        f"{np.median([run['seconds'] for run in runs.values() if 'seconds' in run]):.1f} s a run. "
        f"Guessing evenly costs {math.log(text.letters):.3f} nats, letter frequencies {text.frequencies:.3f}."
    )
    saved = json.loads(path.read_text())
    widths = {w: saved[key] for w in WIDTHS if (key := Setup(steps, w).digest(text)) in saved}
    moved = [transfer(text, name, o, widths) for name, o in plan.items()] if len(widths) > 1 else []
    output = "\n\n".join([head, *(table for table, _ in parts), *moved, *(verdict for _, verdict in parts)])
    (out / "table.md").write_text(output + "\n")
    if options.width == WIDTH:
        spike_figures.draw(tables, plan, text.frequencies, MARGIN, out / "spikes.png")
    print(output)


if __name__ == "__main__":
    main()
