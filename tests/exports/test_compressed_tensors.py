"""compressed-tensors decodes what `export_safetensors` writes to the params bit for bit; transformers loads it."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from on_format import on_format
from safetensors import safe_open

import clipjax
from clipjax import export_safetensors, formats

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
transformers = pytest.importorskip("transformers")

FORMS = [formats.int4(32), formats.int4(None, "float16"), formats.int4(64, "float32")]
FORMS += [formats.int8(), formats.int8(32, "float32"), formats.fp8_e4m3("array"), formats.fp8_e4m3()]
FORMS += [formats.fp8_e4m3((32, 64)), formats.mxfp4(), formats.mxfp4("compressed-tensors"), formats.mxfp8()]
FORMS += [formats.nvfp4()]


def held(form, dtype, seed=0):
    """A matrix that `fake_quantize` holds on a format, with zeros, and its state."""
    w = np.random.default_rng(seed).standard_normal((128, 96)).astype(np.float32)
    w[np.abs(w) < 0.2] = 0
    return clipjax.hold_once(clipjax.fake_quantize(form), {"dense": {"kernel": jnp.asarray(w, dtype)}})


def decoded(folder, dtype):
    """The tensors of a folder by compressed-tensors' own converter."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return converters.CompressedTensorsDequantizer(str(folder), dtype=dtype).validate(tensors)


def array(tensor):
    raw = tensor.detach().contiguous()
    return raw.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if raw.dtype == torch.bfloat16 else raw.numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_values_are_the_params_bit_for_bit(form, dtype, tmp_path):
    params, state = held(form, dtype)
    export_safetensors(tmp_path, params, state)
    kind = torch.bfloat16 if dtype == jnp.bfloat16 else torch.float32
    found = decoded(tmp_path, kind)
    assert found.keys() == {"dense.weight"}
    np.testing.assert_array_equal(array(found["dense.weight"]), params["dense"]["kernel"].T)


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_a_folder(tmp_path):
    """Its logits are those of the decoded weights; the table, the head and the norms are plain."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 32}
    shape = transformers.LlamaConfig(**sizes, num_key_value_heads=1, num_hidden_layers=1, dtype="float32")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(shape).eval()
    shape.save_pretrained(tmp_path)
    forms = {"self_attn": formats.int4(32), "mlp": formats.fp8_e4m3()}
    params, wanted = {}, model.state_dict()
    for name, tensor in wanted.items():
        x = jnp.asarray(tensor.numpy())
        form = next((form for part, form in forms.items() if part in name), None)
        params[name] = x if form is None or x.ndim < 2 else on_format(form, x, 0)
    for name in params:
        if isinstance(params[name], clipjax.Quantized):
            wanted[name] = torch.tensor(np.array(clipjax.dequantize(params[name])))
    model.load_state_dict(wanted)
    axis = clipjax.per_leaf(lambda path, leaf: 0)
    export_safetensors(tmp_path, params, rename=lambda path, leaf: path, axis=axis)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        ours, theirs = loaded(tokens).logits, model(tokens).logits
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=1e-5)
