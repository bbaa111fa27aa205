"""The models of `depgraph.py`, each as a torch module and as a function of JAX params.

Layers have the same names in both, so that `conv.weight` in torch is `conv/kernel` here. In torch images are channels
first and kernels [out, in, ...], in JAX channels come last and kernels are [..., in, out].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from torch import nn
from torch.nn import functional


class Case(NamedTuple):
    """One model in two libraries.

    Attributes:
      torch: the module.
      apply: the function (params, x) -> outputs.
      shapes: those of its params, by path.
      x: the shape of the input in JAX; of rank 4 for images.
      heads: for Torch-Pruning's `num_heads`, which has to be told.
      whole_heads: whether it is told to cut whole heads, or else entries of all of them.
    """

    torch: type[nn.Module]
    apply: Any
    shapes: dict[str, tuple[int, ...]]
    x: tuple[int, ...]
    heads: dict[str, int] = {}  # noqa: RUF012
    whole_heads: bool = False


def dense(p, name, x):
    y = x @ p[f"{name}/kernel"]
    return y + p[f"{name}/bias"] if f"{name}/bias" in p else y


def conv(p, name, x):
    return jax.lax.conv_general_dilated(
        x, p[f"{name}/kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(p, name, x):
    scale = p[f"{name}/scale"] * jax.lax.rsqrt(p[f"{name}/var"] + 1e-5)
    return (x - p[f"{name}/mean"]) * scale + p[f"{name}/bias"]


def layer_norm(p, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p[f"{name}/scale"] + p[f"{name}/bias"]


def group_norm(p, name, x, groups=4):
    parts = layer_norm(
        {"/scale": 1.0, "/bias": 0.0},
        "",
        x.reshape(len(x), -1, groups, x.shape[-1] // groups).swapaxes(1, 2).reshape(len(x), groups, -1),
    )
    parts = parts.reshape(len(x), groups, -1, x.shape[-1] // groups).swapaxes(1, 2).reshape(x.shape)
    return parts * p[f"{name}/scale"] + p[f"{name}/bias"]


def rms_norm(p, name, x):
    epsilon = p.get(f"{name}/epsilon", 1e-5)  # that of a smaller model stands among its params
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon) * p[f"{name}/scale"]


def shapes_of(**layers):
    """Shapes of params: a kernel, and a bias or the arrays of a norm behind it."""
    found = {}
    for name, shape in layers.items():
        if len(shape) > 1:
            found |= {f"{name}/kernel": shape, f"{name}/bias": shape[-1:]}
        elif name.startswith("batch"):
            found |= {f"{name}/{x}": shape for x in ("scale", "bias", "mean", "var")}
        else:
            found |= {f"{name}/{x}": shape for x in ("scale", "bias")}
    return found


def bare(shapes, *names):
    """Without biases."""
    return {path: s for path, s in shapes.items() if not (path.endswith("bias") and path.split("/")[0] in names)}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(12, 32), nn.Linear(32, 24), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))))


def mlp(p, x):
    return dense(p, "head", jax.nn.relu(dense(p, "two", jax.nn.relu(dense(p, "one", x)))))


class Concatenation(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.mixed, self.head = nn.Conv2d(24, 12, 1), nn.Linear(12, 10)

    def forward(self, x):
        both = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(torch.relu(self.mixed(torch.relu(both))).mean((2, 3)))


def concatenation(p, x):
    left, right = (conv(p, name, x) + p[f"{name}/bias"] for name in ("left", "right"))
    both = jnp.concatenate([left, right], -1)
    mixed = conv(p, "mixed", jax.nn.relu(both)) + p["mixed/bias"]
    return dense(p, "head", jax.nn.relu(mixed).mean((1, 2)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.shortcut = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 1, bias=False)
        self.inner, self.outer = (nn.Conv2d(n, 16, 3, padding=1, bias=False) for n in (8, 16))
        self.batch_stem, self.batch_shortcut = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        self.batch_inner, self.batch_outer, self.head = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.batch_stem(self.stem(x)))
        y = self.batch_outer(self.outer(torch.relu(self.batch_inner(self.inner(x)))))
        return self.head(torch.relu(self.batch_shortcut(self.shortcut(x)) + y).mean((2, 3)))


def residual(p, x):
    normed = lambda name, x: batch_norm(p, f"batch_{name}", conv(p, name, x))  # noqa: E731
    x = jax.nn.relu(normed("stem", x))
    y = normed("outer", jax.nn.relu(normed("inner", x)))
    return dense(p, "head", jax.nn.relu(normed("shortcut", x) + y).mean((1, 2)))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 64, 10)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))


def flattened(p, x):
    return dense(p, "head", jax.nn.relu(conv(p, "conv", x) + p["conv/bias"]).reshape(len(x), -1))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def grouped(p, x):
    return dense(p, "head", jax.nn.relu(group_norm(p, "norm", conv(p, "conv", x) + p["conv/bias"])).mean((1, 2)))


class Attention(nn.Module):
    """8 query heads, 2 of keys and values; the size of a head is written into the reshape, as in Llama."""

    def __init__(self, kv_heads=2):
        super().__init__()
        self.query, self.out = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)
        self.key, self.value = (nn.Linear(16, 8 * kv_heads, bias=False) for _ in range(2))
        self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 10)

    def heads(self, x):
        return x.view(*x.shape[:2], -1, 8).transpose(1, 2)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.out(y))


def attention(p, x, split=lambda y: y.reshape(*y.shape[:2], -1, 8)):
    x = dense(p, "stem", x)
    q, k, v = (split(dense(p, name, x)) for name in ("query", "key", "value"))
    k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], 2) for y in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / jnp.sqrt(q.shape[-1]))
    y = jnp.einsum("bhts,bshk->bthk", weights, v)
    return dense(p, "head", x + dense(p, "out", y.reshape(*y.shape[:2], -1)))


class LiteralHeads(Attention):
    """8 heads of everything; their number, or their number and size, is written into the reshape."""

    size = -1

    def __init__(self):
        super().__init__(8)

    def heads(self, x):
        return x.view(*x.shape[:2], 8, self.size).transpose(1, 2)


class FullyLiteral(LiteralHeads):
    size = 8


def literal_heads(p, x, size=-1):
    return attention(p, x, lambda y: y.reshape(*y.shape[:2], 8, size))


def fully_literal(p, x):
    return literal_heads(p, x, 8)


class GateUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down, self.head = nn.Linear(12, 64), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.head(torch.relu(self.down(functional.silu(gate) * up)))


def gate_up(p, x):
    gate, up = jnp.split(dense(p, "gate_up", x), 2, -1)
    return dense(p, "head", jax.nn.relu(dense(p, "down", jax.nn.silu(gate) * up)))


class Flipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.head = nn.Linear(12, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.one(x))
        return self.head(x + x.flip(-1))


def flipped(p, x):
    x = jax.nn.relu(dense(p, "one", x))
    return dense(p, "head", x + jnp.flip(x, -1))


class Stream(nn.Module):
    """A residual stream of 32 units with a norm in front of a block and of the head."""

    norm: Any = nn.LayerNorm

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 48), nn.Linear(48, 32)
        self.norm_1, self.norm_2, self.head = self.norm(32), self.norm(32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(torch.relu(self.up(self.norm_1(x))))
        return self.head(self.norm_2(x))


class RmsNorm(nn.Module):
    """As Llama's."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class RmsStream(Stream):
    norm = RmsNorm


def stream(p, x, norm=layer_norm):
    x = dense(p, "stem", x)
    x = x + dense(p, "down", jax.nn.relu(dense(p, "up", norm(p, "norm_1", x))))
    return dense(p, "head", norm(p, "norm_2", x))


def rms_stream(p, x):
    return stream(p, x, rms_norm)


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))


def shared(p, x):
    x = jax.nn.relu(dense(p, "stem", x))
    return dense(p, "head", jax.nn.relu(dense(p, "shared", jax.nn.relu(dense(p, "shared", x)))))


IMAGES, ROWS, WORDS = (4, 8, 8, 3), (8, 12), (4, 6, 12)
_HEADS = bare(
    shapes_of(stem=(12, 16), query=(16, 64), key=(16, 64), value=(16, 64), out=(64, 16), head=(16, 10)),
    *("query", "key", "value", "out"),
)
_GQA = _HEADS | {"key/kernel": (16, 16), "value/kernel": (16, 16)}
_STREAM = shapes_of(stem=(12, 32), up=(32, 48), down=(48, 32), norm_1=(32,), norm_2=(32,), head=(32, 10))
_EIGHT = {"query": 8, "key": 8, "value": 8}

_CONVS = shapes_of(stem=(3, 3, 3, 8), shortcut=(1, 1, 8, 16), inner=(3, 3, 8, 16), outer=(3, 3, 16, 16), head=(16, 10))
_NORMS = shapes_of(batch_stem=(8,), batch_shortcut=(16,), batch_inner=(16,), batch_outer=(16,))

TWINS = {
    "ResNet block": Case(Residual, residual, bare(_CONVS | _NORMS, "stem", "shortcut", "inner", "outer"), IMAGES),
    "concatenation": Case(
        Concatenation,
        concatenation,
        shapes_of(left=(3, 3, 3, 8), right=(3, 3, 3, 16), mixed=(1, 1, 24, 12), head=(12, 10)),
        IMAGES,
    ),
    "MLP": Case(Mlp, mlp, shapes_of(one=(12, 32), two=(32, 24), head=(24, 10)), ROWS),
}
CASES = TWINS | {
    "flattened map, then a dense layer": Case(
        Flattened, flattened, shapes_of(conv=(3, 3, 3, 16), head=(1024, 10)), IMAGES
    ),
    "one layer used twice": Case(Shared, shared, shapes_of(stem=(12, 32), shared=(32, 32), head=(32, 10)), ROWS),
    "gate and up in one kernel": Case(GateUp, gate_up, shapes_of(gate_up=(12, 64), down=(32, 16), head=(16, 10)), ROWS),
    "GQA": Case(Attention, attention, _GQA, WORDS),
    "GQA, `num_heads` told": Case(Attention, attention, _GQA, WORDS, {"query": 8, "key": 2, "value": 2}, True),
    "a literal number of heads": Case(LiteralHeads, literal_heads, _HEADS, WORDS),
    "a literal number, `num_heads` told": Case(LiteralHeads, literal_heads, _HEADS, WORDS, _EIGHT),
    "a literal number and size of heads": Case(FullyLiteral, fully_literal, _HEADS, WORDS, _EIGHT),
    "`flip` over units": Case(Flipped, flipped, shapes_of(one=(12, 32), head=(32, 10)), ROWS),
    "GroupNorm": Case(Grouped, grouped, shapes_of(conv=(3, 3, 3, 16), norm=(16,), head=(16, 10)), IMAGES),
    "stream under LayerNorm": Case(Stream, stream, _STREAM, WORDS),
    "stream under RMSNorm": Case(RmsStream, rms_stream, bare(_STREAM, "norm_1", "norm_2"), WORDS),
}
