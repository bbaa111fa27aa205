"""The blocks of two guides in order, with those that need a runtime and are no doctests for that reason."""

import doctest
import pathlib
import re
import sys
import warnings

import pytest

for name in ("jax2onnx", "onnxruntime", "compressed_tensors", "torch", "transformers", "xllamacpp"):
    pytest.importorskip(name, reason=f"needs {name}: pip install 'clipjax[runtimes]'")
with warnings.catch_warnings():  # it asks the system which one it is, by a fork
    warnings.simplefilter("ignore")
    pytest.importorskip("openvino", reason="needs openvino: pip install 'clipjax[runtimes]'")

ROOT = pathlib.Path(__file__).parents[2]
TRUE = re.compile(r"^(\S.*?) +# True\b.*$", re.M)


@pytest.mark.parametrize("page, truths", [("formats.md", 4), ("classifier.md", 6)])
@pytest.mark.filterwarnings("ignore")  # of jax2onnx and transformers
def test_the_recipes_run_and_what_they_call_true_is(page, truths, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    shown = [block for block in blocks if ">>>" not in block]
    assert sum(len(TRUE.findall(block)) for block in shown) == truths
    names = {}
    for block in blocks:
        sources = [example.source for example in doctest.DocTestParser().get_examples(block)]
        for source in sources or [TRUE.sub(r"assert \1", block)]:
            exec(compile(source, page, "exec"), names)
