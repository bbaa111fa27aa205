"""Six containers of parameters that the contract is checked in, all tiny and of few distinct shapes.

Each gives its parameters and a loss of them: `model() -> (params, loss)`.
"""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = 8


class Block(nn.Module):
    """Attention and a dense layer, in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.LayerNorm()(x)), None


class Scanned(nn.Module):
    """Dense, BatchNorm, two blocks under one `nn.scan`, dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(WIDTH)(x))
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(WIDTH)(stack()(x, None)[0])


class ViT(nn.Module):
    """Patches, positions, one block, the mean, a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (2, 2), strides=(2, 2))(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.param("position", nn.initializers.normal(0.3), (x.shape[1], WIDTH))
        return nn.Dense(WIDTH)(Block()(x)[0].mean(axis=1))


class Boxed(nn.Module):
    """Two dense layers whose kernels and biases are boxed with logical axes."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        bias = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("mlp",))
        x = nn.relu(nn.Dense(WIDTH, kernel_init=kernel, bias_init=bias)(x))
        return nn.Dense(WIDTH, kernel_init=kernel, bias_init=bias)(x)


class Wired(nnx.Module):
    """Two dense layers of NNX with a BatchNorm between them."""

    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)


def distance(y):
    """A loss that pulls every output to 1."""
    return jnp.mean(jnp.square(y - 1.0))


def linen(module, *shape):
    x = inputs(*shape)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        return distance(
            module.apply({"params": params, **rest}, x, mutable=list(rest) or False)[0]
            if rest
            else module.apply({"params": params}, x)
        )

    return variables["params"], loss


@functools.cache
def nested():
    rng, x = np.random.default_rng(0), inputs(4, WIDTH)
    kernel = lambda: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) * 0.3, jnp.float32)
    params = {"a": {"kernel": kernel(), "bias": jnp.zeros(WIDTH)}, "list": [kernel(), {"scale": jnp.ones(WIDTH)}]}

    def loss(params):
        hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
        return distance(hidden @ params["list"][0] * params["list"][1]["scale"])

    return params, loss


@functools.cache
def scanned():
    return linen(Scanned(), 2, 4, WIDTH)


@functools.cache
def vit():
    return linen(ViT(), 2, 4, 4, 1)


@functools.cache
def boxed():
    return linen(Boxed(), 4, WIDTH)


@functools.cache
def wired():
    graph, params, rest = nnx.split(Wired(nnx.Rngs(0)), nnx.Param, ...)
    x = inputs(4, WIDTH)
    return params, lambda params: distance(nnx.merge(graph, params, rest)(x))


@functools.cache
def equinox():
    model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = inputs(4, WIDTH)
    return params, lambda params: distance(jax.vmap(eqx.combine(params, static))(x))


MODELS = {"nested": nested, "scanned": scanned, "vit": vit, "boxed": boxed, "nnx": wired, "equinox": equinox}
