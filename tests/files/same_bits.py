"""Trees of one structure and of the same bits, and a `Quantized` of any form to compare."""

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import Quantized

RNG = np.random.default_rng(0)


def bits(x):
    """Shape, dtype and bytes."""
    x = np.asarray(x)
    return x.shape, x.dtype.name, x.tobytes()


def same(a, b):
    """Two trees of one structure, which holds the static fields of a `Quantized`, and of the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y)


def q(shape, bits=4, step=(), zero=(), axis=None, group=None, kind=None, format=None):
    """Codes of all levels, with steps and zero points of these shapes."""
    most = 1000 if bits is None else max(1, 2 ** (bits - 1) - 1)
    kind = kind or ("int32" if bits is None else "int8" if bits <= 8 else "int16")
    codes = np.clip(np.rint(RNG.normal(size=shape) * most / 3), -most, most).astype(kind)
    zeros = RNG.integers(-3, 4, zero, np.int32) if zero else np.zeros((), np.int32)
    arrays = (jnp.asarray(x) for x in (codes, RNG.uniform(0.1, 1, step).astype(np.float32), zeros))
    return Quantized(*arrays, bits, axis, group, format)
