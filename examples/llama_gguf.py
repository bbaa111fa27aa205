"""A Llama of one's own, trained from scratch onto Q4_0, in llama.cpp: beside its floats, and these rounded once.

    python examples/llama_gguf.py [--text FILE] [--steps 900] [--seeds 3] [--out out/llama]
    python examples/llama_gguf.py --table [--out out/llama]                   # from the saved rows, without training

3.3 M weights (grouped-query attention, RoPE, RMSNorm, SwiGLU) read text by the byte: FILE, or what Python's own
`help()` says of its keywords. A seed trains in floats, and the last third of its steps once for each chain, from the
same weights with the same batches. The chains begin as README's does, `clip_norm`, Adam, `clamp_weights`, and end in:

- F32: nothing; F16 is a file of the same weights;
- Q4_0, post: nothing; the floats are held on Q4_0 once (`hold_once`), by the rule of llama.cpp's own quantizer;
- Q4_0, trained: `fake_quantize(formats.q4_0(), every=1)`, for the last third of these steps;
- Q4_0, least squares: the same with `step=steps.mse()`, scales of least squared error, searched every 25 steps;
- half zeros, trained: `prune_mask` before `fake_quantize`; "half zeros, post" prunes and rounds the floats once.

Embedding and head are in Q8_0 where the rest is in Q4_0. Each model is a GGUF file in OUT, and what the table says of
it is llama.cpp's (the wheel `xllamacpp`): a greedy answer, and the perplexity a byte of text that nothing has read
before, rows of 127 bytes from all of the last tenth. Beside it stands the perplexity in JAX, where activations are
floats; llama.cpp rounds them to 8 bits. Seeds that OUT has are not trained again. `pip install '.[real]'` first.
"""

import argparse
import hashlib
import json
import math
import statistics
import time
from pathlib import Path

import answering
import optax
import text_llama
from flax import nnx
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import clipjax
from clipjax import formats, steps

CONFIG = text_llama.CONFIG | {"num_hidden_layers": 4, "intermediate_size": 768}
LENGTH, BATCH = 128, 8
PROMPT, ANSWER = "The with statement ", 100
POST = {"Q4_0, post": "Q4_0, trained", "half zeros, post": "half zeros, trained"}
"""Whose constraints hold the floats once."""


def chains(count):
    """By arm the transformations of the last `count` steps."""
    matrices = lambda path, leaf: leaf.ndim > 1  # noqa: E731
    in_layers = lambda path, leaf: leaf.ndim > 1 and path.startswith("layers")  # noqa: E731
    form = clipjax.per_leaf(lambda path, leaf: formats.q4_0() if in_layers(path, leaf) else formats.q8_0())
    first = (
        clipjax.clip_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(1e-3, count)),
        clipjax.clamp_weights(0.5, where=matrices),
    )
    half = optax.polynomial_schedule(0.0, 0.5, 3, count // 2)
    prune = clipjax.prune_mask(half, every=10, stop=count // 2, where=in_layers)
    quantize = clipjax.fake_quantize(form, start=2 * count // 3, every=1, where=matrices)
    return {
        "F32": optax.chain(*first),
        "Q4_0, trained": optax.chain(*first, quantize),
        "Q4_0, least squares": optax.chain(
            *first,
            clipjax.fake_quantize(form, step=steps.mse(), start=2 * count // 3, every=25, where=matrices),
        ),
        "half zeros, trained": optax.chain(*first, prune, quantize),
    }


def trained(seed, text, count, progress):
    """By arm the model of a seed, and the state of its optimizer where it holds a format."""
    last = max(1, count // 3)
    txs = chains(last)

    def on(split, tx, number, part, name):
        model = nnx.merge(*split, copy=True)
        task = progress.add_task(f"seed {seed}, {name}", total=number, loss=math.nan)
        each = lambda loss: progress.update(task, advance=1, loss=loss)  # noqa: E731
        options = {"batch": BATCH, "length": LENGTH, "string": text, "each": each}
        _, state = text_llama.trained(model, tx, number, seed=(seed, part), **options)
        return model, state

    begun = nnx.split(text_llama.Llama(CONFIG, nnx.Rngs(seed)))
    begun, _ = on(begun, optax.chain(clipjax.clip_norm(1.0), optax.adam(2e-3)), count - last, 0, "the first two thirds")
    found = {arm: on(nnx.split(begun), tx, last, 1, arm) for arm, tx in txs.items()}
    graph, floats, rest = nnx.split(found["F32"][0], nnx.Param, ...)
    for arm, constraints in POST.items():
        params, state = clipjax.hold_once(txs[constraints], floats)
        found[arm] = nnx.merge(graph, params, rest), state
    found["F32"] = found["F16"] = (found["F32"][0], None)
    order = (
        "F32",
        "F16",
        "Q4_0, post",
        "Q4_0, trained",
        "Q4_0, least squares",
        "half zeros, post",
        "half zeros, trained",
    )
    return {arm: found[arm] for arm in order}


def write(path, arm, model, state):
    """A file of a model, which llama.cpp runs."""
    clipjax.export_gguf(
        path,
        nnx.state(model, nnx.Param),
        state,
        rename=clipjax.llama_names(CONFIG),
        metadata=clipjax.llama_metadata(CONFIG) | text_llama.TOKENIZER,
        float_type="f16" if arm == "F16" else "f32",
    )


def measured(seed, text, held_out, count, out):
    """The rows of a seed: what llama.cpp computes with the file of each arm."""
    start = time.perf_counter()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns) as progress:
        for arm, (model, state) in trained(seed, text, count, progress).items():
            path = out / f"seed-{seed}-{arm.replace(', ', '-').replace(' ', '-')}.gguf"
            write(path, arm, model, state)
            running = answering.server(path)
            task = progress.add_task(f"seed {seed}, {arm} in llama.cpp", total=len(held_out), loss=math.nan)
            nats = answering.nats(running, held_out, lambda task=task: progress.advance(task))
            progress.update(task, loss=nats)
            yield {
                "seed": seed,
                "arm": arm,
                "file": path.stat().st_size,
                "nats": nats,
                "jax": text_llama.nats(model, held_out),
                "answer": answering.answer(running, PROMPT, ANSWER),
                "minutes": round((time.perf_counter() - start) / 60, 1),
            }


def table(rows):
    """Mean and standard deviation over the seeds, and an answer of the first."""
    seeds = sorted({row["seed"] for row in rows})
    asked = rows[0]["asked"]
    found = Table(title=f"{asked['steps']} steps, seeds {seeds}, {asked['rows'] * (LENGTH - 1):,} held-out bytes")
    for name in ("", "file, bytes", "perplexity a byte in llama.cpp", "over F32", "in JAX"):
        found.add_column(name, justify="right" if name else "left")
    found.add_column(f"{PROMPT!r} …")
    mean = lambda of, value: statistics.mean(map(value, of))  # noqa: E731
    cell = lambda xs, sign: f"{statistics.mean(xs):{sign}.4f} ± {statistics.stdev(xs) if len(xs) > 1 else 0:.4f}"  # noqa: E731
    floats = {row["seed"]: math.exp(row["nats"]) for row in rows if row["arm"] == "F32"}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of = [row for row in rows if row["arm"] == arm]
        ours = [math.exp(row["nats"]) for row in of]
        over = [x - floats[row["seed"]] for row, x in zip(of, ours, strict=True)]
        jax = f"{mean(of, lambda row: math.exp(row['jax'])):.4f}"
        found.add_row(arm, f"{of[0]['file']:,}", cell(ours, ""), cell(over, "+"), jax, repr(of[0]["answer"]))
    return found


def main(arguments=None):
    """Train the seeds that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text file; by default Python's own help")
    parser.add_argument("--steps", type=int, default=900, help="of each arm; the first two thirds are shared")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=60, help="of 127 held-out bytes")
    parser.add_argument("--out", type=Path, default=Path("out/llama"))
    parser.add_argument("--table", action="store_true", help="print the saved rows")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "llama.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if not options.table:
        text = options.text.read_text() if options.text else text_llama.text()
        asked = {"steps": options.steps, "rows": options.rows, "text": hashlib.sha256(text.encode()).hexdigest()[:8]}
        if other := [row["asked"] for row in rows if row["asked"] != asked]:
            parser.error(f"{kept} has rows of {other[0]}, and these are of {asked}. Choose another folder by --out.")
        tenth = len(text) // 10
        ids = text_llama.tokens(text[-tenth:])
        held_out = text_llama.behind_start(ids, answering.spread(ids, options.rows, LENGTH), LENGTH)
        for seed in sorted(set(range(options.seeds)) - {row["seed"] for row in rows}):
            of_seed = measured(seed, text[:-tenth], held_out, options.steps, options.out)
            rows += [row | {"asked": asked} for row in of_seed]
            kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not rows:
        parser.error(f"{kept} has no rows yet: train without --table.")
    Console(width=200).print(table(rows))


if __name__ == "__main__":
    main()
