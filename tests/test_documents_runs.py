"""The first steps of the reference runs of D1, D3 and D4 against NumPy SGD on the same gradients."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
documents = pytest.importorskip("documents", reason="the examples' extra is not installed")

pytestmark = pytest.mark.optimized

RATE, BATCH, STEPS = np.float32(0.01), 2, 3


def clip(x, limit):
    """X ← C·sign(x) if |x| > C."""
    return np.where(np.abs(x) > limit, np.copysign(np.float32(limit), x), x)


def half_away(x):
    """The schoolbook round."""
    return np.sign(x) * np.floor(np.abs(x.astype(np.float64)) + 0.5)


def fresh(generator, shape):
    """Biases of zero, kernels of variance 1/inputs."""
    if len(shape) == 1:
        return np.zeros(shape, np.float32)
    return generator.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[:-1])))


def steps(name, chain=None):
    """Yields (params before, gradients, params after, state) of the first train steps, leaves as lists of arrays."""
    model, own, batches = documents.RUNS[name]
    generator = np.random.default_rng(0)
    x, y = (array[:BATCH] for array in next(batches(generator, 1)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: jnp.asarray(fresh(generator, p.shape)), shapes)
    tx = (chain or own)(params)

    @jax.jit
    def step(params, state):
        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), grads, state

    state = tx.init(params)
    for _ in range(STEPS):
        new, grads, state = step(params, state)
        yield *(list(map(np.asarray, jax.tree.leaves(tree))) for tree in (params, grads, new)), (new, state)
        params = new


def test_d1_reference_run():
    """CNN on 3×32×32, SGD 0.01: θ ← θ − η·clip(g, −0.01, 0.01)."""
    for before, grads, after, _ in steps("D1"):
        assert sum(p.size for p in before) == 8_475_530
        assert any((np.abs(g) > documents.ALPHA).any() for g in grads)
        for p, g, new in zip(before, grads, after, strict=True):
            np.testing.assert_allclose(new, p - RATE * clip(g, documents.ALPHA), rtol=1e-6, atol=1e-8)


def test_d3_reference_run():
    """784-128-10, SGD 0.01: w ← T·sign(w) if |w| > T, g ← C·sign(g) if |g| > C, W ← W − η·g."""
    bound, limit = documents.BOUND, documents.LIMIT
    first, *rest = steps("D3")
    assert any((np.abs(p) > bound).any() for p in first[0])
    for before, grads, after, _ in (first, *rest):
        assert sum(p.size for p in before) == 784 * 128 + 128 + 128 * 10 + 10
        for p, g, new in zip(before, grads, after, strict=True):
            np.testing.assert_allclose(new, clip(p, bound) - RATE * clip(g, limit), rtol=1e-6, atol=1e-8)


def analysed(params):
    """The chain of `documents.clip_and_quantize`, with fewer widths to choose from."""
    bits = clipjax.choose_bits(params, target_db=documents.TARGET_DB, allowed=(5, 7))
    grid = clipjax.fake_quantize(bits, rounding="half_away", every=1)
    return optax.chain(clipjax.clip(documents.CUT), optax.sgd(RATE), grid)


def test_d4_reference_run():
    """CNN on 32×32: g_clip = clip(g, −c, c), update, a width from the distribution, Q(w) = round(w/s)·s, integers."""
    floats = None
    for before, grads, after, (params, state) in steps("D4", analysed):
        floats = before if floats is None else floats
        moves = [-RATE * clip(g, documents.CUT) for g in grads]
        floats = [z + u for z, u in zip(floats, moves, strict=True)]
        integers = jax.tree.leaves(clipjax.quantized(params, state), is_leaf=lambda q: isinstance(q, clipjax.Quantized))
        assert [isinstance(q, clipjax.Quantized) for q in integers] == [p.ndim > 1 for p in before]
        for p, u, z, q, new in zip(before, moves, floats, integers, after, strict=True):
            if z.ndim == 1:
                np.testing.assert_allclose(new, z, rtol=1e-6, atol=1e-8)
                continue
            codes, s = np.asarray(q.codes), np.float32(q.step)
            ratio = z / s
            # a weight that lands on exactly 0 without the grid stays 0, unless its level is surely 0 too
            z[(p + u == 0) & (np.abs(ratio) * 2.004 > 1)] = 0
            ratio = z / s
            top = min(2 ** (q.bits - 1) - 1, np.abs(codes).max())
            clear = np.abs(np.abs(ratio) % 1 - 0.5) > 1e-3  # away from ties, where a fused multiply-add decides
            np.testing.assert_array_equal(codes[clear], np.clip(half_away(ratio), -top, top)[clear])
            assert np.abs(ratio - codes)[np.abs(ratio) <= top].max() <= 0.501
            np.testing.assert_array_equal(new, codes.astype(np.float32) * s)
            assert clipjax.dequantize(q.codes, q.step).dtype == jnp.float32
    kernels = [z for z in floats if z.ndim > 1]
    assert [k.shape for k in kernels] == [(3, 3, 1, 32), (3, 3, 32, 64), (3136, 128), (128, 10)]
