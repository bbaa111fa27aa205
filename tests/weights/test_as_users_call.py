"""Calls of users that once gave a wrong result in silence, an unclear error, or compiled every time."""

import functools

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import formats, projections

PARAMS = {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4)}


def updated(tx, state, params, times=1):
    """Params and state after updates by zero gradients, inside of jit."""
    update = jax.jit(tx.update)
    for _ in range(times):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def zeros(params):
    return int(jnp.sum(params["kernel"] == 0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: clipjax.fake_quantize(4, every=jnp.int32(2)),
        lambda: clipjax.prune_mask(0.5, every=jnp.int32(2)),
        lambda: optax.inject_hyperparams(clipjax.fake_quantize, static_args=("bits",))(bits=4),
    ],
    ids=["quantize", "prune", "injected"],
)
def test_every_may_be_an_array_that_is_known(make):
    tx = make()
    params, state = updated(tx, tx.init(PARAMS), PARAMS, 3)
    assert clipjax.check(params, state, tx) == [] == clipjax.check(params, state)
    assert clipjax.check(*clipjax.hold_once(tx, PARAMS), tx) == []
    assert "kernel" in str(clipjax.summarize(PARAMS, tx=tx))


def test_codes_that_i32_does_not_hold_are_refused():
    params, state = clipjax.hold_once(clipjax.fake_quantize(step=0.001), {"kernel": jnp.array([[3e6, 7.0]])})
    with pytest.raises(ValueError, match=r"`params` must have codes that i32 holds, got 29999"):
        clipjax.quantized(params, state)
    small, state = clipjax.hold_once(clipjax.fake_quantize(step=0.001), {"kernel": jnp.array([[2e6, 7.0]])})
    np.testing.assert_array_equal(clipjax.dequantize(clipjax.quantized(small, state)["kernel"]), small["kernel"])


def test_injected_schedules_have_their_final_values_where_params_are_held_once():
    prune = optax.inject_hyperparams(clipjax.prune_mask)(sparsity=optax.linear_schedule(0, 0.5, 4), stop=4, every=1)
    assert zeros(clipjax.hold_once(prune, PARAMS)[0]) == 6
    clamp = optax.inject_hyperparams(clipjax.clamp_weights)(bound=optax.linear_schedule(0.5, 0.25, 4))
    params, state = clipjax.hold_once(optax.chain(optax.sgd(0.1), clamp), PARAMS)
    assert float(jnp.abs(params["kernel"]).max()) == 0.25
    assert int(state[1].count) == 0  # the run itself is where it was


@pytest.mark.parametrize("radius", [2.0, clipjax.per_leaf(lambda path, leaf: 2.0)], ids=["number", "per leaf"])
def test_another_radius_holds_from_the_next_update_on(radius):
    first, other = (clipjax.project(projections.sphere(r)) for r in (1.0, radius))
    params, state = updated(first, first.init(PARAMS), PARAMS)
    (violation,) = clipjax.check(params, state, other)
    assert violation.kind == "projection"
    params, state = updated(other, state, params)
    np.testing.assert_allclose(jnp.linalg.norm(params["kernel"]), 2.0, rtol=1e-6)
    assert clipjax.check(params, state, other) == []


def test_a_schedule_with_another_end_refreshes_past_its_stop():
    def prune(last):
        return clipjax.prune_mask(optax.linear_schedule(0.0, last, 4), every=1, stop=4)

    tx = prune(0.5)
    params, state = updated(tx, tx.init(PARAMS), PARAMS, 6)
    again, same = updated(tx, state, params)
    chex.assert_trees_all_equal((again, same[2]), (params, state[2]))
    assert (zeros(params), zeros(updated(prune(0.75), state, params)[0])) == (6, 9)


def test_one_sparsity_may_become_one_for_each_leaf_and_the_other_way_round():
    one, each = clipjax.prune_mask(0.5), clipjax.prune_mask(clipjax.per_leaf(lambda path, leaf: 0.75))
    params, state = updated(one, one.init(PARAMS), PARAMS)
    assert zeros(params) == 6
    params, state = updated(each, state, params)
    assert zeros(params) == 9
    assert zeros(updated(one, state, params)[0]) == 9  # what is removed stays so


@pytest.mark.parametrize("last", [50.0, -0.5, np.nan])
def test_a_schedule_that_gives_no_fractions_is_refused(last):
    with pytest.raises(ValueError, match=r"`sparsity` must lie in \[0, 1\).*The schedule has this value at `stop`"):
        clipjax.prune_mask(lambda count: last * count / 4, stop=4)


class Arrays:
    """A function with an array in it, as an Equinox module is, which has no hash."""

    __hash__ = None

    def __init__(self, fn):
        self.fn = fn

    def __call__(self, *args, **extra):
        return self.fn(*args, **extra)


def test_an_optimizer_that_has_no_hash_is_checked_and_held():
    tx = clipjax.prune_mask(0.5)
    tx = optax.GradientTransformationExtraArgs(tx.init, Arrays(tx.update))
    params, state = clipjax.hold_once(tx, PARAMS)
    assert zeros(params) == 6 and clipjax.check(params, state, tx) == []


def test_checking_and_holding_compile_once_for_an_optimizer():
    compiled = []
    listen = functools.partial(lambda found, event, *_, **__: found.append(event), compiled)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        tx = optax.chain(optax.adam(1e-3), clipjax.prune_mask(0.5), clipjax.fake_quantize(4))
        params, state = updated(tx, tx.init(PARAMS), PARAMS)
        for _ in range(2):
            compiled.clear()
            found = (
                clipjax.check(params, state, tx),
                clipjax.hold_once(tx, params, state),
                clipjax.hold_once(tx, params),
            )
            assert found[0] == []
        assert "/jax/core/compile/backend_compile_duration" not in compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    wider = {"kernel": jnp.linspace(-1, 1, 24).reshape(3, 8)}  # another program, with labels of its own
    assert clipjax.check(*clipjax.hold_once(tx, wider), tx) == []
    (violation, *_) = clipjax.check({"kernel": params["kernel"] + 0.01}, state, tx)
    assert violation.path == "kernel"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bits", [4, formats.q4_0()], ids=["grid", "format"])
def test_params_that_are_not_finite_have_no_codes(bits, bad):
    params, state = clipjax.hold_once(clipjax.fake_quantize(bits), {"kernel": jnp.ones((32, 3)).at[1, 2].set(bad)})
    with pytest.raises(ValueError, match=r"`params` must be finite, got 'kernel'\. 1 weights"):
        clipjax.quantized(params, state)


@pytest.mark.parametrize("tx", [clipjax.prune_mask(0.5), clipjax.fake_quantize(4)], ids=["prune", "quantize"])
def test_a_state_of_other_leaves_is_refused_by_check(tx):
    tx = optax.chain(optax.sgd(0.1), tx)
    params, state = updated(tx, tx.init(PARAMS), PARAMS)
    for other in ({}, {"renamed": params["kernel"]}, [params["kernel"]]):
        with pytest.raises(ValueError, match="`state` must belong"):
            clipjax.check(other, state, tx)


def test_a_step_that_is_larger_than_the_array_is_refused():
    x, step = jnp.ones((1, 3)), jnp.ones((4, 3))
    calls = (
        clipjax.round_to_step,
        clipjax.quantize,
        clipjax.dequantize,
        lambda x, step: clipjax.fake_quant(x, step, 4),
    )
    for call in (*calls, lambda x, step: clipjax.quantize(x, 1.0, zero_point=step)):
        with pytest.raises(ValueError, match=r"must broadcast to the array of shape \(1, 3\), got 'shape \(4, 3\)'"):
            call(x, step)
        with pytest.raises(ValueError, match=r"must broadcast to the array of shape \(3,\)"):
            call(x[0], step)
    assert clipjax.quantize(jnp.ones((4, 6)), jnp.full((2, 3), 0.5)).tolist() == [[2] * 6] * 4


@pytest.mark.parametrize("threshold", [{"kernel": 1.0, "Kernel": 1.0}, {"kernel": 1.0, "b": {"kernel": 2.0}}])
def test_a_threshold_for_a_leaf_that_is_not_there_is_refused(threshold):
    with pytest.raises(ValueError, match=r"`threshold` must name leaves of the params, got .'(Kernel|b/kernel)'"):
        clipjax.clip_norm(threshold, per="leaf").init(PARAMS)
    groups = {"a": clipjax.clip_norm(threshold, per="leaf"), "b": optax.identity()}
    both = PARAMS | {"bias": jnp.ones(3)}
    optax.partition(groups, {"kernel": "a", "bias": "b"}).init(both)  # it may name a leaf of the other group


@pytest.mark.parametrize("sharding", ["banana", 5, {"kernel": "cpu"}])
def test_a_sharding_that_is_none_is_refused(sharding):
    with pytest.raises(TypeError, match="`sharding` must be a sharding, a device"):
        clipjax.unpack(clipjax.pack(PARAMS), sharding=sharding)
