"""A small tree as one entry: the same leaves in fewer bytes, and errors for what `pack` does not write."""

import struct
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import clipjax
from clipjax import __main__
from clipjax._files import byte_stream, container, saving, small_trees

RNG = np.random.default_rng(0)


def sparse(*shape):
    codes = np.where(RNG.random(shape) < 0.1, RNG.integers(-3, 4, shape), 0)
    return (codes * 0.25).astype(np.float32)


LENET = {
    "Conv_0": {"kernel": sparse(5, 5, 1, 20), "bias": RNG.integers(-7, 8, 20).astype(np.float32) / 8},
    "Conv_1": {"kernel": sparse(5, 5, 20, 50), "bias": RNG.integers(-7, 8, 50).astype(np.float32) / 8},
    "Dense_0": {"kernel": sparse(800, 500), "bias": RNG.integers(-7, 8, 500).astype(np.float32) / 8},
    "Dense_1": {"kernel": sparse(500, 10), "bias": RNG.integers(-7, 8, 10).astype(np.float32) / 8},
}
TREES = {
    "lenet": LENET,
    "nothing": {},
    "one": np.float32(3),
    "layout": {"a": [jnp.zeros(3), None, (jnp.int8(4), {})], "b": {"": jnp.ones((0, 3))}},
    "names": {
        "x" * 300: jnp.ones(2),
        "x" * 300 + "y": jnp.ones(2),
        "é/ü~": np.arange(3, dtype=np.int32),
        "clipjax": jnp.ones(1),
    },
    "dtypes": [jnp.arange(5).astype(jnp.int4), np.arange(3, dtype=ml_dtypes.bfloat16), np.array([True, False])],
}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def listed(tree):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "SMALL", -1)
        return clipjax.pack(tree)


def opened(data):
    """Where the entry begins, and what its head says."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    return start, *small_trees.unpack(data[start:])


@pytest.mark.parametrize("name", TREES)
def test_a_small_tree_comes_back_from_fewer_bytes(name):
    data = clipjax.pack(TREES[name])
    same(clipjax.unpack(data), jax.tree.map(jnp.asarray, TREES[name]))
    assert len(data) < len(listed(TREES[name]))
    assert list(safetensors.numpy.load(data)) == ["clipjax"]


def test_names_shapes_and_checksums_of_a_lenet_take_less_than_150_bytes():
    data = clipjax.pack(LENET)
    _, rows, _, _, _ = opened(data)
    assert len(data) - sum(row.size for row in rows) < 150 and len(listed(LENET)) - len(data) > 600


def test_a_large_tree_keeps_an_entry_for_each_leaf():
    data = clipjax.pack({"a": RNG.normal(size=20_000).astype(np.float32)})
    assert list(safetensors.numpy.load(data)) == ["a"]


@pytest.mark.parametrize(
    "tree",
    [
        {"n" * 1025: np.zeros(1, np.float32)},
        dict.fromkeys(map(str, range(4097)), np.zeros(0, np.float32)),
    ],
    ids=["long_name", "many_leaves"],
)
def test_what_one_entry_does_not_take_is_listed(tree):
    data = clipjax.pack(tree)
    assert data == listed(tree)
    same(clipjax.unpack(data), jax.tree.map(jnp.asarray, tree))


def test_inspect_lists_what_one_entry_holds(tmp_path):
    clipjax.save(tmp_path / "net", LENET)
    rows = __main__.inspect(tmp_path / "net").to_dict()
    assert rows["Dense_0/kernel"]["how"] == "1 step, order 0" and rows["total"]["bytes"] == len(clipjax.pack(LENET))


def changed(head=None, leaves=None, check=None):
    """The file of a LeNet with another head, leaves or checksum of arrays; the checksum of its bytes is right."""
    data = clipjax.pack(LENET)
    start, _, _, known, begin = opened(data)
    cursor = byte_stream.Cursor(data[start + 6 :])
    small = bytes(cursor.take(cursor.whole(cursor.left)))
    if head is not None:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=small_trees._WORDS)
        plain = zlib.decompressobj(-15, zdict=small_trees._WORDS).decompress(small)
        small = coder.compress(head(plain)) + coder.flush()
    rest = data[start + begin :] if leaves is None else leaves(data[start + begin :])
    body = (known if check is None else check).to_bytes(2, "little") + byte_stream.whole(len(small)) + small + rest
    return container.alone("clipjax", zlib.crc32(body, small_trees._VERSION).to_bytes(4, "little") + body)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: changed(check=0), "decoded arrays have another checksum"),
        (lambda: changed(leaves=lambda rest: rest[:-1]), "too early"),
        (lambda: changed(head=lambda head: b"\x09" + head[1:]), "name|payload"),
        (lambda: changed(head=lambda head: head.replace(b"bias", b"b\xc3as")), "no text"),
        (lambda: changed(head=lambda head: head.replace(b"\xff", b"")), "name"),
        (lambda: changed(head=lambda head: b"\x02\0a\xff\0a\xff" + head[1:]), "occurs twice"),
        (lambda: changed(head=lambda head: head + b"\xc3"), "layout of the tree is damaged"),
        (lambda: clipjax.pack(LENET)[:-1] + bytes([clipjax.pack(LENET)[-1] ^ 1]), "another checksum"),
    ],
)
def test_damage_and_lies_raise(data, words):
    with pytest.raises(ValueError, match=words):
        clipjax.unpack(data())


def test_a_head_that_inflates_without_end_is_refused():
    with pytest.raises(ValueError, match="another length"):
        clipjax.unpack(changed(head=lambda head: head + bytes(1 << 22)))


def test_an_entry_that_was_written_once_stays_readable():
    """Bytes written once: what reads them must go on reading them. Another zlib may write the head in others."""
    x = np.arange(600, dtype=np.float32).reshape(20, 30) % 7 % 5 // 3 / 2
    tree = {"dense": {"kernel": x, "bias": np.float32([1, 2.5])}}
    data = bytes.fromhex(GOLDEN)
    same(clipjax.unpack(data), jax.tree.map(jnp.asarray, tree))
    same(clipjax.unpack(clipjax.pack(tree)), clipjax.unpack(data))


GOLDEN = (
    "3f000000000000007b22636c69706a6178223a7b226474797065223a225538222c227368617065223a5b3131375d2c226461"
    "74615f6f666673657473223a5b302c3131375d7d7d6f00bff4b0eb116362480119836a3b9716231393881c07000000803f00"
    "00204001000201010000003f00183060c183060c183060c183060c183060c183060c183060c183060c183060c183060c1830"
    "60c183060c183060c183060c183060c183060c183060c183060c183060c183060c183060c183"
)
