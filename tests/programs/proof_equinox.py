"""Models of the proof set in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from proof_cases import Case, declared, filled, floats

RNG = np.random.default_rng(4)
KEY = jax.random.key(0)


class Grouped(eqx.Module):
    """A convolution in groups between pointwise ones, as in ResNeXt; a depthwise one of two maps for each channel."""

    into: eqx.nn.Conv2d
    grouped: eqx.nn.Conv2d
    out: eqx.nn.Conv2d
    twice: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, into, grouped, groups, out):
        self.into = eqx.nn.Conv2d(3, into, 1, key=KEY)
        self.grouped = eqx.nn.Conv2d(into, grouped, 3, groups=groups, padding=1, key=KEY)
        self.out = eqx.nn.Conv2d(grouped, out, 1, key=KEY)
        self.twice = eqx.nn.Conv2d(out, 2 * out, 3, groups=out, key=KEY)
        self.head = eqx.nn.Linear(2 * out, 3, key=KEY)

    def __call__(self, x):
        x = jax.nn.relu(self.grouped(jax.nn.relu(self.into(x))))
        x = self.twice(jax.nn.silu(self.out(x)))
        return self.head(x.mean((1, 2)))


class Gru(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, hidden):
        self.cell = eqx.nn.GRUCell(4, hidden, key=KEY)
        self.head = eqx.nn.Linear(hidden, 3, key=KEY)

    def __call__(self, x):
        turn = lambda h, x: (self.cell(x, h), None)
        return self.head(jax.lax.scan(turn, jnp.zeros(self.cell.weight_hh.shape[-1]), x)[0])


class Attention(eqx.Module):
    """Query, key and value from one fused kernel; the heads are those of the arrays."""

    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    head: int = eqx.field(static=True)

    def __call__(self, x):
        q, k, v = jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1)
        q, k, v = (y.reshape(len(x), -1, self.head) for y in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) / self.head**0.5)
        return jax.vmap(self.out)(jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1))


class ViT(eqx.Module):
    patches: eqx.nn.Conv2d
    cls: jax.Array
    positions: jax.Array
    norms: list
    attention: Attention
    library: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self):
        self.patches = eqx.nn.Conv2d(3, 10, 4, 4, key=KEY)
        self.cls, self.positions = jnp.ones((1, 10)), jnp.ones((5, 10))
        self.norms = [eqx.nn.LayerNorm(10) for _ in range(4)]
        self.attention = Attention(eqx.nn.Linear(10, 36, key=KEY), eqx.nn.Linear(12, 10, key=KEY), 4)
        self.library = eqx.nn.MultiheadAttention(2, 10, qk_size=4, vo_size=6, use_key_bias=True, key=KEY)
        self.mlp = eqx.nn.MLP(10, 10, 14, 2, jax.nn.gelu, key=KEY)
        self.head = eqx.nn.Linear(10, 3, key=KEY)

    def __call__(self, x):
        x = self.patches(x)
        x = jnp.concatenate([self.cls, x.reshape(x.shape[0], -1).T]) + self.positions
        x = x + self.attention(jax.vmap(self.norms[0])(x))
        x = x + self.library(*[jax.vmap(self.norms[1])(x)] * 3)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norms[2])(x))
        return self.head(self.norms[3](x[0]))


class UNet(eqx.Module):
    down: eqx.nn.Conv2d
    middle: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    head: eqx.nn.Conv2d

    def __init__(self):
        self.down = eqx.nn.Conv2d(3, 6, 3, padding=1, key=KEY)
        self.middle = eqx.nn.Conv2d(6, 8, 3, stride=2, padding=1, key=KEY)
        self.up = eqx.nn.ConvTranspose2d(8, 5, 2, stride=2, key=KEY)
        self.head = eqx.nn.Conv2d(11, 2, 1, key=KEY)

    def __call__(self, x):
        a = jax.nn.leaky_relu(self.down(x))
        return self.head(jnp.concatenate([self.up(jax.nn.relu(self.middle(a))), a]))


def _apply(model):
    """The arrays keep the static fields of the model that they come from, so only they themselves are read."""
    own, static = eqx.partition(model, eqx.is_inexact_array)
    treedef = jax.tree.structure(own)
    return lambda arrays, x: jax.vmap(eqx.combine(treedef.unflatten(jax.tree.leaves(arrays)), static))(x)


def _case(model, *shape, found, rebuild=None):
    variables = filled(eqx.filter(model, eqx.is_inexact_array), RNG)
    return Case(_apply(model), variables, (floats(RNG, *shape),), found, rebuild)


def _grouped(w):
    within = w("grouped/weight", -3)
    return Grouped(w("into/weight", -4), w("grouped/weight", -4), w("into/weight", -4) // within, w("out/weight", -4))


WIDTHS = {("into/weight", -4): 6, ("grouped/weight", -3): 3, ("grouped/weight", -4): 8, ("out/weight", -4): 5}
GROUPED = (
    ("into/weight", -4, 2),  # a group of the convolution
    ("grouped/weight", -3, 3),  # a map that each group of it reads
    ("grouped/weight", -4, 4),  # a map that each group of it makes
    ("out/weight", -4, 5),
    ("twice/weight", -4, 2),
)
VIT = (
    ("attention/qkv/weight", -2, 3),
    ("library/value_proj/weight", -2, 6),
    ("mlp/layers/0/weight", -2, 14),
    ("mlp/layers/1/weight", -2, 14),
)
model, rebuild = declared(_grouped, WIDTHS, _apply)
CASES = {
    "grouped": _case(model, 2, 3, 6, 6, found=GROUPED, rebuild=rebuild),
    "gru": _case(Gru(7), 2, 5, 4, found=(("head/weight", -1, 7),)),
    "vit": _case(ViT(), 2, 3, 8, 8, found=VIT),
    "unet": _case(UNet(), 2, 3, 6, 6, found=(("down/weight", -4, 6), ("middle/weight", -4, 8), ("up/weight", -4, 5))),
}
