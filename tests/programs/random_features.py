"""Layers of random networks that work on the features: activations, slices, reductions, norms."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from random_networks import CUT, EITHER, REFUSED, Part, along, layer, one

# Operations on the features


@layer
def activation(b, h=None):
    h = b.pick() if h is None else h
    keeps = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh, "sin": jnp.sin}
    moves = {
        "sigmoid": jax.nn.sigmoid,
        "softplus": jax.nn.softplus,
        "exp": lambda x: jnp.exp(0.3 * jnp.tanh(x)),
        "cos": jnp.cos,
    }
    name = b.choice(list(keeps | moves))
    fn = (keeps | moves)[name]
    return b.unary(name, lambda p, x: fn(x), h, name in keeps)


@layer
def product(b):
    """A product of two readers of one node, one of them squashed."""
    h, width = b.pick(), b.width()
    one_, two = b.dense(h, one(width)), b.dense(h, one(width))
    f = b.choice([jnp.maximum, lambda x, y: x * jax.nn.sigmoid(y), lambda x, y: jnp.where(x > y, x, y), lax.sub])
    return b.add("pair", lambda p, x, y: f(x, y), [one_, two], one(width), [width])


@layer
def concatenated(b):
    h = b.pick()
    fits = [n for n in b.nodes if n.between == h.between and n.size + h.size <= 30]
    if not fits:
        return None
    other = b.choice(fits)
    # A width that stands in both counts as 0 where it is so in both.
    zero = [w for w in {*h.zeros(), *other.zeros()} if all(w in n.zeros() for n in (h, other) if w in n.widths)]
    fn = lambda p, x, y: jnp.concatenate([x, y], -1)
    return b.add("concatenate", fn, [h, other], (*h.parts, *other.parts), zero)


@layer
def parted(b):
    """A literal slice: the first entries, whose number the program fixes, and the rest."""
    h, first, rest = b.pick(), b.width(3, EITHER), b.width(verdict=EITHER)
    wide = b.dense(h, (*one(first), *one(rest)))
    turn = lambda p, x: jnp.concatenate([x[..., 3:], x[..., :3]], -1)
    return b.add("parted", turn, [wide], (*one(rest), *one(first)), [first, rest])


@layer
def strided(b):
    """Even and odd features, as pairs of a rotation."""
    h = b.pick()
    if h.size % 2:
        return None
    for width in h.widths:
        width.judge(EITHER)
    fn = lambda p, x: jnp.concatenate([-x[..., 1::2], x[..., ::2]], -1)
    out = b.width(verdict=EITHER)
    turned = b.add("strided", fn, [h], (Part((h.size,)),), [])
    return b.dense(turned, one(out))


@layer
def padded(b):
    h = b.pick()
    fn = lambda p, x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2)])
    return b.add("pad", fn, [h], (*h.parts, Part((2,))), h.zeros())


@layer
def multiplied(b):
    """By a number, or by a table: one number everywhere, or others for each feature."""
    h, n = b.pick(), 0
    n = h.size
    kind = b.choice(["number", "ones", "table", "iota", "literal ones"])
    table, ones = b.rng.normal(size=n), np.ones(n)
    fns = {
        "number": lambda p, x: x * 1.5,
        "ones": lambda p, x: x * (1.5 * along(jnp.ones(x.shape[-1], x.dtype), x)),
        "table": lambda p, x: x * along(jnp.asarray(table, x.dtype), x),
        "iota": lambda p, x: x * along(jnp.arange(1.0, 1.0 + x.shape[-1], dtype=x.dtype), x),
        "literal ones": lambda p, x: x * along(jnp.asarray(ones, x.dtype), x),
    }
    verdict = {"number": CUT, "ones": CUT, "table": EITHER, "iota": REFUSED, "literal ones": EITHER}[kind]
    return b.unary(f"times {kind}", fns[kind], h, verdict=verdict)


@layer
def reduced(b):
    """The features times a number made of all of them."""
    h, kind = b.pick(), b.choice(["sum", "sum", "mean", "max", "norm", "argmax", "prod"])
    fns = {
        "sum": lambda x: x.sum(-1, keepdims=True),
        "mean": lambda x: x.mean(-1, keepdims=True),
        "max": lambda x: x.max(-1, keepdims=True),
        "norm": lambda x: jnp.sqrt((x * x).sum(-1, keepdims=True) + 0.1),
        "argmax": lambda x: 1.0 + x.argmax(-1, keepdims=True).astype(x.dtype),
        "prod": lambda x: x.prod(-1, keepdims=True),
    }
    summed = kind in ("sum", "norm")
    for width in h.widths:
        verdict = CUT if summed and width in h.zeros() else EITHER if kind in ("max", "prod", "argmax") else REFUSED
        width.judge(verdict)
    return b.unary(kind, lambda p, x: x * jnp.tanh(fns[kind](x)), h)


@layer
def softmax(b):
    return b.unary("softmax", lambda p, x: jax.nn.softmax(x, -1), b.pick(), keeps=False, verdict=REFUSED)


@layer
def cumulated(b):
    return b.unary("cumsum", lambda p, x: jnp.cumsum(x, -1), b.pick(), keeps=False, verdict=EITHER)


@layer
def sorted_(b):
    return b.unary("sort", lambda p, x: jnp.sort(x, -1), b.pick(), keeps=False, verdict=EITHER)


@layer
def largest(b):
    h = b.pick()
    if h.size < 2:
        return None
    for width in h.widths:
        width.judge(EITHER)
    return b.add("top_k", lambda p, x: lax.top_k(x, 2)[0], [h], (Part((2,)),), [])


@layer
def gathered(b):
    """The features in an order that weights decide."""
    h = b.pick()
    order = b.param("order", h.size)
    fn = lambda p, x: x[..., jnp.argsort(p[order])]
    return b.unary("gather", fn, h, keeps=False, verdict=EITHER)


@layer
def dropped(b):
    """Dropout by a key: another number of units draws another mask."""
    fn = lambda p, x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
    return b.unary("dropout", fn, b.pick(), verdict=EITHER)


@layer
def reshaped(b):
    """Heads of literal sizes."""
    h = b.pick()
    if h.size % 2:
        return None
    half, f = h.size // 2, b.choice([jnp.tanh, lambda x: x[..., ::1, :]])
    fn = lambda p, x: f(x.reshape(*x.shape[:-1], 2, half)).reshape(*x.shape[:-1], 2 * half)
    return b.unary("reshape", fn, h, verdict=EITHER)


@layer
def turned(b):
    """The axes in another order, and back."""
    h = b.pick(rank=[1, 2])
    if h is None:
        return None
    f = b.choice([jnp.tanh, jax.nn.relu])
    fn = lambda p, x: jnp.moveaxis(f(jnp.moveaxis(x, -1, 0)), 0, -1)
    return b.unary("turned", fn, h)


# Norms


@layer
def layer_norm(b):
    h = b.pick()
    for width in h.widths:
        width.judge(REFUSED)
    s = b.param("scale", h.parts)

    def fn(p, x):
        y = x - x.mean(-1, keepdims=True)
        return y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-2) * along(p[s], x)

    return b.add("layer norm", fn, [h], h.parts, h.widths)


@layer
def rms_norm(b):
    """A scale behind it makes up for fewer units, if it multiplies the inverse root and is used nowhere else."""
    h = b.pick()
    s, form = b.param("scale", h.parts), b.choice(["rsqrt", "root", "one plus", "scale first"])
    for width in h.widths:
        width.judge(CUT if h.all_zero() and form != "scale first" else EITHER)

    def fn(p, x):
        c, mean = along(p[s], x), (x * x).mean(-1, keepdims=True) + b.epsilons.get(s, 0.02)
        if form == "rsqrt":
            return x * lax.rsqrt(mean) * c
        if form == "root":
            return x / jnp.sqrt(mean) * c
        return x * lax.rsqrt(mean) * (1 + c) if form == "one plus" else (x * c) * lax.rsqrt(mean)

    # A scale of 1 + 0 does not make the features of a dead unit 0.
    return b.add(f"rms norm {form}", fn, [h], h.parts, h.zeros() if form == "one plus" else h.widths)


@layer
def batch_norm(b):
    h = b.pick()
    mean, var = b.statistic("mean", h.parts), b.statistic("var", h.parts)
    s = b.param("scale", h.parts) if b.chance(0.7) else None

    def fn(p, x):
        y = (x - along(p[mean], x)) * lax.rsqrt(along(p[var], x) + 1e-5)
        return y if s is None else y * along(p[s], x)

    return b.add(f"batch norm {s}", fn, [h], h.parts, [] if s is None else h.widths)


@layer
def current_batch_norm(b):
    """With the statistics of the batch itself."""
    fn = lambda p, x: (x - x.mean(0, keepdims=True)) * lax.rsqrt(x.var(0, keepdims=True) + 1e-2)
    return b.unary("current batch norm", fn, b.pick())


@layer
def group_norm(b):
    h = b.pick()
    if h.size % 2 or h.size < 4:
        return None

    def fn(p, x):
        y = x.reshape(*x.shape[:-1], 2, -1)
        y = y - y.mean(-1, keepdims=True)
        return (y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-2)).reshape(x.shape)

    return b.unary("group norm", fn, h, verdict=REFUSED)
