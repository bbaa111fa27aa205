"""A short form of examples/magika_small.py: the unmodified package magika runs what is pruned, trained and exported."""

import importlib.metadata
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import clipjax

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
for package in ("magika", "jax2onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is missing: pip install 'clipjax[real]'")
magika_net = pytest.importorskip("magika_net", reason="the examples' extra is not installed")

import magika  # noqa: E402
import magika_small  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def files():
    """Some of each extension out of what is installed."""
    found = {}
    for path in sorted(pathlib.Path(np.__file__).parents[1].rglob("*")):
        alike = found.setdefault(path.suffix, [])
        if path.is_file() and path.stat().st_size > 100 and len(alike) < 6:
            alike.append(path)
    return [path for alike in found.values() for path in alike][:96]


@pytest.fixture(scope="module")
def tokens(files):
    return np.stack([magika_net.tokens(path.read_bytes()) for path in files])


def exact(tokens):
    """What the graph of the package says in f64. onnxruntime's own answers are up to 6e-4 beside it."""
    model = onnx.load(magika_net.folder() / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.DOUBLE
        if node.op_type == "GlobalMaxPool":  # of which onnx.reference drops the axis that Squeeze expects
            node.op_type = "ReduceMax"
            node.attribute.extend(onnx.helper.make_attribute(*pair) for pair in (("axes", [2]), ("keepdims", 1)))
    return ReferenceEvaluator(model).run(None, {"bytes": tokens})[0]


def test_bytes_are_read_as_the_package_reads_them(files, tokens):
    config = magika.Magika()._model_config
    sizes = (config.beg_size, config.mid_size, config.end_size, config.padding_token, config.block_size)
    for path, ours in zip(files, tokens, strict=True):
        with open(path, "rb") as stream:
            seekable = magika.types.seekable.Seekable(stream)
            theirs = magika.Magika._extract_features_from_seekable(seekable, *sizes, config.use_inputs_at_offsets)
        np.testing.assert_array_equal(ours, theirs.beg + theirs.end)


def test_the_rebuilt_model_is_the_graph_of_the_package(tokens):
    model = magika_net.pretrained()
    assert magika_net.number_of_params(model) == 784_214
    ours = jax.nn.softmax(magika_small.answers(model, tokens))
    np.testing.assert_allclose(ours[:12], exact(tokens[:12]), rtol=0, atol=1e-5)
    session = onnxruntime.InferenceSession(magika_net.folder() / "model.onnx")
    theirs = session.run(None, {"bytes": tokens})[0]
    assert (np.argmax(ours, -1) == theirs.argmax(-1)).mean() > 0.98
    assert importlib.metadata.version("magika") in magika.Magika().get_module_version()


@pytest.mark.filterwarnings("ignore")  # of jax2onnx
def test_pruned_trained_and_run_by_the_package(files, tokens, tmp_path):
    model = magika_net.pretrained()
    logits = magika_small.answers(model, tokens)
    magika_small.prune(model, 128, tokens, logits, steps=10)
    assert model.conv.kernel.shape == (5, 256, 128) and model.types.kernel.shape == (128, 214)
    before = magika_small.loss(model, tokens[:32], logits[:32])
    opt_state = magika_small.train(model, magika_small.quantizer(30, 3), tokens, logits, 30)
    assert magika_small.loss(model, tokens[:32], logits[:32]) < 0.7 * before
    size = magika_small.save(model, opt_state, tmp_path)
    assert 100_000 < size < (magika_net.folder() / "model.onnx").stat().st_size / 20

    params = nnx.state(model, nnx.Param)
    assert not clipjax.check(params, opt_state, magika_small.quantizer(30, 3))
    ours = jax.nn.softmax(magika_small.answers(model, tokens))
    theirs = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"bytes": tokens})[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    names = magika_net.labels()
    answers = magika.Magika(model_dir=tmp_path).identify_paths(files)
    assert [str(answer.dl.label) for answer in answers] == [names[i] for i in theirs.argmax(-1)]
