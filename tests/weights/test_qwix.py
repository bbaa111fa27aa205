"""The hand-over to Qwix: our codes and steps as its QArray give the params back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import steps

qwix = pytest.importorskip("qwix")


def qarray(q):
    """A `Quantized` as Qwix holds it: steps and zero points of the rank of the codes, 4-bit codes as int4."""
    codes = q.codes.astype(jnp.int4) if q.bits is not None and q.bits <= 4 else q.codes
    scale, zero = (jnp.reshape(v, v.shape or (1,) * codes.ndim) for v in (q.step, q.zero_point))
    return qwix.QArray(codes, scale, zero.astype(codes.dtype) if zero.any() else None)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 4, "axis": -1},
        {"bits": 4, "group": 8},
        {"bits": 2, "step": steps.twn()},
        {"bits": 1, "axis": -1},
        {"bits": 4, "step": steps.minmax(), "axis": -1},
        {"bits": 8, "step": steps.minmax(), "group": 4},
        {"bits": 8, "step": steps.interval(0.0, 1.0)},
    ],
    ids=["8", "4-channel", "4-groups", "twn", "binary", "affine", "affine-groups", "interval"],
)
def test_qarray_gives_the_params_back(options):
    """`qwix.dequantize` of our integers is the trained kernel, bit for bit."""
    tx = optax.chain(optax.sgd(0.1), clipjax.fake_quantize(**options))
    params = {"kernel": jnp.asarray(np.random.default_rng(0).uniform(-0.2, 1.0, size=(16, 6)), jnp.float32)}
    state = tx.init(params)
    for i in range(3):
        grads = {"kernel": jnp.asarray(np.random.default_rng(i).normal(size=(16, 6)), jnp.float32)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    array = qarray(clipjax.quantized(params, state)["kernel"])
    np.testing.assert_array_equal(qwix.dequantize(array), params["kernel"])


def test_qwix_multiplies_with_our_codes():
    """A float batch times a QArray of ours is the float product."""
    x, w = (jnp.asarray(np.random.default_rng(i).normal(size=s), jnp.float32) for i, s in enumerate([(4, 16), (16, 6)]))
    step = clipjax.choose_step(w, 4, axis=-1)
    array = qwix.QArray(clipjax.quantize(w, step, 4).astype(jnp.int4), step)
    expected = x @ clipjax.dequantize(array.qvalue, step)
    np.testing.assert_allclose(qwix.dot_general(x, array, (((1,), (0,)), ((), ()))), expected, rtol=1e-5, atol=1e-5)
    assert jax.tree.leaves(array)[0].dtype == jnp.int4
