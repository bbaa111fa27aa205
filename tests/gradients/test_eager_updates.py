"""Updates outside of jit, as notebooks begin: nothing is compiled twice, and nothing stays behind in memory."""

import gc

import jax
import jax.monitoring
import jax.numpy as jnp
import optax
import pytest

import clipjax
from clipjax import selections, thresholds

GRADS = {"a": jnp.ones((4, 3)), "b": jnp.full(3, 2.0, jnp.bfloat16)}
COMPILED = "/jax/core/compile/backend_compile_duration"
SEEN: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: SEEN.append(event))

zscore, mine = thresholds.zscore(warmup=1), thresholds.percentile(50, window=4)
BUILD = {
    "clip": lambda c: clipjax.clip(c),
    "clip_spam": lambda c: clipjax.clip(thresholds.spam()),
    "clip_carry": lambda c: clipjax.clip(c, carry=True),
    "clip_random": lambda c: clipjax.clip(c, select=selections.bernoulli(0.5)),
    "clip_norm": lambda c: clipjax.clip_norm(c),
    "clip_norm_one": lambda c: clipjax.clip_norm(c, ord=3),
    "clip_norm_leaf": lambda c: clipjax.clip_norm({"a": c, "b": lambda count: 0.1 * count}, per="leaf"),
    "clip_norm_schedule": lambda c: clipjax.clip_norm(lambda count: 1.0 / (1 + count)),
    "zscore": lambda c: clipjax.clip_norm(zscore),
    "percentile_leaf": lambda c: clipjax.clip_norm(mine, per="leaf"),
    "skip_spikes": lambda c: clipjax.skip_spikes(optax.sgd(0.1), c),
}


def compiled(name, again):
    """Programs compiled, live arrays more, and the change of the updates, over some updates behind the first three."""
    tx = BUILD[name](1.0)
    state = tx.init(GRADS)
    for _ in range(3):
        updates, state = tx.update(GRADS, state)
    SEEN.clear()
    gc.collect()
    before = len(jax.live_arrays())
    for _ in range(again):
        updates, state = tx.update(GRADS, state)
    gc.collect()
    return SEEN.count(COMPILED), len(jax.live_arrays()) - before


@pytest.mark.parametrize("name", BUILD)
def test_an_eager_update_compiles_nothing_that_the_first_ones_have(name):
    assert compiled(name, again=5) == (0, 0)


@pytest.mark.parametrize("name", ["clip", "clip_norm", "clip_norm_leaf"])
def test_a_new_transformation_of_another_threshold_compiles_nothing_either(name):
    """`optax.inject_hyperparams` makes one at every update."""
    compiled(name, again=0)
    for threshold in (0.5, 2.0):
        tx = BUILD[name](threshold)
        SEEN.clear()
        tx.update(GRADS, tx.init(GRADS))
        assert SEEN.count(COMPILED) == 0


def test_a_rule_that_cannot_be_hashed_is_found_again():
    class Ruled:
        """Methods of an object without a hash, as those of a module with arrays are."""

        __hash__ = None

        def init(self):
            return jnp.zeros(())

        def update(self, norm, state):
            return jnp.maximum(state, 1.0), norm

    tx = clipjax.clip_norm(clipjax.Rule(Ruled().init, Ruled().update))
    state = tx.init(GRADS)
    for _ in range(4):
        SEEN.clear()
        updates, state = tx.update(GRADS, state)
    assert SEEN.count(COMPILED) == 0
    assert float(state.threshold) == pytest.approx(24**0.5) and int(state.clipped) == 1
