"""What keeps a chain exact, each rule on a case that needs it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax

WEIGHTS = np.float32([[1.0, -1.0, 1.1, -0.9, 5.0, 0.0, 0.95, -1.05]])


def run(tx, weights, updates):
    """[(params, state)] after each update, op by op."""
    params = {"kernel": jnp.asarray(weights)}
    path = []
    with jax.disable_jit():
        state = tx.init(params)
        for u in updates:
            params, state = _step(tx, params, state, {"kernel": jnp.broadcast_to(jnp.float32(u), weights.shape)})
            path.append((params["kernel"], state))
    return path


def _step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def test_a_weight_pruned_later_is_zero_although_the_carry_lies_beyond_the_grid():
    """The float weight 5 shows as the top level; when a transformation before sends it to 0, it stays there."""
    mask = {"kernel": jnp.asarray(np.abs(WEIGHTS) < 4)}
    prune = clipjax.prune_mask(mask=mask, start=1)
    quantize = clipjax.fake_quantize(2, step=1.0, every=1)
    (first, _), (second, _), (third, _) = run(optax.chain(prune, quantize), WEIGHTS, [0.0, 0.0, 0.0])
    assert float(first[0, 4]) == 1.0
    assert float(second[0, 4]) == float(third[0, 4]) == 0.0


def test_step_ignores_weights_that_transformations_before_put_at_zero():
    """The carry of a pruned weight is kept where it shows as 0, and has no say in the step."""
    mask = {"kernel": jnp.asarray([[True, True, False, True]])}
    weights = np.float32([[1.0, -1.0, 1.25, 1.0]])
    tx = optax.chain(clipjax.prune_mask(mask=mask, start=1), clipjax.fake_quantize(1, every=1))
    _, (_, state) = run(tx, weights, [0.0, 0.0])
    assert abs(float(state[1].projection.step["kernel"]) - 1.0) < 1e-4  # the mean of the others, not .8


@pytest.mark.parametrize("count", [1, 3])
def test_pruned_is_exactly_zero_whatever_its_size(count):
    """1e-30 times a weight is no zero."""
    path = run(clipjax.prune_mask(0.5), WEIGHTS * np.float32(1e10), [0.0] * count)
    assert int((path[-1][0] == 0).sum()) == 4


def test_one_bit_in_an_asymmetric_interval():
    """-s and s, s as large as the nearer end allows."""
    tx = clipjax.fake_quantize(1, step=clipjax.steps.interval(-0.125, 0.5))
    weights = np.float32([[-0.1, 0.2, -0.06, 0.4]])
    kernel, _ = run(tx, weights, [0.0, 0.0])[-1]
    np.testing.assert_array_equal(np.sign(kernel), np.sign(weights))
    assert np.abs(np.asarray(kernel)).max() <= 0.125


def test_the_carry_survives_stochastic_rounding():
    """What was shown is recognized with the key that drew it: the float weight is the plain sum of all updates."""
    tx = clipjax.fake_quantize(8, step=1.0, rounding="stochastic", key=jax.random.key(3))
    _, state = run(tx, 8 * WEIGHTS, [0.125] * 6)[-1]
    np.testing.assert_array_equal(np.asarray(state.carry["kernel"]), 8 * WEIGHTS + np.float32(0.75))
