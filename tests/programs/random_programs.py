"""Layers of random networks that are written in less common ways."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from random_networks import CUT, EITHER, REFUSED, Part, layer, one


@layer
def repeated(b):
    """The features repeated, each beside itself or one row behind the other, under one kernel."""
    h = b.pick(most=12)
    if h is None or len(h.parts) > 1:
        return None
    beside, width = b.chance(0.5), b.width()
    factors = (*h.parts[0].factors, 2) if beside else (2, *h.parts[0].factors)
    fn = lambda p, x: jnp.repeat(x, 2, -1) if beside else jnp.tile(x, 2)
    wide = b.add(f"repeated {beside}", fn, [h], (Part(factors),), h.zeros())
    return b.dense(wide, one(width))


@layer
def interleaved(b):
    """Two readers, whose features alternate."""
    h, width = b.pick(), b.width()
    left, right = b.dense(h, one(width)), b.dense(h, one(width))
    fn = lambda p, x, y: jnp.stack([jnp.sin(x), y], -1).reshape(*x.shape[:-1], -1)
    both = b.add("interleaved", fn, [left, right], (Part((width, 2)),), [width])
    return b.dense(both, one(b.width()))


@layer
def shuffled(b):
    """Channels in two groups, whose order is exchanged."""
    h, half = b.pick(), b.width(3, EITHER)
    wide = b.dense(h, (Part((2, half)),))
    fn = lambda p, x: x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)
    return b.dense(b.add("shuffled", fn, [wide], (Part((half, 2)),), [half]), one(b.width()))


@layer
def turned_around(b):
    """The features from the last to the first, or each in the place of its neighbour."""
    f = b.choice([lambda x: x[..., ::-1], lambda x: jnp.roll(x, 1, -1), lambda x: jnp.flip(x, -1)])
    h = b.pick()
    w = b.param("w", h.parts, h.parts)
    return b.unary("turned around", lambda p, x: x + f(x @ p[w]), h, verdict=EITHER)


@layer
def experts(b):
    """A mixture of experts: the weights of a softmax over them, and hidden units that all of them share."""
    h, many, hidden = b.pick(), b.width(2, REFUSED), b.width()
    router = b.param("router", h.parts, one(many))
    w, u = b.param("w", one(many), h.parts, one(hidden)), b.param("u", one(many), one(hidden), h.parts)

    def fn(p, x):
        y = jnp.einsum("...eh,eho->...eo", jnp.cos(jnp.einsum("...i,eih->...eh", x, p[w])), p[u])
        return x + jnp.einsum("...e,...eo->...o", jax.nn.softmax(x @ p[router], -1), y)

    return b.add("experts", fn, [h], h.parts, h.zeros())


@layer
def one_hot_experts(b):
    """The expert whose score is largest alone."""
    h, hidden = b.pick(), b.width()
    router = b.param("router", h.parts, 3)
    w, u = b.param("w", 3, h.parts, one(hidden)), b.param("u", 3, one(hidden), h.parts)

    def fn(p, x):
        chosen = jax.nn.one_hot((x @ p[router]).argmax(-1), 3, dtype=x.dtype)
        y = jnp.einsum("...i,eih->...eh", x, p[w]) * chosen[..., None]
        return x + jnp.einsum("...eh,eho->...o", jax.nn.sigmoid(y), p[u])

    return b.add("one-hot experts", fn, [h], h.parts, h.zeros())


@layer
def mapped_over_units(b):
    """A function of one unit, mapped over all, or a loop over them."""
    h = b.pick(most=6)
    if h is None:
        return None
    mapped = b.chance(0.5)
    f = lambda p, x: (
        jax.vmap(jnp.tanh, -1, -1)(x) if mapped else jnp.moveaxis(lax.map(jnp.tanh, jnp.moveaxis(x, -1, 0)), 0, -1)
    )
    return b.unary(f"mapped {mapped}", f, h, verdict=CUT if mapped else EITHER)


@layer
def numbered(b):
    """A number that is the width, or that follows from it."""
    h = b.pick()
    w = b.param("w", h.parts, h.parts)
    f = b.choice(
        [
            lambda p, x: x * (1 / x.shape[-1]),
            lambda p, x: x / np.sqrt(x.shape[-1]),
            lambda p, x: x + x.sum(-1, keepdims=True) / x.shape[-1],
            lambda p, x: x * jnp.full(x.shape, p[w].shape[1], x.dtype),
            lambda p, x: (x + jnp.maximum(x @ p[w], -float(x.shape[-1]))) * p[w].shape[0] ** -0.5,
            lambda p, x: x * (x * x).mean((0, -1), keepdims=True),
        ]
    )
    return b.unary("numbered", f, h, verdict=REFUSED)


@layer
def smooth_maximum(b):
    f = b.choice([jax.nn.logsumexp, jnp.var, jnp.std, jnp.linalg.norm, jnp.median])
    fn = lambda p, x: x * jnp.tanh(f(x + 0.5, axis=-1, keepdims=True))
    return b.unary("statistic", fn, b.pick(), verdict=EITHER)


@layer
def scaled_kernel(b):
    """A kernel divided by a norm of all of it, or by a number that says how many entries it has."""
    h, width = b.pick(), b.width()
    w = b.param("w", h.parts, one(width))
    norms = {
        "frobenius": lambda w: jnp.sqrt((w * w).sum() + 0.1),
        "rows": lambda w: 1 + jnp.abs(w).sum(0, keepdims=True),
        "root mean square": lambda w: jnp.sqrt((w * w).mean() + 0.1),
        "deviation": lambda w: w.std() + 0.1,
        "largest": lambda w: 1 + jnp.abs(w).max(),
    }
    kind = b.choice(list(norms))
    verdict = CUT if kind in ("frobenius", "rows") else EITHER if kind == "largest" else REFUSED
    for other in (*h.widths, width):
        other.judge(verdict)
    return b.add(f"kernel by {kind}", lambda p, x: x @ (p[w] / norms[kind](p[w])), [h], one(width), [width])


@layer
def masked_kernel(b):
    """A kernel under a triangular mask."""
    h, width = b.pick(), b.width()
    w = b.param("w", h.parts, one(width))
    for other in (*h.widths, width):
        other.judge(EITHER)
    return b.add("masked kernel", lambda p, x: x @ jnp.tril(p[w]), [h], one(width), [width])


@layer
def filled(b):
    """Another number than 0 where a feature is negative."""
    h = b.pick()
    f = b.choice([lambda x: jnp.where(x > 0, x, 0.3), lambda x: jnp.clip(x, 0.1, 2.0), lambda x: jnp.log(x * x + 0.5)])
    return b.unary("filled", lambda p, x: f(x), h, keeps=False)


@layer
def query_norm(b):
    """Attention whose queries are normalized over the features of a head."""
    h = b.pick(rank=[1])
    if h is None:
        return None
    heads_, d = b.width(), b.width(verdict=REFUSED)
    q, k = b.param("q", h.parts, one(heads_), one(d)), b.param("k", h.parts, one(heads_), one(d))
    o = b.param("o", one(heads_), one(d), h.parts)

    def fn(p, x):
        qs, ks = jnp.einsum("bti,ihd->bhtd", x, p[q]), jnp.einsum("bti,ihd->bhtd", x, p[k])
        qs, ks = (y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 0.02) for y in (qs, ks))
        out = jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(jnp.einsum("bhtd,bhsd->bhts", qs, ks)), qs)
        return x + jnp.einsum("bthd,hdo->bto", out, p[o])

    return b.add("query norm", fn, [h], h.parts, h.zeros())


@layer
def gram(b):
    """The products of all pairs of features, over a sequence, as a kernel of the features."""
    h = b.pick(rank=[1], most=6)
    if h is None:
        return None
    f = b.choice([lambda x: x, jnp.tanh, jnp.cos])
    fn = lambda p, x: jnp.einsum("btg,bgf->btf", x, f(jnp.einsum("btf,btg->bgf", x, x)))
    for width in h.widths:
        width.judge(EITHER)
    return b.add("gram", fn, [h], h.parts, [])


@layer
def own_derivative(b):
    """A function with a derivative of its own."""
    f = b.choice([jax.nn.relu6, jax.nn.silu, _straight])
    return b.unary("own derivative", lambda p, x: f(x), b.pick())


@jax.custom_vjp
def _straight(x):
    return jnp.round(x * 4) / 4


_straight.defvjp(lambda x: (_straight(x), None), lambda _, g: (g,))


@layer
def derivative(b):
    """The derivative of a function of the features."""
    h = b.pick()
    w = b.param("w", h.parts, one(b.width()))
    fn = lambda p, x: jax.grad(lambda y: jnp.sin(jnp.tanh(y) @ p[w]).sum())(x)
    return b.add("derivative", fn, [h], h.parts, h.widths)


@layer
def until(b):
    """A loop that ends when the features are large."""
    h, whole = b.pick(), b.chance(0.5)
    for width in h.widths if whole else ():
        width.judge(CUT if width in h.zeros() else REFUSED)
    test = lambda carry: (carry[0] < 3) & ((jnp.abs(carry[1]).sum() < 40) if whole else True)
    fn = lambda p, x: lax.while_loop(test, lambda carry: (carry[0] + 1, carry[1] * 1.5), (0, x))[1]
    return b.unary(f"until {whole}", fn, h)


@layer
def accumulated(b):
    """A sum over time, forwards, backwards, or in a tree."""
    h = b.pick(rank=[1])
    if h is None:
        return None
    f = b.choice(
        [
            lambda x: jnp.cumsum(x, 1),
            lambda x: lax.associative_scan(jnp.add, x, axis=1),
            lambda x: lax.scan(lambda c, r: (c + r, c), x[:, 0] * 0, x.swapaxes(0, 1), reverse=True)[1].swapaxes(0, 1),
            lambda x: x[:, ::-1],
            lambda x: jnp.sort(x, 1),
            lambda x: jnp.pad(x, [(0, 0), (1, 0), (0, 0)])[:, :-1],
        ]
    )
    return b.unary("accumulated", lambda p, x: f(x), h)


@layer
def written(b):
    """A class token in front of a sequence, or rows that are written into one."""
    h = b.pick(rank=[1])
    if h is None:
        return None
    token = b.param("token", 1, h.parts)
    if b.chance(0.5):
        fn = lambda p, x: jnp.concatenate([jnp.broadcast_to(p[token][None], (x.shape[0], 1, x.shape[2])), x], 1)
        return b.add("class token", fn, [h], h.parts, h.zeros(), (h.between[0] + 1,))
    return b.add("written", lambda p, x: x.at[:, 0].set(p[token]), [h], h.parts, h.zeros())


@layer
def counted(b):
    """Rows summed by the class of each, the classes as given by the data."""
    h = b.pick(rank=[1])
    if h is None:
        return None
    fn = lambda p, x: jnp.zeros((x.shape[0], 3, x.shape[2]), x.dtype).at[:, jnp.arange(x.shape[1]) % 3].add(x)
    return b.add("counted", fn, [h], h.parts, h.zeros(), (3,))
