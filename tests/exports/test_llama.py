"""`llama_names` and `llama_metadata`: usual names, one's own in a few lines, stacks, fused kernels, permuted rows."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax

CONFIG = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 20,
    "rms_norm_eps": 1e-5,
}
LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
ALL = ["token_embd", "output_norm", "output", *(f"blk.{i}.{name}" for i in range(2) for name in LAYER)]
USUAL = {
    "hugging face": (
        "model/embed_tokens/embedding model/norm/weight lm_head/kernel",
        "model/layers/{}/",
        "input_layernorm/weight self_attn/q_proj/kernel self_attn/k_proj/kernel self_attn/v_proj/kernel"
        " self_attn/o_proj/kernel post_attention_layernorm/weight mlp/gate_proj/kernel mlp/up_proj/kernel"
        " mlp/down_proj/kernel",
    ),
    "meta, in Linen": (
        "params/tok_embeddings/embedding params/norm/scale params/output/kernel",
        "params/layers_{}/",
        "attention_norm/scale attention/wq/kernel attention/wk/kernel attention/wv/kernel attention/wo/kernel"
        " ffn_norm/scale feed_forward/w1/kernel feed_forward/w3/kernel feed_forward/w2/kernel",
    ),
    "arrays alone": (
        "embed final_norm head",
        "blocks/{}/",
        "norm1 attn/q attn/k attn/v attn/out norm2 mlp/gate mlp/up mlp/down",
    ),
}


def named(rename, path, shape=(32, 32)):
    found = rename(path, jax.ShapeDtypeStruct(shape, jnp.float32))
    return [found] if isinstance(found, str) else [name for name, _, _ in found]


@pytest.mark.parametrize("names", USUAL)
def test_usual_names(names):
    whole, prefix, layer = USUAL[names]
    rename = clipjax.llama_names(types.SimpleNamespace(**CONFIG))
    paths = [*whole.split(), *(prefix.format(i) + name for i in range(2) for name in layer.split())]
    assert [name for path in paths for name in named(rename, path)] == [f"{name}.weight" for name in ALL]


def test_stacked_layers_and_fused_kernels():
    """q, k and v side by side, and gate beside up; q and k are permuted, each with its own heads."""
    rename = clipjax.llama_names(CONFIG)
    qkv = rename("layers/attn/qkv/kernel", jnp.zeros((2, 32, 64)))
    assert [(name, index) for name, index, _ in qkv] == [
        (f"blk.{i}.attn_{x}.weight", (i, part))
        for i in range(2)
        for x, part in zip("qkv", (slice(0, 32), slice(32, 48), slice(48, 64)), strict=True)
    ]
    assert [order is None or len(order) for *_, order in qkv] == [32, 16, True] * 2
    assert rename("layers/attn_norm/scale", jnp.zeros((2, 32)))[1] == ("blk.1.attn_norm.weight", 1, None)
    gate_up = rename("layers/1/mlp/gate_up/bias", jnp.zeros(96))
    assert gate_up == [("blk.1.ffn_gate.bias", slice(0, 48), None), ("blk.1.ffn_up.bias", slice(48, 96), None)]


def test_rows_are_permuted_as_llama_cpp_does():
    """The formula of convert_hf_to_gguf.py, for kernels and biases."""
    x = np.arange(32 * 5).reshape(32, 5)
    want = x.reshape(4, 2, 4, 5).swapaxes(1, 2).reshape(32, 5)
    for kind, shape in (("kernel", (5, 32)), ("bias", (32,))):
        ((name, index, order),) = clipjax.llama_names(CONFIG)(f"layers/0/q_proj/{kind}", jnp.zeros(shape))
        assert (name, index) == ("blk.0.attn_q." + {"kernel": "weight", "bias": "bias"}[kind], None)
        np.testing.assert_array_equal(x[order], want)
    assert (
        clipjax.llama_names(CONFIG, permute=False)("layers/0/q_proj/kernel", jnp.zeros((5, 32)))
        == "blk.0.attn_q.weight"
    )


def test_numbers_that_count_something_else_than_layers():
    """Linen numbers its modules by class: inside a scanned layer Mlp_0 is the one of every layer."""
    rename = clipjax.llama_names(CONFIG | {"num_hidden_layers": 3})
    for path in ("layers/Mlp_0/up_proj/kernel", "layers/Block_0/up_proj/kernel", "Llama_1/blocks/up_proj/kernel"):
        found = rename(path, jnp.zeros((3, 32, 48)))
        assert [(name, index) for name, index, _ in found] == [(f"blk.{i}.ffn_up.weight", i) for i in range(3)]
    for path in ("Llama_0/Block_1/up_proj/bias", "h_1/up_proj/bias", "layers_1/Mlp_2/up_proj/bias", "1/up_proj/bias"):
        assert rename(path, jnp.zeros(48)) == "blk.1.ffn_up.bias"
    assert rename("Llama_0/norm/scale", jnp.zeros(32)) == "output_norm.weight"
    with pytest.raises(ValueError, match=r"'layers/Mlp_0/up_proj/kernel' has no number of a layer: stack all 3"):
        rename("layers/Mlp_0/up_proj/kernel", jnp.zeros((32, 48)))


def test_the_frequencies_of_llama_3_are_divided(tmp_path):
    """The loop of convert_hf_to_gguf.py; the tensor goes into the file, and is no leaf on the way back."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = CONFIG | {"head_dim": 64, "rope_scaling": rope | {"original_max_position_embeddings": 8192}}
    want = []
    for freq in 1.0 / (5e5 ** (np.arange(0, 64, 2) / 64)):
        wavelen = 2 * np.pi / freq
        if wavelen < 8192 / 4:
            want.append(1)
        elif wavelen > 8192 / 1:
            want.append(8)
        else:
            smooth = (8192 / wavelen - 1) / (4 - 1)
            want.append(1 / ((1 - smooth) / 8 + smooth))
    assert len({*want}) > 4
    metadata = clipjax.llama_metadata(config)
    params = {"norm": {"scale": jnp.ones(32)}}
    clipjax.export_gguf(tmp_path / "net", params, rename=clipjax.llama_names(config), metadata=metadata)
    found = clipjax.import_gguf(tmp_path / "net")["rope_freqs.weight"]
    assert found.dtype == np.float32 and "llama.rope.freq_base" in metadata
    np.testing.assert_allclose(found, want, rtol=1e-6)
    back = clipjax.import_gguf(tmp_path / "net", like=params, rename=clipjax.llama_names(config))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    with pytest.raises(ValueError, match=r"each name once, got 'rope_freqs.weight'"):
        clipjax.export_gguf(tmp_path / "net", params, rename=lambda *_: "rope_freqs.weight", metadata=metadata)
    with pytest.raises(ValueError, match=r"`config` must have a high_freq_factor above the low one, got 1\.0"):
        clipjax.llama_metadata(config | {"rope_scaling": config["rope_scaling"] | {"high_freq_factor": 1}})


def test_modules_of_ones_own():
    modules = {"mixer/in": ("attn_q", "attn_k", "attn_v"), "Norm_1": "ffn_norm", "q_norm": "attn_q_norm", "extra": None}
    rename = clipjax.llama_names(CONFIG, modules | {"wte": "output"})
    assert named(rename, "h/1/mixer/in/w", (32, 64)) == [f"blk.1.attn_{x}.weight" for x in "qkv"]
    assert named(rename, "layers_1/Norm_1/scale") == ["blk.1.ffn_norm.weight"]
    assert named(rename, "layers/0/attn/q_norm/scale") == ["blk.0.attn_q_norm.weight"]
    assert named(rename, "wte/embedding") == ["output.weight"]
    assert named(rename, "embedder/input_embedding") == ["token_embd.weight"]
    assert rename("layers/0/extra/kernel", jnp.zeros((2, 2))) is None


def test_a_tree_there_and_back(tmp_path):
    """Stacked layers whose kernels have an axis of heads, which `axis=` names; q, k and v in one kernel."""
    shape = {
        "embed": {"embedding": (20, 32)},
        "layers": {
            "attn_norm": {"scale": (2, 32)},
            "qkv": {"kernel": (2, 32, 8, 8)},
            "out": {"kernel": (2, 4, 8, 32)},
            "ffn_norm": {"scale": (2, 32)},
            "gate_up": {"kernel": (2, 32, 2, 48)},
            "down": {"kernel": (2, 48, 32)},
        },
        "norm": {"scale": (32,)},
    }
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda n: jnp.asarray(rng.standard_normal(n, np.float32)), shape, is_leaf=lambda x: type(x) is tuple
    )
    wide = clipjax.per_leaf(lambda path, leaf: (2, 3) if "qkv" in path or "gate_up" in path else None)
    options = {"rename": clipjax.llama_names(CONFIG), "axis": wide}
    clipjax.export_gguf(tmp_path / "net", params, metadata=clipjax.llama_metadata(CONFIG), **options)
    found = clipjax.import_gguf(tmp_path / "net")
    assert sorted(found) == sorted(f"{name}.weight" for name in ALL if name != "output")
    q = np.asarray(params["layers"]["qkv"]["kernel"])[1, :, :4].reshape(32, 32).T
    np.testing.assert_array_equal(found["blk.1.attn_q.weight"], q.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32))
    back = clipjax.import_gguf(tmp_path / "net", like=params, **options)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), back, params))


def test_metadata_of_a_config():
    found = clipjax.llama_metadata(CONFIG | {"head_dim": 16, "rope_parameters": {"rope_theta": 5e5}}, "mistral")
    assert found == {
        "mistral.block_count": 2,
        "mistral.context_length": 64,
        "mistral.embedding_length": 32,
        "mistral.feed_forward_length": 48,
        "mistral.attention.head_count": 4,
        "mistral.attention.head_count_kv": 2,
        "mistral.attention.key_length": 16,
        "mistral.attention.value_length": 16,
        "mistral.attention.layer_norm_rms_epsilon": 1e-5,
        "mistral.rope.dimension_count": 16,
        "mistral.rope.freq_base": 5e5,
        "mistral.vocab_size": 20,
    }


def test_what_is_not_known():
    rename = clipjax.llama_names(CONFIG)
    leaf = jnp.zeros((3, 4))
    for call, error in (
        (
            lambda: rename("layers/0/mixer/in/kernel", leaf),
            r"`modules` must name every module.*got 'layers/0/mix.*\{'mixer/in'",
        ),
        (lambda: rename("layers/2/q_proj/kernel", leaf), "`config` must have the layers of the params, got 2"),
        (lambda: rename("layers/q_proj/kernel", leaf), r"as many layers as an array, got \(3, 4\)"),
        (lambda: clipjax.llama_names({"num_hidden_layers": 2}), "positive number hidden_size, got None"),
        (lambda: clipjax.llama_names(CONFIG, {"a": 3}), "`modules` must name modules"),
        (lambda: clipjax.llama_names(CONFIG, {"a": ("attn_q", "ffn_down")}), "`modules` must join q, k and v"),
        (lambda: clipjax.llama_metadata(CONFIG | {"rope_scaling": {"type": "linear"}}), "RoPE that is not scaled"),
        (
            lambda: rename("embedder/table", leaf),
            r"got 'embedder/table'. .* `modules=\{'embedder/table': 'attn_q'\}` if",
        ),
        (lambda: rename("layers/1/norm/scale", leaf), r"`modules=\{'norm': 'attn_q'\}`"),
        (
            lambda: rename("layers/1/gate_up/kernel", jnp.zeros((32, 80))),
            r"lies side by side, got '48 \+ 48'. .*32, 80",
        ),
        (
            lambda: rename("layers/qkv/bias", jnp.zeros((2, 80))),
            r"got '32 \+ 16 \+ 16'. 'layers/qkv/bias' has the shape",
        ),
        (
            lambda: clipjax.llama_names(CONFIG | {"num_attention_heads": 64}),
            "that divide it, got 64. hidden_size is 32",
        ),
        (lambda: clipjax.llama_names(CONFIG | {"num_attention_heads": 5}), "num_attention_heads that divide it, got 5"),
        (
            lambda: clipjax.llama_names(CONFIG | {"num_key_value_heads": 3}),
            "that divide them, got 3. num_attention_hea",
        ),
        (lambda: clipjax.llama_names(CONFIG | {"head_dim": 3}), "heads of an even size, got 3"),
    ):
        with pytest.raises(ValueError, match=error):
            call()
