"""Bytes after many steps of training, on as many blocks as a model has: what a reference makes of the weights."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import formats
from clipjax._maths import format_blocks

KINDS = {kind: getattr(formats, kind.lower())() for kind in "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 TQ2_0 MXFP4".split()}
BLOCKS, STEPS, BOUND = 250_000, 200, 1.5  # of each of four parts: a million ternary blocks at once take 18 GB
PACKINGS = {"TQ2_0": ["TQ1_0", "TQ2_0"]}
"""Ternary formats differ only in how they pack codes: their weights are trained once."""

pytestmark = [pytest.mark.slow, pytest.mark.optimized]  # an FMA, or a product with an inverse, would change codes


def trained(tx, params, steps, seed):
    """Params and state after some updates by noise that is drawn in the step."""

    def step(i, carried):
        params, state = carried
        key = jax.random.fold_in(jax.random.key(seed), i)
        grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(lambda carried: jax.lax.fori_loop(0, steps, step, carried), donate_argnums=0)
    return run((params, tx.init(params)))


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_finds_the_bytes_of_the_state(kind, dtype, part):
    """Behind Adam, a clamp and a mask, with scales of every update; a format without a zero is behind no mask."""
    form = KINDS[kind]
    mask = [clipjax.prune_mask(0.3)] if form.zero else []
    quantizer = clipjax.fake_quantize(form, every=1)
    tx = optax.chain(optax.adam(0.01), clipjax.clamp_weights(BOUND), *mask, quantizer)
    kernel = np.random.default_rng(part).standard_normal((256, BLOCKS * form.block // 256), np.float32)
    params, state = trained(tx, {"kernel": jnp.asarray(kernel, dtype)}, STEPS, part)

    w = np.asarray(params["kernel"].astype(jnp.float32))
    assert np.abs(w).max() <= BOUND and (not mask or np.mean(w == 0) >= 0.3)
    assert not clipjax.check(params, state, tx)
    q = clipjax.quantized(params, state)["kernel"]
    np.testing.assert_array_equal(clipjax.dequantize(q, dtype=dtype), params["kernel"])
    codes, scales = format_blocks.matrix(q.codes, q.scales, q.axis)
    rows = codes.reshape(*codes.shape[:-1], -1, form.block)
    for packed in PACKINGS.get(kind, [kind]):
        bytes_ = getattr(formats, packed.lower())().pack(rows, tuple(s[..., None] for s in scales))[0]
        expected = gguf.quants.quantize(np.ascontiguousarray(w.T), gguf.GGMLQuantizationType[packed])
        np.testing.assert_array_equal(bytes_.reshape(expected.shape), expected)
