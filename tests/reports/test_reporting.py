"""report: names, order and values of the metrics, from any optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections, structures, thresholds

pytestmark = pytest.mark.usefixtures("strict")

PARAMS = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": {"w": jnp.array([[5.0, 0.5]])}}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS)


def metrics(tx, **kwargs):
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    return {key: float(x) for key, x in clipjax.report(state, **kwargs).items()}


def names(found):
    """The transformations in their order, each once."""
    return list(dict.fromkeys(key.split("/")[0] for key in found))


@pytest.mark.parametrize("tx", [optax.sgd(0.1, momentum=0.9), optax.identity()], ids=["momentum", "identity"])
def test_a_state_without_clipjax_transformations_has_no_metrics(tx):
    assert metrics(tx) == {} and clipjax.report(None) == {}


def test_every_transformation_has_its_name_in_the_order_of_the_chain():
    tx = optax.chain(
        clipjax.clip(2.0),
        clipjax.clip_norm(1.0),
        optax.sgd(0.1),
        clipjax.clamp_weights((-1.0, 2.0)),
        clipjax.prune_mask(0.5),
        clipjax.fake_quantize(4),
        clipjax.project(projections.unit_norm()),
    )
    found = metrics(tx)
    assert names(found) == ["clip", "clip_norm", "clamp_weights", "prune_mask", "fake_quantize", "project"]
    assert found["clip/threshold"] == 2.0 and found["project/count"] == 1
    assert (found["clamp_weights/low"], found["clamp_weights/high"]) == (-1.0, 2.0)
    assert found["clip_norm/norm_pre"] == pytest.approx(2 * np.sqrt(6)) and found["clip_norm/norm_post"] == 1.0
    assert found["clip_norm/fraction_clipped"] == found["clip_norm/clipped"] == 1.0


def test_a_second_transformation_of_a_name_is_numbered():
    found = metrics(optax.chain(clipjax.clip_norm(1.0), clipjax.clip_norm(0.5), clipjax.clip_norm(0.25)))
    assert names(found) == ["clip_norm", "clip_norm_1", "clip_norm_2"]
    assert found["clip_norm_2/threshold"] == 0.25


def test_what_is_inside_comes_first():
    inside = optax.chain(clipjax.clip(1.0), optax.sgd(0.1))
    skipping = clipjax.skip_spikes(clipjax.prune_mask(0.5, inner=inside), 1.0)
    found = metrics(clipjax.fake_quantize(4, inner=skipping))
    assert names(found) == ["clip", "prune_mask", "skip_spikes", "fake_quantize"]
    assert found["skip_spikes/skipped"] == found["skip_spikes/fraction_skipped"] == 1.0


def test_per_leaf_keys_are_paths_and_the_whole_is_over_all_entries():
    found = metrics(optax.chain(clipjax.prune_mask(0.5), clipjax.fake_quantize(4, axis=-1)), per_leaf=True)
    assert found["prune_mask/removed"] == 3 and found["prune_mask/sparsity"] == 0.5
    assert found["prune_mask/sparsity/a"] * 4 + found["prune_mask/sparsity/b/w"] * 2 == 3
    assert found["fake_quantize/bits"] == found["fake_quantize/bits/b/w"] == 4
    steps = [found["fake_quantize/step/a"], found["fake_quantize/step/b/w"]]
    assert found["fake_quantize/step"] == pytest.approx(np.mean(steps))


def test_norms_of_leaves_have_an_entry_each():
    found = metrics(clipjax.clip_norm(1.0, per="leaf"), per_leaf=True)
    norms = [found[f"clip_norm/norm_pre/{path}"] for path in ("a", "b/w")]
    np.testing.assert_allclose(norms, [6.0, np.sqrt(18.0)], rtol=1e-6)
    assert found["clip_norm/norm_pre"] == pytest.approx(np.mean(norms))


def test_units_are_counted_where_units_are_removed():
    assert metrics(clipjax.prune_mask(0.5, structure=structures.unit()))["prune_mask/removed"] == 2


@pytest.mark.filterwarnings("ignore:`where` picks no float array")
@pytest.mark.parametrize("factory", [clipjax.prune_mask, clipjax.fake_quantize])
def test_nothing_governed_is_zero(factory):
    found = metrics(factory(0.5 if factory is clipjax.prune_mask else 4, where=lambda path, leaf: False), per_leaf=True)
    assert set(found.values()) == {0.0}


def test_in_jit_and_scan():
    tx = clipjax.clip_norm(thresholds.ema_ratio())
    state = tx.init(PARAMS)

    def step(state, scale):
        _, state = tx.update(jax.tree.map(lambda g: g * scale, GRADS), state)
        return state, clipjax.report(state)

    last, found = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(1.0, 4.0)))(state)
    np.testing.assert_allclose(found["clip_norm/norm_pre"] / found["clip_norm/norm_pre"][0], [1, 2, 3], rtol=1e-6)
    assert float(found["clip_norm/clipped"][-1]) == float(clipjax.report(last)["clip_norm/clipped"])


def test_nothing_is_claimed_before_start_and_the_rest_after_shrink():
    """No bits, no step, no sparsity before the first refresh; the mask that is left when its zeros are cut out."""
    groups = [{"a/kernel": -1, "b/kernel": 0}]
    structure = structures.unit(groups=groups)
    tx = optax.chain(clipjax.prune_mask(0.5, structure=structure, start=1), clipjax.fake_quantize(4, start=1))
    params = {"a": {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}, "b": {"kernel": jnp.ones((4, 3))}}
    state, zeros, seen = tx.init(params), jax.tree.map(jnp.zeros_like, params), []
    for _ in range(2):
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        found = clipjax.report(state, per_leaf=True)
        keys = ("prune_mask/sparsity", "fake_quantize/bits", "fake_quantize/bits/a/kernel")
        seen.append([float(found[key]) for key in keys])
    assert seen == [[0, 0, 0], [0.5, 4, 4]]
    assert float(found["fake_quantize/step"]) > 0
    small = clipjax.shrink(params, groups, state)
    assert float(clipjax.report(small.opt_state)["prune_mask/sparsity"]) == 0
    assert clipjax.check(small.variables, small.opt_state) == []
