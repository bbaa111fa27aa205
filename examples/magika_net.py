"""Magika, the file-type model of Google, in Flax NNX, with the weights of the package `magika`.

What the package runs is `model.onnx`, exported from JAX: 2,048 bytes of a file, each looked up in a table of 64
numbers; four neighbours side by side; a convolution of 512 channels, of which the largest answer along the file counts;
a dense layer to 214 types.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BYTES, NEIGHBOURS, PADDING = 2048, 4, 256
TYPES = 214
WEIGHTS = {
    ("bytes", "kernel"): "jax2tf_get_logits_/Const:0",
    ("bytes", "bias"): "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/Dense_0/Reshape:0",
    ("bytes_norm", "scale"): "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/LayerNorm_0/Reshape_2:0",
    ("bytes_norm", "bias"): "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/LayerNorm_0/Reshape_3:0",
    ("conv", "kernel"): "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/Conv_0/transpose_3:0",
    ("conv", "bias"): "const_fold_opt__209",
    ("conv_norm", "scale"): "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/LayerNorm_1/Reshape_2:0",
    ("conv_norm", "bias"): "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/LayerNorm_1/Reshape_3:0",
    ("types", "kernel"): "jax2tf_get_logits_/Const_24:0",
    ("types", "bias"): "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/Dense_1/Reshape:0",
}
"""By layer and variable the initializer in the graph of "standard_v3_3", the model of magika 1.0."""


class Magika(nnx.Module):
    """Logits of 214 types, of tokens[batch, 2048]: bytes, and 256 where a file has none."""

    def __init__(self, rngs, units=64, channels=512):
        """Makes the layers with so many numbers a byte and so many channels."""
        places = BYTES // NEIGHBOURS
        self.bytes = nnx.Linear(257, units, rngs=rngs)
        self.bytes_norm = nnx.LayerNorm(places, use_fast_variance=False, rngs=rngs)
        self.conv = nnx.Conv(NEIGHBOURS * units, channels, kernel_size=5, padding="VALID", rngs=rngs)
        self.conv_norm = nnx.LayerNorm(channels, use_fast_variance=False, rngs=rngs)
        self.types = nnx.Linear(channels, TYPES, rngs=rngs)

    def __call__(self, tokens):
        """Logits, of which the softmax is what `model.onnx` gives."""
        table = nnx.gelu(self.bytes.kernel[...] + self.bytes.bias[...])  # the dense layer on a one-hot byte
        x = jnp.take(table, tokens, axis=0, mode="clip")
        x = x.reshape(tokens.shape[0], BYTES // NEIGHBOURS, -1)
        x = self.bytes_norm(x.swapaxes(1, 2)).swapaxes(1, 2)  # along the file
        x = nnx.gelu(self.conv(x)).max(axis=1)
        return self.types(self.conv_norm(x))


def folder():
    """Where the package `magika` keeps the model that it uses."""
    import magika

    return Path(magika.__file__).parent / "models" / "standard_v3_3"


def pretrained():
    """The model with the weights of the package."""
    import onnx

    graph = onnx.load(folder() / "model.onnx").graph
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    model = nnx.eval_shape(lambda: Magika(nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    for (layer, name), source in WEIGHTS.items():
        value = found[source].transpose(2, 1, 0, 3) if name == "kernel" and layer == "conv" else found[source]
        params[layer][name].set_value(jnp.asarray(value.reshape(params[layer][name].shape)))
    nnx.update(model, params)
    return model


def labels():
    """The names of the 214 types, in the order of the logits."""
    return json.loads((folder() / "config.min.json").read_text())["target_labels_space"]


def tokens(content):
    """What the model reads of a file: 1,024 bytes at its start and at its end, without white space there."""
    half, block = BYTES // 2, 4096
    start, end = content[:block].lstrip()[:half], content[-block:].rstrip()[-half:]
    read = np.full(BYTES, PADDING, np.int32)
    read[: len(start)] = np.frombuffer(start, np.uint8)
    read[BYTES - len(end) :] = np.frombuffer(end, np.uint8)
    return read


def number_of_params(model):
    """How many numbers are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
