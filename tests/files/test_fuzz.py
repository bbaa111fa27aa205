"""Damaged and hostile files: the same params or a ValueError, in bounded memory; 1,000 cases, 20,000 with `make slow`.

Damage leaves checksums as they are. A hostile file has them right, so what is behind them must hold as well.
"""

import json
import random
import struct
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax._files import byte_stream, container, saving, small_trees
from clipjax._maths.grids import short

RNG = np.random.default_rng(0)
CASES, CHUNKS = 500, 20  # of either kind


def codes(*shape):
    return np.rint(2 * RNG.normal(size=shape)).astype(np.float32) + 0


def lines(*shape):
    """Mostly zeros, in rows and columns of unlike density."""
    alive = RNG.random(shape) < RNG.beta(0.3, 1, (shape[0], 1)) * RNG.beta(0.5, 0.5, (1, shape[1]))
    return np.where(alive, codes(*shape), 0).astype(np.float32)


def quantized(shape, step, *static, zero=()):
    """Codes of 4 bits, with steps and zero points of these shapes."""
    fields = RNG.integers(-7, 8, shape), RNG.uniform(0.1, 1, step), RNG.integers(-3, 4, zero) if zero else 0
    dtypes = jnp.int8, jnp.float32, jnp.int32
    return clipjax.Quantized(*(jnp.asarray(x, t) for x, t in zip(fields, dtypes, strict=True)), 4, *static)


STEPS = np.asarray(short(jnp.asarray(RNG.uniform(0.1, 1, 12), jnp.float32), 4))
NET = {
    "packed": RNG.integers(0, 4, (5, 9)).astype(np.int8),
    "order0": codes(40, 12) * np.float32(0.25),
    "columns": codes(30, 12) * STEPS,
    "lines": lines(60, 50),
    "book": np.array([0.1, 0.7, np.nan, -0.0])[RNG.integers(0, 4, 300)],
    "rest": np.where(RNG.random((20, 20)) < 0.8, 0, RNG.normal(size=(20, 20))).astype(np.float32),
    "raw": [RNG.normal(size=9).astype(np.float32), np.zeros((0, 3)), np.bool_(True)],
    "int4": jnp.arange(5).astype(jnp.int4),
    "constant": np.full((7, 7), 2.5, jnp.bfloat16),
    "quantized": [
        quantized((30, 12), (1, 12), 1, None),
        quantized((64, 6), (4, 6), 1, 16, zero=(4, 6)),
        clipjax.Quantized(jnp.asarray(codes(40, 30), jnp.int32), jnp.float32(1), jnp.int32(0), None, (0, 1), None),
        clipjax.Quantized(jnp.full(9, 2**20, jnp.int32).at[0].set(-5), jnp.ones(3), jnp.int32(0), None, None, None),
    ],
}


def packed(small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "SMALL", small)
        return clipjax.pack(NET)


DATA, ONE = packed(-1), packed(1 << 20)


def facts(tree):
    """The leaves' bytes, dtypes and shapes, and the static fields between them."""
    arrays = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), [(x.tobytes(), x.dtype.name, x.shape) for x in arrays]


def is_quantized(x):
    return isinstance(x, clipjax.Quantized)


def values(x):
    return clipjax.dequantize(x) if is_quantized(x) else x


KNOWN = facts(jax.tree.map(values, NET, is_leaf=is_quantized)), facts(clipjax.unpack(DATA, dequantize=False))


def opened(data):
    """The facts of a file, read as values and as codes, or None for a ValueError; anything else is a failure."""
    try:
        read = [clipjax.unpack(data, dequantize=dequantize, max_bytes=1 << 21) for dequantize in (True, False)]
    except ValueError:
        return None
    return tuple(map(facts, read))


def test_net_has_every_code():
    """What is fuzzed below uses every branch of the format."""
    header = json.loads(DATA[8 : 8 + struct.unpack("<Q", DATA[:8])[0]])
    flags = {name: DATA[begin(name) + 4] for name, spec in header.items() if ":" in note(header, name)}
    assert flags == {"book": 2, "columns": 1, "constant": 1, "lines": 1, "order0": 1, "packed": 2, "rest": 6}
    assert opened(DATA) == opened(ONE) == KNOWN and len(ONE) < len(DATA) - 1000
    assert facts(clipjax.unpack(DATA, dequantize=False)["quantized"]) == facts(NET["quantized"])


def begin(name):
    length = struct.unpack("<Q", DATA[:8])[0]
    return 8 + length + json.loads(DATA[8 : 8 + length])[name]["data_offsets"][0]


def note(header, name):
    return dict(
        zip([n for n in header if n != "__metadata__"], header["__metadata__"]["leaves"].split(), strict=True)
    ).get(name, "")


def damaged(rng, data):
    """Flipped bits, a cut, an extension, a stretch of zeros, a stretch from elsewhere."""
    data = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        data += rng.randbytes(rng.randrange(1, 64))
    else:
        at, size = rng.randrange(len(data)), rng.randrange(1, 64)
        source = rng.randrange(len(data))
        data[at : at + size] = bytes(size) if kind == 3 else data[source : source + size]
    return bytes(data)


def hostile(rng):
    """A header or payloads that are changed, with every checksum of bytes made right again."""
    length = struct.unpack("<Q", DATA[:8])[0]
    header, entries = json.loads(DATA[8 : 8 + length]), bytearray(DATA[8 + length :])
    metadata, names = header["__metadata__"], [name for name in header if name != "__metadata__"]
    notes = metadata["leaves"].split()
    kind = rng.randrange(4)
    if kind == 0:  # the bytes of payloads
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(entries))
            entries[at] = rng.choice([entries[at] ^ (1 << rng.randrange(8)), 0, 255, 127, rng.randrange(256)])
    elif kind == 1:  # a leaf's shape or dtype
        i = rng.randrange(len(notes))
        shape = [rng.choice([0, 1, 2, 3, 9, 60, 50, 1000, 2**20, 2**47, -1]) for _ in range(rng.randrange(4))]
        dtype = rng.choice(["float32", "bfloat16", "int8", "bool", "complex128", "float64", "int4", "object"])
        form, axes = rng.choice([":", ":", ":", "=", "", "*", "*"]), ",".join(map(str, shape))
        notes[i] = notes[i][:8] + form + (axes if form == "*" else f"{dtype}[{axes}]")
    elif kind == 2:  # an entry
        spec = header[rng.choice(names)]
        key = rng.choice(list(spec))
        spec[key] = rng.choice(["U8", "F32", "F128", [], [1], [0, 10], [2**60, 2**60], None, -1, 1.5, [[]], {}, True])
    else:  # the layout
        text = list(metadata["layout"])
        text[rng.randrange(len(text))] = rng.choice('0123456789[]{}",:ndl')
        metadata["layout"] = "".join(text)
    if kind < 2:
        for i, name in enumerate(names):
            first, last = header[name]["data_offsets"]
            notes[i] = f"{zlib.crc32(entries[first:last]):08x}" + notes[i][8:]
        metadata["leaves"] = " ".join(notes)
    metadata["crc"] = "00000000"
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.replace(b'"crc":"00000000"', f'"crc":"{zlib.crc32(text):08x}"'.encode())
    return struct.pack("<Q", len(text)) + text + bytes(entries)


def hostile_one(rng):
    """One entry whose head or leaves are changed, with the checksum of its bytes made right again."""
    start = 8 + struct.unpack("<Q", ONE[:8])[0]
    *_, begin = small_trees.unpack(ONE[start:])
    cursor = byte_stream.Cursor(ONE[start + 4 :])
    check = bytes(cursor.take(2))
    coder = zlib.decompressobj(-15, zdict=small_trees._WORDS)
    head, leaves = bytearray(coder.decompress(cursor.take(cursor.whole(cursor.left)))), bytearray(ONE[start + begin :])
    for _ in range(rng.choice([1, 1, 2, 5])):
        part = head if rng.random() < 0.6 else leaves
        at = rng.randrange(len(part))
        part[at] = rng.choice([part[at] ^ (1 << rng.randrange(8)), 0, 255, 127, 128, rng.randrange(256)])
    if rng.random() < 0.1:
        del head[rng.randrange(len(head)) :]
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, small_trees._WORDS)
    small = coder.compress(bytes(head)) + coder.flush()
    if rng.random() < 0.1:
        small = bytes(rng.randbytes(1)[0] if rng.random() < 0.02 else b for b in small)
    body = check + byte_stream.whole(len(small)) + small + leaves
    return container.alone(small_trees.NAME, zlib.crc32(body, small_trees._VERSION).to_bytes(4, "little") + body)


CHUNK = [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, CHUNKS))]


@pytest.mark.parametrize("chunk", CHUNK)
@pytest.mark.parametrize("data", [DATA, ONE], ids=["listed", "one_entry"])
def test_damage_is_seen(chunk, data):
    rng = random.Random(chunk)
    for _ in range(CASES):
        found = opened(damaged(rng, data))
        assert found is None or found == KNOWN


@pytest.mark.parametrize("chunk", CHUNK)
@pytest.mark.parametrize("made", [hostile, hostile_one], ids=["listed", "one_entry"])
def test_hostile_files_only_raise_value_errors(chunk, made):
    rng = random.Random(chunk)
    tracemalloc.start()
    results = [opened(made(rng)) for _ in range(CASES)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20  # the limit of 2 MiB of arrays, and what decoding them takes
    assert 0 < sum(found is not None for found in results) < CASES / 2
