"""Makes Magika small: channels go, 2 or 3 bits a weight are left, and the unmodified package runs what comes out.

    python benchmarks/real/file_corpus.py                               # once: files of some 800 packages
    python examples/magika_small.py [--files out/files] [--out out/magika] [--channels 432] [--bits 3] [--epochs 2]

The original answers for every file that is trained on, and the small one learns its answers (distillation):

1. `analyze` finds what belongs to a channel of the convolution, and `prune_mask` removes those that matter least;
2. `shrink` cuts them out of all arrays, which changes the mean under the LayerNorm behind them: training repairs it;
3. training goes on with `fake_quantize`, on a grid for each output: 3 bits in the convolution, 4 and 8 in the others;
4. `export_onnx(pack=True)` writes the codes, bit for bit, into a graph that ONNX Runtime takes, in a folder that
   `magika.Magika` takes.

It needs `pip install 'clipjax[real]'`.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import magika_net
import numpy as np
import optax
from flax import nnx
from rich.progress import Progress, track

import clipjax
from clipjax import scores, structures

BATCH = 32


def cut(content, rng):
    """A file as three: all of it, its start alone, and what is behind its start."""
    end, begin = rng.integers(len(content) // 8 + 1, len(content) + 1), rng.integers(len(content) // 2 + 1)
    return [content, content[:end], content[begin:]]


def data(files, split):
    """Tokens[files, 2048] of a split, and the logits that the original gives; both are kept beside the files.

    For training there are parts of files too, which the original answers as well.
    """
    kept = Path(files, f"{split}.npz")
    if not kept.exists():
        rng = np.random.default_rng(0)
        rows = [json.loads(line) for line in Path(files, "index.jsonl").read_text().splitlines()]
        paths = [Path(files, row["path"]) for row in rows if row["split"] == split]
        read = (path.read_bytes() for path in track(paths, f"reading {split}"))
        contents = (part for content in read for part in (cut(content, rng) if split == "train" else [content]))
        tokens = np.stack([magika_net.tokens(content).astype(np.uint16) for content in contents])
        np.savez_compressed(kept, tokens=tokens, logits=answers(magika_net.pretrained(), tokens))
    read = np.load(kept)
    return read["tokens"], read["logits"]


def answers(model, tokens, batch=64):
    """The logits of a model, in batches of one size."""
    run = nnx.jit(lambda model, rows: model(rows))
    padded = np.concatenate([tokens, np.repeat(tokens[:1], -len(tokens) % batch, axis=0)]).astype(np.int32)
    parts = [run(model, part) for part in track(np.split(padded, len(padded) // batch), "answers")]
    return np.concatenate([np.asarray(part) for part in parts])[: len(tokens)]


def loss(model, tokens, logits):
    """Cross entropy with the answers of the original."""
    return optax.softmax_cross_entropy(model(tokens), jax.nn.softmax(logits)).mean()


def train(model, tx, tokens, logits, steps, seed=0, text="training"):
    """Trains the model in place, and returns the optimizer's state."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, logits):
        value, gradient = nnx.value_and_grad(loss)(model, tokens, logits)
        optimizer.update(model, gradient)
        return value

    rng, order = np.random.default_rng(seed), np.arange(0)
    with Progress() as progress:
        bar, shown = progress.add_task(text, total=steps), None
        for _ in range(steps):
            if len(order) < BATCH:
                order = rng.permutation(len(tokens))
            rows, order = order[:BATCH], order[BATCH:]
            value = step(model, optimizer, tokens[rows].astype(np.int32), logits[rows])
            shown = float(value) if shown is None else 0.98 * shown + 0.02 * float(value)
            progress.update(bar, advance=1, description=f"{text}, loss {shown:.3f}")
    return optimizer.opt_state


def prune(model, channels, tokens, logits, steps=100, seed=0):
    """Leaves so many channels: those go one after another of which the loss changes least without them (Taylor)."""
    analysis = clipjax.analyze(lambda model, tokens: model(tokens), model, jnp.zeros((2, magika_net.BYTES), jnp.int32))
    [group] = analysis.inexact  # the channels, under a LayerNorm; the numbers of a byte are a group that stays
    fraction = 1 - channels / model.conv.out_features
    ramp = optax.polynomial_schedule(0.0, fraction, power=3, transition_steps=steps * 4 // 5)
    units = structures.unit(groups=[group])
    mask = clipjax.prune_mask(ramp, every=10, stop=steps * 9 // 10, structure=units, score=scores.taylor())
    train(model, clipjax.with_gradient(optax.chain(optax.adam(3e-5), mask)), tokens, logits, steps, seed, "pruning")
    clipjax.shrink(model, [group], exact=False)


def quantizer(steps, bits):
    """A chain that trains on a grid for each output, of so many bits in the convolution."""
    widths = {"bytes/kernel": 8, "conv/kernel": bits, "types/kernel": 4}
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-4, steps // 20, steps)
    grid = clipjax.fake_quantize(clipjax.per_leaf(lambda path, leaf: widths.get(path)), axis=-1, every=20)
    return optax.chain(clipjax.clip_norm(1.0), optax.adam(rate), grid)


def save(model, opt_state, folder):
    """Writes a folder for `magika.Magika(model_dir=folder)`: the graph with the codes, and the package's own config."""
    import jax2onnx

    folder.mkdir(parents=True, exist_ok=True)
    answer = lambda tokens: jax.nn.softmax(model(tokens))  # noqa: E731
    names = {"input_names": ["bytes"], "output_names": ["target_label"]}
    tokens = jax.ShapeDtypeStruct(("files", magika_net.BYTES), jnp.int32)
    graph = jax2onnx.to_onnx(answer, [tokens], opset=21, model_name="magika", **names)
    clipjax.export_onnx(graph, folder / "model.onnx", nnx.state(model, nnx.Param), opt_state, pack=True)
    copy_config(folder)
    return (folder / "model.onnx").stat().st_size


def copy_config(folder):
    """Puts what the package needs besides a model into a folder."""
    for name in ("config.min.json", "metadata.json"):
        shutil.copyfile(magika_net.folder() / name, folder / name)


def small(files, channels, bits, epochs, seed):
    """The small model, and the state that knows its codes."""
    tokens, logits = data(files, "train")
    model = magika_net.pretrained()
    if channels < model.conv.out_features:
        prune(model, channels, tokens, logits, seed=seed)
    steps = int(epochs * len(tokens) // BATCH)
    text = f"{channels} channels of {bits} bits"
    return model, train(model, quantizer(steps, bits), tokens, logits, steps, seed, text)


def main():
    """Trains, writes, and says how often the small model answers as the original does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, default=Path("out/files"))
    parser.add_argument("--out", type=Path, default=Path("out/magika"))
    parser.add_argument("--channels", type=int, default=432)
    parser.add_argument("--bits", type=int, default=3, help="of a weight of the convolution")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, opt_state = small(options.files, options.channels, options.bits, options.epochs, options.seed)
    size = save(model, opt_state, options.out)
    tokens, logits = data(options.files, "tuning")
    agreement = np.mean(answers(model, tokens).argmax(-1) == logits.argmax(-1))
    print(f"{size:,} bytes, {agreement:.2%} of {len(tokens):,} files as the original answers: {options.out}")


if __name__ == "__main__":
    main()
