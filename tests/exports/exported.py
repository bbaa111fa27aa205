"""Small models of Flax NNX as ONNX graphs, and their leaves on formats."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from on_format import on_format

import clipjax
from clipjax._arrays import trees


class Transformer(nnx.Module):
    """A table, Gemm, LayerNorm, attention of two heads and a residual."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 64, rngs=rngs)
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.LayerNorm(128, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 128, rngs=rngs, decode=False)
        self.head = nnx.Linear(128, 32, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(nnx.gelu(self.up(self.embed(tokens))))
        return self.head(x + self.attention(x))


class Mlp(nnx.Module):
    """A stack whose second product is an Einsum, as jax2onnx writes x @ w of three axes."""

    def __init__(self, rngs):
        self.up = nnx.Linear(64, 256, rngs=rngs)
        self.middle = nnx.Param(jax.random.normal(rngs.params(), (256, 256)) / 16)
        self.down = nnx.Linear(256, 32, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(nnx.relu(self.up(x)) @ self.middle[...]))


class Cnn(nnx.Module):
    """Convolutions, one of them depthwise, with running statistics and a head."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs, use_running_average=True)
        self.depthwise = nnx.Conv(32, 32, (3, 3), feature_group_count=32, rngs=rngs)
        self.last = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(nnx.relu(self.last(self.depthwise(x))).mean((1, 2)))


def on_formats(model, chosen):
    """The params of a model, with those leaves on a format for which `chosen(path, leaf)` gives it, and its axes."""

    def one(path, leaf):
        found = chosen(path, leaf) if leaf.ndim > 1 and "bias" not in path else None
        return leaf if found is None else on_format(found[0], leaf, found[1], path)

    return trees.map_with_path(one, trees.pure(nnx.state(model, nnx.Param)))


def outputs(model, params, x):
    """What a model gives with the values that its params stand for."""
    q = lambda leaf: isinstance(leaf, clipjax.Quantized)
    floats = jax.tree.map(lambda leaf: clipjax.dequantize(leaf) if q(leaf) else leaf, params, is_leaf=q)
    definition, state, rest = nnx.split(model, nnx.Param, ...)
    state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(floats))
    with jax.default_matmul_precision("highest"):
        return np.asarray(nnx.merge(definition, state, rest)(jnp.asarray(x)))
