"""A Llama in Flax NNX as its users write it, trained on text by the byte, and the tokenizer that a file of it has."""

import functools
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

CONFIG = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "vocab_size": 259,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
START, FIRST_BYTE = 1, 3  # <s>, and the zero byte behind <unk>, <s> and </s>

TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *("▁" if i == 32 else f"<0x{i:02X}>" for i in range(256))],
    "tokenizer.ggml.scores": [0.0] * 259,
    "tokenizer.ggml.token_type": [2, 3, 3, *(1 if i == 32 else 6 for i in range(256))],  # unknown, control, bytes
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
}
"""Every byte is a token: the tokenizer "llama" (SentencePiece) falls back to bytes, but for spaces, which become ▁."""


def text():
    """What Python's own `help()` says of its keywords: 0.7 MB of English that every Python has."""
    return "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))


def tokens(string):
    """A token for each byte."""
    return np.frombuffer(string.encode(), np.uint8).astype(np.int32) + FIRST_BYTE


def rotated(x, theta):
    """RoPE on x[batch, time, heads, size]: entry i of a head turns with entry i + size / 2."""
    size = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None] / theta ** (jnp.arange(0, size, 2) / size)
    sine, cosine = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


class Attention(nnx.Module):
    """Causal attention whose heads share keys and values in groups."""

    def __init__(self, config, rngs):
        """Makes the four kernels."""
        width, heads, kv_heads = (
            config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.size, self.theta = width // heads, config["rope_theta"]
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, kv_heads * self.size)
        self.v_proj = linear(width, kv_heads * self.size)
        self.o_proj = linear(width, width)

    def __call__(self, x):
        """What is attended to, of x[batch, time, width]."""
        q, k, v = (f(x).reshape(*x.shape[:2], -1, self.size) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotated(q, self.theta), rotated(k, self.theta)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # shares k and v in groups
        return self.o_proj(attended.reshape(x.shape))


class Block(nnx.Module):
    """Attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config, rngs):
        """Makes the kernels and scales."""
        width, hidden = config["hidden_size"], config["intermediate_size"]
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.RMSNorm, width, epsilon=config["rms_norm_eps"], rngs=rngs)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = Attention(config, rngs)
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(width, hidden),
            linear(width, hidden),
            linear(hidden, width),
        )

    def __call__(self, x):
        """The stream behind this block."""
        x = x + self.self_attn(self.input_layernorm(x))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Llama(nnx.Module):
    """The model of a config with the names of Hugging Face's LlamaConfig."""

    def __init__(self, config, rngs):
        """Makes embedding and blocks, and the head where it is no other use of the embedding."""
        width, vocabulary = config["hidden_size"], config["vocab_size"]
        self.embed_tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config["num_hidden_layers"])])
        self.norm = nnx.RMSNorm(width, epsilon=config["rms_norm_eps"], rngs=rngs)
        if not config.get("tie_word_embeddings"):
            self.lm_head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        """Logits of the next token, of ids[batch, time]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.lm_head(x) if hasattr(self, "lm_head") else self.embed_tokens.attend(x)


def log_probabilities(model, ids):
    """Log p of the next token behind each of some tokens."""
    return jax.nn.log_softmax(model(jnp.asarray(ids)[None])[0])


def trained(model, tx, steps, batch=8, length=96, seed=0, string=None, each=lambda loss: None):
    """The loss of the last step and the state of the optimizer, after some steps of the model on a text.

    Models that are trained with the same seed see the same batches. `each` is called with the loss of every step.
    """
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    ids, rng = tokens(text() if string is None else string), np.random.default_rng(seed)

    def loss(model, rows):
        logits = model(rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    @nnx.jit
    def step(model, optimizer, rows):
        value, gradient = nnx.value_and_grad(loss)(model, rows)
        optimizer.update(model, gradient)
        return value

    for _ in range(steps):
        starts = rng.integers(0, len(ids) - length, batch)
        value = float(step(model, optimizer, jnp.asarray(behind_start(ids, starts, length))))
        each(value)
    return value, optimizer.opt_state


def behind_start(ids, starts, length):
    """Rows of a text behind <s>, which takes the place of the first byte: i32[rows, length]."""
    rows = np.stack([ids[start : start + length] for start in starts])
    rows[:, 0] = START
    return rows


def nats(model, rows):
    """The mean loss on rows of a text, in nats a byte."""
    graph, state = nnx.split(model)

    @jax.jit
    def loss(state, row):
        logits = nnx.merge(graph, state)(row[None, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, row[None, 1:]).mean()

    return float(np.mean([loss(state, jnp.asarray(row)) for row in rows]))
