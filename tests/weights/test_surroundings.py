"""What stands around a weight transformation, or inside of it: the unsuitable is refused by name, at init if it can."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections

PARAMS = {"kernel": jnp.asarray(np.linspace(-1, 1, 32).reshape(4, 8), jnp.float32), "bias": jnp.ones(8)}
NARROW = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
LOOKAHEAD = optax.lookahead(optax.sgd(0.1), 5, 0.5)
HOLD = {
    "prune": lambda **kw: clipjax.prune_mask(0.5, **kw),
    "prune_carry": lambda **kw: clipjax.prune_mask(0.5, carry=True, **kw),
    "quantize": lambda **kw: clipjax.fake_quantize(4, step=0.25, **kw),
    "project": lambda **kw: clipjax.project(projections.identity(), **kw),
}


@pytest.mark.parametrize("name", HOLD)
def test_lookahead_is_refused_as_inner_at_init(name):
    with pytest.raises(ValueError, match=r"`inner` must .*got `optax\.lookahead`.*Give the optimizer that it wraps"):
        HOLD[name](inner=optax.chain(optax.clip(1.0), LOOKAHEAD)).init(PARAMS)


@pytest.mark.parametrize(
    ("inner", "name"),
    [
        (optax.sm3(0.1), "ScaleBySM3State"),
        (optax.lbfgs(), "ScaleByLBFGSState and ScaleByZoomLinesearchState"),
        (optax.flatten(optax.adam(0.1)), "ScaleByAdamState"),
    ],
    ids=["sm3", "lbfgs", "flatten"],
)
def test_an_optimizer_whose_moments_cannot_be_cleared_is_refused_at_init_by_name(inner, name):
    for init in (HOLD["prune"](inner=inner).init, lambda p: jax.eval_shape(HOLD["prune"](inner=inner).init, p)):
        with pytest.raises(ValueError, match=rf"(?s)`inner` must .*got {name}, where it fails.*behind it instead"):
            init(PARAMS)


@pytest.mark.parametrize(
    "inner", [optax.adafactor(0.1, min_dim_size_to_factor=4), optax.contrib.muon(0.1), optax.sm3(0.1)]
)
def test_a_constraint_without_moments_to_clear_takes_any_optimizer(inner):
    tx = HOLD["quantize"](inner=inner)
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), PARAMS)


WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda count: count < 2),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda count: count < 2),
}


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_that_skips_is_refused_around_narrow_gradients(name, transform):
    tx = WRAPPERS[name](optax.chain(optax.sgd(0.1), HOLD["prune"]()))
    state = tx.init(NARROW)
    with pytest.raises(TypeError, match=rf"`optax\.{name}` must not hold.*bfloat16.*chain\(optax\.{name}\(optimizer"):
        transform(tx.update)(NARROW, state, NARROW)


def test_a_wrapper_that_skips_holds_f32_gradients_and_stands_around_the_optimizer_of_narrow_ones():
    """The way out that the error names: the constraint holds at the skipped update too."""
    wide = optax.apply_if_finite(optax.chain(optax.sgd(0.1), HOLD["prune"]()), 3)
    narrow = optax.chain(optax.apply_if_finite(optax.sgd(0.1), 3), HOLD["prune"]())
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), NARROW)
    updates, _ = wide.update(PARAMS, wide.init(PARAMS), PARAMS)
    assert int((optax.apply_updates(PARAMS, updates)["kernel"] == 0).sum()) == 16
    updates, state = narrow.update(bad, narrow.init(NARROW), NARROW)
    new = optax.apply_updates(NARROW, updates)
    assert int((new["kernel"] == 0).sum()) == 16 and int(state[0].total_notfinite) == 1
    kept = new["kernel"] != 0
    np.testing.assert_array_equal(new["kernel"][kept], NARROW["kernel"][kept])
