"""Refreshes: what they read, what they know of the transformations before, and when arguments ask for one."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import scores, steps
from clipjax._weights import allowed_values

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
PARAMS = {"a": {"bias": jnp.zeros(5), "kernel": KERNEL}, "b": {"kernel": KERNEL[:, :3].T}}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def step(tx, params, state, grads=None):
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params) if grads is None else grads, state, params)
    return optax.apply_updates(params, updates), state


def removed(params):
    return sum(int(jnp.sum(layer["kernel"] == 0)) for layer in params.values())


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_is_fitted_without_weights_that_are_removed_at_the_same_update(every):
    """Half of the weights are 1, half .25 and pruned at count 0: one bit has s = mean|w| = 1, not .625."""
    params = {"kernel": jnp.float32([[1, 0.25, -1, -0.25]])}
    tx = optax.chain(optax.identity(), clipjax.prune_mask(0.5, every=every), clipjax.fake_quantize(1, every=every))
    first, state = step(tx, params, tx.init(params))
    assert float(state[-1].projection.step["kernel"]) == 1
    assert first["kernel"].tolist() == [[1, 0, -1, 0]]


BRANCHES = {
    "mask": clipjax.prune_mask(0.5, every=2),
    "scores": clipjax.prune_mask(0.5, every=2, score=scores.taylor(decay=0.0)),
    "latent": clipjax.prune_mask(0.5, every=2, carry=True),
    "chain": optax.chain(
        clipjax.clamp_weights(0.5), clipjax.prune_mask(0.5, every=2), clipjax.fake_quantize(4, step=steps.absmax())
    ),
    "inner": clipjax.fake_quantize(4, step=steps.absmax(), inner=optax.adam(0.1)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tx", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_reads_memory_alone(tx, dtype):
    """Every large operand of a refresh's branch is an argument of the program or one of its results: none is stored."""
    tx = clipjax.with_gradient(optax.chain(optax.adam(0.1), tx))
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params).jaxpr
    branches = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    stored = {id(v) for v in (*jaxpr.invars, *jaxpr.outvars)}
    large = [v for eqn in branches for v in eqn.invars if v.aval.size >= 12]
    assert large and all(id(v) in stored for v in large)


def test_a_note_belongs_to_its_array():
    """Another array, at the same place in memory or with the same values, has none."""
    update = jnp.ones(3)
    fact = allowed_values.Fact(lambda x, _: jnp.abs(x), ())
    allowed_values.note(update, (fact,))
    assert (
        allowed_values.of(update) == (fact,) and allowed_values.of(update + 0) == () and allowed_values.of(None) == ()
    )
    number, (_, settles) = id(update), allowed_values._notes[id(update)]
    del update
    assert number not in allowed_values._notes
    allowed_values._notes[number] = (lambda: None, settles)  # an array that went without a trace
    other = jnp.ones(3)
    allowed_values._notes[id(other)] = allowed_values._notes.pop(number)
    assert allowed_values.of(other) == ()
    del allowed_values._notes[id(other)]


def test_a_mask_follows_a_constant_that_was_changed_on_resume():
    """The state of one sparsity in a run with another: pruned further at once, also behind `stop`; never back."""
    for structure in ({}, {"sparsity": {"a": {"kernel": 0.5}, "b": {"kernel": 0.5}}}):
        more = jax.tree.map(lambda s: 0.8, structure.get("sparsity", 0.5))
        half, most = (clipjax.prune_mask(s, every=2, stop=2) for s in (structure.get("sparsity", 0.5), more))
        params, state = PARAMS, half.init(PARAMS)
        counts = []
        for tx in (half, half, half, half, most, most, half):
            params, state = step(tx, params, state)
            counts.append(removed(params))
        assert counts == [16, 16, 16, 16, 26, 26, 26]


def test_widths_that_were_changed_on_resume_are_fitted_at_once():
    """Also behind `stop`: the integers have the new width, and no refresh follows while it stays."""
    wide, narrow = (clipjax.fake_quantize(bits, every=None) for bits in (8, 3))
    params, state = step(wide, PARAMS, wide.init(PARAMS))
    for tx, bits in ((wide, 8), (narrow, 3), (narrow, 3)):
        params, state = step(tx, params, state)
        found = jax.tree.leaves(clipjax.quantized(params, state), is_leaf=lambda x: isinstance(x, clipjax.Quantized))
        assert {q.bits for q in found if isinstance(q, clipjax.Quantized)} == {bits}
        assert clipjax.check(params, state, tx) == []


def test_a_ramp_that_stop_cuts_off_warns_once_with_both_numbers():
    """Counted from `start`, a schedule of `stop` updates ends early; one that falls back to 0, as AC/DC's, does not."""
    ramp = optax.polynomial_schedule(0.0, 0.8, 3, 150)
    with pytest.warns(UserWarning, match=r"reaches 0\.563 at `stop` \(150 - 100\), not the 0\.8 at which it ends"):
        clipjax.prune_mask(ramp, start=100, stop=150)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.8, 3, 50), start=100, stop=150)
        clipjax.prune_mask(ramp, stop=150)
        clipjax.prune_mask(lambda count: jnp.where(count % 20 < 10, 0.0, 0.5), start=5, stop=40)
