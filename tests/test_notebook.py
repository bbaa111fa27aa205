"""examples/compression.ipynb runs from top to bottom, its asserts included. As a script: writes its outputs again."""

import os
import pathlib
import tempfile

import pytest

nbformat = pytest.importorskip("nbformat", reason="the test extra is not installed")
nbclient = pytest.importorskip("nbclient", reason="the test extra is not installed")
FILE = pathlib.Path(__file__).parents[1] / "examples" / "compression.ipynb"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the source distribution has no examples")
TRACES = ("/home/", "/root/", "/tmp/", "site-packages", "Traceback", "stderr")


def executed(folder):
    """The notebook, run in a folder and a process of its own, on one device as a user has it."""
    notebook = nbformat.read(FILE, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, record_timing=False, kernel_name="python3")
    client.resources = {"metadata": {"path": str(folder)}}
    client.execute(env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"})
    return notebook


def check(notebook):
    """Its outputs were made in one run, and hold neither warnings nor traces of a machine."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any("execution" in cell.metadata for cell in code)
    assert not [word for word in TRACES if word in str([cell.outputs for cell in code])]


@pytest.mark.slow  # a minute; `.ci/run` asks for it by name
@pytest.mark.filterwarnings("ignore")  # of the kernel's connection
def test_every_cell_runs(tmp_path):
    check(executed(tmp_path))


def test_what_is_committed_comes_from_one_run_and_names_no_machine():
    check(nbformat.read(FILE, as_version=4))
    assert FILE.stat().st_size < 600_000


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(folder), FILE)
