"""The reference runs of the documents D1, D3 and D4, with the documents' own numbers.

    python examples/documents.py                      # ten epochs each, as the documents say
    python examples/documents.py --runs D3 --epochs 3 --steps 5

D1 clips every gradient entry to ±0.01 (CNN 3→64→128, SGD 0.01). D3 clamps the weights to ±T *before* the update and
clips the gradients to ±C (MLP 784-128-10, SGD 0.01); it leaves T and C open, here 0.05 and 0.01. D4 clips to ±0.01,
updates, analyses each array, chooses a bit width from it and quantizes (CNN 1→32→64 on random 32x32 inputs, SGD 0.01).
D1 and D3 do not say where their data comes from: here they see scikit-learn's digits, enlarged to their shapes.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import clipjax

RATE = 0.01
ALPHA = 0.01  # D1
BOUND, LIMIT = 0.05, 0.01  # D3's T and C
CUT, TARGET_DB = 0.01, 30.0  # D4's c, and the signal to noise that its bit width must reach
BATCH = 32


class D1(nn.Module):
    """3→64→128 convolutions 3x3, each pooled to half, then 8·8·128→1024→10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps f32[n, 32, 32, 3] to logits f32[n, 10]."""
        for channels in (64, 128):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(1024)(x.reshape(x.shape[0], 8 * 8 * 128)))
        return nn.Dense(10)(x)


class D3(nn.Module):
    """784→128→10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps f32[n, 28, 28, 1] to logits f32[n, 10]."""
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x.reshape(x.shape[0], 784))))


class D4(nn.Module):
    """1→32→64 convolutions 3x3 without padding, 4x4 average pool, 64·7·7 = 3136→128→10 (the document says 64·16·16)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps f32[n, 32, 32, 1] to log-probabilities f32[n, 10]."""
        for channels in (32, 64):
            x = nn.relu(nn.Conv(channels, (3, 3), padding="VALID")(x))
        x = nn.avg_pool(x, (4, 4), (4, 4))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], 64 * 7 * 7)))
        return nn.log_softmax(nn.Dense(10)(x))


def clip_gradients(params: Any) -> optax.GradientTransformation:
    """D1: θ ← θ − η·clip(g, −α, α)."""
    return optax.chain(clipjax.clip(ALPHA), optax.sgd(RATE))


def clamp_and_clip(params: Any) -> optax.GradientTransformation:
    """D3: w ← clamp(w, ±T), then W ← W − η·clip(g, ±C)."""
    return optax.chain(clipjax.clip(LIMIT), optax.sgd(RATE), clipjax.clamp_weights(BOUND, when="before"))


def clip_and_quantize(params: Any) -> optax.GradientTransformation:
    """D4: clip(g, −c, c) → update → a bit width from each array's distribution → Q(w) = round(w/s)·s."""
    bits = clipjax.choose_bits(params, target_db=TARGET_DB)
    return optax.chain(clipjax.clip(CUT), optax.sgd(RATE), clipjax.fake_quantize(bits, rounding="half_away", every=1))


class Run(NamedTuple):
    """One document: model, chain, and an epoch's batches."""

    model: nn.Module
    chain: Callable[[Any], optax.GradientTransformation]
    batches: Callable[[np.random.Generator, int], Any]


def digits(height: int, channels: int) -> Callable[[np.random.Generator, int], Any]:
    """Makes batches of digits, each pixel enlarged and the border padded, as f32[32, height, height, channels]."""
    images, labels = load_digits(return_X_y=True)
    scale = height // 8
    images = np.kron(images.reshape(-1, 8, 8) / 16, np.ones((1, scale, scale)))
    border = (height - 8 * scale) // 2
    images = np.pad(images, ((0, 0), (border, border), (border, border)))[..., None].astype(np.float32)

    def batches(generator, steps):
        for _ in range(steps):
            picked = generator.integers(len(labels), size=BATCH)
            yield np.repeat(images[picked], channels, axis=-1), labels[picked].astype(np.int32)

    return batches


def noise(generator: np.random.Generator, steps: int) -> Any:
    """Makes D4's batch: random inputs and random labels, one step an epoch."""
    yield generator.standard_normal((BATCH, 32, 32, 1), np.float32), generator.integers(10, size=BATCH, dtype=np.int32)


def check(name: str, before: Any, after: Any, opt_state: Any) -> str:
    """Asserts what a document's formula promises of the last step, and returns in words what held."""
    moved = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(after))
    if name == "D1":
        assert moved <= RATE * ALPHA * 1.001, moved
        return f"last step moved no weight by more than {moved:.6f} (η·α = {RATE * ALPHA})"
    if name == "D3":
        assert largest <= BOUND + RATE * LIMIT * 1.001, largest
        return f"max |w| = {largest:.5f} <= T + η·C = {BOUND + RATE * LIMIT:.5f}"
    leaves = jax.tree.leaves(clipjax.quantized(after, opt_state), is_leaf=lambda leaf: hasattr(leaf, "codes"))
    grids = [(grid, leaf) for grid, leaf in zip(leaves, jax.tree.leaves(after), strict=True) if hasattr(grid, "codes")]
    assert len(grids) == 4 and all((grid.codes.astype(jnp.float32) * grid.step == leaf).all() for grid, leaf in grids)
    return f"every kernel is codes · s exactly, bits chosen: {[int(grid.bits) for grid, _ in grids]}"


def run(name: str, epochs: int, steps: int) -> tuple[list[float], str]:
    """Trains one document's model; returns the mean loss of every epoch and what held at the end."""
    model, chain, batches = RUNS[name]
    generator = np.random.default_rng(0)
    params = model.init(jax.random.key(0), next(batches(generator, 1))[0])["params"]
    tx = chain(params)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, x, y):
        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in track(range(epochs), description=name):
        epoch = []
        for x, y in batches(generator, steps):
            before = params
            params, opt_state, loss = train_step(params, opt_state, x, y)
            epoch.append(loss)
        losses.append(float(jnp.stack(epoch).mean()))
    return losses, check(name, before, params, opt_state)


RUNS = {
    "D1": Run(D1(), clip_gradients, digits(32, 3)),
    "D3": Run(D3(), clamp_and_clip, digits(28, 1)),
    "D4": Run(D4(), clip_and_quantize, noise),
}


def main() -> None:
    """Runs the documents and prints the loss of every epoch and the constraint that was checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="steps in an epoch of D1 and D3; D4 has one, as it says")
    args = parser.parse_args()
    table = Table("run", *(f"epoch {epoch}" for epoch in range(1, args.epochs + 1)), title="mean loss")
    held = []
    for name in args.runs:
        losses, words = run(name, args.epochs, args.steps)
        table.add_row(name, *(f"{loss:.3f}" for loss in losses))
        held.append(f"{name}: {words}")
    console = Console(width=120)
    console.print(table)
    console.print("\n".join(held), highlight=False)


if __name__ == "__main__":
    main()
