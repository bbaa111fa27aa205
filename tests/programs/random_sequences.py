"""Layers of random networks that work on sequences, and loops."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from random_networks import CUT, EITHER, REFUSED, Part, layer, one


@layer
def attention(b):
    """Multi-head, or grouped queries by repetition or by a reshape; a fixed or a following scale; rotations."""
    h = b.pick(rank=[1])
    if h is None:
        return None
    kv, r, d, dv = b.width(), b.choice([1, 2, 3]), b.width(4), b.width()
    query = (Part((kv, b.width(r, EITHER))),) if r > 1 else one(kv)
    q, k = b.param("q", h.parts, query, one(d)), b.param("k", h.parts, one(kv), one(d))
    v, o = b.param("v", h.parts, one(kv), one(dv)), b.param("o", query, one(dv), h.parts)
    scaled, rotated, form = b.chance(0.4), b.chance(0.3), b.choice(["repeat", "reshape"])
    if scaled:
        d.judge(REFUSED)
    if rotated:
        d.judge(EITHER)

    def fn(p, x):
        qs, ks, vs = (jnp.einsum("bti,ihd->bthd", x, p[w]) for w in (q, k, v))
        if rotated:
            qs, ks = _rotated(qs), _rotated(ks)
        number = 1 / np.sqrt(qs.shape[-1]) if scaled else 0.5
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        many = qs.shape[2] // ks.shape[2]
        if form == "repeat" or many == 1:
            ks, vs = (jnp.repeat(y, many, 2) if many > 1 else y for y in (ks, vs))
            weights = jnp.where(mask[None, None], jnp.einsum("bthd,bshd->bhts", qs, ks) * number, -1e9)
            out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(weights, -1), vs)
        else:
            qs = qs.reshape(*qs.shape[:2], ks.shape[2], many, qs.shape[3])
            weights = jnp.where(mask[None, None, None], jnp.einsum("btkrd,bskd->bkrts", qs, ks) * number, -1e9)
            out = jnp.einsum("bkrts,bskd->btkrd", jax.nn.softmax(weights, -1), vs)
            out = out.reshape(*out.shape[:2], out.shape[2] * out.shape[3], out.shape[4])
        return x + jnp.einsum("bthd,hdo->bto", out, p[o])

    return b.add(f"attention {r} {form} {scaled} {rotated}", fn, [h], h.parts, h.zeros())


def _rotated(x):
    half = x.shape[-1] // 2
    times, rates = jnp.arange(x.shape[1], dtype=x.dtype), 0.1 ** jnp.arange(half, dtype=x.dtype)
    angles = (times[:, None] * rates[None])[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1)


@layer
def mixed(b):
    """A product of activations over their features, without any softmax."""
    h = b.pick(rank=[1])
    if h is None:
        return None
    for width in h.widths:
        width.judge(CUT if width in h.zeros() else REFUSED)
    fn = lambda p, x: jnp.einsum("bts,bsf->btf", jnp.tanh(jnp.einsum("btf,bsf->bts", x, x)), x)
    return b.add("mixed", fn, [h], h.parts, h.zeros())


@layer
def recurrent(b):
    """A gated unit under a scan over time, with all gates in one kernel."""
    h = b.pick(rank=[1])
    if h is None:
        return None
    width = b.width()
    w, u = b.param("w", h.parts, (Part((3, width)),)), b.param("u", one(width), (Part((3, width)),))

    def fn(p, x):
        def turn(state, row):
            (z, r, n), (uz, ur, un) = jnp.split(row @ p[w], 3, -1), jnp.split(state @ p[u], 3, -1)
            z, r = jax.nn.sigmoid(z + uz), jax.nn.sigmoid(r + ur)
            state = (1 - z) * state + z * jnp.tanh(n + r * un)
            return state, state

        zero = jnp.zeros((x.shape[0], p[u].shape[0]), x.dtype)
        return lax.scan(turn, zero, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return b.add("recurrent", fn, [h], one(width), [width])


@layer
def stacked(b):
    """Layers of one shape under a scan."""
    h, width = b.pick(), b.width()
    w, u = b.param("w", 2, h.parts, one(width)), b.param("u", 2, one(width), h.parts)
    f = b.choice([jnp.tanh, jax.nn.sigmoid])

    def fn(p, x):
        return lax.scan(lambda y, ws: (y + f(y @ ws[0]) @ ws[1], None), x, (p[w], p[u]))[0]

    return b.add("stacked", fn, [h], h.parts, h.zeros())


@layer
def branched(b):
    """One of two operations, as the data say."""
    h = b.pick()
    whole = b.chance(0.5)  # a sum over the features decides
    keeps = b.chance(0.5)
    for width in h.widths if whole else ():
        width.judge(CUT if width in h.zeros() else REFUSED)
    f = jnp.tanh if keeps else jnp.cos
    fn = lambda p, x: lax.cond((x.sum() if whole else x.shape[0]) > 0.01, lambda y: y * 2, lambda y: f(y), x)
    return b.unary(f"branched {whole}", fn, h, keeps)


@layer
def pooled_over_time(b):
    h = b.pick(rank=[1, 2])
    if h is None:
        return None
    f = b.choice([jnp.mean, jnp.max, jnp.sum])
    return b.add("pooled", lambda p, x: f(x, tuple(range(1, x.ndim - 1))), [h], h.parts, h.zeros(), ())


@layer
def looked_up(b):
    """Rows of a table, by the place of the largest feature."""
    h = b.pick()
    if h.size < 2:
        return None
    for width in h.widths:
        width.judge(EITHER)
    width = b.width()
    table = b.param("table", h.size, one(width), scale=1.0)
    return b.add("looked up", lambda p, x: p[table][x.argmax(-1)], [h], one(width), [width])


@layer
def looped(b):
    h = b.pick()
    w = b.param("w", h.parts, h.parts)
    fn = lambda p, x: lax.fori_loop(0, 2, lambda i, y: y + jnp.tanh(y @ p[w]), x)
    return b.add("loop", fn, [h], h.parts, h.zeros())
