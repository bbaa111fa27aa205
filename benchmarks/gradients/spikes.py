"""Question: which clipping threshold makes training better, and for which optimizer?

A small decoder-only transformer (Flax, characters) is trained at learning rates from too low to too high, with a
constant threshold, rules that follow the history, and subsets. Layer norms follow the residual sums and the warm-up is
a tenth of the run, because there the unclipped run does break at high rates: it spikes and falls back to predicting
letter frequencies, and with SGD it overflows at higher ones. The rates decay to 0.

Every arm has three candidate settings, tried on a seed of their own at two rates, one that no clipping survives and one
that it does not; the best by validation loss goes to the grid. Constants are multiples of the median norm that the same
chain records at the lowest rate, clipping nothing. Histories start after 10 steps, as the runs are short.

**loss**: final validation loss in nats, mean over seeds; a run that ends worse than guessing evenly counts as that.
**stable**: the widest unbroken stretch of learning rates whose loss is within 0.1 nats of the best that no clipping
reaches at any rate; "within by" is what the worst of them has to spare. The rest is over the whole grid, the rates that
are too high included. **spikes**: times in a run that the train loss jumps 0.3 nats above the median of its last 20
steps; steps in a row are one spike. **steps lost**: those at which the median loss of the last 10 stands more than 0.1
nats above its lowest so far. **failed**: runs that end less than 0.05 nats below letter frequencies.
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
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import NullLocator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import clipjax
from clipjax import selections, thresholds

BATCH, CONTEXT, WIDTH, LAYERS, HEADS = 8, 64, 128, 2, 4
SEEDS, TUNING_SEED = (0, 1, 2), 100
MARGIN, JUMP = 0.1, 0.3  # nats

Runs = dict[str, dict[str, Any]]  # by optimizer, arm, setting, learning rate and seed; choices by optimizer and arm


class Optimizer(NamedTuple):
    """What follows the clip, its learning rates, and those at which the arms are tuned."""

    build: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    tuning: tuple[float, ...]


OPTIMIZERS = {
    "SGD": Optimizer(lambda lr: optax.sgd(lr, momentum=0.9), tuple(0.00625 * 2**i for i in range(10)), (0.05, 0.4)),
    "AdamW": Optimizer(optax.adamw, tuple(0.00025 * 2**i for i in range(9)), (0.008, 0.032)),
}


class Arm(NamedTuple):
    """A chain with one setting c, and the candidates for it, multiples of a median norm if `relative`."""

    chain: Callable[[Any, optax.GradientTransformation], optax.GradientTransformation]
    candidates: tuple[float, ...]
    relative: bool = False


def norms(rule: Callable[[Any], Any], candidates: tuple[float, ...], **options: Any) -> Arm:
    """A norm is held below a rule of one setting; without a rule of clipjax below the setting itself."""
    relative = not isinstance(rule(1.0), clipjax.Rule)
    return Arm(lambda c, inner: optax.chain(clipjax.clip_norm(rule(c), **options), inner), candidates, relative)


FIXED = (0.25, 1.0, 4.0)
ARMS = {  # runs are kept under these names: an arm whose chain changes needs a new one
    "no clip": Arm(lambda c, inner: inner, (math.inf,)),
    "constant": norms(lambda c: c, FIXED),
    "zscore": norms(lambda c: thresholds.zscore(c, warmup=10), (1.0, 2.5, 4.0)),
    "ema_ratio per leaf": norms(lambda c: thresholds.ema_ratio(c, warmup=10), (1.05, 1.5, 3.0), per="leaf"),
    "percentile": norms(thresholds.percentile, (10.0, 50.0, 90.0)),
    "spam per entry": Arm(lambda c, x: optax.chain(clipjax.clip(thresholds.spam(c, decay=0.99)), x), (10, 100, 5000)),
    "random half": norms(lambda c: c, FIXED, select=selections.bernoulli(0.5)),
    "largest tenth": norms(lambda c: c, FIXED, select=selections.largest(0.1)),
    "constant with carry": norms(lambda c: c, FIXED, carry=True),
    "skip mean_sigma": Arm(lambda c, x: clipjax.skip_spikes(x, thresholds.mean_sigma(c, window=10)), (2, 4, 8)),
}


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
    """A decoder-only transformer whose layer norms follow the residual sums."""

    letters: int
    width: int = WIDTH

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps i32[batch, context] to logits f32[batch, context, letters]."""
        place = self.param("place", nn.initializers.normal(0.02), (CONTEXT, self.width))
        x = nn.Embed(self.letters, self.width)(tokens) + place[None]
        for _ in range(LAYERS):
            x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(HEADS)(x, mask=nn.make_causal_mask(tokens)))
            x = nn.LayerNorm()(x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(x))))
        return nn.Dense(self.letters)(x)


def trainer(text: Text, optimizer: Optimizer, arm: Arm, steps: int) -> Callable[..., tuple[jax.Array, ...]]:
    """One program for an arm: `train(c, lr, seed)` is losses f32[steps], the median norm and the final loss."""
    model = Decoder(text.letters)
    share = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)

    def loss_fn(params, windows):
        logits = model.apply(params, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    @jax.jit
    def train(c, lr, seed):
        key = jax.random.key(seed)
        params = model.init(key, text.windows[:1, :-1])
        tx = arm.chain(c, optimizer.build(lambda count: lr * share(count)))

        def step(carry, count):
            params, state = carry
            starts = jax.random.randint(jax.random.fold_in(key, count), (BATCH, 1), 0, len(text.train) - CONTEXT)
            loss, grads = jax.value_and_grad(loss_fn)(params, text.train[starts + jnp.arange(CONTEXT + 1)])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (loss, optax.tree.get(state, "norm_pre", 0.0))

        (params, _), (losses, norms) = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        return losses, jnp.median(norms), loss_fn(params, text.windows)

    return train


def measure(text: Text, plan: dict[str, Optimizer], steps: int, runs: Runs, save: Callable[[], None]) -> Iterator[str]:
    """Train what is missing, and say after each run of the grid what it was for."""
    for (name, optimizer), (arm_name, arm) in itertools.product(plan.items(), ARMS.items()):
        train, prefix = trainer(text, optimizer, arm, steps), f"{name}|{arm_name}"

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


COLORS = ("#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d1f", "#7f7f7f", "#6a3d9a")


def draw(tables: dict[str, dict[str, Row]], plan: dict[str, Optimizer], frequencies: float, path: Path) -> None:
    """Final loss against learning rate, and beside it the stable range of every arm in the color of its line."""
    figure, axes = plt.subplots(len(tables), 2, figsize=(12, 4.4 * len(tables)), layout="constrained", squeeze=False)
    for (name, table), (left, right) in zip(tables.items(), axes, strict=True):
        rates = plan[name].rates
        left.axhspan(0, table["no clip"].loss.min() + MARGIN, color="#eeeeee", zorder=0)
        left.axhline(frequencies, color="#999999", linestyle=":", linewidth=1)
        left.text(rates[0], frequencies, "letter frequencies", color="#777777", va="bottom")
        for i, r in enumerate(table.values()):
            look = {"color": COLORS[i], "marker": "osDv^<>PXh"[i], "markersize": 5}
            left.plot(rates, r.loss, linestyle="-" if i else "--", linewidth=1.3 if i else 2.2, **look)
            right.plot(r.stable, [-i] * len(r.stable), linewidth=4, **look)
        left.set_ylim(min(r.loss.min() for r in table.values()) - 0.05, frequencies + 0.25)
        left.set_title(f"{name}: final validation loss, nats (grey: stable)", loc="left")
        right.set_title("Stable learning rates, largest over smallest", loc="left")
        right.set_yticks([-i for i in range(len(table))], [f"{arm}  {r.width:g}x" for arm, r in table.items()])
        for axis in (left, right):
            axis.set(xscale="log", xlabel="learning rate, log scale", xlim=(rates[0] / 1.2, rates[-1] * 1.2))
            axis.set_xticks(rates, [f"{lr:g}" for lr in rates], fontsize=8)
            axis.xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train what is missing, and print the tables and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="plain text to train on; the source of optax by default")
    parser.add_argument("--out", type=Path, help="folder of the results, out/spikes or out/spikes-quick by default")
    parser.add_argument("--quick", action="store_true", help="SGD only, three learning rates, half the steps")
    parser.add_argument("--print", action="store_true", help="train nothing, print what is there")
    options = parser.parse_args()
    if options.text and not options.text.is_file():
        parser.error(f"--text: no file {options.text}. Give a plain text file, or leave --text out.")
    text, plan, steps = read(options.text), OPTIMIZERS, 200
    if options.quick:
        plan, steps = {"SGD": OPTIMIZERS["SGD"]._replace(rates=(0.05, 0.2, 0.8), tuning=(0.2,))}, 100
    out = options.out or Path(__file__).parents[2] / "out" / ("spikes-quick" if options.quick else "spikes")
    out.mkdir(parents=True, exist_ok=True)
    shape = (text.digest, steps, BATCH, CONTEXT, WIDTH, LAYERS, HEADS)
    setup = hashlib.sha256(repr(shape).encode()).hexdigest()[:12]
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
            bar = progress.add_task("", total=sum(len(ARMS) * len(o.rates) * len(SEEDS) for o in plan.values()))
            for doing in measure(text, plan, steps, runs, save):
                progress.update(bar, advance=1, description=doing.replace("|", ", "))

    tables = {name: table for name, o in plan.items() if (table := rows(text, name, o, runs))}
    if not tables:
        raise SystemExit(f"{out} holds no arm of this setup whose runs are all there. Run without --print first.")
    shapes = jax.eval_shape(Decoder(text.letters).init, jax.random.key(0), text.windows[:1, :-1])
    parts = [render(table, name, plan[name].rates) for name, table in tables.items()]
    head = (
        f"{sum(x.size for x in jax.tree.leaves(shapes)):,} params, {steps} steps of {BATCH} x {CONTEXT} characters of "
        f"{text.name}, {len(SEEDS)} seeds, jax {jax.__version__} on {jax.devices()[0].platform}, "
        f"{np.median([run['seconds'] for run in runs.values() if 'seconds' in run]):.1f} s a run. "
        f"Guessing evenly costs {math.log(text.letters):.3f} nats, letter frequencies {text.frequencies:.3f}."
    )
    output = "\n\n".join([head, *(table for table, _ in parts), *(verdict for _, verdict in parts)])
    (out / "table.md").write_text(output + "\n")
    draw(tables, plan, text.frequencies, out / "spikes.png")
    print(output)


if __name__ == "__main__":
    main()
