"""The sizes of a Llama, read from its config, and the metadata with which llama.cpp builds the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import gguf_metadata

CONFIG = "`config` is a dict or an object with the names of Hugging Face's LlamaConfig."


class Sizes(NamedTuple):
    """The sizes of a model.

    Attributes:
      layers: how many there are.
      width: of the stream, hidden_size.
      heads: of q.
      kv_heads: of k and v.
      head: the size of one.
      hidden: of the SwiGLU, intermediate_size.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    hidden: int


def sizes(config: Mapping[str, object] | object) -> Sizes:
    """The sizes that a config says, by default as many heads of k and v as of q, which make up the width.

    Raises:
      ValueError: for a size that is missing or no whole number, and for heads that do not fit each other or the width.
    """
    layers, width, heads, hidden = (
        int(_number(config, name))
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    )
    kv_heads, head = heads, width // heads
    if _get(config, "num_key_value_heads") is not None:
        kv_heads = int(_number(config, "num_key_value_heads"))
    if _get(config, "head_dim") is not None:
        head = int(_number(config, "head_dim"))
    else:
        remedy = f"hidden_size is {width}: say the size of a head by head_dim."
        arguments.require(width % heads == 0, "config", "have num_attention_heads that divide it", heads, remedy)
    remedy = f"num_attention_heads is {heads}: each head of k and v serves as many of q."
    arguments.require(heads % kv_heads == 0, "config", "have num_key_value_heads that divide them", kv_heads, remedy)
    remedy = "RoPE rotates its entries in pairs."
    arguments.require(head % 2 == 0, "config", "have heads of an even size", head, remedy)
    return Sizes(layers, width, heads, kv_heads, head, hidden)


def llama_metadata(config: Mapping[str, object] | object, architecture: str = "llama") -> dict[str, object]:
    """The metadata with which llama.cpp builds the model; what is missing to run it is a tokenizer.

    Args:
      config: as for `llama_names`, with max_position_embeddings, vocab_size, rms_norm_eps and rope_theta beside, and
        where the model has a scaled RoPE its rope_parameters or rope_scaling, of the type "llama3".
      architecture: the argument of `export_gguf`, which begins the keys.

    Returns:
      A dict for `metadata=` of `export_gguf`. With a RoPE of Llama 3.1 it has the factors by which frequencies are
      divided, which `export_gguf` writes as the tensor "rope_freqs.weight".

    Raises:
      ValueError: for a config without these numbers, and with a RoPE that is scaled in another way.

    Example:
      >>> config = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=256,
      ...               intermediate_size=512, max_position_embeddings=128, vocab_size=259, rms_norm_eps=1e-5)
      >>> found = llama_metadata(config)
      >>> found["llama.block_count"], found["llama.rope.dimension_count"], found["llama.rope.freq_base"]
      (2, 64, 10000.0)
    """
    size = sizes(config)
    rope = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    kind = _get(rope, "rope_type") or _get(rope, "type") or "default"
    remedy = "Give the config without it, and the keys `rope.scaling.…` of llama.cpp beside these metadata."
    known = kind in ("default", "llama3")
    arguments.require(known, "config", "have a RoPE that is not scaled, or that of Llama 3.1", kind, remedy)
    theta = float(_get(config, "rope_theta") or _get(rope, "rope_theta") or 10000.0)
    found = {
        "block_count": size.layers,
        "context_length": _number(config, "max_position_embeddings"),
        "embedding_length": size.width,
        "feed_forward_length": size.hidden,
        "attention.head_count": size.heads,
        "attention.head_count_kv": size.kv_heads,
        "attention.key_length": size.head,
        "attention.value_length": size.head,
        "attention.layer_norm_rms_epsilon": _number(config, "rms_norm_eps", float),
        "rope.dimension_count": size.head,
        "rope.freq_base": theta,
        "vocab_size": _number(config, "vocab_size"),
    }
    factors = {gguf_metadata.FACTORS: _factors(rope, theta, size.head)} if kind == "llama3" else {}
    return {f"{architecture}.{key}": value for key, value in found.items()} | factors


def _factors(rope: Any, theta: float, size: int) -> np.ndarray:
    """What the frequencies of Llama 3.1's RoPE are divided by: f32[size / 2].

    With the wavelength λ = 2π / frequency and the context C of the first training, it is 1 below C / high, the factor
    above C / low, and between them 1 / ((1 - t) / factor + t), t = (C / λ - low) / (high - low).
    """
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, context = (float(_number(rope, name, float)) for name in names)
    remedy = f"low_freq_factor is {low}: the wavelengths from {context} / high to {context} / low lie between."
    arguments.require(high > low, "config", "have a high_freq_factor above the low one", high, remedy)
    turns = context / (2 * math.pi * theta ** (np.arange(0, size, 2) / size))  # C / λ
    t = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - t) / factor + t)).astype(np.float32)


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _number(config: Any, name: str, kind: type = int) -> Any:
    value = _get(config, name)
    fits = arguments.is_number(value) and value > 0 and kind(value) == value
    arguments.require(fits, "config", f"have a positive number {name}", value, CONFIG)
    return kind(value)
