"""all-MiniLM-L6-v2 in an ONNX file of at most 11 MB: load, choose widths, distil, export, measure in onnxruntime.

    python examples/minilm_small.py --sentences out/sentences --out out/minilm --megabytes 11 --steps 3000

`--sentences` is a folder with train.txt and tuning.txt, a sentence a line, as `benchmarks/real/sentence_corpus.py`
writes them. Nothing is labelled: the float model is the teacher.
"""

import argparse
import os
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

CUTS = (64, 256, 768, 2000, 4000, 6500, 9500, 13000, 18000, 23000)
"""Where the table is cut, its rows sorted by how frequent they are in the sentences."""

GROUP = 128
LONGEST = 48
"""Tokens of the longest sentence that is trained on: few programs are compiled."""

GRAPH_BYTES = 360_000
"""What the file has beside codes and steps of 16 bits: nodes, biases, norms, the order of the table."""


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


def sensitivity(apply, params, rows, size=32):
    r"""How much a squared error of each weight changes embeddings: :math:`\sum_k (\partial e_k / \partial w)^2`.

    The mean over sentences, from the gradient of :math:`v \cdot e` with a random v of normal entries for each.
    """

    @jax.jit
    def squares(total, params, key, ids, mask):
        def projected(params):
            found = minilm_net.embedded(apply(params, ids, mask), mask)
            return jnp.sum(found * jax.random.normal(key, found.shape))

        return jax.tree.map(lambda t, g: t + g**2, total, jax.grad(projected)(params))

    total = jax.tree.map(jnp.zeros_like, params)
    for i, (_, ids, mask) in enumerate(track(list(minilm_net.batches(rows, size)), "sensitivity")):
        total = squares(total, params, jax.random.key(i), ids, mask)
    return jax.tree.map(lambda t: t / len(rows), total)


def chosen(params, found, megabytes, allowed=(1, 2, 3, 4, 5, 6, 7, 8)):
    """The width of each leaf, for a file of a size.

    `found` is the sensitivity, from sentences that the order of the table has not counted: rare rows would look rarer.
    """
    weights = sum(leaf.size for path, leaf in flat(params) if where(path, leaf))
    budget = 8 * (1e6 * megabytes - GRAPH_BYTES) / weights - 16 / GROUP
    # A band of which no sentence had a row still costs error: the least that any weight has.
    floor = 1e-3 * np.median([float(h.mean()) for path, h in flat(found) if where(path, h)])
    weighed = jax.tree.map(lambda h: jnp.full_like(h, jnp.maximum(h.mean(), floor)), found)
    # An eighth of the rows and outputs tells how the errors of widths compare.
    some = {0: lambda x: x[::8], -1: lambda x: x[..., ::8]}
    part, weighed = (map_with_path(lambda path, x: some[axis(path, x)](x), tree) for tree in (params, weighed))
    return clipjax.choose_bits(
        part,
        budget=budget,
        allowed=allowed,
        step=STEP,
        axis=clipjax.per_leaf(axis),
        group=GROUP,
        sensitivity=weighed,
        where=where,
    )


def map_with_path(f, tree):
    """The tree of `f(path, leaf)`."""
    leaves = [f(path, x) for path, x in flat(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def flat(tree):
    """Paths as clipjax has them, and leaves."""
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    found = jax.tree_util.tree_flatten_with_path(pure)[0]
    return [("/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), x) for path, x in found]


def quantizer(bits, step=STEP, **kwargs):
    """The transformation that holds all weights on grids of these widths."""
    return clipjax.fake_quantize(bits, step=step, axis=clipjax.per_leaf(axis), group=GROUP, **kwargs)


def chain(bits, steps, rate):
    """Adam, and grids that are fitted anew 20 times in the first three quarters."""
    stop = 3 * steps // 4
    rates = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    return optax.chain(
        clipjax.clip_norm(clipjax.thresholds.zscore()),
        optax.adam(rates, b2=0.99),
        quantizer(bits, every=max(1, stop // 20), stop=stop),
    )


def distilled(apply, params, tx, rows, steps, size=64, seed=0, keep=None):
    """Params, optimizer state and losses after some steps towards the float model.

    The loss is the squared distance of embeddings, and the error of the last hidden states relative to their size: a
    sentence has one embedding and a hidden state for each of its tokens, so that it teaches more.

    Args:
      apply: of the model, as `minilm_net.split` gives it.
      params: the float params, which are the teacher too.
      tx: the chain.
      rows: the tokens of the sentences.
      steps: updates.
      size: sentences of a batch.
      seed: of the order of sentences.
      keep: a file for what is there every 100 steps, from which a run goes on that was interrupted; None for none.
    """
    teacher, opt_state, losses = params, tx.init(params), []

    def loss_fn(params, teacher, ids, mask):
        hidden, wanted = apply(params, ids, mask), apply(teacher, ids, mask)
        far = jnp.square(minilm_net.embedded(hidden, mask) - minilm_net.embedded(wanted, mask)).sum(-1).mean()
        gap, whole = (jnp.where(mask[..., None], jnp.square(x), 0.0).sum() for x in (hidden - wanted, wanted))
        return far + gap / whole, far

    # Two programs: the first is compiled for each length of sentences, the second, with the search of steps, once.
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True))

    @jax.jit
    def update(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    if keep is not None and keep.exists():
        with np.load(keep) as held:
            losses = held["losses"].tolist()
            leaves = [jnp.asarray(held[str(i)]) for i in range(len(held.files) - 1)]
        params, opt_state = jax.tree.unflatten(jax.tree.structure((params, opt_state)), leaves)
    lengths = np.array([-(-len(row) // 16) * 16 for row in rows])
    short = np.flatnonzero(lengths <= LONGEST)
    for count in track(range(len(losses), steps), "distil"):
        rng = np.random.default_rng((seed, count))
        length = lengths[rng.choice(short)]
        batch = rng.choice(np.flatnonzero(lengths == length), size)
        ids, mask = minilm_net.padded([rows[i] for i in batch], length)
        grads, far = gradient(params, teacher, ids, mask)
        params, opt_state = update(params, opt_state, grads)
        losses.append(float(far))
        if keep is not None and (count + 1) % 100 == 0:
            held = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves((params, opt_state)))}
            with open(f"{keep}.partial", "wb") as file:
                np.savez(file, losses=losses, **held)
            os.replace(f"{keep}.partial", keep)
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
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--size", type=int, default=64, help="sentences of a batch")
    parser.add_argument("--calibrate", type=int, default=1024, help="sentences that widths are chosen with")
    parser.add_argument("--held", type=int, default=1000, help="sentences to measure with")
    args = parser.parse_args()

    rows = minilm_net.tokens(read(args.sentences, "train"))
    strange = minilm_net.tokens(read(args.sentences, "tuning")[-args.calibrate :])
    model = minilm_net.pretrained(args.out, minilm_net.by_frequency(rows), CUTS)
    apply, params = minilm_net.split(model)
    bits = chosen(params, sensitivity(apply, params, strange), args.megabytes)
    print({path: width for path, width in flat(bits) if width})

    start = time.perf_counter()
    tx = chain(bits, args.steps, args.rate)
    params, opt_state, losses = distilled(apply, params, tx, rows, args.steps, args.size)
    far = [np.mean(part) for part in (losses[:20], losses[-20:])]
    print(f"{time.perf_counter() - start:.0f} s, squared distance {far[0]:.4f} to {far[1]:.4f}")
    file = args.out / f"minilm-{args.megabytes:g}MB.onnx"
    export(file, model, params, opt_state)
    print(f"{file.stat().st_size:,} bytes")

    held = minilm_net.tokens(read(args.sentences, "tuning", args.held))
    files = {"float": minilm_graph.float_graph(model), "int8": minilm_graph.rival(), "ours": file}
    found = {name: minilm_graph.embeddings(minilm_graph.session(graph), held) for name, graph in files.items()}
    for name in ("int8", "ours"):
        print(name, measures(found["float"], found[name]))


if __name__ == "__main__":
    main()
