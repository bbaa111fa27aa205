"""The naive NumPy references of `test_documents.py`, and the small jitted train step that they are held against."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

RATE = 2.0**-7  # η; a power of two, so that η·g is exact and NumPy agrees bit for bit
C = np.float32(0.01)
T = np.float32(0.4)
RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=(32, n)).astype(np.float32) for n in (6, 4))
PARAMS = {
    "a": {"bias": jnp.zeros(8), "kernel": jnp.asarray(RNG.normal(size=(6, 8)) * 0.5, jnp.float32)},
    "b": {"bias": jnp.zeros(4), "kernel": jnp.asarray(RNG.normal(size=(8, 4)) * 0.5, jnp.float32)},
}


def sign_rule(x, limit):
    """X ← C·sign(x) if |x| > C."""
    return np.where(np.abs(x) > limit, np.copysign(limit, x), x)


def half_away(x):
    """The schoolbook round."""
    return np.sign(x) * np.floor(np.abs(x.astype(np.float64)) + 0.5)


def round_to(w, s):
    """Q(w) = round(w/s)·s."""
    return (half_away(np.float32(w) / np.float32(s)) * np.float64(s)).astype(np.float32)


def remove(values, k):
    """Masks of a list of arrays without the k lowest values, the earlier position being kept among equals."""
    flat = np.concatenate([v.ravel() for v in values])
    keep = np.ones(flat.size, bool)
    keep[np.lexsort((-np.arange(flat.size), flat))[:k]] = False
    ends = np.cumsum([v.size for v in values])[:-1]
    return [m.reshape(v.shape) for m, v in zip(np.split(keep, ends), values, strict=True)]


def loss_fn(params):
    hidden = jnp.tanh(X @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["b"]["kernel"] + params["b"]["bias"][None] - 3 * Y))


def train(tx, params, count):
    """Yields (params before, gradients, params after, state) of `count` jitted train steps, as NumPy arrays."""

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), grads, state

    state = tx.init(params)
    for _ in range(count):
        new, grads, state = step(params, state)
        yield *jax.tree.map(np.asarray, (params, grads, new)), state
        params = new


def same(fn, expected, *trees):
    """`fn` of the other trees' leaves, in NumPy, is what the step returned, bit for bit."""
    jax.tree.map(lambda e, *xs: np.testing.assert_array_equal(e, fn(*xs).astype(np.float32)), expected, *trees)


def close(fn, expected, *trees):
    """The same up to the last bit: a weight that moves by more than itself lands next to its value."""
    jax.tree.map(lambda e, *xs: np.testing.assert_allclose(e, fn(*xs), rtol=2.0**-23), expected, *trees)


def kernels(tree):
    return [np.asarray(tree[layer]["kernel"]) for layer in ("a", "b")]
