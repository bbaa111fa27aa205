"""The payload of a `Quantized`: no longer than that of its values, and read without trust."""

import jax.numpy as jnp
import numpy as np
import pytest
from same_bits import q, same

import clipjax
from clipjax import Quantized
from clipjax._files import quantized_leaves, saving
from clipjax._maths.grids import short

RNG = np.random.default_rng(0)


def fitted(shape, bits=4, step=(), affine=False, zeros=0.0, axis=None, group=None):
    """Normal weights, a share of them 0, on the grids that `absmax` or `minmax` fit, with a step for each block."""
    w = RNG.normal(size=shape) * RNG.uniform(0.5, 2, shape[-1]) * (RNG.random(shape) >= zeros)
    split = [n for have, want in zip(step or (1,) * len(shape), shape, strict=True) for n in (have, want // have)]
    inner = tuple(range(1, 2 * len(shape), 2))
    whole = lambda x: np.broadcast_to(x.reshape([n if i % 2 == 0 else 1 for i, n in enumerate(split)]), split).reshape(
        shape
    )
    top = max(1, 2 ** (bits - 1) - 1)
    low, high = (f(0, pick(w.reshape(split), inner)) for f, pick in ((np.minimum, np.min), (np.maximum, np.max)))
    low, high = (low, high) if affine else (-np.maximum(-low, high), np.maximum(-low, high))
    s = np.asarray(short(jnp.asarray((high - low) / (2 * top), jnp.float32), bits + 1)).reshape(step)
    zero = (-top - np.rint(low.reshape(step) / s)).astype(np.int32) if affine else np.zeros((), np.int32)
    codes = np.clip(np.rint(w / whole(s)) + (whole(zero) if zero.shape else zero), -top, top)
    arrays = codes.astype(np.int8 if bits <= 8 else np.int16), s, zero
    return Quantized(*map(jnp.asarray, arrays), bits, axis, group)


FITTED = {
    "one_step": {"shape": (200, 100)},
    "columns": {"shape": (200, 100), "step": (1, 100), "axis": 1},
    "rows": {"shape": (200, 100), "step": (200, 1), "axis": 0},
    "stacked": {"shape": (3, 40, 50), "step": (3, 1, 50), "axis": (0, 2)},
    "groups": {"shape": (128, 40), "step": (4, 40), "axis": 1, "group": 32},
    "kernel": {"shape": (3, 3, 16, 32), "step": (1, 1, 1, 32), "axis": 3},
    "8_bits": {"shape": (100, 60), "bits": 8, "step": (1, 60), "axis": 1},
    "2_bits_pruned": {"shape": (300, 80), "bits": 2, "zeros": 0.8},
    "16_bits": {"shape": (200, 100), "bits": 16},
    "affine": {"shape": (200, 100), "affine": True},
    "affine_columns": {"shape": (200, 50), "step": (1, 50), "affine": True, "axis": 1},
    "affine_columns_pruned": {"shape": (200, 50), "bits": 6, "step": (1, 50), "affine": True, "axis": 1, "zeros": 0.9},
    "affine_groups": {"shape": (128, 40), "step": (4, 40), "affine": True, "axis": 1, "group": 32},
    "vector": {"shape": (500,), "bits": 3},
    "tiny": {"shape": (1, 2)},
    "small": {"shape": (2, 2)},
    "small_columns": {"shape": (4, 4), "step": (1, 4), "axis": 1},
}


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize(("small", "more"), [(-1, 0), (1 << 16, 8)], ids=["listed", "one_entry"])
def test_integers_take_no_more_bytes_than_the_params(name, small, more, monkeypatch):
    """But for a few in one entry: there the params have no checksum, which in a list made up for static fields."""
    monkeypatch.setattr(saving, "SMALL", small)
    leaf = fitted(**FITTED[name])
    params = {"kernel": clipjax.dequantize(leaf)}
    same(clipjax.unpack(clipjax.pack({"kernel": leaf}), dequantize=False), {"kernel": leaf})
    assert len(clipjax.pack({"kernel": leaf})) <= len(clipjax.pack(params)) + more


def test_zeros_of_an_affine_grid_are_coded_as_zeros():
    """Each column has another code for 0; relative to the zero points the densities of rows are there again."""
    leaf = q((300, 100), bits=8, step=(1, 100), axis=1)
    alive = RNG.random((300, 1)) < 0.1
    zero = RNG.integers(-120, 121, (1, 100)).astype(np.int32)
    codes = np.where(alive, RNG.integers(-127, 128, (300, 100)), zero).astype(np.int8)
    leaf = Quantized(jnp.asarray(codes), leaf.step, jnp.asarray(zero), 8, 1, None)
    same(clipjax.unpack(clipjax.pack(leaf), dequantize=False), leaf)
    assert len(clipjax.pack(leaf)) < codes.size / 4


@pytest.mark.parametrize("levels", [(-30_000, 0, 30_000), (-(2**30), 3, 2**30)])
def test_few_codes_far_apart_take_a_codebook(levels):
    codes = jnp.asarray(RNG.choice(levels, (40, 30)), jnp.int32)
    leaf = Quantized(codes, jnp.float32(1), jnp.int32(0), None, None, None)
    assert len(quantized_leaves.pack(leaf, "")) < codes.size * np.log2(3) / 8 + 60


def test_hostile_fields_raise():
    """Payloads that `pack` does not write, behind a right checksum."""
    leaf = q((6, 4), step=(2, 4), axis=1, group=3)
    data = bytes(quantized_leaves.pack(leaf, ""))
    same(quantized_leaves.unpack(data, (6, 4)), leaf)
    for shape in ((4, 6), (5, 4), (6, 4, 1), ()):
        with pytest.raises(ValueError):
            quantized_leaves.unpack(data, shape)
    with pytest.raises(ValueError, match="1 bytes too long"):
        quantized_leaves.unpack(data + b"\0", (6, 4))
    with pytest.raises(ValueError, match="16 bits at most, got 17"):
        quantized_leaves.unpack(b"\x11", (6, 4))
    with pytest.raises(ValueError, match="a form from 0 to 4, got 7"):
        quantized_leaves.unpack(b"\x04" + bytes(4) + b"\x07", (6, 4))
    many = b"\x84\x06" + b"\x01f" + b"\x01\xff\xff\x7f" + b"\x01\x00\x01"  # 2^21 - 1 equal steps of a format "f"
    with pytest.raises(ValueError, match="must have 64 entries at most"):
        quantized_leaves.unpack(many, (6, 4))
    coded = bytearray(quantized_leaves.pack(q((60, 40)), ""))
    coded[8] ^= 1  # of the checksum
    with pytest.raises(ValueError, match="another checksum"):
        quantized_leaves.unpack(coded, (60, 40))


HOSTILE = {
    "affine_groups": lambda: q((64, 20), step=(4, 20), zero=(4, 20), axis=1, group=16),
    "large": lambda: q((800, 700), step=(1, 700), axis=1),
    "codebook": lambda: Quantized(
        jnp.asarray(RNG.choice([-(2**30), 3, 2**30], (40, 30)), jnp.int32),
        jnp.ones((1, 30)),
        jnp.int32(0),
        None,
        1,
        None,
    ),
    "format": lambda: Quantized(
        jnp.asarray(RNG.integers(0, 256, (8, 16)), jnp.uint8),
        jnp.asarray(RNG.uniform(size=(3, 8, 2)), jnp.float16),
        jnp.asarray(RNG.uniform(size=(8, 2)), jnp.bfloat16),
        4,
        -1,
        32,
        "a format",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_only_raise_value_errors(name):
    """Bytes changed at random where no checksum of the entry is in the way."""
    leaf = HOSTILE[name]()
    data, shape = quantized_leaves.pack(leaf, ""), np.shape(leaf.codes)
    raised = 0
    for _ in range(200 if name != "large" else 5):
        damaged = bytearray(data)
        for _ in range(RNG.integers(1, 4)):  # half of them among the fields, which stand in front
            at = RNG.integers(0, 20 if RNG.random() < 0.5 else len(data))
            damaged[at] = RNG.choice([damaged[at] ^ (1 << RNG.integers(8)), 0, 255, RNG.integers(256)])
        try:
            quantized_leaves.unpack(damaged, shape)
            quantized_leaves.describe(damaged, shape)
        except ValueError:
            raised += 1
    assert raised
