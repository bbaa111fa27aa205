"""Updates of the weight side outside of jit, as notebooks begin: nothing is compiled twice, nothing stays in memory."""

import gc

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections, roundings, scores, selections, steps, structures, widths

COMPILED = "/jax/core/compile/backend_compile_duration"
SEEN: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: SEEN.append(event))

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": jnp.asarray(RNG.integers(-64, 64, (8, 6)) / 64, jnp.float32), "bias": jnp.ones(6)},
    "b": {"kernel": jnp.asarray(RNG.integers(-64, 64, (6, 4)) / 64, jnp.bfloat16), "none": None},
}
GRADS = jax.tree.map(lambda p: p / 8, PARAMS)
RAMP = optax.polynomial_schedule(0.0, 0.75, 3, 4)
SGD = optax.sgd(0.25)


def behind(tx):
    return optax.chain(SGD, tx)


BUILD = {
    "clamp": lambda: behind(clipjax.clamp_weights(lambda count: 1 - 0.125 * count)),
    "project": lambda: behind(clipjax.project(projections.max_norm(1.0, axis=0))),
    "master": lambda: clipjax.project(projections.identity(), carry=True, inner=SGD),
    "prune": lambda: behind(clipjax.prune_mask(RAMP, every=2, stop=4)),
    "prune_always": lambda: behind(clipjax.prune_mask(0.5, every=1, carry=True)),
    "prune_units": lambda: behind(clipjax.prune_mask(0.5, structure=structures.unit(), score=scores.random())),
    "prune_some": lambda: behind(clipjax.prune_mask(0.5, select=selections.bernoulli(0.5), every=2, stop=4)),
    "rigl": lambda: clipjax.prune_mask(0.5, regrow=0.25, every=2, stop=4, inner=optax.sgd(0.25, momentum=0.5)),
    "quantize": lambda: behind(clipjax.fake_quantize(4, every=2)),
    "quantize_soft": lambda: behind(clipjax.fake_quantize(3, axis=-1, rounding=roundings.parq(4), every=2)),
    "widths": lambda: clipjax.fake_quantize(widths.sqnr(20.0), step=steps.absmax(), every=2, inner=SGD),
    "chain": lambda: optax.chain(
        clipjax.clip(0.0625),
        SGD,
        clipjax.clamp_weights(0.5),
        clipjax.prune_mask(RAMP, every=2, stop=4),
        clipjax.fake_quantize(4, every=2, stop=4),
    ),
}


@pytest.mark.parametrize("name", BUILD)
def test_an_eager_update_compiles_nothing_that_the_first_one_has(name):
    """Updates 2 to 8, refreshes among them."""
    tx, params = BUILD[name](), PARAMS
    state, seen, live = tx.init(params), [], []
    for _ in range(8):
        SEEN.clear()
        updates, state = tx.update(GRADS, state, params)
        seen.append(SEEN.count(COMPILED))
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        gc.collect()
        live.append(len(jax.live_arrays()))
    assert seen[1:] == [0] * 7
    assert live[2:] == [live[2]] * 6
    # the same values as under jit, to the bit: all of this is exact
    update, again, expected = jax.jit(tx.update), tx.init(PARAMS), PARAMS
    for _ in range(8):
        updates, again = update(GRADS, again, expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_equal(params, expected)


def test_derivatives_and_sweeps_outside_of_jit():
    """With a refresh in them; a `start` that differs along a batch leaves the branch to `lax.cond`."""
    params = {"kernel": PARAMS["a"]["kernel"]}

    def moved(params, start=0, grid=()):
        tx = optax.chain(SGD, clipjax.prune_mask(0.5, start=start), *grid)
        return optax.apply_updates(params, tx.update(params, tx.init(params), params)[0])["kernel"]

    grid = (clipjax.fake_quantize(4, step=steps.absmax()),)
    slope = jax.grad(lambda params: jnp.sum(jnp.square(moved(params, grid=grid))))
    chex.assert_trees_all_equal(slope(params), jax.jit(slope)(params))
    rows = jax.vmap(moved, in_axes=(None, 0))(params, jnp.arange(2))
    np.testing.assert_array_equal(rows, [moved(params), 0.75 * params["kernel"]])
    assert np.mean(rows[0] == 0) >= 0.5
