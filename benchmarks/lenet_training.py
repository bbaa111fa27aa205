"""MNIST, the two LeNets, and a whole training as one compiled program: what lenet.py runs, without any chain."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import mnist

BATCH = 256
HELD_OUT = 10_000  # the last training images, on which settings are chosen


class Data(NamedTuple):
    """Images f32[n, 28, 28, 1] in [0, 1] and labels i32[n] to train on, then the same two to test on."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: np.ndarray


def load(folder: Path, validate: bool) -> Data:
    """Returns MNIST, or its training images alone, the last of them to test on."""
    x, y, x_test, y_test = mnist.load(folder)
    if validate:
        (x, x_test), (y, y_test) = np.split(x, [-HELD_OUT]), np.split(y, [-HELD_OUT])
    return Data(jnp.asarray(x), jnp.asarray(y), jnp.asarray(x_test), y_test)


class LeNet300(nn.Module):
    """784-300-100-10, 266,610 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps f32[n, 28, 28, 1] to logits f32[n, 10]."""
        x = x.reshape(x.shape[0], -1)
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class LeNet5(nn.Module):
    """Caffe's LeNet: 20 and 50 filters of 5x5, each pooled to half, 500, 10; 431,080 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps f32[n, 28, 28, 1] to logits f32[n, 10]."""
        for width in (20, 50):
            x = nn.max_pool(nn.Conv(width, (5, 5), padding="VALID")(x), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Course(NamedTuple):
    """What a chain is built for.

    Attributes:
      level: the sparsity to reach, f32[]; traced, so one program serves every level.
      steps: how many updates there will be.
      key: the PRNG key of what the chain draws.
      params: the first params.
      loss: params -> loss of the first thousand training images.
    """

    level: jax.Array
    steps: int
    key: jax.Array
    params: Any
    loss: Callable[[Any], jax.Array]


def trainer(model: nn.Module, data: Data, chain: Callable[[Course], Any], epochs: int) -> Callable[..., Any]:
    """Compiles a training: `train(level, seed)` is params, opt_state and the seconds that it took.

    The seed, traced like the level, decides the first params, the batches and what the chain draws.
    """
    batches = len(data.x) // BATCH

    def loss_fn(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

    def train(level, seed, x, y):
        key = jax.random.key(seed)
        params = model.init(key, x[:1])["params"]
        draws = jax.random.fold_in(key, epochs)
        tx = chain(Course(level, epochs * batches, draws, params, lambda p: loss_fn(p, x[:1000], y[:1000])))

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss_fn)(params, x[batch], y[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, number):
            order = jax.random.permutation(jax.random.fold_in(key, number), len(x))
            return jax.lax.scan(step, carry, order[: batches * BATCH].reshape(batches, BATCH))

        return jax.lax.scan(epoch, (params, tx.init(params)), jnp.arange(epochs))[0]

    program = jax.jit(train).lower(jnp.float32(0), 0, data.x, data.y).compile()

    def timed(level, seed):
        begin = time.perf_counter()
        params, state = jax.block_until_ready(program(jnp.float32(level), seed, data.x, data.y))
        return params, state, time.perf_counter() - begin

    return timed


def predict(model: nn.Module, params: Any, x: jax.Array) -> np.ndarray:
    """Returns the class i64[n] of every image, a thousand images at a time."""
    return np.concatenate([_predict(model, params, part) for part in _parts(x)])


def _parts(x: jax.Array) -> Iterator[jax.Array]:
    return (x[i : i + 1000] for i in range(0, len(x), 1000))


@jax.jit(static_argnums=0)
def _predict(model: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    return model.apply({"params": params}, x).argmax(-1)
