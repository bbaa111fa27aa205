"""Llama in llama.cpp: its names for the tensors of a Flax model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import llama_sizes
from clipjax._exports.llama_sizes import Sizes
from clipjax.typing import Leaf, Rename

Target: TypeAlias = str | Sequence[str] | None
"""llama.cpp's name of a module, several for one whose outputs lie side by side, or None to leave it out."""

MODEL = {
    "token_embd": "embed_tokens tok_embeddings embed embedder embedding input_embedding wte token_embd",
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
"""What layers are called; a class of Linen whose name ends so, as DecoderBlock_1, is a layer too."""


def llama_names(
    config: Mapping[str, object] | object, modules: Mapping[str, Target] | None = None, *, permute: bool = True
) -> Rename:
    r"""A `rename` for `export_gguf` and `import_gguf`: the names that llama.cpp has for a Llama in Flax.

    A module is found by the end of its path: "layers/3/self_attn/q_proj/kernel" is "blk.3.attn_q.weight". The usual
    names of Hugging Face, Meta and Flax are known; `modules` adds others, and says what differs:

    | llama.cpp | modules that are known |
    | --- | --- |
    | token_embd | embed_tokens, tok_embeddings, embed, embedder, embedding, input_embedding, wte |
    | output_norm | norm, final_norm, ln_f |
    | output | lm_head, head, unembed |
    | attn_norm | input_layernorm, attention_norm, pre_attention_norm, norm1, ln_1 |
    | attn_q, _k, _v | q_proj, wq, query, q, and so on; of all three, qkv_proj, wqkv, qkv |
    | attn_output | o_proj, wo, out_proj, out, o |
    | ffn_norm | post_attention_layernorm, mlp_norm, pre_ffw_norm, norm2, ln_2 |
    | ffn_gate, _up | gate_proj, w1, gate; up_proj, w3, up; of both, gate_up_proj, gate_up |
    | ffn_down | down_proj, w2, down |

    The number of a layer is a key of the path ("layers/3", "layers_3", "Block_3"). Without one, and where an array has
    the size of all, the layers are stacked along the first axis of each array. A kernel f32[in, heads, size] has two
    axes of outputs, which `axis=` of the exporter names; of f32[in, heads * size] it knows.

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
      ValueError: for a config without these numbers, and with heads that do not fit; when called, for a module that has
        no name, a layer beyond num_hidden_layers, an array without a layer's number that is no stack of layers, and
        outputs side by side that have another size than the config says.

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
    size, own = llama_sizes.sizes(config), _own(modules)
    orders = _orders(size) if permute else {}

    def rename(path: str, leaf: Leaf) -> Any:
        keys = path.split("/")
        bias = keys[-1] in ("bias", "b")
        at, targets = _found(own, keys)
        name = "bias" if bias else "weight"
        if not targets:
            return None
        if set(targets) <= MODEL.keys():
            return f"{targets[0]}.{name}"
        number = _number_of(path, leaf, _layer(keys[:at]), targets, bias, size)
        found, start = [], 0
        for target in targets:
            part = slice(start, start := start + _shapes(size)[target][0]) if len(targets) > 1 else None
            found.append((target, part, orders.get(target)))
        return [
            (f"blk.{i}.{target}.{name}", _index(i if number is None else None, part), order)
            for i in (range(size.layers) if number is None else (number,))
            for target, part, order in found
        ]

    return lambda path, leaf: _plain(rename(path, leaf))


def _shapes(size: Sizes) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the modules of a layer."""
    heads, kv = size.heads * size.head, size.kv_heads * size.head
    return {
        "attn_q": (heads, size.width),
        "attn_k": (kv, size.width),
        "attn_v": (kv, size.width),
        "attn_output": (size.width, heads),
        "ffn_gate": (size.hidden, size.width),
        "ffn_up": (size.hidden, size.width),
        "ffn_down": (size.width, size.hidden),
        "attn_norm": (size.width, 1),
        "ffn_norm": (size.width, 1),
    }


def _number_of(
    path: str, leaf: Leaf, number: int | None, targets: tuple[str, ...], bias: bool, size: Sizes
) -> int | None:
    """The number of the layer that an array belongs to, None for a stack of all.

    The key of a path may count something else: Mlp_0 of a scanned layer. So an array of the size of a stack is one.
    """
    shapes = [_shapes(size).get(target, (0, 0)) for target in targets]
    one, entries = sum(rows * (1 if bias else inputs) for rows, inputs in shapes), math.prod(leaf.shape)
    stacked = leaf.shape[:1] == (size.layers,) and (number is None or 0 < size.layers * one == entries > one)
    if number is None:
        remedy = f"{path!r} has no number of a layer: stack all {size.layers} of them along the first axis."
        arguments.require(stacked, "config", "have as many layers as an array", leaf.shape, remedy)
    elif not stacked:
        remedy = f"The path is {path!r}."
        arguments.require(number < size.layers, "config", "have the layers of the params", size.layers, remedy)
    if len(targets) > 1:
        rows = " + ".join(str(n) for n, _ in shapes)
        remedy = f"{path!r} has the shape {leaf.shape}, and {' and '.join(targets)} {rows} outputs by the config."
        fits = entries == one * (size.layers if stacked else 1)
        arguments.require(fits, "config", "have the sizes of what lies side by side", rows, remedy)
    return None if stacked else number


def _orders(size: Sizes) -> dict[str, np.ndarray]:
    """Which row of q and k stands where in the file: the two halves of each head, interleaved."""
    return {name: _interleaved(_shapes(size)[name][0], size.head) for name in ("attn_q", "attn_k")}


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
    module = "/".join(key for key in keys[: ends[0]][-2:] if _layer([key]) is None)  # a layer's number stays outside
    path, example = "/".join(keys), {module: "attn_q"}
    remedy = f"Say which one it is, `modules={example}` if it is q, or None instead of a name to leave it out."
    arguments.require(False, "modules", "name every module that is not usual", path, remedy)
    return 0, ()


def _layer(keys: Sequence[str]) -> int | None:
    """The number of a layer in the keys before a module: a number alone, else the one behind a name of layers."""
    for key in keys:
        if key.isdecimal():
            return int(key)
    for key in keys:
        numbered = re.fullmatch(r"(.*)_(\d+)", key)
        if numbered and (numbered[1] in LAYERS or numbered[1].lower().endswith(LAYERS[:-1])):
            return int(numbered[2])
    return None


def _index(layer: int | None, part: slice | None) -> Any:
    return part if layer is None else layer if part is None else (layer, part)


def _plain(found: Any) -> Any:
    """A name alone where it is all of a leaf, as it is."""
    alone = isinstance(found, list) and len(found) == 1 and all(part is None for part in found[0][1:])
    return found[0][0] if alone else found
