"""MNIST, the two LeNets, and a whole training as one compiled program: what lenet.py runs, without any chain."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import mnist

BATCH = 256
HELD_OUT = 10_000  # the last training images, on which settings are chosen
COPIES = 10  # of the training images, each distorted in another way: an epoch sees the next one


class Data(NamedTuple):
    """Images f32[n, 28, 28, 1] in [0, 1] and labels i32[n] to train on, then the same two to test on.

    The images to train on may also be u8[copies, n, 28, 28, 1] of 0 to 255: each epoch then sees the next copy.
    """

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


def distorted(x: jax.Array, strength: float, copies: int = COPIES) -> jax.Array:
    """Copies of images under random affine maps, bilinear: u8[copies, n, 28, 28, 1] of 0 to 255.

    At strength 1 the four entries of the matrix are off those of the identity by up to .15, shifts are up to 2 pixels.
    """
    place = jnp.stack(jnp.meshgrid(*[jnp.arange(28.0)] * 2, indexing="ij"), -1).reshape(-1, 2) - 13.5

    @jax.jit
    def copy(key: jax.Array, x: jax.Array) -> jax.Array:
        turned, moved = (jax.random.uniform(k, (len(x), 2, 2), minval=-1) for k in jax.random.split(key))
        matrix = jnp.eye(2) + 0.15 * strength * turned
        at = jnp.einsum("nij,pj->npi", matrix, place) + 2 * strength * moved[:, None, 0] + 13.5
        images = jax.vmap(lambda image, at: jax.scipy.ndimage.map_coordinates(image, at, order=1))
        return jnp.rint(255 * images(x[..., 0], jnp.moveaxis(at, -1, 1))).astype(jnp.uint8).reshape(x.shape)

    keys = jax.random.split(jax.random.key(7), (copies, len(x) // 1000))
    return jnp.stack([jnp.concatenate([copy(k, x[i * 1000 :][:1000]) for i, k in enumerate(row)]) for row in keys])


class LeNet300(nn.Module):
    """784-300-100-10, 266,610 parameters."""

    dropout: float = 0.0
    widths: tuple[int, ...] = (300, 100)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps f32[n, 28, 28, 1] to logits f32[n, 10]."""
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(nn.Dense(width)(x)))
        return nn.Dense(10)(x)


class Conv(nn.Module):
    """A convolution with 5x5 weights as one product: in a scan XLA's CPU backend takes 19 times as long for its own."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps f32[n, h, w, c] to f32[n, h - 4, w - 4, width]; params are those of `nn.Conv`."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (5, 5, x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        height, width = x.shape[1] - 4, x.shape[2] - 4
        seen = [x[:, i : i + height, j : j + width] for i in range(5) for j in range(5)]
        return jnp.concatenate(seen, axis=-1) @ kernel.reshape(-1, self.width) + bias


class LeNet5(nn.Module):
    """Caffe's LeNet: 20 and 50 filters of 5x5, each pooled to half, 500, 10; 431,080 parameters."""

    dropout: float = 0.0
    widths: tuple[int, ...] = (20, 50, 500)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps f32[n, 28, 28, 1] to logits f32[n, 10]."""
        for width in self.widths[:2]:
            x = _pooled(Conv(width)(x))
        x = nn.relu(nn.Dense(self.widths[2])(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(nn.Dropout(self.dropout, deterministic=not train)(x))


def _pooled(x: jax.Array) -> jax.Array:
    """The largest of every 2x2; on a CPU a third faster to train than `nn.max_pool`."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


MODELS = {"LeNet-300-100": LeNet300, "LeNet-5": LeNet5}


def model(network: str, params: Any, dropout: float = 0.0) -> nn.Module:
    """The net whose widths are those of params."""
    *layers, _ = sorted(params)  # the last one has the ten outputs
    return MODELS[network](dropout, tuple(params[layer]["bias"].size for layer in layers))


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


class Lesson(NamedTuple):
    """How a training goes: how long, and with what usual trick; `mix` is what the teacher's answers count."""

    epochs: int
    batch: int = BATCH
    dropout: float = 0.0
    smoothing: float = 0.0
    mix: float = 0.0
    temperature: float = 1.0


def trainer(
    network: str, data: Data, chain: Callable[[Course], Any], lesson: Lesson, together: int = 0, begin: Any = None
) -> Callable[..., Any]:
    """Compiles a training: `train(level, seed)` is params, opt_state and the seconds that it took.

    The seed, traced like the level, decides the first params, the batches and what the chain draws. With `mix` a third
    argument is needed: the teacher's logits f32[n, 10] of the training images. With `together` so many trainings run as
    one batch, for a GPU: the seed is then i32[together], and every array of the result has that axis in front.
    With `begin`, params of any widths, each training begins with the params of its argument `begin`.
    """
    given, batches = begin is not None, len(data.y) // lesson.batch
    net = model(network, begin, lesson.dropout) if given else MODELS[network](lesson.dropout)
    copies = data.x if data.x.ndim == 5 else data.x[None]

    def loss_fn(params, x, y, taught=None, key=None):
        logits = net.apply({"params": params}, x, train=key is not None, rngs=None if key is None else {"dropout": key})
        labels = optax.smooth_labels(jax.nn.one_hot(y, 10), lesson.smoothing)
        loss = optax.softmax_cross_entropy(logits, labels).mean()
        if not lesson.mix or taught is None:
            return loss
        soft = jax.nn.softmax(taught / lesson.temperature)
        distance = optax.softmax_cross_entropy(logits / lesson.temperature, soft).mean()
        return (1 - lesson.mix) * loss + lesson.mix * lesson.temperature**2 * distance

    def floats(images):
        return images if images.dtype == jnp.float32 else images.astype(jnp.float32) / 255

    def train(level, seed, copies, y, taught, begin):
        key, first = jax.random.key(seed), floats(copies[0, :1000])
        params = begin if given else net.init(key, first[:1])["params"]
        draws = jax.random.fold_in(key, lesson.epochs)
        tx = chain(Course(level, lesson.epochs * batches, draws, params, lambda p: loss_fn(p, first, y[:1000])))

        def step(x, carry, batch):
            params, state, key = carry
            key, mine = jax.random.split(key) if lesson.dropout else (key, None)
            soft = taught[batch] if lesson.mix else None
            grads = jax.grad(loss_fn)(params, floats(x[batch]), y[batch], soft, mine)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, key), None

        def epoch(carry, number):
            order = jax.random.permutation(jax.random.fold_in(key, number), len(y))
            x = jax.lax.dynamic_index_in_dim(copies, number % len(copies), keepdims=False)
            return jax.lax.scan(
                functools.partial(step, x), carry, order[: batches * lesson.batch].reshape(batches, lesson.batch)
            )

        return jax.lax.scan(epoch, (params, tx.init(params), draws), jnp.arange(lesson.epochs))[0][:2]

    def arguments(level, seed, taught=None, begin=None):
        return jnp.float32(level), seed, copies, data.y, jnp.zeros(()) if taught is None else taught, begin

    shape = jnp.zeros((len(data.y), 10)) if lesson.mix else None
    first = jnp.zeros(together, jnp.int32) if together else 0
    compiled = jax.jit(jax.vmap(train, (None, 0, None, None, None, None)) if together else train)
    program = compiled.lower(*arguments(0, first, shape, begin)).compile()

    def timed(level, seed, taught=None, begin=None):
        start = time.perf_counter()
        params, state = jax.block_until_ready(program(*arguments(level, seed, taught, begin)))
        return params, state, time.perf_counter() - start

    return timed


def grouped(jobs: Iterable[tuple[Any, int]], together: bool) -> list[tuple[Any, list[int]]]:
    """What to train with which seeds: one by one, as they come, or all seeds of the same together."""
    if not together:
        return [(what, [seed]) for what, seed in jobs]
    groups: dict[Any, list[int]] = {}
    for what, seed in jobs:
        groups.setdefault(what, []).append(seed)
    return list(groups.items())


def trainings(
    program: Callable[[int], Callable[..., Any]], level: float, seeds: list[int], together: bool
) -> Iterator[tuple[int, Any, Any, float]]:
    """Trains some seeds, one by one or as one batch: seed, params, opt_state, and a seed's share of the seconds.

    `program(n)` is the `trainer` of n seeds together.
    """
    if not together:
        for seed in seeds:
            yield seed, *program(0)(level, seed)
        return
    params, opt_state, seconds = program(len(seeds))(level, jnp.array(seeds, jnp.int32))
    for i, seed in enumerate(seeds):
        yield seed, *jax.tree.map(lambda x, i=i: x[i], (params, opt_state)), seconds / len(seeds)


def answers(network: str, params: Any, x: jax.Array) -> np.ndarray:
    """Returns the logits f32[n, 10] of every image, a thousand images at a time."""
    return np.concatenate([_apply(model(network, params), params, x[i : i + 1000]) for i in range(0, len(x), 1000)])


@jax.jit(static_argnums=0)
def _apply(net: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    return net.apply({"params": params}, x)
