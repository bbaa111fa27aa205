"""llama.cpp runs what `export_gguf` writes of a Llama in Flax NNX, with the next-token probabilities that JAX has."""

import functools
import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from format_rules import named

import clipjax
from clipjax import formats

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
text_llama = pytest.importorskip("text_llama", reason="the examples' extra is not installed")
xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install 'clipjax[runtimes]'")
pytestmark = pytest.mark.optimized

CONFIG = text_llama.CONFIG
NAMES = clipjax.llama_names(CONFIG)
METADATA = clipjax.llama_metadata(CONFIG) | text_llama.TOKENIZER
LENGTHS = (20, 50, 81, 100, 120, 150, 177, 200)


@pytest.fixture(scope="module")
def trained():
    model = text_llama.Llama(CONFIG, nnx.Rngs(0))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) > 1_000_000
    loss, _ = text_llama.trained(model, optax.adam(2e-3), 40)
    assert loss < 3.2  # from log 259 = 5.6; each byte by itself has 3.3
    return nnx.split(model)


def on_format(form, path, leaf):
    """Tables and the head in Q8_0, as llama.cpp's own conversions have them in more bits than the rest."""
    return formats.q8_0() if "embed" in path or "lm_head" in path else form


def server(path):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.warmup, params.n_gpu_layers, params.verbosity = 256, False, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def next_token(server, prompt):
    """Log p of every token behind a prompt, which the tokenizer of the file reads."""
    found = server.handle_completions(
        {"prompt": prompt, "n_predict": 1, "n_probs": CONFIG["vocab_size"], "temperature": 0, "cache_prompt": False}
    )
    found = found if isinstance(found, dict) else json.loads(found)
    assert found["usage"]["prompt_tokens"] == len(prompt.encode()) + 1  # a token a byte, behind <s>
    rows = {row["id"]: row["logprob"] for row in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    return np.array([rows[i] for i in range(CONFIG["vocab_size"])])


def distance(model, path):
    """The largest difference of two log-probabilities, and of prompts the largest KL divergence."""
    prompt = text_llama.text()[5000:5200]
    assert prompt.isascii()
    ours = np.asarray(text_llama.log_probabilities(model, np.r_[1, text_llama.tokens(prompt)]), np.float64)
    running = server(path)
    theirs = [next_token(running, prompt[:n]) for n in LENGTHS]
    del running
    gc.collect()
    rows = [(ours[n], row) for n, row in zip(LENGTHS, theirs, strict=True)]
    return max(np.abs(p - q).max() for p, q in rows), max((np.exp(p) * (p - q)).sum() for p, q in rows)


def test_floats(trained, tmp_path):
    model = nnx.merge(*trained, copy=True)
    params = nnx.state(model, nnx.Param)
    clipjax.export_gguf(tmp_path / "net.gguf", params, rename=NAMES, metadata=METADATA)
    worst, divergence = distance(model, tmp_path / "net.gguf")
    assert worst < 1e-3 and divergence < 1e-4  # measured 5e-6 and 1e-6
    unpermuted = clipjax.llama_names(CONFIG, permute=False)
    clipjax.export_gguf(tmp_path / "net.gguf", params, rename=unpermuted, metadata=METADATA)
    assert distance(model, tmp_path / "net.gguf")[0] > 0.01


def test_the_rope_of_llama_3(trained, tmp_path, monkeypatch):
    """The same model with the frequencies that the tensor of the file divides."""
    rope = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    config = CONFIG | {"rope_scaling": rope | {"original_max_position_embeddings": 32}}
    metadata = clipjax.llama_metadata(config) | text_llama.TOKENIZER

    def rotated(x, theta=CONFIG["rope_theta"]):
        frequencies = theta ** -(np.arange(0, x.shape[-1], 2) / x.shape[-1]) / metadata["rope_freqs.weight"]
        angle = (np.arange(x.shape[1])[:, None] * frequencies)[:, None].astype(np.float32)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)

    model = nnx.merge(*trained, copy=True)
    monkeypatch.setattr(text_llama, "rotated", rotated)
    for written, near in ((metadata, True), (METADATA, False)):
        clipjax.export_gguf(tmp_path / "net.gguf", nnx.state(model, nnx.Param), rename=NAMES, metadata=written)
        worst, _ = distance(model, tmp_path / "net.gguf")
        assert (worst < 1e-3) == near and (worst > 0.01) != near


@named([formats.q8_0(), formats.q4_0(), formats.mxfp4(), formats.tq2_0()])
def test_formats(form, trained, tmp_path):
    """Trained on it behind a clamp that binds: the file has these weights. llama.cpp's activations have 8 bits."""
    model = nnx.merge(*trained, copy=True)
    tx = optax.chain(
        optax.adam(1e-3),
        clipjax.clamp_weights(0.15, where=lambda path, leaf: leaf.ndim > 1),
        clipjax.fake_quantize(clipjax.per_leaf(functools.partial(on_format, form)), every=1),
    )
    _, state = text_llama.trained(model, tx, 8)
    params = nnx.state(model, nnx.Param)
    clipjax.export_gguf(tmp_path / "net.gguf", params, state, rename=NAMES, metadata=METADATA)
    found = clipjax.import_gguf(tmp_path / "net.gguf", dequantize=False)
    on = {name: q.format for name, q in found.items() if isinstance(q, clipjax.Quantized)}
    assert {on.pop("token_embd.weight"), on.pop("output.weight")} == {"q8_0"}
    assert len(on) == 14 and {*on.values()} == {form.name}
    back = clipjax.import_gguf(tmp_path / "net.gguf", like=params, rename=NAMES)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), back, params))
    worst, divergence = distance(model, tmp_path / "net.gguf")
    assert worst < 0.15 and divergence < 1e-3  # measured .10 and 4e-4 after more steps
