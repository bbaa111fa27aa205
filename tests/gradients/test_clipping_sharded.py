"""Clipping on eight host devices: under jit with sharded gradients and inside `shard_map`, as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import clipjax
from clipjax import thresholds

RULES = {
    "constant": 0.7,
    "zscore": thresholds.zscore(0.5, warmup=2),
    "ema_ratio": thresholds.ema_ratio(1.05, 0.9, warmup=2),
    "percentile": thresholds.percentile(50, window=4),
    "mean_sigma": thresholds.mean_sigma(0.5, window=2),
    "quantile_track": thresholds.quantile_track(0.5),
}
SPECS = {"split": P("data"), "both": P(("data", "model")), "whole": P()}
AXES = ("data", "model")
STEPS = 5
MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", " sort(", "gather(")


def gradients(step):
    """The first half of the steps is calm, later ones are longer."""
    rng = np.random.default_rng(step)
    size = 0.1 if step < 2 else 0.3 * step
    shapes = {"split": (8, 4), "both": (16,), "whole": (3, 5)}
    return {name: jnp.asarray(rng.normal(size=shape) * size, jnp.float32) for name, shape in shapes.items()}


@functools.cache
def mesh():
    return jax.make_mesh((4, 2), AXES)


def sharded(grads):
    return {name: jax.device_put(g, NamedSharding(mesh(), SPECS[name])) for name, g in grads.items()}


def run(update, state, place=lambda grads: grads):
    """Updates, thresholds and norms of every step."""
    seen = []
    for step in range(STEPS):
        updates, state = update(place(gradients(step)), state)
        seen.append((updates, state.threshold, state.norm_pre, state.rule))
    return seen


def assert_same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, expected)


@pytest.mark.parametrize("per", ["global", "leaf"])
@pytest.mark.parametrize("name", RULES)
def test_jit_with_sharded_gradients_equals_one_device(name, per):
    tx = clipjax.clip_norm(RULES[name], per=per)
    expected = run(jax.jit(tx.update), tx.init(gradients(0)))
    assert any(bool(jnp.any(jnp.isfinite(limit) & (norm > limit))) for _, limit, norm, _ in expected), "nothing clipped"
    assert_same(run(jax.jit(tx.update), tx.init(sharded(gradients(0))), sharded), expected)


@pytest.mark.parametrize("name", RULES)
def test_compiled_program_has_scalar_reductions_only(name):
    """What crosses devices is the sum of squares: one number for each scale that the norm may need."""
    tx = clipjax.clip_norm(RULES[name])
    grads = sharded(gradients(0))
    text = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
    assert not [line for line in text.splitlines() if any(word in line for word in MOVES)]
    reductions = [line.split("all-reduce(")[0] for line in text.splitlines() if "all-reduce(" in line]
    assert reductions and all("[]" in line and "f32[1" not in line for line in reductions), reductions


@pytest.mark.parametrize("ord", [0.5, 2, 3, np.inf])
@pytest.mark.parametrize("per", ["global", "leaf"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_axis_name_adds_up_what_is_sharded(check_vma, per, ord):
    """Replicated leaves count once: by the type of the array, or by `per_leaf` where check_vma=False hides that."""
    by_leaf = clipjax.per_leaf(lambda path, leaf: {"split": "data", "both": AXES, "whole": None}[path])
    inside = clipjax.clip_norm(0.7, per=per, ord=ord, axis_name=AXES if check_vma else by_leaf)
    state = inside.init(gradients(0))
    specs = (SPECS, jax.tree.map(lambda _: P(), state))
    update = jax.shard_map(inside.update, mesh=mesh(), in_specs=specs, out_specs=specs, check_vma=check_vma)
    outside = clipjax.clip_norm(0.7, per=per, ord=ord)
    expected = run(jax.jit(outside.update), outside.init(gradients(0)))
    assert_same(run(jax.jit(update), state, sharded), expected)


@pytest.mark.parametrize("name", RULES)
def test_shard_map_with_a_rule(name):
    inside, outside = clipjax.clip_norm(RULES[name], axis_name=AXES), clipjax.clip_norm(RULES[name])
    state = inside.init(gradients(0))
    specs = (SPECS, jax.tree.map(lambda _: P(), state))
    update = jax.shard_map(inside.update, mesh=mesh(), in_specs=specs, out_specs=specs)
    assert_same(run(jax.jit(update), state, sharded), run(jax.jit(outside.update), outside.init(gradients(0))))


def test_shard_map_without_types_takes_every_leaf_as_sharded():
    """`check_vma=False` and plain names: right where all leaves are sharded, as documented."""
    tx = clipjax.clip_norm(0.7, axis_name="data")
    grads = {"split": gradients(3)["split"]}
    state = tx.init(grads)
    specs = ({"split": P("data")}, jax.tree.map(lambda _: P(), state))
    update = jax.shard_map(tx.update, mesh=mesh(), in_specs=specs, out_specs=specs, check_vma=False)
    placed = {"split": jax.device_put(grads["split"], NamedSharding(mesh(), P("data")))}
    _, new = jax.jit(update)(placed, state)
    np.testing.assert_allclose(new.norm_pre, np.linalg.norm(grads["split"]), rtol=1e-6)


def test_shard_map_skips_on_all_devices_or_none():
    """The norm is that of all shards, so that every device decides the same."""
    tx = clipjax.skip_spikes(optax.sgd(1.0), 5.0, axis_name="data")
    state = tx.init(jnp.zeros(8))
    specs = (P("data"), jax.tree.map(lambda _: P(), state))
    update = jax.jit(jax.shard_map(tx.update, mesh=mesh(), in_specs=specs, out_specs=specs))
    for grads, skipped in ((jnp.arange(8.0), 1), (jnp.arange(8.0) / 10, 0)):
        updates, new = update(jax.device_put(grads, NamedSharding(mesh(), P("data"))), state)
        assert int(new.skipped) == skipped
        np.testing.assert_array_equal(updates, np.zeros(8) if skipped else -grads)


def test_shard_map_element_clip_needs_no_axis():
    tx = clipjax.clip(thresholds.spam(theta=1.5, decay=0.5))
    state = tx.init(sharded(gradients(0)))
    by_shape = state._replace(count=P(), threshold=P(), rule=SPECS)
    update = jax.shard_map(tx.update, mesh=mesh(), in_specs=(SPECS, by_shape), out_specs=(SPECS, by_shape))
    alone = tx.init(gradients(0))
    for step in range(3):
        got, state = jax.jit(update)(sharded(gradients(step)), state)
        expected, alone = jax.jit(tx.update)(gradients(step), alone)
        assert_same(got, expected)


@pytest.mark.parametrize("tx", [clipjax.clip_norm(1.0), clipjax.clip_norm(1.0, per="leaf")], ids=["global", "leaf"])
def test_shard_map_without_names_clips_by_the_norms_of_each_device(tx):
    across = {"mesh": jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)), "in_specs": P("d")}
    local = jax.shard_map(lambda g: tx.update(g, tx.init(g))[0], **across, out_specs=P("d"))
    np.testing.assert_array_equal(jax.jit(local)(jnp.arange(8.0)), [0, 1, 1, 1, 1, 1, 1, 1])
