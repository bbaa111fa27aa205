"""Models of the proof set in Linen, whose layers declare their widths: the small ones are built from what is left."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from proof_cases import Case, declared, filled, floats

RNG = np.random.default_rng(2)


class LeNet(nn.Module):
    conv1: int = 6
    conv2: int = 8
    dense1: int = 12
    dense2: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(self.conv1, (3, 3), name="conv1")(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(self.conv2, (3, 3), padding="VALID", name="conv2")(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.dense1, name="dense1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(self.dense2, name="dense2")(x)))


class Block(nn.Module):
    """A basic block; a stride or another width needs a projected shortcut."""

    inside: int
    outside: int
    strides: int
    projected: bool
    train: bool

    @nn.compact
    def __call__(self, x):
        norm = lambda name: nn.BatchNorm(use_running_average=not self.train, name=name)
        y = nn.Conv(self.inside, (3, 3), self.strides, use_bias=False, name="conv1")(x)
        y = nn.Conv(self.outside, (3, 3), use_bias=False, name="conv2")(nn.relu(norm("bn1")(y)))
        if self.projected:
            x = norm("bn3")(nn.Conv(self.outside, (1, 1), self.strides, use_bias=False, name="shortcut")(x))
        return nn.relu(x + norm("bn2")(y))


class ResNet(nn.Module):
    stem: int = 6
    stage2: int = 10
    inside: tuple[int, int] = (8, 14)
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.stem, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train, name="bn")(x))
        x = Block(self.inside[0], self.stem, 1, False, self.train, name="block1")(x)
        x = Block(self.inside[1], self.stage2, 2, True, self.train, name="block2")(x)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class EncoderBlock(nn.Module):
    """Heads of four, by the library or by hand."""

    mlp: int
    heads: int
    by_hand: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        d = x.shape[-1]
        if self.by_hand:
            q, k, v = (nn.Dense(4 * self.heads, name=name)(y) for name in ("query", "key", "value"))
            q, k, v = (z.reshape(*z.shape[:2], -1, 4) for z in (q, k, v))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(4)
            y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
            x = x + nn.Dense(d, name="out")(y.reshape(*y.shape[:2], -1))
        else:
            x = x + nn.MultiHeadDotProductAttention(self.heads, qkv_features=4 * self.heads, name="attention")(y)
        y = nn.gelu(nn.Dense(self.mlp, name="in")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(d, name="back")(y)


class ViT(nn.Module):
    mlp: tuple[int, int] = (14, 16)
    heads: tuple[int, int] = (3, 5)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(10, (4, 4), (4, 4), name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = self.param("cls", nn.initializers.normal(1.0), (1, 1, x.shape[-1]))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.normal(1.0), (1, *x.shape[1:]))
        x = EncoderBlock(self.mlp[0], self.heads[0], name="block1")(x)
        x = EncoderBlock(self.mlp[1], self.heads[1], by_hand=True, name="block2")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class Layer(nn.Module):
    mlp: int
    heads: int

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, qkv_features=4 * self.heads, name="attention")(y)
        y = nn.relu(nn.Dense(self.mlp, name="in")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(x.shape[-1], name="back")(y), None


class Stacked(nn.Module):
    mlp: int = 10
    heads: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="stem")(x)
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(self.mlp, self.heads, name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


class UNet(nn.Module):
    down: tuple[int, int] = (6, 8)
    middle: int = 10
    up: tuple[int, int] = (4, 12)

    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(self.down[0], (3, 3), name="down1")(x))
        b = nn.relu(nn.Conv(self.down[1], (3, 3), name="down2")(nn.max_pool(a, (2, 2), (2, 2))))
        x = nn.relu(nn.Conv(self.middle, (3, 3), strides=2, name="middle")(b))
        x = nn.ConvTranspose(self.up[1], (2, 2), strides=(2, 2), name="up2")(x)
        x = jnp.concatenate([x, b], -1)
        x = nn.ConvTranspose(self.up[0], (3, 3), strides=(2, 2), name="up1")(x)
        return nn.Conv(2, (1, 1), name="head")(jnp.concatenate([a, nn.relu(x)], -1))


def _lenet(w):
    return LeNet(w("conv1/kernel"), w("conv2/kernel"), w("dense1/kernel"), w("dense2/kernel"))


def _resnet(w):
    return ResNet(w("stem/kernel"), w("block2/conv2/kernel"), (w("block1/conv1/kernel"), w("block2/conv1/kernel")))


def _vit(w):
    heads = w("block1/attention/query/kernel", -2), w("block2/query/kernel") // 4
    return ViT((w("block1/in/kernel"), w("block2/in/kernel")), heads)


def _stacked(w):
    return Stacked(w("layers/in/kernel"), w("layers/attention/query/kernel", -2))


def _unet(w):
    down, up = (w("down1/kernel"), w("down2/kernel")), (w("up1/kernel"), w("up2/kernel"))
    return UNet(down, w("middle/kernel"), up)


def _case(build, widths, *shape, found=(), train=False):
    """Every width is found, but for those that are `found` in its place."""
    x = floats(RNG, *shape)
    applied = lambda model: model.apply
    if train:
        applied = lambda model: lambda variables, x: model.clone(train=True).apply(variables, x, mutable="batch_stats")
    model, rebuild = declared(build, widths, applied)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = found or tuple((path, -1, n) for path, n in widths.items())
    return Case(applied(model), filled(variables, RNG), (x,), found, rebuild)


RESNET = {"stem/kernel": 6, "block2/conv2/kernel": 10, "block1/conv1/kernel": 8, "block2/conv1/kernel": 14}
CASES = {
    "lenet": _case(
        _lenet, {"conv1/kernel": 6, "conv2/kernel": 8, "dense1/kernel": 12, "dense2/kernel": 10}, 2, 10, 10, 1
    ),
    "resnet": _case(_resnet, RESNET, 2, 8, 8, 3),
    "resnet in training": _case(_resnet, RESNET, 4, 8, 8, 3, train=True),
    "vit": _case(
        _vit,
        {"block1/attention/query/kernel": 3, "block2/query/kernel": 20, "block1/in/kernel": 14, "block2/in/kernel": 16},
        *(2, 8, 8, 3),
        found=(
            ("block1/attention/query/kernel", -2, 3),
            ("block2/query/kernel", -1, 5),
            ("block1/in/kernel", -1, 14),
            ("block2/in/kernel", -1, 16),
        ),
    ),
    "stacked": _case(
        _stacked,
        {"layers/in/kernel": 10, "layers/attention/query/kernel": 2},
        *(2, 5, 4),
        found=(("layers/in/kernel", -1, 10), ("layers/attention/query/kernel", -2, 2)),
    ),
    "unet": _case(
        _unet,
        {"down1/kernel": 6, "down2/kernel": 8, "middle/kernel": 10, "up1/kernel": 4, "up2/kernel": 12},
        *(2, 8, 8, 3),
    ),
}
