"""Layers of random networks that have weights: dense ones, scales, convolutions and pooling."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from random_features import activation
from random_networks import EITHER, REFUSED, Part, along, layer, one

# Layers with weights


@layer
def dense(b):
    return b.dense(b.pick(), one(b.width()))


@layer
def residual(b):
    h = b.pick()
    inner = b.dense(h, one(b.width()))
    inner = activation(b, inner)
    back = b.dense(inner, h.parts, "back")
    return b.add("add", lambda p, x, y: x + y, [h, back], h.parts, [w for w in h.zeros() if w in back.zeros()])


@layer
def gated(b):
    """Gate and up in one kernel."""
    h, width = b.pick(), b.width()
    part = Part((2, width))
    w = b.param("fused", h.parts, (part,))
    gate = b.choice([jax.nn.silu, jax.nn.sigmoid, jax.nn.gelu])

    def fn(p, x):
        g, u = jnp.split(x @ p[w], 2, -1)
        return gate(g) * u

    return b.add("gated", fn, [h], one(width), [width])


@layer
def heads(b):
    """A kernel of rank 3, flattened behind the product."""
    h, m, n = b.pick(), b.width(), b.width()
    w = b.param("w3", h.parts, one(m), one(n))
    fn = lambda p, x: jnp.einsum("...i,imn->...mn", x, p[w]).reshape(*x.shape[:-1], p[w].shape[1] * p[w].shape[2])
    return b.add("heads", fn, [h], (Part((m, n)),), [m, n])


@layer
def standardized(b):
    """Weights less their mean, over the inputs or over the units."""
    h, width, axis = b.pick(), b.width(), b.choice([0, 1])
    w = b.param("standardized", h.parts, one(width))
    for other in [width] if axis else h.widths:
        other.judge(REFUSED)
    fn = lambda p, x: x @ (p[w] - p[w].mean(axis, keepdims=True))
    return b.add(f"standardized {axis}", fn, [h], one(width), [] if axis else [width])


@layer
def normalized(b):
    """Weights divided by their norm, over the inputs or over the units."""
    h, width, axis = b.pick(), b.width(), b.choice([0, 1])
    w = b.param("normalized", h.parts, one(width))
    fn = lambda p, x: x @ (p[w] / jnp.sqrt((p[w] ** 2).sum(axis, keepdims=True) + 1e-3))
    return b.add(f"normalized {axis}", fn, [h], one(width), [width])


@layer
def tied(b):
    """A kernel that is used twice, the second time transposed."""
    h, width = b.pick(), b.width()
    w = b.param("tied", h.parts, one(width))
    f = b.choice([jnp.tanh, jax.nn.sigmoid])
    return b.add("tied", lambda p, x: f(x @ p[w]) @ p[w].T, [h], h.parts, h.widths)


@layer
def square(b):
    """A square kernel that is applied twice, so that its outputs are its inputs."""
    h = b.pick()
    if len(h.widths) != 1 or len(h.parts) > 1 or len(h.parts[0].factors) > 1:
        return None
    w = b.param("square", h.parts, h.parts)
    return b.add("square", lambda p, x: jnp.tanh(x @ p[w]) @ p[w], [h], h.parts, h.widths)


@layer
def scale(b):
    """A learned scale, or an offset, or both."""
    h = b.pick()
    kind = b.choice(["s", "o", "so"])
    s = b.param("scale", h.parts) if "s" in kind else None
    o = b.param("offset", h.parts) if "o" in kind else None

    def fn(p, x):
        x = x * along(p[s], x) if "s" in kind else x
        return x + along(p[o], x) if "o" in kind else x

    if "s" in kind:
        return b.add(f"scale {kind}", fn, [h], h.parts, h.widths)
    return b.add(f"scale {kind}", fn, [h], h.parts, h.zeros())


@layer
def positions(b):
    h = b.pick(rank=[1])
    if h is None:
        return None
    table = b.param("positions", h.between[0], h.parts)
    return b.add("positions", lambda p, x: x + p[table][None], [h], h.parts, h.zeros())


@layer
def outer(b):
    """All products of the units of two layers, flattened, under one kernel."""
    h, m, n, width = b.pick(), b.width(3), b.width(2), b.width()
    u, v, w = b.param("u", h.parts, one(m)), b.param("v", h.parts, one(n)), b.param("w", (Part((m, n)),), one(width))

    def fn(p, x):
        y = (x @ p[u])[..., :, None] * (x @ p[v])[..., None, :]
        return y.reshape(*x.shape[:-1], y.shape[-1] * y.shape[-2]) @ p[w]

    return b.add("outer", fn, [h], one(width), [width])


@layer
def outer_square(b):
    """All products of the units with themselves: an entry belongs to two of them."""
    h = b.pick(most=6)
    if h is None:
        return None
    width = b.width()
    for other in h.widths:
        other.judge(EITHER)
    w = b.param("w", h.size**2, one(width))
    fn = lambda p, x: (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], x.shape[-1] ** 2) @ p[w]
    return b.add("outer square", fn, [h], one(width), [width])


# Convolutions and pooling


@layer
def convolution(b):
    h = b.pick(rank=[2])
    if h is None:
        return None
    width, stride = b.width(), 1 if min(h.between) < 3 else b.choice([1, 2])
    w, o = b.param("conv", 3, 3, h.parts, one(width)), b.param("b", one(width))

    def fn(p, x):
        y = _conv(x, p[w], stride)
        return y + along(p[o], y)

    return b.add(f"conv/{stride}", fn, [h], one(width), [width], tuple(-(-n // stride) for n in h.between))


def _conv(x, w, stride=1, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=layout, feature_group_count=groups)


@layer
def depthwise(b):
    h = b.pick(rank=[2])
    if h is None:
        return None
    w = b.param("depthwise", 3, 3, 1, h.parts)
    return b.add("depthwise", lambda p, x: _conv(x, p[w], groups=x.shape[-1]), [h], h.parts, h.widths)


@layer
def grouped(b):
    """Two groups of channels, a number that the program fixes."""
    h = b.pick(rank=[2])
    if h is None or h.size % 2:
        return None
    width = b.width(2 * int(b.rng.integers(1, 4)), EITHER)
    for other in h.widths:
        other.judge(EITHER)
    w = b.param("grouped", 3, 3, h.size // 2, one(width))
    return b.add("grouped", lambda p, x: _conv(x, p[w], groups=2), [h], one(width), [width])


@layer
def transposed(b):
    h = b.pick(rank=[2])
    if h is None or max(h.between) > 4:
        return None
    width = b.width()
    w = b.param("transposed", 2, 2, h.parts, one(width))
    fn = lambda p, x: lax.conv_transpose(x, p[w], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return b.add("transposed", fn, [h], one(width), [width], tuple(2 * n for n in h.between))


@layer
def pooled(b):
    h = b.pick(rank=[2])
    if h is None or min(h.between) < 2:
        return None
    window, between = (1, 2, 2, 1), tuple(n // 2 for n in h.between)
    largest = b.chance(0.5)

    def fn(p, x):
        if largest:
            return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
        return lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / 4

    return b.add(f"pool {largest}", fn, [h], h.parts, h.zeros(), between)


@layer
def flattened(b):
    """A map or a sequence whose axes become features."""
    h = b.pick(rank=[1, 2], most=6)
    if h is None or math.prod(h.between) > 16 or len(h.parts) > 1:
        return None
    part = Part((math.prod(h.between), *h.parts[0].factors))
    fn = lambda p, x: x.reshape(x.shape[0], -1)
    flat = b.add("flatten", fn, [h], (part,), h.zeros(), ())
    return b.dense(flat, one(b.width()))


@layer
def flattened_channels_first(b):
    """The same with the channels as the slowest index."""
    h = b.pick(rank=[1, 2], most=6)
    if h is None or math.prod(h.between) > 16 or len(h.parts) > 1:
        return None
    part = Part((*h.parts[0].factors, math.prod(h.between)))
    fn = lambda p, x: jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
    flat = b.add("flatten first", fn, [h], (part,), h.zeros(), ())
    return b.dense(flat, one(b.width()))
