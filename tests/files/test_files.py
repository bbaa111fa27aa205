"""What lies on the disk: a safetensors file that is written whole or not at all, and opened without trust."""

import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import clipjax
from clipjax._files import container

ROOT = pathlib.Path(clipjax.__file__).parents[1]
RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("listed")
SPARSE = np.where(RNG.random((200, 100)) < 0.9, 0, np.rint(3 * RNG.normal(size=(200, 100)))).astype(np.float32) / 4
NET = {"head": {"bias": RNG.normal(size=5).astype(np.float32), "kernel": SPARSE}, "scale": jnp.bfloat16(2)}


def parts(data):
    """Header and entries of a file."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def joined(header, entries):
    """A file of such a header, whose checksum is right."""
    header["__metadata__"]["crc"] = "00000000"
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.replace(b'"crc":"00000000"', f'"crc":"{zlib.crc32(text):08x}"'.encode())
    return struct.pack("<Q", len(text)) + text + entries


def test_safetensors_lists_and_reads_the_file(tmp_path):
    clipjax.save(tmp_path / "net", NET)
    with safetensors.safe_open(tmp_path / "net", framework="numpy") as file:
        assert sorted(file.keys()) == ["head/bias", "head/kernel", "scale"]
        np.testing.assert_array_equal(file.get_tensor("head/bias"), NET["head"]["bias"])  # raw ones as they are
        assert file.get_tensor("head/kernel").dtype == np.uint8
        assert file.metadata()["clipjax"] == "1"


def test_we_read_what_safetensors_writes(tmp_path):
    arrays = {"a": SPARSE, "b": np.arange(6).reshape(2, 3)}
    safetensors.numpy.save_file(arrays, tmp_path / "plain")
    with open(tmp_path / "plain", "rb") as file:
        reader = container.Reader(file)
        for entry in reader.entries:
            assert reader.read(entry) == arrays[entry.name].tobytes() and entry.shape == arrays[entry.name].shape


def test_a_plain_safetensors_file_is_refused_with_the_way_out(tmp_path):
    safetensors.numpy.save_file({"a": SPARSE}, tmp_path / "plain")
    with pytest.raises(ValueError, match="clipjax compress"):
        clipjax.load(tmp_path / "plain")


def test_header_is_aligned_and_says_shapes():
    header, _ = parts(clipjax.pack(NET))
    assert header["__metadata__"]["leaves"].split()[1][8:] == ":float32[200,100]"
    assert struct.unpack("<Q", clipjax.pack(NET)[:8])[0] % 8 == 0


def test_the_file_never_changes_between_versions():
    """Bytes written once: what reads them must go on reading them."""
    data = bytes.fromhex(GOLDEN)
    x = np.arange(600, dtype=np.float32).reshape(20, 30) % 7 % 5 // 3 / 2
    np.testing.assert_array_equal(clipjax.unpack(data)["x"], x)
    assert clipjax.pack({"x": x}) == data


GOLDEN = (
    "90000000000000007b225f5f6d657461646174615f5f223a7b22636c69706a6178223a2231222c226c6561766573223a2261"
    "306161323539633a666c6f617433325b32302c33305d222c22637263223a223230373035383036227d2c2278223a7b226474"
    "797065223a225538222c227368617065223a5b38395d2c22646174615f6f666673657473223a5b302c38395d7d7d20202020"
    "2020b0eb94ed01000201010000003f00183060c183060c183060c183060c183060c183060c183060c183060c183060c18306"
    "0c183060c183060c183060c183060c183060c183060c183060c183060c183060c183060c183060c183"
)


def test_a_tiny_file_cannot_ask_for_gigabytes():
    data = clipjax.pack({"x": np.zeros((100, 100), np.float32)})
    header, entries = parts(data)
    header["__metadata__"]["leaves"] = header["__metadata__"]["leaves"].replace("[100,100]", "[100000,100000]")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"`max_bytes` must allow for all leaves, got 67108864. .* 40000000000 bytes"):
        clipjax.unpack(joined(header, entries))
    with pytest.raises(ValueError, match="`max_bytes` must allow for all leaves, got 39999"):
        clipjax.unpack(data, max_bytes=39_999)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert clipjax.unpack(data, max_bytes=40_000)["x"].shape == (100, 100)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["__metadata__"].update(clipjax="4"), "version 1 or 2 or 3, got '4'"),
        (lambda h: h["__metadata__"].update(leaves=""), "notes on 0 of 3"),
        (lambda h: h["__metadata__"].update(layout="3"), "each of 3 leaves once"),
        (lambda h: h["__metadata__"].update(layout='{"set":[0,1,2]}'), "dict, list or tuple, got 'set'"),
        (lambda h: h["__metadata__"].update(layout="[" * 100_000), "layout of the tree is damaged"),
        (
            lambda h: h["__metadata__"].update(leaves=h["__metadata__"]["leaves"].replace("float32", "float31")),
            "damaged",
        ),
        (lambda h: h["head/bias"].update(dtype="I64"), "its shape needs 40"),
        (lambda h: h["head/bias"].update(shape=[-5]), "whole numbers"),
        (lambda h: h["head/bias"].update(shape=[2**47] * 60), "has 20 bytes"),
        (lambda h: h["head/bias"].update(data_offsets=[1, 21]), "begins at byte 1, where 0 is next"),
        (lambda h: h["head/bias"].pop("dtype"), "must have dtype, shape"),
        (lambda h: h.update({"head": h.pop("scale")}), "another's, or holds others"),
    ],
)
def test_hostile_headers(change, words):
    header, entries = parts(clipjax.pack(NET))
    change(header)
    with pytest.raises(ValueError, match=words):
        clipjax.unpack(joined(header, entries))


def test_names_that_occur_twice():
    header, entries = parts(clipjax.pack({"a": np.ones(2), "b": np.ones(2)}))
    text = json.dumps(header).replace('"b":', '"a":').encode()
    with pytest.raises(ValueError, match="occurs twice"):
        clipjax.unpack(struct.pack("<Q", len(text)) + text + entries)


def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "net"
    clipjax.save(path, NET)
    old = path.read_bytes()
    with pytest.raises(TypeError):
        clipjax.save(path, {"a": SPARSE, "b": object()})
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["net"]


def test_modes_are_those_of_a_plain_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    clipjax.save(tmp_path / "net", NET)
    assert (tmp_path / "net").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "net").chmod(0o640)
    clipjax.save(tmp_path / "net", NET)
    assert (tmp_path / "net").stat().st_mode & 0o777 == 0o640


WRITER = """
import os, sys, jax, numpy as np
import clipjax
path, kills = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
nets = [{"n": np.full(400_000, float(i)), "x": rng.normal(size=400_000)} for i in range(2)]
clipjax.save(path, nets[0])
for _ in range(kills):
    child = os.fork()
    if not child:
        i = 0
        while True:
            i += 1
            clipjax.save(path, nets[i % 2])
    print(child, flush=True)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_old_file_survives(tmp_path, kills):
    """One warm process forks children that save without end; each is killed at a random moment."""
    path = tmp_path / "net"
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(path), str(kills)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    seen, left = set(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        for line in parent.stdout:
            time.sleep(random.random() * 0.06)
            os.kill(int(line), signal.SIGKILL)
            net = clipjax.load(path)
            assert np.all(net["n"] == net["n"][0]) and net["x"].shape == (400_000,)
            seen.add(float(net["n"][0]))
        left = len(list(tmp_path.iterdir())) - 1
    assert seen <= {0.0, 1.0} and parent.returncode == 0
    assert kills < 100 or (len(seen) == 2 and left)  # some were killed between two files, some while writing one


def test_folder_is_flushed_after_the_rename(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append(os.fstat(handle).st_mode & 0o170000) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    clipjax.save(tmp_path / "net", NET)
    assert order == [0o100000, "rename", 0o040000]


def peak(call):
    """The most memory that a call takes on top of what is there."""
    tracemalloc.start()
    call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8])
def test_leaves_stream_through_a_bounded_memory(tmp_path, dtype):
    """Ten leaves: saving takes at most four times one of them, loading the tree and at most four times one."""
    shape = (1000, 1500)
    alive = RNG.random(shape) < RNG.random((1000, 1)) * RNG.random((1, 1500))
    leaf = np.where(alive, RNG.integers(-60, 60, shape), 0).astype(dtype)
    clipjax.save(tmp_path / "net", {"a": leaf[:100]})
    clipjax.load(tmp_path / "net")  # imports
    tree = {str(i): leaf for i in range(10)}
    assert peak(lambda: clipjax.save(tmp_path / "net", tree)) < 4 * leaf.nbytes
    assert os.path.getsize(tmp_path / "net") < 5 * leaf.nbytes
    for dequantize in (True, False):
        load = lambda: clipjax.load(tmp_path / "net", dequantize=dequantize)  # noqa: B023
        assert peak(load) < (10 + 4) * leaf.nbytes


def test_the_file_is_as_small_as_the_entropy_and_one_kilobyte(tmp_path):
    """A tree as the demo's chain leaves it: 90 % zeros, 4 bits, float biases."""
    net = {}
    for i, (rows, columns) in enumerate([(9, 16), (144, 32), (512, 64), (64, 10)]):
        codes = np.clip(np.rint(3 * RNG.normal(size=(rows, columns))), -7, 7) * (RNG.random((rows, columns)) < 0.1)
        kernel = (codes + 0.0).astype(np.float32) * np.float32(0.0625)
        net[f"layer{i}"] = {"bias": RNG.normal(size=columns).astype(np.float32), "kernel": kernel}
    clipjax.save(tmp_path / "net", net)
    total = clipjax.summarize(net).to_dict()["total"]
    assert os.path.getsize(tmp_path / "net") <= 1.02 * total["entropy_bytes"] + 1024
    assert total["coded_bytes"] < total["packed_bytes"] < total["bytes"]


def test_raw_leaves_are_written_as_they_are(tmp_path):
    x = jax.random.normal(jax.random.key(0), (10_000,))
    clipjax.save(tmp_path / "net", {"x": x})
    assert os.path.getsize(tmp_path / "net") < x.nbytes + 256
