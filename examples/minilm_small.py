"""all-MiniLM-L6-v2 in an ONNX file of at most 11 MB: load, choose widths, distil, export, measure in onnxruntime.

    python examples/minilm_small.py --sentences out/sentences --out out/minilm --megabytes 11 --steps 3000

`--sentences` is a folder with train.txt and tuning.txt, a sentence a line, as `benchmarks/real/sentence_corpus.py`
writes them. The teacher is the float model, whose embeddings onnxruntime computes once.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import minilm_graph
import minilm_net
import numpy as np
import optax
from flax import nnx
from rich.progress import track

import clipjax

CUTS = (999, 1996, 2400, 3000, 4000, 5500, 8000, 12000, 20000)
"""Bands of the table: unused rows, characters, and then words, the frequent ones first."""

GROUP = 128
LONGEST = 48
"""Tokens of the longest sentence that is trained on: few programs are compiled."""

GRAPH_BYTES = 260_000
"""What the file has beside codes and steps: nodes, biases and norms."""


def axis(path, leaf):
    """Rows of a table and outputs of a kernel have steps of their own."""
    return 0 if path.endswith("embedding") else -1


def where(path, leaf):
    """All kernels and tables but the two rows of types."""
    return path.endswith(("kernel", "embedding")) and not path.startswith("types")


def in_halves(rule):
    """A rule whose steps f16 has, so that a file stores them in 16 bits."""
    return rule._replace(fit=lambda x, bits, axes: rule.fit(x, bits, axes).astype(jnp.float16).astype(jnp.float32))


STEP = in_halves(clipjax.steps.mse())


def applied(graphdef, params, ids, mask):
    """The embeddings of a batch."""
    return minilm_net.embedded(nnx.merge(graphdef, params)(ids, mask), mask)


def sensitivity(graphdef, params, rows, size=32):
    r"""How much a squared error of each weight changes embeddings: :math:`\sum_k (\partial e_k / \partial w)^2`.

    The mean over sentences, from the gradient of :math:`v \cdot e` with a random v of normal entries for each.
    """

    @jax.jit
    def squares(total, key, ids, mask):
        def projected(params):
            found = applied(graphdef, params, ids, mask)
            return jnp.sum(found * jax.random.normal(key, found.shape))

        return jax.tree.map(lambda t, g: t + g**2, total, jax.grad(projected)(params))

    total = jax.tree.map(jnp.zeros_like, params)
    for i, (_, ids, mask) in enumerate(track(list(minilm_net.batches(rows, size)), "sensitivity")):
        total = squares(total, jax.random.key(i), ids, mask)
    return jax.tree.map(lambda t: t / len(rows), total)


def chosen(params, found, megabytes, allowed=(2, 3, 4, 5, 6, 7, 8)):
    """The width of each leaf, for a file of a size."""
    weights = sum(leaf.size for path, leaf in flat(params) if where(path, leaf))
    budget = 8 * (1e6 * megabytes - GRAPH_BYTES) / weights - 16 / GROUP
    # A band of which no sentence had a row still costs error: the least that any weight has.
    floor = 1e-3 * np.median([float(h.mean()) for path, h in flat(found) if where(path, h)])
    weighed = jax.tree.map(lambda h: jnp.full_like(h, jnp.maximum(h.mean(), floor)), found)
    return clipjax.choose_bits(
        params,
        budget=budget,
        allowed=allowed,
        step=STEP,
        axis=clipjax.per_leaf(axis),
        group=GROUP,
        sensitivity=weighed,
        where=where,
    )


def flat(tree):
    """Paths as clipjax has them, and leaves."""
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    found = jax.tree_util.tree_flatten_with_path(pure)[0]
    return [("/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), x) for path, x in found]


def quantizer(bits, **kwargs):
    """The transformation that holds all weights on grids of these widths."""
    return clipjax.fake_quantize(bits, step=STEP, axis=clipjax.per_leaf(axis), group=GROUP, **kwargs)


def chain(bits, steps, rate):
    """Adam, and grids that are fitted anew 20 times in the first three quarters."""
    stop = 3 * steps // 4
    rates = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    return optax.chain(
        clipjax.clip_norm(clipjax.thresholds.zscore()),
        optax.adam(rates, b2=0.99),
        quantizer(bits, every=max(1, stop // 20), stop=stop),
    )


def distilled(graphdef, params, tx, rows, teacher, steps, size=64, tokens=1.0, seed=0):
    """Params and optimizer state after some steps towards the teacher's embeddings.

    Args:
      graphdef: of the model.
      params: the float params; they are the teacher of the hidden states too.
      tx: the chain.
      rows: the tokens of the sentences.
      teacher: the embeddings of the float model.
      steps: updates.
      size: sentences of a batch.
      tokens: weight of the mean squared error of the last hidden states; 0 leaves out the teacher's forward pass.
      seed: of the order of sentences.
    """
    float_params, opt_state, rng = params, tx.init(params), np.random.default_rng(seed)

    def loss_fn(params, ids, mask, wanted):
        hidden = nnx.merge(graphdef, params)(ids, mask)
        loss = jnp.square(minilm_net.embedded(hidden, mask) - wanted).sum(-1).mean()
        if tokens:
            gap = jnp.square(hidden - nnx.merge(graphdef, float_params)(ids, mask)).mean(-1)
            loss += tokens * (gap * mask).sum() / mask.sum()
        return loss

    @jax.jit
    def step(params, opt_state, ids, mask, wanted):
        loss, grads = jax.value_and_grad(loss_fn)(params, ids, mask, wanted)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    lengths = np.array([-(-len(row) // 16) * 16 for row in rows])
    places = np.flatnonzero(lengths <= LONGEST)
    losses = []
    for _ in track(range(steps), "distil"):
        length = lengths[rng.choice(places)]
        batch = rng.choice(np.flatnonzero(lengths == length), size)
        ids, mask = minilm_net.padded([rows[i] for i in batch], length)
        params, opt_state, loss = step(params, opt_state, ids, mask, teacher[batch])
        losses.append(float(loss))
    return params, opt_state, losses


def export(path, model, params, opt_state=None):
    """The ONNX file of quantized params; `model` has the float ones."""
    source = nnx.state(model, nnx.Param)
    graph = minilm_graph.float_graph(model)
    clipjax.export_onnx(graph, path, params, opt_state, source=source, axis=clipjax.per_leaf(axis), pack=True)


def measures(wanted, found, neighbours=10, pairs=200_000):
    """How alike two tables of embeddings are: mean cosine, overlap of the nearest, rank correlation of similarities."""
    from scipy.stats import spearmanr

    cosine = float((wanted * found).sum(1).mean())
    hits = 0
    for start in range(0, len(wanted), 1000):
        near = []
        for x in (wanted, found):
            similar = x[start : start + 1000] @ x.T
            similar[np.arange(len(similar)), start + np.arange(len(similar))] = -np.inf
            near.append(np.argpartition(-similar, neighbours, axis=1)[:, :neighbours])
        hits += sum(len(np.intersect1d(a, b)) for a, b in zip(*near, strict=True))
    a, b = np.random.default_rng(0).integers(0, len(wanted), (2, pairs))
    a, b = a[a != b], b[a != b]
    ranks = spearmanr(*((x[a] * x[b]).sum(1) for x in (wanted, found))).statistic
    return {"cosine": cosine, "overlap": hits / (neighbours * len(wanted)), "ranks": float(ranks)}


def read(folder, split, count=None):
    """The sentences of a split, the first ones."""
    return (Path(folder) / f"{split}.txt").read_text().splitlines()[:count]


def main():
    """Makes the file and prints what it measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", required=True, help="folder with train.txt and tuning.txt")
    parser.add_argument("--out", type=Path, default=Path("out/minilm"))
    parser.add_argument("--megabytes", type=float, default=11.0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--train", type=int, default=100_000, help="sentences to train on")
    args = parser.parse_args()
    model = minilm_net.pretrained(args.out, CUTS)
    run = minilm_graph.session(minilm_graph.float_graph(model))
    rows = minilm_net.tokens(read(args.sentences, "train", args.train))
    rows = [row for row in rows if len(row) <= LONGEST]
    held = minilm_net.tokens(read(args.sentences, "tuning", 2000))
    teacher, wanted = minilm_graph.embeddings(run, rows), minilm_graph.embeddings(run, held)
    graphdef, params = nnx.split(model, nnx.Param)
    bits = chosen(params, sensitivity(graphdef, params, rows[:512]), args.megabytes)
    print({path: width for path, width in flat(bits) if width})
    start = time.perf_counter()
    tx = chain(bits, args.steps, args.rate)
    params, opt_state, losses = distilled(graphdef, params, tx, rows, teacher, args.steps)
    print(f"{time.perf_counter() - start:.0f} s, loss {np.mean(losses[:20]):.4f} to {np.mean(losses[-20:]):.4f}")
    file = args.out / f"minilm-{args.megabytes:g}MB.onnx"
    export(file, model, params, opt_state)
    print(f"{file.stat().st_size:,} bytes")
    for name, path in (("rival", minilm_graph.rival()), ("ours", file)):
        print(name, measures(wanted, minilm_graph.embeddings(minilm_graph.session(path), held)))


if __name__ == "__main__":
    main()
