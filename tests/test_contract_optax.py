"""Contract rule 2: every transformation is an Optax citizen, in every wrapper that Optax has for transformations."""

import functools
import inspect

import contract_table as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import clipjax

every_path = pytest.mark.parametrize("row", table.paths(table.ALL))
every_kind = pytest.mark.parametrize("row", table.kinds(table.ALL))
SGD = optax.sgd(0.25)  # a power of two: the same result fused or not


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def run(tx, grads, params=None, state=None):
    """Params and state after each gradient of a list."""
    params = table.params() if params is None else params
    state = jax.jit(tx.init)(params) if state is None else state
    step = jax.jit(functools.partial(table.step, tx))
    for g in grads:
        params, state = step(params, state, g)
    return params, state


def each(n=3):
    return [table.at(table.gradients(), i) for i in range(n)]


@functools.cache
def plain(name, n=3):
    """The transformation in a bare chain with SGD."""
    return run(find(name).tx(SGD), each(n))


def find(name):
    return next(m for m in table.ALL if m.name == name)


@pytest.mark.filterwarnings("ignore:`where` picks no float array")
@pytest.mark.parametrize("row", table.paths([m for m in table.ROWS if m.side in ("weight", "inner")]))
def test_a_group_without_any_leaf_that_is_governed_passes(row):
    """As the biases of `optax.partition`: every state exists, and an update goes through unchanged."""
    params = {"dense": {"bias": jnp.ones(3, jnp.int32)}}
    tx = row.tx(optax.identity())
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert updates == jax.eval_shape(lambda: params)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@every_path
def test_is_a_transformation_with_extra_args(row):
    """`update(updates, state, params=None, **extra)`; extra arguments of other transformations pass by."""
    tx = row.build(SGD, **{k: v[0] for k, v in row.numbers.items()})
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert inspect.signature(tx.update).parameters["params"].default is None
    params = table.params()
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, grad=p, value=jnp.float32(1), note=2), params)


@every_kind
def test_masked_and_partition_equal_the_transformation_on_the_subtree(row):
    """Both hand over MaskedNodes; the gradient that `with_gradient` gives is the unmasked tree."""
    without = {"out": {"kernel": None}}
    half = [{"dense": g["dense"]} | without for g in each(2)]
    expected, _ = run(row.tx(SGD), half, {"dense": table.params()["dense"]} | without)
    masked = row.tx(SGD, wrap=lambda tx: optax.masked(tx, {"dense": True, "out": False}))
    inside = row._replace(gradient=False).tx(SGD)
    parts = optax.partition({"held": inside, "free": SGD}, {"dense": "held", "out": "free"})
    for wrapped in (masked, clipjax.with_gradient(parts) if row.gradient else parts):
        params, _ = run(wrapped, each(2))
        if row.name == "quantize_parq":  # between levels, two programs may round differently
            np.testing.assert_allclose(params["dense"]["kernel"], expected["dense"]["kernel"], rtol=1e-6)
        else:
            equal(params["dense"], expected["dense"])


@every_kind
def test_multi_steps_from_the_first_emitted_update(row):
    """Every second update is emitted; it is the transformation's on the mean of two gradients."""
    wrapped = optax.MultiSteps(row.tx(SGD), every_k_schedule=2).gradient_transformation()
    twice = [g for g in each(2) for _ in range(2)]  # the mean of two equal gradients is exact
    params, _ = run(wrapped, twice)
    equal(params, plain(row.name, 2)[0])


INJECTED = {
    "clip": (clipjax.clip, {"threshold": 0.05}, ()),
    "clip_norm": (clipjax.clip_norm, {"threshold": 0.1}, ("ord",)),
    "clamp": (clipjax.clamp_weights, {"bound": 0.2}, ()),
    "prune": (clipjax.prune_mask, {"sparsity": 0.5, "start": 0, "every": 2, "stop": 3}, ("carry",)),
    "quantize": (clipjax.fake_quantize, {"bits": 4, "start": 0, "every": 2, "stop": 3}, ("bits", "carry")),
    "quantize_d4": (clipjax.fake_quantize, {"step": 0.125, "rounding": "half_away"}, ("carry",)),
    "project": (clipjax.project, {"projection": clipjax.projections.identity()}, ("projection", "carry")),
}


@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams(name):
    """Traced hyperparameters in the state give the same run; they can be changed there."""
    factory, arguments, static = INJECTED[name]
    row = find(name)._replace(
        build=lambda optimizer, **numbers: optax.inject_hyperparams(factory, static_args=static)(**arguments)
    )
    params, state = run(row.tx(SGD), each())
    equal(params, plain(name)[0])
    for hyperparameter in set(arguments) - set(static) - {"rounding"}:
        assert optax.tree.get(state, hyperparameter, filtering=_in_hyperparams) is not None


def _in_hyperparams(path, value):
    return any(getattr(key, "name", None) == "hyperparams" for key in path)


def test_inject_hyperparams_without_static_args_says_what_to_do():
    """`bits` decides the program: it may not become a hyperparameter in the state."""
    with pytest.raises(TypeError, match=r"`bits`.*inject_hyperparams\(..., static_args=\('bits',\)"):
        optax.inject_hyperparams(clipjax.fake_quantize)(4).init(table.params())


@pytest.mark.parametrize("row", table.kinds(table.WEIGHT))
def test_apply_if_finite_around_the_optimizer_constraints_hold_on_skipped_steps(row):
    """Weight constraints stand outside of `apply_if_finite`: the bad step is skipped, the params stay in the set."""
    good, bad, last = each(3)
    bad["dense"]["kernel"] = bad["dense"]["kernel"].at[0, 0].set(jnp.nan)
    tx = row._replace(gradient=False).tx(optax.apply_if_finite(SGD, 5))
    params, update = table.params(), jax.jit(lambda g, state, params, grad: tx.update(g, state, params, grad=grad))
    state = jax.jit(tx.init)(params)
    for g in (good, bad, last):
        calm = jax.tree.map(jnp.nan_to_num, g)  # a score hears of the gradient from its caller
        updates, state = update(g, state, params, calm)
        params = optax.apply_updates(params, updates)
        if row.holds:
            row.holds(params, state)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    assert int(optax.tree.get(state, "total_notfinite")) == 1


@pytest.mark.parametrize("name", ["prune_carry", "quantize", "project_master"])
def test_a_state_made_from_shapes_alone_trains_as_one_made_from_params(name):
    """Latent weights begin as zeros then, and the params replace them at the first update."""
    tx = find(name).tx(SGD)
    state = tx.init(jax.eval_shape(table.params))
    equal(run(tx, each(2), state=state), plain(name, 2))


@every_path
def test_tree_map_params_visits_what_has_the_shape_of_the_params(row):
    """Arrays of a param's shape are mapped, every other array is left as it is; the structure survives."""
    tx, params = row.tx(SGD), table.params()
    state = tx.init(params)
    mapped = optax.tree_utils.tree_map_params(tx, lambda x: jnp.full_like(x, 1), state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    shapes = {p.shape for p in jax.tree.leaves(params)}
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(mapped), strict=True):
        if old.shape in shapes:
            assert bool((new == 1).all())
        else:
            equal(old, new)


def test_orbax_resumes_bit_for_bit(tmp_path):
    """States of every kind in one checkpoint: restored into a fresh template they continue as if never stopped."""
    rows = [m for m in table.ALL if m.name in table.KINDS]
    halfway = {m.name: plain(m.name, 2) for m in rows}
    template = {m.name: (table.params(), m.tx(SGD).init(table.params())) for m in rows}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "all", _storable(halfway))
        checkpointer.wait_until_finished()
        resumed = checkpointer.restore(tmp_path / "all", _storable(template))
    for row in rows:
        equal(resumed[row.name], halfway[row.name])
    for row in (find("prune_random"), find("prune_taylor"), find("quantize_inner")):
        last = [each(3)[2]]
        equal(run(row.tx(SGD), last, *resumed[row.name]), run(row.tx(SGD), last, *halfway[row.name]))


def _storable(tree):
    return jax.tree.map(jnp.asarray, tree)
