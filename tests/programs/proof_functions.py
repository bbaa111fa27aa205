"""Models of the proof set that are plain functions of a dict of arrays: their widths are those of the arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from proof_cases import Case, floats, shapes

RNG = np.random.default_rng(1)


EPSILON = 0.05  # large, so that outputs with another one are others


def rms_norm(x, p, epsilon):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon) * p["scale"]


def rotated(x):
    """RoPE: the two halves of every head turn by an angle of the position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 100.0 ** -(jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def grouped_attention(p, x):
    """Query head i reads the key and the value of head i // repeats."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("query", "key", "value"))
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(y, repeats, axis=2) for y in (rotated(k), v))
    scores = jnp.einsum("bqhk,bshk->bhqs", rotated(q), k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e30))
    return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhqs,bshk->bqhk", weights, v), p["out"])


def swiglu(p, x):
    gate, up = jnp.split(x @ p["gate_up"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ p["down"]


def gpt(params, tokens, epsilon=EPSILON):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = x + grouped_attention(p["attention"], rms_norm(x, p["norm1"], epsilon))
        x = x + swiglu(p["mlp"], rms_norm(x, p["norm2"], epsilon))
    return rms_norm(x, params["norm"], epsilon) @ params["embed"].T


def smaller_gpt(params, tokens):
    """The one whose stream had twelve units: the number that it adds to the mean squares belongs to these."""
    return gpt(params, tokens, EPSILON * 12 / params["embed"].shape[-1])


def _gpt_shapes(vocab, d, heads, kv, head, ffn):
    layer = {
        "norm1": {"scale": (d,)},
        "attention": {"query": (d, heads, head), "key": (d, kv, head), "value": (d, kv, head), "out": (heads, head, d)},
        "norm2": {"scale": (d,)},
        "mlp": {"gate_up": (d, 2 * ffn), "down": (ffn, d)},
    }
    return {"embed": (vocab, d), "layers": [layer, layer], "norm": {"scale": (d,)}}


def experts(params, x):
    """A mixture of experts: the dense one weighs all of them, the other the two best, by one-hot masks."""
    weights = jax.nn.softmax(x @ params["router"]["kernel"])
    h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, params["dense"]["in"]) + params["dense"]["bias"])
    x = x + jnp.einsum("bte,btef,efd->btd", weights, h, params["dense"]["out"])
    values, chosen = jax.lax.top_k(x @ params["router2"]["kernel"], 2)
    n = params["router2"]["kernel"].shape[-1]
    sent = jnp.einsum("btk,btke->bte", jax.nn.softmax(values), jax.nn.one_hot(chosen, n))
    given = jnp.einsum("bte,btd->ebtd", sent, x)
    h = jax.nn.silu(jnp.einsum("ebtd,edf->ebtf", given, params["best"]["in"]))
    y = jnp.einsum("ebtf,efd->btd", h, params["best"]["out"])
    return y @ params["head"]["kernel"]


def gru(params, x):
    """A GRU whose three gates lie in one kernel, under `lax.scan`."""

    def turn(h, x):
        update, reset, new = jnp.split(x @ params["in"]["kernel"] + params["in"]["bias"], 3, axis=-1)
        update_h, reset_h, new_h = jnp.split(h @ params["hidden"]["kernel"], 3, axis=-1)
        z, r = jax.nn.sigmoid(update + update_h), jax.nn.sigmoid(reset + reset_h)
        h = (1 - z) * jnp.tanh(new + r * new_h) + z * h
        return h, h

    start = jnp.zeros((x.shape[1], params["hidden"]["kernel"].shape[0]))
    last, every = jax.lax.scan(turn, start, x)
    return last @ params["last"]["kernel"] + every.mean(0) @ params["mean"]["kernel"]


def _gpt_found(layer):
    at = f"layers/{layer}/"
    return (
        (f"{at}attention/key", -2, 3),
        (f"{at}attention/query", -2, 3),
        (f"{at}attention/query", -2, 2),  # the repeats: as many query heads for each key
        (f"{at}attention/value", -1, 8),
        (f"{at}mlp/gate_up", -1, 10),
    )


EXPERTS = {
    "router": {"kernel": (6, 3)},
    "dense": {"in": (3, 6, 10), "bias": (3, 10), "out": (3, 10, 6)},
    "router2": {"kernel": (6, 4)},
    "best": {"in": (4, 6, 8), "out": (4, 8, 9)},
    "head": {"kernel": (9, 5)},
}
GRU = {
    "in": {"kernel": (4, 21), "bias": (21,)},
    "hidden": {"kernel": (7, 21)},
    "last": {"kernel": (7, 3)},
    "mean": {"kernel": (7, 3)},
}
CASES = {
    "gpt": Case(
        gpt,
        shapes(_gpt_shapes(17, 12, 6, 3, 8, 10), RNG),
        (RNG.integers(0, 17, (2, 5)),),
        (("embed", -1, 12), *_gpt_found(0), *_gpt_found(1)),
        smaller=smaller_gpt,
    ),
    "experts": Case(
        experts,
        shapes(EXPERTS, RNG),
        (floats(RNG, 2, 7, 6),),
        (("dense/in", -1, 10), ("best/in", -1, 8), ("best/out", -1, 9)),
    ),
    "gru": Case(gru, shapes(GRU, RNG), (floats(RNG, 5, 2, 4),), (("hidden/kernel", -1, 7), ("hidden/kernel", -2, 7))),
}
