"""Llama in llama.cpp: its names for the tensors of a Flax model, and the metadata that say its shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from clipjax._arrays import arguments
from clipjax.typing import Leaf, Rename

Target: TypeAlias = str | Sequence[str] | None
"""llama.cpp's name of a module, several for one whose outputs lie side by side, or None to leave it out."""

MODEL = {
    "token_embd": "embed_tokens tok_embeddings embed embedder embedding wte token_embd",
    "output_norm": "norm final_norm ln_f output_norm",
    "output": "lm_head head unembed output",
}
LAYER = {
    "attn_norm": "input_layernorm attention_norm pre_attention_norm norm1 ln_1 attn_norm",
    "attn_q": "q_proj wq query q attn_q",
    "attn_k": "k_proj wk key k attn_k",
    "attn_v": "v_proj wv value v attn_v",
    "attn_q attn_k attn_v": "qkv_proj wqkv qkv",
    "attn_output": "o_proj wo out_proj out o attn_output",
    "ffn_norm": "post_attention_layernorm mlp_norm pre_ffw_norm norm2 ln_2 ffn_norm",
    "ffn_gate": "gate_proj w1 gate ffn_gate",
    "ffn_up": "up_proj w3 up ffn_up",
    "ffn_gate ffn_up": "gate_up_proj gate_up",
    "ffn_down": "down_proj w2 down ffn_down",
}
ARRAYS = ("kernel", "weight", "w", "embedding", "scale", "bias", "b")
LAYERS = ("layers", "layer", "blocks", "block", "h")

CONFIG = "`config` is a dict or an object with the names of Hugging Face's LlamaConfig."


def llama_names(
    config: Mapping[str, object] | object, modules: Mapping[str, Target] | None = None, *, permute: bool = True
) -> Rename:
    r"""A `rename` for `export_gguf` and `import_gguf`: the names that llama.cpp has for a Llama in Flax.

    A module is found by the end of its path: "layers/3/self_attn/q_proj/kernel" is "blk.3.attn_q.weight". The usual
    names of Hugging Face, Meta and Flax are known; `modules` adds others, and says what differs:

    ================  ==========================================
    llama.cpp         modules that are known
    ================  ==========================================
    token_embd        embed_tokens, tok_embeddings, embed, embedder, embedding, wte
    output_norm       norm, final_norm, ln_f
    output            lm_head, head, unembed
    attn_norm         input_layernorm, attention_norm, pre_attention_norm, norm1, ln_1
    attn_q, _k, _v    q_proj, wq, query, q, and so on; of all three, qkv_proj, wqkv, qkv
    attn_output       o_proj, wo, out_proj, out, o
    ffn_norm          post_attention_layernorm, mlp_norm, pre_ffw_norm, norm2, ln_2
    ffn_gate, _up     gate_proj, w1, gate; up_proj, w3, up; of both, gate_up_proj, gate_up
    ffn_down          down_proj, w2, down
    ================  ==========================================

    The number of a layer is a key of the path ("layers/3", "layers_3"). Without one the layers are stacked along the
    first axis of each array. A kernel f32[in, heads, size] has two axes of outputs, which `axis=` of the exporter
    names; of f32[in, heads * size] it knows.

    llama.cpp rotates neighbouring rows of q and k, (2i, 2i + 1), in its architecture "llama", where Flax and Hugging
    Face rotate halves, (i, i + size / 2). The rows of q and k are therefore permuted, head by head: row 2i + j of a
    head in the file is row i + j size / 2 of the model.

    Args:
      config: what Hugging Face's LlamaConfig has, as a dict (its config.json) or as attributes: num_hidden_layers,
        num_attention_heads, num_key_value_heads (by default as many), hidden_size, intermediate_size, and head_dim (by
        default hidden_size / num_attention_heads).
      modules: more names: the last keys of a module's path -> llama.cpp's name; several names for one whose outputs lie
        side by side, in this order; None to leave it out.
      permute: False for a model that rotates neighbours itself, and for an architecture of llama.cpp that rotates
        halves, as "qwen2".

    Returns:
      `rename(path, leaf)`.

    Raises:
      ValueError: for a config without these numbers; when called, for a module that has no name, a layer beyond
        num_hidden_layers, and an array without a layer's number that is no stack of layers.

    Example:
      >>> import jax.numpy as jnp
      >>> config = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=16)
      >>> rename = llama_names(config, {"mixer/out": "attn_output"})
      >>> rename("layers/1/mixer/out/kernel", jnp.zeros((8, 8))), rename("norm/scale", jnp.zeros(8))
      ('blk.1.attn_output.weight', 'output_norm.weight')
      >>> [(name, index) for name, index, _ in rename("layers/mlp/gate_up/kernel", jnp.zeros((2, 8, 32)))]
      [('blk.0.ffn_gate.weight', (0, slice(0, 16, None))), ('blk.0.ffn_up.weight', (0, slice(16, 32, None))),
       ('blk.1.ffn_gate.weight', (1, slice(0, 16, None))), ('blk.1.ffn_up.weight', (1, slice(16, 32, None)))]
      >>> rename("layers/0/self_attn/q_proj/kernel", jnp.zeros((8, 8)))[0][2].tolist()
      [0, 2, 1, 3, 4, 6, 5, 7]

    References:
      llama.cpp, convert_hf_to_gguf.py. Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864.
    """
    layers, sizes, orders = _number(config, "num_hidden_layers"), _rows(config), _orders(config) if permute else {}
    own = _own(modules)

    def rename(path: str, leaf: Leaf) -> Any:
        keys = path.split("/")
        name = "bias" if keys[-1] in ("bias", "b") else "weight"
        at, targets = _found(own, keys)
        if not targets:
            return None
        if set(targets) <= MODEL.keys():
            return f"{targets[0]}.{name}"
        number = _layer(keys[:at])
        if number is None:
            stacked = leaf.shape[:1] == (layers,)
            remedy = f"{path!r} has no number of a layer: stack all {layers} of them along the first axis."
            arguments.require(stacked, "config", "have as many layers as an array", leaf.shape, remedy)
        else:
            remedy = f"The path is {path!r}."
            arguments.require(number < layers, "config", "have the layers of the params", layers, remedy)
        found, start = [], 0
        for target in targets:
            part = slice(start, start := start + sizes.get(target, 0)) if len(targets) > 1 else None
            found.append((target, part, orders.get(target)))
        return [
            (f"blk.{i}.{target}.{name}", _index(i if number is None else None, part), order)
            for i in (range(layers) if number is None else (number,))
            for target, part, order in found
        ]

    return lambda path, leaf: _plain(rename(path, leaf))


def llama_metadata(config: Mapping[str, object] | object, architecture: str = "llama") -> dict[str, object]:
    """The metadata with which llama.cpp builds the model; what is missing to run it is a tokenizer.

    Args:
      config: as for `llama_names`, with max_position_embeddings, vocab_size, rms_norm_eps and rope_theta beside.
      architecture: the argument of `export_gguf`, which begins the keys.

    Returns:
      A dict for `metadata=` of `export_gguf`.

    Raises:
      ValueError: for a config without these numbers, and with a scaled RoPE, whose keys differ by kind.

    Example:
      >>> config = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=256,
      ...               intermediate_size=512, max_position_embeddings=128, vocab_size=259, rms_norm_eps=1e-5)
      >>> found = llama_metadata(config)
      >>> found["llama.block_count"], found["llama.rope.dimension_count"], found["llama.rope.freq_base"]
      (2, 64, 10000.0)
    """
    rope = _get(config, "rope_parameters") or _get(config, "rope_scaling") or {}
    kind = _get(rope, "rope_type") or _get(rope, "type") or "default"
    remedy = "Give the config without it, and the keys `rope.scaling.…` of llama.cpp beside these metadata."
    arguments.require(kind == "default", "config", "have a RoPE that is not scaled", kind, remedy)
    theta = _get(config, "rope_theta") or _get(rope, "rope_theta") or 10000.0
    size = _head_size(config)
    found = {
        "block_count": _number(config, "num_hidden_layers"),
        "context_length": _number(config, "max_position_embeddings"),
        "embedding_length": _number(config, "hidden_size"),
        "feed_forward_length": _number(config, "intermediate_size"),
        "attention.head_count": _number(config, "num_attention_heads"),
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": _number(config, "rms_norm_eps", float),
        "rope.dimension_count": size,
        "rope.freq_base": float(theta),
        "vocab_size": _number(config, "vocab_size"),
    }
    return {f"{architecture}.{key}": value for key, value in found.items()}


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _number(config: Any, name: str, kind: type = int) -> Any:
    value = _get(config, name)
    fits = arguments.is_number(value) and value > 0 and kind(value) == value
    arguments.require(fits, "config", f"have a positive number {name}", value, CONFIG)
    return kind(value)


def _kv_heads(config: Any) -> int:
    given = _get(config, "num_key_value_heads") is not None
    return int(_number(config, "num_key_value_heads" if given else "num_attention_heads"))


def _head_size(config: Any) -> int:
    if _get(config, "head_dim") is not None:
        return int(_number(config, "head_dim"))
    return int(_number(config, "hidden_size") // _number(config, "num_attention_heads"))


def _rows(config: Any) -> dict[str, int]:
    """How many outputs the parts of a module have whose outputs may lie side by side."""
    size = _head_size(config)
    heads, kv = _number(config, "num_attention_heads") * size, _kv_heads(config) * size
    hidden = _number(config, "intermediate_size")
    return {"attn_q": heads, "attn_k": kv, "attn_v": kv, "ffn_gate": hidden, "ffn_up": hidden}


def _orders(config: Any) -> dict[str, np.ndarray]:
    """Which row of q and k stands where in the file: the two halves of each head, interleaved."""
    rows, size = _rows(config), _head_size(config)
    return {name: _interleaved(rows[name], size) for name in ("attn_q", "attn_k")}


def _interleaved(rows: int, size: int) -> np.ndarray:
    return np.arange(rows).reshape(rows // size, 2, size // 2).swapaxes(1, 2).ravel()


def _own(modules: Mapping[str, Target] | None) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The argument `modules`, by the keys at the end of a path."""
    found = {}
    for end, target in (modules or {}).items():
        names = () if target is None else tuple(target) if isinstance(target, list | tuple) else (target,)
        known = isinstance(end, str) and all(isinstance(name, str) and name for name in names)
        remedy = "Try {'attention/in': 'attn_q'}, or a tuple of names where outputs lie side by side."
        arguments.require(known, "modules", "name modules of llama.cpp", {end: target}, remedy)
        sized = len(names) < 2 or set(names) <= {"attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"}
        arguments.require(sized, "modules", "join q, k and v, or gate and up", target, remedy)
        found[tuple(end.split("/"))] = names
    return found


def _found(own: Mapping[tuple[str, ...], tuple[str, ...]], keys: list[str]) -> tuple[int, tuple[str, ...]]:
    """Where a module begins in a path, and llama.cpp's names for it."""
    ends = [len(keys) - 1] * (keys[-1] in ARRAYS and len(keys) > 1) + [len(keys)]
    for end in ends:
        for begin in range(end):
            if tuple(keys[begin:end]) in own:
                return begin, own[tuple(keys[begin:end])]
    for end in ends:
        before = keys[: end - 1]
        inside = _layer(before) is not None or any(key in LAYERS for key in before)
        for table in (LAYER,) if inside else (MODEL, LAYER):
            for target, known in table.items():
                if keys[end - 1] in known.split():
                    return end - 1, tuple(target.split())
    path, example = "/".join(keys), {"/".join(keys[:-1][-2:]) or keys[-1]: "attn_q"}
    remedy = f"Say which one it is, `modules={example}`, or None instead of a name to leave it out."
    arguments.require(False, "modules", "name every module that is not usual", path, remedy)
    return 0, ()


def _layer(keys: Sequence[str]) -> int | None:
    """The number of a layer in the keys before a module: a number alone, else one behind a name."""
    for pattern in (r"(\d+)", r".*_(\d+)"):
        for key in keys:
            if number := re.fullmatch(pattern, key):
                return int(number[1])
    return None


def _index(layer: int | None, part: slice | None) -> Any:
    return part if layer is None else layer if part is None else (layer, part)


def _plain(found: Any) -> Any:
    """A name alone where it is all of a leaf, as it is."""
    alone = isinstance(found, list) and len(found) == 1 and all(part is None for part in found[0][1:])
    return found[0][0] if alone else found
