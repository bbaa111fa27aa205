"""A run that goes on with other arguments: what they ask for holds at once, or one sentence says to start anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import structures, thresholds

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
PARAMS = {"body": {"kernel": jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32), "bias": jnp.zeros(8)}}


def after(tx, other, params=PARAMS):
    """Params and state after an update of one transformation, and then two of another one with its state."""
    state = tx.init(params)
    for one in (tx, other, other):
        updates, state = jax.jit(one.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("options", [{"stop": 0, "axis": -1}, {"carry": False, "group": 4}], ids=str)
@pytest.mark.parametrize("bits", [2, 6], ids=["fewer", "more"])
def test_another_width_refreshes_at_once(bits, options):
    params, state = after(clipjax.fake_quantize(4, **options), clipjax.fake_quantize(bits, **options))
    kernel = clipjax.quantized(params, state)["body"]["kernel"]
    assert kernel.bits == bits and clipjax.report(state)["fake_quantize/bits"] == bits
    assert int(jnp.abs(kernel.codes).max()) <= 2 ** (bits - 1) - 1
    if options.get("carry", True):  # the latent weights are still there
        assert int(jnp.abs(kernel.codes).max()) == 2 ** (bits - 1) - 1


def test_another_number_as_step_refreshes_at_once_and_the_same_one_does_not():
    params, state = after(clipjax.fake_quantize(4, step=0.125), clipjax.fake_quantize(4, step=0.5))
    assert jnp.all(params["body"]["kernel"] % 0.5 == 0) and float(state.projection.step["body"]["kernel"]) == 0.5
    chain = lambda bound: optax.chain(clipjax.clamp_weights(bound), clipjax.fake_quantize(4, step=0.125, every=None))
    _, state = after(chain(1.0), chain(0.25))
    assert float(state[1].projection.high["body"]["kernel"]) == 7.0  # a refresh would leave out levels beyond .25


def test_a_step_that_follows_a_schedule_is_followed():
    build = optax.inject_hyperparams(lambda step: clipjax.fake_quantize(4, step=step))
    tx = build(step=optax.linear_schedule(0.125, 0.5, 3))
    params, state, steps = PARAMS, tx.init(PARAMS), []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        steps.append(float(clipjax.report(state)["fake_quantize/step"]))
    assert steps == [0.125, 0.25, 0.375, 0.5]


def test_another_n_of_m_refreshes_at_once():
    two, one = (clipjax.prune_mask(structure=structures.n_of_m(n, 4)) for n in (2, 1))
    params, state = after(two, one)
    kept = (params["body"]["kernel"] != 0).reshape(4, 4, 8).sum(1)
    assert (kept == 1).all() and float(clipjax.report(state)["prune_mask/sparsity"]) == 0.75
    mask = after(two, two)[1].projection.mask["body"]["kernel"]
    assert (mask.reshape(4, 4, 8).sum(1) == 2).all()


HEAD = PARAMS | {"head": {"kernel": PARAMS["body"]["kernel"].T}}
OTHERS = {
    "axis": (clipjax.fake_quantize(4), clipjax.fake_quantize(4, axis=-1), r"steps of shape \(\)"),
    "group": (clipjax.fake_quantize(4, group=4), clipjax.fake_quantize(4, group=8), r"steps of shape \(4, 1, 8\)"),
    "structure": (
        clipjax.prune_mask(0.5),
        clipjax.prune_mask(0.5, structure=structures.block(2, 2)),
        "a mask of other units",
    ),
    "where": (
        clipjax.prune_mask(0.5),
        clipjax.prune_mask(0.5, where=lambda path, leaf: path == "head/kernel"),
        "2 masks for 1 leaves",
    ),
    "window": (
        clipjax.clip_norm(thresholds.percentile(50, window=8)),
        clipjax.clip_norm(thresholds.percentile(50, window=4)),
        "of another rule",
    ),
    "rule": (clipjax.clip_norm(thresholds.ema_ratio()), clipjax.clip_norm(thresholds.zscore()), "of another rule"),
    "number": (clipjax.clip_norm(1.0), clipjax.skip_spikes(optax.identity(), 1.0), "ClipNormState"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_that_does_not_fit_says_to_start_anew(name):
    tx, other, got = OTHERS[name]
    with pytest.raises((ValueError, TypeError), match=rf"^`state` must be.* got .*{got}"):
        after(tx, other, HEAD)
