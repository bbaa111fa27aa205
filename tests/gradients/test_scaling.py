"""`scale_to_norm`, and the root mean square as a norm of `clip_norm`: against NumPy, Optax and the papers' formulas."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import selections, thresholds

pytestmark = pytest.mark.usefixtures("strict")

# the norms are 5, 10 and 2
GRADS = {"enc": {"kernel": jnp.array([3.0, 4.0])}, "b": [jnp.array([[6.0], [8.0]]), jnp.array(-2.0)]}


def once(tx, grads=GRADS):
    return jax.jit(tx.update)(grads, tx.init(grads))


def test_all_arrays_together_get_the_norm():
    """AUTO-S: g / (|g| + gamma)."""
    n = math.sqrt(25 + 100 + 4)
    for target, gamma in ((1.0, 0.0), (3.0, 0.5)):
        got, state = once(clipjax.scale_to_norm(target, gamma))
        want = jax.tree.map(lambda g, c=target / (n + gamma): g * jnp.float32(c), GRADS)
        chex.assert_trees_all_close(got, want, rtol=1e-6)
        assert clipjax.report(state)["scale_to_norm/norm_pre"] == pytest.approx(n)


def test_all_arrays_together_get_the_norm_as_with_optax():
    theirs, _ = once(optax.normalize_by_update_norm(3.0, 0.5))
    chex.assert_trees_all_close(once(clipjax.scale_to_norm(3.0, 0.5))[0], theirs, rtol=1e-6)


def test_every_array_gets_the_norm():
    got, state = once(clipjax.scale_to_norm(2.0, per="leaf"))
    np.testing.assert_allclose([jnp.linalg.norm(g) for g in jax.tree.leaves(got)], 2.0, rtol=1e-6)
    found = clipjax.report(state, per_leaf=True)
    assert float(found["scale_to_norm/coefficient/b/0"]) == pytest.approx(0.2)


def test_a_schedule_is_read_at_the_count():
    tx = clipjax.scale_to_norm(lambda count: 1.0 + count.astype(jnp.float32))
    state, norms = tx.init(GRADS), []
    for _ in range(3):
        got, state = tx.update(GRADS, state)
        norms.append(math.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(got))))
    np.testing.assert_allclose(norms, [1, 2, 3], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e30])
def test_tiny_and_huge_gradients_keep_their_direction(size):
    grads = jnp.array([3.0, -4.0]) * jnp.float32(size)
    np.testing.assert_allclose(once(clipjax.scale_to_norm(5.0), grads)[0], [3.0, -4.0], rtol=1e-6)


def test_a_gradient_of_zero_stays_zero_and_one_of_nan_shows_and_is_counted():
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    chex.assert_trees_all_equal(once(clipjax.scale_to_norm(1.0), zero)[0], zero)
    got, state = once(clipjax.scale_to_norm(1.0), {**GRADS, "enc": jnp.array([jnp.nan])})
    assert all(np.isnan(x).all() for x in jax.tree.leaves(got))
    assert int(clipjax.report(state)["scale_to_norm/nonfinite"]) == 1


def test_small_gradients_stay_small_beside_gamma():
    grads = jnp.array([3e-3, 4e-3])
    assert float(jnp.linalg.norm(once(clipjax.scale_to_norm(1.0, 0.495), grads)[0])) == pytest.approx(0.01)


def test_a_gradient_of_bf16_stays_bf16():
    got, _ = once(clipjax.scale_to_norm(1.0), jnp.array([3.0, 4.0], jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), [0.6, 0.8], rtol=2**-8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: clipjax.scale_to_norm(-1.0), "`target` must be a number >= 0"),
        (lambda: clipjax.scale_to_norm(1.0, gamma=-1.0), "`gamma` must be a number >= 0"),
        (lambda: clipjax.scale_to_norm(1.0, per="layer"), "`per` must be"),
        (lambda: clipjax.clip_norm(1.0, ord="max"), "`ord` must be a number > 0 or"),
    ],
)
def test_wrong_calls_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("threshold", [0.1, 3.0, 100.0])
def test_the_root_mean_square_of_a_leaf_is_clipped_as_optax_does(threshold):
    ours, _ = once(clipjax.clip_norm(threshold, per="leaf", ord="rms"))
    theirs, _ = once(optax.clip_by_block_rms(threshold))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_the_root_mean_square_of_all_leaves_counts_every_entry_once():
    _, state = once(clipjax.clip_norm(math.inf, ord="rms"))
    assert clipjax.report(state)["clip_norm/norm_pre"] == pytest.approx(math.sqrt(129 / 5))


def test_the_root_mean_square_of_a_selection_is_over_that_alone():
    grads = jnp.array([1.0, 2.0, 3.0, 6.0])
    _, state = once(clipjax.clip_norm(math.inf, ord="rms", select=selections.largest(0.5)), grads)
    assert clipjax.report(state)["clip_norm/norm_pre"] == pytest.approx(math.sqrt(45 / 2))


def test_a_rule_follows_the_root_mean_square():
    tx = clipjax.clip_norm(thresholds.percentile(50, window=3), per="leaf", ord="rms")
    _, state = once(tx)
    found = clipjax.report(state, per_leaf=True)
    assert float(found["clip_norm/threshold/enc/kernel"]) == pytest.approx(math.sqrt(12.5))


def test_the_root_mean_square_inside_shard_map_is_that_of_all_devices():
    mesh = jax.make_mesh((8,), ("x",))
    grads = jax.device_put(jnp.arange(16.0), jax.NamedSharding(mesh, jax.P("x")))
    tx = clipjax.clip_norm(math.inf, ord="rms", axis_name="x")
    update = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[1].norm_pre, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P()
    )
    assert float(jax.jit(update)(grads)) == pytest.approx(float(jnp.sqrt(jnp.mean(grads**2))))
