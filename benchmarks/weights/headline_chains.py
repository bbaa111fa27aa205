"""The recipes of headline.py, those that were tried, and the chain that a recipe makes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lenet_chains as chains
import optax
from lenet_training import MODELS, Course, Lesson, model

import clipjax
from clipjax import roundings, scores, structures


class Recipe(NamedTuple):
    """The settings of one training.

    Attributes:
      level: the fraction of zeros of all kernels together, spread over them by `scope`; or one of each kernel.
      bits: of the kernels, in the order of the layers.
      bias_bits: of every bias.
      epochs: how long.
      batch: images an update.
      rate: Adam's, on a cosine to 0.
      decay: AdamW's weight decay.
      dropout: the share of hidden units that are dropped.
      mix: what the answers of the dense net of the same seed count (distillation); 0 trains no such net.
      scope: of the mask, where `level` is one number.
      units: the fraction of units of each group of `clipjax.analyze` that is cut out first, by layer; () for none.
      lam: what a bit costs (`roundings.rate`), in squared steps, rising over the first 60 % to this; 0 for nothing.
      distortion: how strongly the training images are distorted, see `lenet_training.distorted`.
    """

    level: float | tuple[float, ...]
    bits: tuple[int, ...]
    bias_bits: int = 4
    epochs: int = 40
    batch: int = 256
    rate: float = 6e-3
    decay: float = 0.05
    dropout: float = 0.1
    mix: float = 0.0
    scope: str = "erk"
    units: tuple[float, ...] = ()
    lam: float = 0.0
    distortion: float = 0.0

    @property
    def words(self) -> str:
        """What differs from the defaults."""
        mine = self._asdict().items()
        return ", ".join(f"{name} {value}" for name, value in mine if value != self._field_defaults.get(name))

    @property
    def lesson(self) -> Lesson:
        """How it is trained."""
        return Lesson(self.epochs, self.batch, self.dropout, mix=self.mix, temperature=4.0)


TEACHER = Lesson(epochs=30, dropout=0.3), 3e-3, 0.05  # of the recipes with `mix`: its lesson, rate and decay
FIRST = Lesson(epochs=6, batch=128, dropout=0.1), 2e-3, 0.05  # before units are cut out: its lesson, rate and decay
LAYERS = {"LeNet-300-100": ("Dense_0", "Dense_1", "Dense_2"), "LeNet-5": ("Conv_0", "Conv_1", "Dense_0", "Dense_1")}


def layer(path: str) -> str:
    """The layer that a leaf belongs to."""
    return path.split("/")[0]


def optimizer(rate: float, decay: float, steps: int) -> optax.GradientTransformation:
    """AdamW on a cosine to 0."""
    return optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=decay)


def chain(network: str, recipe: Recipe, course: Course) -> optax.GradientTransformation:
    """A grid for all leaves, biases too, around the optimizer and masks by movement: both see the float weights.

    Zeros are complete at 60 % of the training (`chains.gradual`), the steps are frozen for its last tenth.
    """
    layers = LAYERS[network]

    def bits(path: str, leaf: jax.Array) -> int:
        return recipe.bits[layers.index(layer(path))] if leaf.ndim > 1 else recipe.bias_bits

    def lam(count: jax.Array) -> jax.Array:
        return recipe.lam * jnp.minimum(count / (chains.LAST * course.steps), 1)

    inner = optax.chain(optimizer(recipe.rate, recipe.decay, course.steps), *masks(layers, recipe, course))
    grid = clipjax.fake_quantize(
        clipjax.per_leaf(bits),
        rounding=roundings.rate(lam) if recipe.lam else "nearest",
        where=lambda path, leaf: True,
        stop=int(0.9 * course.steps),
        inner=inner,
    )
    return clipjax.with_gradient(grid)  # movement is a sum of weight times gradient


def masks(layers: tuple[str, ...], recipe: Recipe, course: Course) -> list[optax.GradientTransformation]:
    """One mask for all kernels, or one for each."""
    score = scores.movement(0.9999)
    if not isinstance(recipe.level, tuple):
        return [chains.gradual(course._replace(level=recipe.level), score=score, scope=recipe.scope)]

    def only(name: str) -> Any:
        return lambda path, leaf: layer(path) == name and leaf.ndim > 1

    levels = zip(layers, recipe.level, strict=True)
    return [chains.gradual(course._replace(level=x), score=score, where=only(name)) for name, x in levels]


def analysis(network: str) -> clipjax.Analysis:
    """What is known of a network's units."""
    x = jnp.zeros((2, 28, 28, 1))
    params = MODELS[network]().init(jax.random.key(0), x)["params"]
    return clipjax.analyze(lambda params, x: model(network, params).apply({"params": params}, x), params, x)


def thin(network: str, groups: Any, units: tuple[float, ...], course: Course) -> Any:
    """A chain that sets a fraction of the units of each group to zero, those with the least movement."""
    ordered = sorted(groups, key=lambda group: LAYERS[network].index(layer(next(iter(group)))))
    held = [
        chains.gradual(
            course._replace(level=level), score=scores.movement(0.9999), structure=structures.unit(groups=(group,))
        )
        for group, level in zip(ordered, units, strict=True)
        if level
    ]
    _, rate, decay = FIRST
    return clipjax.with_gradient(optax.chain(optimizer(rate, decay, course.steps), *held))


SHIFTED: Any = {"batch": 128, "rate": 3e-3, "dropout": 0.0, "distortion": 0.5}  # LeNet-5 on distorted images
BEST = {
    "LeNet-300-100-80x": Recipe(0.95, (3, 3, 4)),
    "LeNet-300-100-120x": Recipe(0.972, (3, 3, 3)),
    "LeNet-300-100-6kB": Recipe(0.9805, (3, 3, 3), distortion=0.5, dropout=0.0, epochs=160),
    "LeNet-300-100-4.5kB": Recipe(0.986, (3, 3, 3), distortion=0.5, dropout=0.0, epochs=160),
    "LeNet-5-4.5kB": Recipe((0.0, 0.5, 0.75, 0.4), (4, 3, 3, 3), epochs=60, units=(0.6, 0.68, 0.9), lam=0.2, **SHIFTED),
    "LeNet-5-200x": Recipe((0.4, 0.92, 0.9905, 0.87), (4, 3, 3, 3), epochs=28, batch=64, rate=2e-3),
}
TRIED = {
    "LeNet-300-100": (
        Recipe(0.95, (2, 2, 3), epochs=16),
        Recipe(0.95, (2, 2, 3), epochs=16, mix=0.7),
        Recipe(0.97, (3, 3, 4), epochs=16, mix=0.7),
        Recipe(0.97, (4, 4, 4), epochs=16, mix=0.7),
        Recipe(0.94, (3, 3, 4), epochs=16, mix=0.7, scope="global"),
        Recipe(0.94, (3, 3, 4), epochs=16, mix=0.7, decay=0.02),
        Recipe(0.93, (2, 2, 3), mix=0.7),
        Recipe(0.96, (3, 3, 4)),
        Recipe(0.96, (3, 3, 4), mix=0.7),
        Recipe(0.96, (3, 3, 4), dropout=0.2),
        Recipe(0.96, (3, 3, 4), mix=0.7, scope="global"),
        Recipe(0.96, (3, 3, 4), rate=3e-3),
        Recipe(0.98, (3, 3, 3), distortion=0.5),
        Recipe(0.98, (3, 3, 3), distortion=0.5, dropout=0.0),
        Recipe(0.98, (3, 3, 3), distortion=1.0, dropout=0.0),
        Recipe(0.985, (3, 3, 3), distortion=0.5, dropout=0.0),
        Recipe(0.985, (3, 3, 3), distortion=0.3, dropout=0.0),
        Recipe(0.985, (3, 3, 3), distortion=0.5, dropout=0.0, epochs=80),
        Recipe(0.985, (3, 3, 3), distortion=0.5, dropout=0.0, decay=0.02),
        Recipe(0.98, (3, 3, 3), distortion=0.5, dropout=0.0, lam=0.05),
        Recipe(0.97, (3, 3, 3), distortion=0.5, lam=0.1),
        Recipe(0.9, (3, 3, 3), distortion=0.5, lam=0.5),
        Recipe(0.0, (4, 4, 4), distortion=0.5, lam=4.0),
        Recipe(0.98, (2, 3, 3), distortion=0.5, dropout=0.0),
        Recipe(0.986, (3, 3, 3), distortion=0.5, dropout=0.0, epochs=160),
        Recipe(0.98, (3, 3, 3), distortion=0.5, dropout=0.0, epochs=160),
    ),
    "LeNet-5": (
        Recipe((0.4, 0.92, 0.988, 0.85), (4, 3, 3, 3), epochs=8, batch=128, rate=3e-3),
        Recipe((0.4, 0.92, 0.9915, 0.88), (4, 3, 3, 3), epochs=8, batch=128, rate=6e-3),
        Recipe((0.4, 0.92, 0.99, 0.87), (4, 3, 3, 3), epochs=8, batch=64, rate=2e-3),
        Recipe((0.4, 0.92, 0.9905, 0.87), (4, 3, 3, 3), epochs=28, batch=64, rate=2e-3),
        Recipe((0.4, 0.92, 0.9905, 0.87), (4, 3, 3, 3), epochs=28, batch=128, rate=3e-3),
        Recipe((0.3, 0.6, 0.8, 0.5), (4, 3, 3, 3), epochs=30, units=(0.5, 0.6, 0.88), lam=0.2, **SHIFTED),
        Recipe((0.0, 0.5, 0.75, 0.4), (4, 3, 3, 3), epochs=60, units=(0.6, 0.68, 0.9), lam=0.2, **SHIFTED),
        Recipe((0.2, 0.6, 0.8, 0.5), (4, 3, 3, 3), epochs=60, units=(0.6, 0.7, 0.9), lam=0.2, **SHIFTED),
        Recipe((0.0, 0.4, 0.7, 0.4), (4, 3, 3, 3), epochs=80, units=(0.65, 0.74, 0.92), lam=0.2, **SHIFTED),
    ),
}
