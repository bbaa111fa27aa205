"""`python -m clipjax`: what it prints, and that files come back through plain safetensors and Orbax bit for bit."""

import importlib.metadata
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import safetensors.numpy

import clipjax
from clipjax import __main__

RNG = np.random.default_rng(0)
SPARSE = np.where(RNG.random((200, 100)) < 0.9, 0, np.rint(3 * RNG.normal(size=(200, 100))) + 0.0).astype(np.float32)
NET = {"head": {"bias": RNG.normal(size=5).astype(np.float32), "kernel": SPARSE / 4}, "scale": np.float32(2)}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes())


def test_inspect_has_a_row_for_every_leaf(tmp_path, capsys):
    path = tmp_path / "net"
    clipjax.save(path, NET)
    assert __main__.main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines()}
    assert list(rows) == ["path", "head/bias", "head/kernel", "scale", "header", "total"]
    assert "float32[200,100]" in rows["head/kernel"] and "1 step, order 0" in rows["head/kernel"]
    assert str(path.stat().st_size) in rows["total"] and rows["head/bias"].endswith("raw")


def test_inspect_runs_as_a_module(tmp_path):
    clipjax.save(tmp_path / "net", NET)
    command = [sys.executable, "-m", "clipjax", "inspect", str(tmp_path / "net")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0 and "head/kernel" in done.stdout


def test_plain_safetensors_there_and_back(tmp_path, capsys):
    plain, small, back = (str(tmp_path / name) for name in ("plain.safetensors", "small", "back.safetensors"))
    arrays = {"a.weight": SPARSE, "block/b": np.arange(6).reshape(2, 3), "empty": np.zeros((0, 4)), "~1": np.ones(2)}
    safetensors.numpy.save_file(arrays, plain)
    assert __main__.main(["compress", plain, small]) == 0
    assert os.path.getsize(small) < os.path.getsize(plain) / 8
    same(clipjax.load(small)["block"]["b"], arrays["block/b"])
    assert __main__.main(["expand", small, back]) == 0
    same(safetensors.numpy.load_file(back), safetensors.numpy.load_file(plain))
    assert __main__.main(["inspect", plain]) == 0
    assert "a.weight" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_orbax_there_and_back(tmp_path):
    checkpoint, small, back = (str(tmp_path / name) for name in ("checkpoint", "small", "back"))
    net = jax.tree.map(jnp.asarray, NET)
    orbax.checkpoint.PyTreeCheckpointer().save(checkpoint, net)
    assert __main__.main(["compress", checkpoint, small]) == 0
    same(clipjax.load(small), net)
    assert __main__.main(["expand", small, back]) == 0
    same(orbax.checkpoint.PyTreeCheckpointer().restore(back), net)


@pytest.mark.parametrize("bits", [None, 4], ids=["floats", "grid"])
def test_a_small_file_of_floats_is_exported_in_their_dtypes_with_a_note(tmp_path, capsys, bits):
    pytest.importorskip("gguf")
    small, gguf, folder = (str(tmp_path / name) for name in ("small", "model.gguf", "folder"))
    params = {"dense": {"kernel": jnp.asarray(SPARSE / 4, jnp.bfloat16), "bias": jnp.ones(100)}}
    if bits is None:
        clipjax.save(small, params)
    else:
        held = clipjax.hold_once(clipjax.fake_quantize(bits, step=0.25), params)
        params = held[0] | {"dense": held[0]["dense"] | {"kernel": held[0]["dense"]["kernel"].astype(jnp.float32)}}
        clipjax.save(small, clipjax.quantized(*held))
    assert __main__.main(["export", small, gguf, "--architecture", "net"]) == 0
    same(clipjax.import_gguf(gguf, like=params)["dense"]["bias"], params["dense"]["bias"])
    assert __main__.main(["export", small, folder]) == 0
    same(clipjax.import_safetensors(folder, like=params), params)
    note = "has no leaf on a format, so that OUT has floats. Save `clipjax.quantized(params, opt_state)` for codes."
    assert capsys.readouterr().err == f"clipjax: {small} {note}\n" * 2


@pytest.mark.parametrize(
    ("form", "target"), [(clipjax.formats.q4_0(), "model.gguf"), (clipjax.formats.int4(32, "float32"), "folder")]
)
def test_a_leaf_on_a_format_is_exported_as_its_bytes(tmp_path, capsys, form, target):
    pytest.importorskip("gguf")
    params = {"dense": {"kernel": jnp.asarray(RNG.normal(size=(64, 8)), jnp.float32)}}
    params, state = clipjax.hold_once(clipjax.fake_quantize(form), params)
    small, target = str(tmp_path / "small"), str(tmp_path / target)
    clipjax.save(small, clipjax.quantized(params, state))
    assert __main__.main(["export", small, target]) == 0 and not capsys.readouterr().err
    read = clipjax.import_gguf if target.endswith("gguf") else clipjax.import_safetensors
    back = read(target, like=params, dequantize=False)["dense"]["kernel"]
    assert back.format == form.name and jnp.array_equal(clipjax.dequantize(back), params["dense"]["kernel"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nothing"], "No such file"),
        (["compress", "net", "out"], "small already"),
        (["expand", "int4", "out.safetensors"], "no name for int4"),
        (["expand", "net", "out.safetensors", "--max-bytes", "10"], "must allow for all leaves, got 10"),
        (["expand", "text", "out.safetensors"], "no safetensors file"),
        (["export", "net", "out.safetensors"], "a folder or end in .gguf, got out.safetensors"),
        (["export", "text", "out.gguf"], "no safetensors file"),
        (["expand", "plain.safetensors", "out.safetensors"], "clipjax compress"),
    ],
)
def test_errors_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    clipjax.save("net", NET)
    clipjax.save("int4", {"x": jnp.arange(5).astype(jnp.int4)})
    safetensors.numpy.save_file({"a": SPARSE}, "plain.safetensors")
    (tmp_path / "text").write_text("some text, no header")
    before = sorted(os.listdir())
    assert __main__.main(arguments) == 1
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert sorted(os.listdir()) == before


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"clipjax {clipjax.__version__}\n"
    assert importlib.metadata.version("clipjax") == clipjax.__version__
