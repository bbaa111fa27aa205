"""Optax's wrappers around our transformations, on the inputs of Optax's own suites and to their tolerances.

Conditionality, accumulation, masking and layouts. Rows name a transformation and what it makes of these inputs.
"""

import dataclasses
import itertools

import contract_table as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections

NAN = jnp.array(jnp.nan)
EVERY = {"where": lambda path, leaf: True}

# Each leaves whole numbers from -3 to 3 as they are, so that the values of SGD with a rate of 1 are known.
TRANSPARENT = {
    "clip": lambda: optax.chain(clipjax.clip(2.0), optax.sgd(1.0)),
    "clip_norm": lambda: optax.chain(clipjax.clip_norm(10.0), optax.sgd(1.0)),
    "clamp": lambda: optax.chain(optax.sgd(1.0), clipjax.clamp_weights(3.0)),
    "quantize": lambda: optax.chain(optax.sgd(1.0), clipjax.fake_quantize(4, step=0.5, **EVERY)),
    "master": lambda: clipjax.project(projections.identity(), carry=True, inner=optax.sgd(1.0, momentum=0.0)),
    "mask": lambda: optax.chain(optax.sgd(1.0), clipjax.prune_mask(mask=jnp.array(True))),
}
every_transparent = pytest.mark.parametrize("name", TRANSPARENT)


def steps(tx, params, grads, state=None):
    """The params and states after each gradient, from one compiled update."""
    update = jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@every_transparent
def test_apply_if_finite_rejects_two_and_accepts_the_third(name):
    """0 -> -1, two rejected, -> -2, two rejected, and the third is let through: 5 of 7 were not finite."""
    tx = optax.apply_if_finite(TRANSPARENT[name](), 2)
    one = jnp.ones(())
    path = list(steps(tx, jnp.zeros(()), [one, NAN, NAN, one, NAN, NAN, NAN]))
    assert [float(p) for p, _ in path[:-1]] == [-1, -1, -1, -2, -2, -2]
    assert [int(s.notfinite_count) for _, s in path[:-1]] == [0, 1, 2, 0, 1, 2]
    last, state = path[-1]
    assert int(state.total_notfinite) == 5 and not bool(state.last_finite)
    assert bool(jnp.isnan(last))


# What `scale(2)` and the transformation emit for params 0 and a gradient of 1.
LIMITED = {
    "clip": (lambda: clipjax.clip(1.5), 1.5),
    "clip_norm": (lambda: clipjax.clip_norm(0.5), 0.5),
    "clamp": (lambda: clipjax.clamp_weights(1.25), 1.25),
    "quantize": (lambda: clipjax.fake_quantize(2, step=0.75, **EVERY), 0.75),
    "latent": (lambda: clipjax.project(projections.clamp(1.5), carry=True), 1.5),
}


@pytest.mark.parametrize(
    ("wrap", "after"),
    [(optax.conditionally_transform, 1.0), (optax.conditionally_mask, 0.0)],
    ids=["transform", "mask"],
)
@pytest.mark.parametrize("name", LIMITED)
def test_conditional_wrappers_stop_after_three_updates(name, wrap, after):
    """Then the gradient passes as it is, or nothing does, and the inner state stays: also where a NaN arrives."""
    build, emitted = LIMITED[name]
    tx = wrap(optax.chain(optax.scale(2.0), build()), lambda count: count < 3)
    params, update = jnp.zeros(()), jax.jit(tx.update)
    state, got = tx.init(params), []
    for _ in range(5):
        updates, state = update(jnp.ones(()), state, params)
        got.append(float(updates))
    np.testing.assert_allclose(got, [emitted] * 3 + [after] * 2, rtol=1e-6)
    kept = state.inner_state
    updates, state = update(NAN, state, params)
    assert bool(jnp.isnan(updates)) == (after == 1.0) and float(jnp.nan_to_num(updates)) == 0
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, kept)


@every_transparent
def test_multi_steps_skip_what_is_not_finite_or_too_large(name):
    """Two gradients of 1 make an update of -1; an infinite one, a NaN and one of norm 11 > 10 are not counted."""

    def skip(updates, step, params):
        bad, state = optax.skip_not_finite(updates, step, params)
        large, _ = optax.skip_large_updates(updates, step, params, 100.0)
        return bad | large, state

    tx = optax.MultiSteps(TRANSPARENT[name](), 2, should_skip_update_fn=skip).gradient_transformation()
    grads = [jnp.array(g) for g in (1.0, 1.0, np.inf, np.nan, 11.0, 1.0, 1.0)]
    path = list(steps(tx, jnp.zeros(()), grads))
    assert [float(p) for p, _ in path] == [0, -1, -1, -1, -1, -1, -2]
    assert [int(s.mini_step) for _, s in path] == [1, 0, 0, 0, 0, 1, 0]


@every_transparent
def test_multi_steps_takes_the_mean_and_a_schedule(name):
    """Two updates of one gradient each, then one of the mean of 1, 2, 3, which is 2."""
    multi = optax.MultiSteps(TRANSPARENT[name](), lambda count: jnp.where(count < 2, 1, 3))
    grads = [jnp.array(g) for g in (-1.0, -2.0, 1.0, 2.0, 3.0)]
    path = list(steps(multi.gradient_transformation(), jnp.zeros(()), grads))
    np.testing.assert_allclose([float(p) for p, _ in path], [1, 3, 3, 3, 1], rtol=1e-6)
    assert [bool(multi.has_updated(s)) for _, s in path] == [True, True, False, False, True]


def test_multi_steps_move_nothing_in_between_and_the_loss_falls_at_each():
    """A Dense layer of 7 positive inputs and 10 outputs on 32 rows of ones, 5 updates of 4 gradients each."""
    data = jnp.ones((32, 7))
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(np.abs(rng.normal(size=(7, 10))) / np.sqrt(7), jnp.float32), "bias": jnp.zeros(10)}
    multi = optax.MultiSteps(
        optax.chain(
            clipjax.clip_norm(clipjax.thresholds.zscore()),
            optax.adamw(1e-4, weight_decay=1e-2),
            clipjax.clamp_weights(0.75),
            clipjax.prune_mask(0.5),
        ),
        4,
    )
    loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.square(data @ p["kernel"] + p["bias"]))))
    update, state, losses = jax.jit(multi.update), multi.init(params), []
    for i in range(20):
        value, grads = loss(params)
        updates, state = update(grads, state, params)
        new = optax.apply_updates(params, updates)
        if i % 4 < 3:
            jax.tree.map(np.testing.assert_array_equal, new, params)
        else:
            losses.append(float(value))
            kernel = np.asarray(new["kernel"])
            assert (kernel == 0).sum() == 35 and np.abs(kernel).max() <= 0.75
        params = new
    assert all(later < earlier for earlier, later in itertools.pairwise([*losses, float(loss(params)[0])]))


TREE = jax.tree.map(jnp.asarray, {"a": 1.0, "b": [2.0, 3.0], "c": {"d": 4.0, "e": (5.0, 6.0)}})
TENTHS = jax.tree.map(lambda x: x / 10, TREE)
MASK = {"a": True, "b": [False, True], "c": {"d": True, "e": (False, True)}}
PREFIX = {"a": True, "b": False, "c": {"d": False, "e": True}}
# Where the mask is True: what the transformation makes of an update u of a param p.
MASKED = {
    "clip": (lambda: clipjax.clip(0.25), lambda u, p: min(u, 0.25)),
    "clip_leaf": (lambda: clipjax.clip_norm(0.25, per="leaf"), lambda u, p: min(u, 0.25)),
    "clamp": (lambda: clipjax.clamp_weights(3.0), lambda u, p: min(p + u, 3) - p),
    "quantize": (lambda: clipjax.fake_quantize(step=1.0, **EVERY), lambda u, p: np.round(p + u) - p),
    "zero": (lambda: clipjax.prune_mask(mask=jax.tree.map(lambda x: jnp.array(False), TREE)), lambda u, p: -p),
}


@pytest.mark.parametrize("mask", [MASK, PREFIX, lambda params: MASK], ids=["mask", "prefix", "function"])
@pytest.mark.parametrize("name", MASKED)
def test_masked_acts_where_the_mask_is_true(name, mask):
    build, wanted = MASKED[name]
    tx = optax.masked(build(), mask)
    state = tx.init(TREE)
    updates, _ = tx.update(TENTHS, state, TREE)
    full = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(full) == jax.tree.structure(state)
    chosen = mask(TREE) if callable(mask) else mask
    picks = jax.tree.leaves(jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), chosen, TREE))
    expected = [
        wanted(float(u), float(p)) if m else float(u)
        for u, p, m in zip(jax.tree.leaves(TENTHS), jax.tree.leaves(TREE), picks, strict=True)
    ]
    np.testing.assert_allclose(jax.tree.leaves(updates), expected, rtol=1e-6)


def test_masks_in_masks():
    """Kernels alone, and of these not the second layer's: the others pass."""
    sizes = {"linear_1": (1, 1), "linear_2": (1, 2), "linear_3": (2, 3)}
    params = {name: {"w": jnp.full(shape, 2.0), "b": jnp.full(shape[1], 2.0)} for name, shape in sizes.items()}
    layers = {"linear_1": True, "linear_2": False, "linear_3": True}
    tx = optax.masked(optax.masked(clipjax.clamp_weights(1.0), layers), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    updates, _ = tx.update(params, tx.init(params), params)
    for name, shape in sizes.items():
        np.testing.assert_array_equal(updates[name]["w"], np.full(shape, 2 if name == "linear_2" else -1))
        np.testing.assert_array_equal(updates[name]["b"], np.full(shape[1], 2))


@dataclasses.dataclass
class Module:
    """A model that is a pytree and can be called, and does not say its keys."""

    w: jax.Array

    def __call__(self, x):
        return self.w @ x


jax.tree_util.register_pytree_node(Module, lambda m: ((m.w,), None), lambda _, children: Module(*children))
# A group's own tree, and a mask's, belong to other params.
ROWS = pytest.mark.parametrize("row", table.paths(table.ROWS))


@pytest.mark.filterwarnings("ignore:`where` picks no float array")
@ROWS
def test_empty_containers_and_callable_models(row):
    """An empty list, tuple or dict, in a mask and in a partition, and a model that a schedule might be taken for."""
    for empty in ([], (), {}):
        for tx in (optax.masked(row.tx(), empty), optax.partition({0: row.tx()}, lambda _: 0)):
            assert tx.update(empty, tx.init(empty), empty)[0] == empty
    model = Module(jnp.array([[1.0, -2.0, 3.0], [0.5, 2.0, -1.0]]))
    for tx in (row.tx(), optax.masked(row.tx(), Module(True))):
        state = tx.init(model)
        updates, new = jax.eval_shape(tx.update, model, state, model)
        assert isinstance(updates, Module) and updates.w.shape == (2, 3)
        assert jax.tree.structure(new) == jax.tree.structure(state)


FLAT = {
    "clip": lambda: clipjax.clip(10.0),
    "clip_norm": lambda: clipjax.clip_norm(10.0),
    "clip_zscore": lambda: clipjax.clip_norm(clipjax.thresholds.zscore()),
    "clamp": lambda: optax.chain(optax.sgd(1e-2, 0.0), clipjax.clamp_weights(1.5)),
    "quantize": lambda: optax.chain(optax.sgd(1e-2, 0.0), clipjax.fake_quantize(4, step=0.25, **EVERY)),
    "master": lambda: clipjax.project(projections.identity(), carry=True, inner=optax.sgd(1e-2, 0.0)),
}


@pytest.mark.parametrize("name", FLAT)
def test_flatten_changes_no_result(name):
    """`optax.flatten` hands one long array on: entries do not care, and a norm is that of all."""
    params = (jnp.array(2.0), jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    grads = (jnp.array(1.0), jnp.array([500.0, 5.0]), jnp.array([300.0, 3.0]))
    got = []
    for tx in (FLAT[name](), optax.flatten(FLAT[name]())):
        updates, _ = tx.update(grads, tx.init(params), params)
        got.append(optax.apply_updates(params, updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7), *got)
