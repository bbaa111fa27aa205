"""The data, the model and the train step that every row of digits.py shares: nothing in here knows clipjax's chains."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import mnist
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import clipjax


class Data(NamedTuple):
    """Images f32[n, height, width, 1] in [0, 1] and labels i32[n], and how to go through them."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: np.ndarray
    batch: int
    epochs: int


def load(name: str, folder: str | None) -> Data:
    """Loads scikit-learn's bundled digits (8x8), or MNIST's IDX files from a folder."""
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
        x, x_test, y, y_test = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
        return Data(jnp.asarray(x), jnp.asarray(y, jnp.int32), jnp.asarray(x_test), y_test, batch=64, epochs=40)
    x, y, x_test, y_test = mnist.load(folder)
    return Data(jnp.asarray(x), jnp.asarray(y), jnp.asarray(x_test), y_test, batch=128, epochs=5)


class CNN(nn.Module):
    """Two 3x3 convolutions and two dense layers; 38,282 parameters on 8x8 images, 407,242 on 28x28."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images f32[n, height, width, 1] to logits f32[n, 10]."""
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        x = nn.relu(nn.Dense(64, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="logits")(x)


class Run(NamedTuple):
    """What a training leaves: the state, the facts of every step, test accuracy and train seconds of every epoch."""

    params: Any
    opt_state: Any
    facts: dict[str, np.ndarray]
    accuracy: np.ndarray
    seconds: np.ndarray
    predicted: np.ndarray


@dataclasses.dataclass
class _Training:
    """A training that is under way: its compiled step, its state and its metrics so far."""

    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    facts: list[dict[str, jax.Array]] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def init(data: Data, seed: int) -> Any:
    """Returns the model's first params."""
    return CNN().init(jax.random.key(seed), data.x[:1])["params"]


def train(
    data: Data,
    chains: dict[str, optax.GradientTransformation],
    params: Any,
    *,
    epochs: int,
    seed: int,
    on_turn: Callable[[str, int], None],
) -> dict[str, Run]:
    """Trains every chain from the same params on the same batches.

    They take turns, an epoch each, so that whatever else the machine does slows them all alike. The clock runs only
    while compiled train steps do: no compiling, no testing. `on_turn(name, epochs)` hears of every turn before it
    starts: compiling is one of 0 epochs.
    """
    runs = {}
    for name, tx in chains.items():
        on_turn(name, 0)
        runs[name] = _start(data, tx, params)
    for epoch in range(epochs):
        batches = _batches(data, np.random.default_rng((seed, epoch)))
        for name, run in runs.items():
            on_turn(name, 1)
            _run_epoch(run, data, batches)
    return {name: _finish(run, data) for name, run in runs.items()}


def _start(data: Data, tx: optax.GradientTransformation, params: Any) -> _Training:
    # The step is donated its state, so it gets params of its own.
    state = TrainState.create(apply_fn=CNN().apply, params=jax.tree.map(jnp.array, params), tx=tx)
    batch = jax.ShapeDtypeStruct((data.batch,), jnp.int32)
    return _Training(jax.jit(_step, donate_argnums=0).lower(state, data.x, data.y, batch).compile(), state)


def _run_epoch(run: _Training, data: Data, batches: np.ndarray) -> None:
    begin = time.perf_counter()
    for batch in batches:
        run.state, facts = run.step(run.state, data.x, data.y, batch)
        run.facts.append(facts)
    jax.block_until_ready(run.state)
    run.seconds.append(time.perf_counter() - begin)
    run.accuracy.append(float(np.mean(predict(run.state.params, data.x_test) == data.y_test)))


def _finish(run: _Training, data: Data) -> Run:
    facts = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(run.facts))
    params, opt_state = run.state.params, run.state.opt_state
    predicted = predict(params, data.x_test)
    return Run(params, opt_state, facts, np.array(run.accuracy), np.array(run.seconds), predicted)


def _step(state: TrainState, x: jax.Array, y: jax.Array, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One train step as it would be without clipjax, and what the chain has to tell."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads)
    return state, {"loss": loss, **clipjax.report(state.opt_state)}


def predict(params: Any, x: jax.Array) -> np.ndarray:
    """Returns the class i64[n] of every image, a thousand images at a time."""
    return np.concatenate([_predict(params, x[i : i + 1000]) for i in range(0, len(x), 1000)])


@jax.jit
def _predict(params: Any, x: jax.Array) -> jax.Array:
    return CNN().apply({"params": params}, x).argmax(-1)


def _batches(data: Data, generator: np.random.Generator) -> np.ndarray:
    """Shuffled indices i32[steps, batch] of one epoch; the incomplete last batch is left out."""
    steps = len(data.x) // data.batch
    return generator.permutation(len(data.x))[: steps * data.batch].reshape(steps, data.batch).astype(np.int32)
