"""Where clipping coincides with Optax it gives the same bits; where it differs, both values stand here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax


def run(tx, grads):
    return jax.jit(tx.update)(grads, tx.init(grads))[0]


def some(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.normal(size=(17, 5)) * size, jnp.float32)},
        "b": jnp.asarray(rng.normal(size=33) * size, jnp.float32),
    }


def ulps(a, b):
    """The distance of two f32 arrays of the same signs, in units in the last place."""
    return np.abs(np.asarray(a).view(np.int32).astype(np.int64) - np.asarray(b).view(np.int32)).max()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [1e-3, 0.5, 1.0, 100.0])
def test_clip_is_bit_identical(seed, limit):
    got, expected = run(clipjax.clip(limit), some(seed)), run(optax.clip(limit), some(seed))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e6])
def test_norm_within_the_threshold_is_bit_identical(seed, size):
    grads = some(seed, size)
    limit = 1.001 * float(optax.tree.norm(grads))
    for tx in (clipjax.clip_norm(limit), optax.clip_by_global_norm(limit)):
        jax.tree.map(np.testing.assert_array_equal, run(tx, grads), grads)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e6])
def test_rescaled_norm_is_within_four_ulps(seed, size):
    grads = some(seed, size)
    limit = 0.37 * float(optax.tree.norm(grads))
    got, expected = run(clipjax.clip_norm(limit), grads), run(optax.clip_by_global_norm(limit), grads)
    assert all(d <= 4 for d in jax.tree.leaves(jax.tree.map(ulps, got, expected)))


def test_bf16_leaves_are_added_up_in_f32():
    """600 leaves of 0.1 have the norm 2.45; Optax finds 2, to which bf16 cannot add 0.01, and clips too little."""
    grads = [jnp.full((), 0.1, jnp.bfloat16)] * 600
    tx = clipjax.clip_norm(1.0)
    with jax.disable_jit():
        theirs, ours = float(optax.tree.norm(grads)), float(tx.update(grads, tx.init(grads))[1].norm_pre)
    assert theirs == 2.0
    assert ours == pytest.approx(600**0.5 * float(jnp.bfloat16(0.1)), rel=1e-6)


def test_norm_beyond_the_square_root_of_the_largest_float():
    """[3e19, 4e19] has the norm 5e19; Optax's sum of squares overflows and the update is silently 0."""
    grads = jnp.array([3e19, 4e19])
    np.testing.assert_array_equal(run(optax.clip_by_global_norm(1.0), grads), [0.0, 0.0])
    np.testing.assert_allclose(run(clipjax.clip_norm(1.0), grads), [0.6, 0.8], rtol=1e-6)


def test_norm_below_the_square_root_of_the_smallest_float():
    """[3e-25, 4e-25] has the norm 5e-25; Optax's is 0, so it never clips."""
    grads = jnp.array([3e-25, 4e-25])
    np.testing.assert_array_equal(run(optax.clip_by_global_norm(1e-25), grads), grads)
    np.testing.assert_allclose(run(clipjax.clip_norm(1e-25), grads), [0.6e-25, 0.8e-25], rtol=1e-6)


def test_f32_array_threshold_on_bf16_gradients():
    """A threshold from `inject_hyperparams` is an f32 array: Optax raises, here the dtype of the gradient is kept."""
    grads, limit = jnp.array([3.0, 4.0], jnp.bfloat16), jnp.float32(1.0)
    with pytest.raises(TypeError, match="dtype"):
        run(optax.clip_by_global_norm(limit), grads)
    updates = run(clipjax.clip_norm(limit), grads)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(updates, np.float32), [0.6, 0.8], rtol=1e-2)


def test_threshold_zero():
    """C = 0 gives 0 in both; for an all-zero gradient Optax divides 0 by 0 only where its norm is not below C."""
    grads = jnp.array([3.0, 4.0])
    np.testing.assert_array_equal(run(clipjax.clip_norm(0.0), grads), [0.0, 0.0])
    np.testing.assert_array_equal(run(optax.clip_by_global_norm(0.0), grads), [0.0, 0.0])
    zeros = jnp.zeros(2)
    np.testing.assert_array_equal(run(clipjax.clip_norm(0.0), zeros), [0.0, 0.0])
    np.testing.assert_array_equal(run(optax.clip_by_global_norm(0.0), zeros), [np.nan, np.nan])


def test_one_nan_or_infinity():
    """One NaN: all is NaN in both. One infinity: Optax zeroes the finite entries, here all is NaN."""
    for bad, theirs in ((np.nan, [np.nan, np.nan]), (np.inf, [0.0, np.nan])):
        grads = jnp.array([1.0, bad])
        np.testing.assert_array_equal(run(optax.clip_by_global_norm(1.0), grads), theirs)
        np.testing.assert_array_equal(run(clipjax.clip_norm(1.0), grads), [np.nan, np.nan])


def test_element_clip_of_nan():
    for tx in (clipjax.clip(1.0), optax.clip(1.0)):
        np.testing.assert_array_equal(run(tx, jnp.array([np.nan, np.inf, -np.inf])), [np.nan, 1.0, -1.0])
