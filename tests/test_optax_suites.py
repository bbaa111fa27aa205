"""Optax's chains, partitions, hyperparameters and shardings, and its two common targets, with our transformations.

The inputs are those of Optax's own suites, and so are the tolerances.
"""

import contract_table as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections, thresholds

EVERY = {"where": lambda path, leaf: True}

PARAMS = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
GRADS = (jnp.array([500.0, 5.0]), jnp.array([300.0, 3.0]))
CHAINS = {
    "clips": lambda: [clipjax.clip_norm(thresholds.zscore()), clipjax.clip(100.0), optax.scale_by_adam()],
    "constraints": lambda: [
        optax.adam(1e-2),
        clipjax.clamp_weights(3.5),
        clipjax.prune_mask(0.5, every=7, **EVERY),
        clipjax.fake_quantize(4, every=5, **EVERY),
    ],
    "latent": lambda: [
        optax.sgd(1e-4),
        clipjax.project(projections.max_norm(2.0), carry=True),
        optax.keep_params_nonnegative(),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_its_transformations_one_after_the_other(name):
    """50 updates, in one chain, in a named one and by hand."""
    parts = CHAINS[name]()
    chain = optax.chain(*parts)
    named = optax.named_chain(*((str(i), tx) for i, tx in enumerate(parts)))

    def by_hand(updates, states, params):
        new = []
        for tx, state in zip(parts, states, strict=True):
            updates, state = optax.with_extra_args_support(tx).update(updates, state, params)
            new.append(state)
        return updates, tuple(new)

    def trained(update, state):
        def step(carry, _):
            params, state = carry
            updates, state = update(GRADS, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda s: jax.lax.scan(step, (PARAMS, s), length=50)[0])(state)

    params, state = trained(chain.update, chain.init(PARAMS))
    for update, begin in ((by_hand, tuple(tx.init(PARAMS) for tx in parts)), (named.update, named.init(PARAMS))):
        other, end = trained(update, begin)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), other, params)
        states = tuple(end.values()) if isinstance(end, dict) else end
        assert jax.tree.structure(states) == jax.tree.structure(state)


LABELLED = jax.tree.map(jnp.asarray, {"a1": 1.0, "b1": 2.0, "z1": {"a2": 3.0, "z2": {"c1": 4.0}}})


def first_letters(tree):
    return {key: first_letters(x) if isinstance(x, dict) else key[0] for key, x in tree.items()}


@pytest.mark.parametrize("labels", [first_letters, first_letters(LABELLED)], ids=["function", "tree"])
def test_partition_gives_each_label_its_transformation(labels):
    """Updates of a tenth: a is clipped to 0.2, b is clamped to 2.1 and c rounded to whole numbers."""
    tx = optax.partition(
        {
            "a": clipjax.clip(0.2),
            "b": clipjax.clamp_weights(2.1),
            "c": clipjax.fake_quantize(step=1.0, carry=False, **EVERY),
        },
        labels,
    )
    update, state = jax.jit(tx.update), tx.init(LABELLED)
    tenths = jax.tree.map(lambda x: x / 10, LABELLED)
    for _ in range(2):
        updates, state = update(tenths, state, LABELLED)
        np.testing.assert_allclose(jax.tree.leaves(updates), [0.1, 0.1, 0.2, 0.0], atol=1e-6)


def test_partition_hands_extra_arguments_on_and_refuses_unknown_labels():
    score = clipjax.scores.taylor(decay=0.0)
    tx = optax.partition({0: clipjax.clip(1.0), 1: clipjax.prune_mask(0.5, score=score)}, (0, 1))
    params = ({"u": jnp.ones((1, 2))}, {"v": jnp.array([[1.0, 2.0]])})
    grad = ({"u": jnp.ones((1, 2))}, {"v": jnp.array([[9.0, 1.0]])})
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"needs `grad`"):
        tx.update(params, state, params)
    updates, _ = tx.update(params, state, params, grad=grad, other="passes by")
    assert (params[1]["v"] + updates[1]["v"]).tolist() == [[2.0, 0.0]]  # |1 * 9| against |2 * 1|, after u = p
    with pytest.raises(ValueError, match="labels"):
        optax.partition({0: clipjax.clip(1.0)}, (0, 1)).init(params)


STEPWISE = optax.piecewise_constant_schedule(3.0, {1: 5, 7: 2, 12: 1.5})
INJECTED = {  # what of a gradient of 100, at params of 0, each leaves for a hyperparameter h
    "clip": (clipjax.clip, "threshold"),
    "clip_norm": (clipjax.clip_norm, "threshold"),
    "clamp_weights": (clipjax.clamp_weights, "bound"),
}

STATIC = dict.fromkeys((*INJECTED, "prune_mask"), ()) | {"clip_norm": ("ord",)}  # an integer that Optax would inject


@pytest.mark.parametrize("name", INJECTED)
def test_injected_schedules_begin_at_count_zero(name):
    build, argument = INJECTED[name]
    tx = optax.inject_hyperparams(build, static_args=STATIC[name])(**{argument: STEPWISE})
    params, grads = [jnp.zeros(())], [jnp.full((), 100.0)]
    update, state, got = jax.jit(tx.update), jax.jit(tx.init)(params), []
    state = optax.tree.map_params(tx, lambda x: x, state)
    for _ in range(15):
        updates, state = update(grads, state, params)
        got.append(float(updates[0]))
    np.testing.assert_allclose(got, ([3.0] * 2 + [15.0] * 6 + [30.0] * 5 + [45.0] * 3)[1:], rtol=1e-6)


@pytest.mark.parametrize("name", INJECTED)
def test_an_injected_hyperparameter_is_overridden_in_the_state(name):
    build, argument = INJECTED[name]
    tx = optax.inject_hyperparams(build, static_args=STATIC[name])(0.1)
    params = jnp.zeros((3, 5, 7))
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for i in range(5):
        state.hyperparams[argument] = jnp.asarray(i, jnp.float32)
        updates, state = update(jnp.ones_like(params), state, params)
        norm = {"clip": min(i, 1) * np.sqrt(105), "clip_norm": i, "clamp_weights": min(i, 1) * np.sqrt(105)}[name]
        assert np.isclose(jnp.linalg.norm(updates.ravel()), norm)


DTYPES = [
    (jnp.bfloat16, jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (jnp.float32, jnp.float32, jnp.bfloat16),
    (jnp.float32, jnp.bfloat16, jnp.float32),
]


@pytest.mark.parametrize(("hyper", "param", "grad"), DTYPES, ids=lambda x: jnp.dtype(x).name)
@pytest.mark.parametrize("name", [*INJECTED, "prune_mask"])
def test_injected_hyperparameters_keep_their_dtype_and_that_of_the_updates(name, hyper, param, grad):
    build, argument = (INJECTED | {"prune_mask": (clipjax.prune_mask, "sparsity")})[name]
    tx = optax.inject_hyperparams(build, STATIC[name], hyperparam_dtype=hyper)(**{argument: 0.25})
    params = [jnp.ones(shape, param) for shape in ((1, 2), (2,), (1, 1, 1))]
    grads = jax.tree.map(lambda x: x.astype(grad), params)
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, grads, state, params)
    assert state.hyperparams[argument].dtype == new.hyperparams[argument].dtype == hyper
    gradient_side = name in ("clip", "clip_norm")
    # prune_mask leaves vectors alone, and so their updates
    assert [u.dtype for u in updates if u.ndim > 1] == [grad if gradient_side else jnp.float32] * 2


MESH = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
SHARDED = jax.NamedSharding(MESH, jax.P(None, "x"))


def types(tree):
    """Shape, dtype and sharding of every array, whether it exists or not."""

    def of(x):
        sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
        spec = () if sharding is None else tuple(sharding.spec)
        return x.shape, x.dtype, (*spec, *[None] * (x.ndim - len(spec)))

    return [of(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("row", table.paths(table.ROWS))
def test_the_types_of_a_state_are_those_of_init_everywhere(row):
    """Explicit axes: eagerly, under jit and after an update a state has the same shardings, and updates the params'."""
    with jax.set_mesh(MESH):
        params = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=SHARDED)
        tx = row.tx()
        state = tx.init(params)
        updates, new = jax.eval_shape(tx.update, params, state, params)
        assert types(state) == types(jax.eval_shape(tx.init, params)) == types(new)
        assert types(updates)[0][::2] == ((2, 8, 4), (None, "x", None))
    assert tx.init(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)) is not None


TARGETS = {
    "parabola": ([-1.0, 10.0, 1.0], [1.0, -1.0, 1.0], lambda p: jnp.sum(jnp.square(p - jnp.array([1.0, -1.0, 1.0])))),
    "rosenbrock": ([0.0, 0.0], [1.0, 1.0], lambda p: jnp.square(1 - p[0]) + 100 * jnp.square(p[1] - p[0] ** 2)),
}
FREE = {  # constraints that hold at the optimum, so that it is reached all the same
    "clips and a clamp": lambda: optax.chain(
        clipjax.clip_norm(thresholds.quantile_track(0.9)), optax.adam(1e-2), clipjax.clamp_weights(20.0)
    ),
    "grid": lambda: clipjax.fake_quantize(step=2.0**-6, inner=optax.adam(1e-2), **EVERY),
    "skip and master": lambda: clipjax.project(
        projections.identity(), carry=True, inner=clipjax.skip_spikes(optax.adam(1e-2), 1e4)
    ),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FREE)
def test_the_common_targets_are_reached(name, target):
    """Within 3 %, as Optax asks of every optimizer, in 20,000 steps."""
    begin, end, loss = TARGETS[target]
    tx, params = FREE[name](), jnp.array(begin)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    state = optax.tree.map_params(tx, lambda x: x, tx.init(params))
    params, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=20_000)[0])((params, state))
    np.testing.assert_allclose(params, end, rtol=3e-2, atol=3e-2)
