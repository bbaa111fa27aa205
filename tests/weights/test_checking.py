"""`check` finds every constraint that does not hold, and only these; `hold_once` holds any params."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
from clipjax import projections, roundings, steps, structures

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(16, 16)), jnp.float32)
PARAMS = {"a": {"bias": jnp.zeros(16), "kernel": KERNEL}, "b": {"kernel": KERNEL.T / 2}}


def train(tx, updates=4, params=PARAMS):
    """Params and state after some updates."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: p * p.dtype.type(0.25) + p.dtype.type(0.0625), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(updates):
        params, state = step(params, state)
    return params, state


def after(*constraints):
    return optax.chain(optax.adam(1e-2), *constraints)


def found(violations):
    return [(v.path, v.rule, v.kind) for v in violations]


HELD = {
    "chain": after(clipjax.clamp_weights(0.75), clipjax.prune_mask(0.5), clipjax.fake_quantize(4)),
    "one bit": after(clipjax.prune_mask(0.5), clipjax.fake_quantize(1, axis=-1)),
    "groups": after(clipjax.fake_quantize(3, group=4, step=steps.minmax())),
    "stochastic": after(clipjax.fake_quantize(4, rounding="stochastic")),
    "hardening": clipjax.fake_quantize(2, rounding=roundings.parq(50), inner=optax.adam(1e-2)),
    "inner": clipjax.fake_quantize(4, inner=after(clipjax.clamp_weights(0.5))),
    "latent": after(clipjax.prune_mask(0.5, carry=True, every=1)),
    "blocks": after(clipjax.prune_mask(0.5, structure=structures.block(2, 4), scope="leaf")),
    "scheduled bound": after(clipjax.clamp_weights(optax.linear_schedule(1.0, 0.5, 10))),
    "random entries": after(clipjax.clamp_weights(0.5, select=clipjax.selections.bernoulli(0.5))),
    "own": after(clipjax.project(projections.unit_norm(axis=0))),
    "not yet": after(
        clipjax.prune_mask(0.5, start=9), clipjax.fake_quantize(4, start=9), optax.add_decayed_weights(0.1)
    ),
    "nor your own": after(clipjax.project(lambda tree: jax.tree.map(jnp.abs, tree), start=9)),
}


@pytest.mark.parametrize("tx", HELD.values(), ids=HELD)
def test_what_holds_is_not_reported(tx):
    params, state = train(tx)
    assert clipjax.check(params, state, tx, raise_=True) == []


def test_a_narrow_weight_that_lands_late_counts_as_held():
    """From far outside onto a given step: two units in the last place at most."""
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        params = {"kernel": jnp.asarray(RNG.normal(size=(8, 8)), dtype)}
        tx = clipjax.fake_quantize(4, step=0.3)
        params, state = train(tx, 1, params)
        assert clipjax.check(params, state, tx) == clipjax.check(params, state) == []


BOTH = [("a/kernel", "prune_mask", "mask"), ("b/kernel", "prune_mask", "mask")]
LOST = {
    "before the optimizer": (optax.chain(clipjax.prune_mask(0.5), optax.adam(1e-2)), BOTH),
    "before a decay": (after(clipjax.prune_mask(0.5), optax.add_decayed_weights(0.1)), BOTH),
    "second of a kind": (
        after(clipjax.prune_mask(0.25), clipjax.prune_mask(0.5), optax.add_decayed_weights(0.1)),
        [*BOTH, *((path, "prune_mask_1", kind) for path, _, kind in BOTH)],
    ),
    "a quantizer before a clamp": (
        after(clipjax.fake_quantize(4), clipjax.clamp_weights(0.3)),
        [("a/kernel", "fake_quantize", "grid"), ("b/kernel", "fake_quantize", "grid")],
    ),
    "a bound": (
        after(clipjax.clamp_weights(0.3, where=lambda path, leaf: path == "a/kernel"), optax.add_decayed_weights(0.1)),
        [("a/kernel", "clamp_weights", "bound")],
    ),
    "your own": (
        optax.chain(clipjax.project(lambda tree: jax.tree.map(jnp.abs, tree)), optax.sgd(1e-2)),
        [(path, "project", "projection") for path in ("a/bias", "a/kernel", "b/kernel")],
    ),
}


@pytest.mark.parametrize(("tx", "expected"), LOST.values(), ids=LOST)
def test_what_does_not_hold_is_named(tx, expected):
    params, state = train(tx)
    violations = clipjax.check(params, state, tx)
    assert found(violations) == expected
    assert all(v.entries > 0 and v.distance > 0 for v in violations)
    with pytest.raises(ValueError, match=r"`params` must be in the sets(.|\n)*" + expected[0][1]):
        clipjax.check(params, state, tx, raise_=True)


def test_entries_and_distance_are_those_of_the_params():
    params, state = train(after(clipjax.prune_mask(0.5)))
    params["a"]["kernel"] = params["a"]["kernel"] + 0.25
    (violation,) = clipjax.check(params, state)
    kept = np.asarray(state[1].projection.mask["a"]["kernel"])
    assert violation[:4] == ("a/kernel", "prune_mask", "mask", int((~kept).sum())) and violation.distance == 0.25


def test_what_a_state_does_not_show_is_unchecked():
    """Without `tx`: where a clamp acts, what a projection of your own is, how large blocks are."""
    tx = after(
        clipjax.clamp_weights(0.3, where=lambda path, leaf: path == "a/kernel"),
        clipjax.project(projections.identity()),
        clipjax.prune_mask(0.5, structure=structures.block(3, 4), where=lambda path, leaf: path == "b/kernel"),
    )
    params, state = train(tx)
    expected = [("b/kernel", "clamp_weights"), ("", "project"), ("b/kernel", "prune_mask")]
    assert found(clipjax.check(params, state, raise_=True)) == [(*names, "unchecked") for names in expected]
    multi = optax.MultiSteps(after(clipjax.prune_mask(0.5)), 2).gradient_transformation()
    params, state = train(multi)
    assert found(clipjax.check(params, state, multi)) == [("", "tx", "unchecked")]


def test_a_leaf_that_is_nearly_empty_beside_its_pool_is_flagged():
    params = {"body": {"kernel": KERNEL}, "head": {"kernel": KERNEL / 1e6}}
    tx = after(clipjax.prune_mask(0.5))
    params, state = train(tx, params=params)
    for violations in (clipjax.check(params, state, tx, raise_=True), clipjax.check(params, state)):
        assert found(violations) == [("head/kernel", "prune_mask", "nearly empty")]


# hold_once

README = optax.chain(
    clipjax.clip_norm(1.0),
    optax.adamw(1e-2, weight_decay=0.1),
    clipjax.clamp_weights(optax.linear_schedule(9.0, 0.5, 50)),
    clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.8, 3, 100), every=10, stop=100, scope="leaf"),
    clipjax.fake_quantize(bits=4, start=120),
)


def test_hold_once_is_the_projection_as_at_stop():
    """Final values of schedules, no decay, exactly on the grid from far outside, and the other states untouched."""
    far = jax.tree.map(lambda p: 100 * p, PARAMS)
    params, state = clipjax.hold_once(README, far)
    assert clipjax.check(params, state, README) == []
    kernels = np.concatenate([np.ravel(layer["kernel"]) for layer in params.values()])
    assert (
        np.sum(kernels == 0) >= 2 * round(0.8 * 256) and np.abs(kernels).max() <= 0.5 and len(np.unique(kernels)) <= 15
    )
    codes = clipjax.quantized(params, state)
    chex.assert_trees_all_equal(clipjax.dequantize(codes["b"]["kernel"]), params["b"]["kernel"])
    chex.assert_trees_all_equal(params["a"]["bias"], PARAMS["a"]["bias"])
    chex.assert_trees_all_equal(state[1], README.init(far)[1])
    again, _ = clipjax.hold_once(README, params, state)
    chex.assert_trees_all_equal(again, params)


def test_hold_once_holds_an_average_with_the_masks_and_grids_of_its_run():
    tx = after(clipjax.prune_mask(0.5, every=1, stop=3), clipjax.fake_quantize(4, every=2))
    params, state = train(tx, 6)
    average = jax.tree.map(lambda p, q: 0.5 * p + 0.5 * q, params, PARAMS)
    with pytest.raises(ValueError, match=r"(?s)`params` must be on the grid.*a/kernel.*between its levels, by up to"):
        clipjax.quantized(average, state)
    held, after_it = clipjax.hold_once(tx, average, state)
    chex.assert_trees_all_equal(after_it[1].projection, state[1].projection)
    chex.assert_trees_all_equal(after_it[2].projection, state[2].projection)
    assert clipjax.check(held, after_it, tx) == []
    mask = np.asarray(state[1].projection.mask["a"]["kernel"])
    chex.assert_trees_all_equal(np.asarray(held["a"]["kernel"])[~mask], np.zeros((~mask).sum(), np.float32))


def test_hold_once_chooses_what_the_run_had_not_chosen_yet():
    tx = after(clipjax.prune_mask(0.5), clipjax.fake_quantize(2, start=50))
    params, state = train(tx, 2)
    held, after_it = clipjax.hold_once(tx, params, state)
    assert len(np.unique(held["a"]["kernel"])) == 3 and clipjax.check(held, after_it, tx) == []


def test_a_transformation_that_picks_nothing_has_nothing_to_check():
    nothing = clipjax.prune_mask(0.5, structure=structures.unit(groups=()))
    tx = optax.chain(nothing, clipjax.fake_quantize(4))
    with pytest.warns(UserWarning, match=r"does nothing.*Analysis\.inexact"):
        params, state = clipjax.hold_once(tx, {"kernel": jnp.arange(12.0).reshape(3, 4)})
    assert clipjax.check(params, state) == []


def test_hold_once_with_inner_scores_and_your_own_projection():
    """Inside of `inner=` first; gradient scores take `grad=`; a plain function is called as it is."""
    inner = clipjax.fake_quantize(3, inner=after(clipjax.clamp_weights(0.5)))
    held, state = clipjax.hold_once(inner, PARAMS)
    assert np.abs(held["a"]["kernel"]).max() <= 0.5 and clipjax.check(held, state, inner) == []
    taylor = clipjax.prune_mask(0.5, score=clipjax.scores.taylor(), where=lambda path, leaf: path == "a/kernel")
    grads = {"a": {"bias": jnp.zeros(16), "kernel": 1 / KERNEL.at[0].set(1e9)}, "b": {"kernel": KERNEL.T}}
    held, _ = clipjax.hold_once(taylor, PARAMS, grad=grads)
    assert not held["a"]["kernel"][0].any()
    held, _ = clipjax.hold_once(clipjax.project(lambda tree: jax.tree.map(jnp.abs, tree)), PARAMS)
    chex.assert_trees_all_equal(held, jax.tree.map(jnp.abs, PARAMS))


@pytest.mark.parametrize("tx", [optax.adam(1e-3), optax.MultiSteps(after(clipjax.prune_mask(0.5)), 2)])
def test_hold_once_says_where_it_reaches_nothing(tx):
    with pytest.raises(ValueError, match="`tx` must have weight transformations that a call of it reaches"):
        clipjax.hold_once(getattr(tx, "gradient_transformation", lambda: tx)(), PARAMS)


def test_the_state_of_an_nnx_optimizer_is_read_and_comes_back_in_its_boxes():
    """`nnx.Optimizer` keeps variables, and gives its transformation arrays."""
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    tx = after(clipjax.prune_mask(0.5), clipjax.fake_quantize(4))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    params = nnx.state(model, nnx.Param)
    assert clipjax.check(params, optimizer.opt_state, tx) == []
    average = jax.tree.map(lambda p: 0.9 * p, params)
    kinds = [violation.kind for violation in clipjax.check(average, optimizer.opt_state, tx)]
    assert kinds == ["grid"]
    held, state = clipjax.hold_once(tx, average, optimizer.opt_state)
    assert jax.tree.structure((held, state)) == jax.tree.structure((params, optimizer.opt_state))
    assert clipjax.check(held, state, tx) == []


CHANGED = {
    "in MultiSteps": (
        lambda: optax.MultiSteps(optax.chain(clipjax.prune_mask(0.5), optax.sgd(0.1)), 2).gradient_transformation(),
        [("", "tx", "unchecked"), ("a/kernel", "prune_mask", "mask"), ("b/kernel", "prune_mask", "mask")],
    ),
    "injected": (
        lambda: optax.chain(optax.inject_hyperparams(clipjax.prune_mask)(sparsity=0.5), optax.sgd(0.1)),
        [("a/kernel", "prune_mask", "mask"), ("b/kernel", "prune_mask", "mask")],
    ),
    "in a group": (
        lambda: optax.partition(
            {
                "wrong": optax.chain(clipjax.prune_mask(0.5), optax.sgd(0.1)),
                "right": optax.chain(optax.sgd(0.1), clipjax.prune_mask(0.5)),
            },
            {"a": {"bias": "right", "kernel": "wrong"}, "b": {"kernel": "right"}},
        ),
        [("a/kernel", "prune_mask_1", "mask")],  # groups come in the order of their names
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_does_not_hold_is_found_inside_of_optax_wrappers(name):
    build, expected = CHANGED[name]
    tx = build()
    params, state = train(tx)
    assert sorted(found(clipjax.check(params, state, tx))) == expected
    of_state = [violation for violation in clipjax.check(params, state) if violation.kind != "unchecked"]
    assert sorted(found(of_state)) == [row for row in expected if row[2] != "unchecked"]
