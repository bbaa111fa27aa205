"""fake_quantize and quantized: weights on a grid, the float weights behind them, the integers that come out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import steps

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"bias": jnp.ones(5), "kernel": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(5, 4)) * 0.1, jnp.float32)},
}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def levels(w, s, bits):
    """clip(round(w/s))·s, halves to even; over {−s, s} for one bit."""
    w, s = np.asarray(w, np.float32), np.float32(s)
    top = max(1, 2 ** (bits - 1) - 1)
    code = np.where(w < 0, -1, 1) * (w != 0) if bits == 1 else np.round(w / s)
    return (np.clip(code, -top, top) * s).astype(np.float32)


def run(tx, count, gradient=None, params=PARAMS):
    """Yields (params, state) after each of `count` jitted updates; `gradient(i)` gives the incoming updates."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    for i in range(count):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = update(zeros if gradient is None else gradient(i), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def noise(i):
    generator = np.random.default_rng(i)
    return jax.tree.map(lambda p: jnp.asarray(generator.normal(size=p.shape) * 0.05, jnp.float32), PARAMS)


def grids(params, state):
    """The `Quantized` of every leaf on a grid, with the leaf."""
    leaves = jax.tree.leaves(clipjax.quantized(params, state), is_leaf=lambda q: isinstance(q, clipjax.Quantized))
    pairs = zip(leaves, jax.tree.leaves(params), strict=True)
    return [(q, p) for q, p in pairs if isinstance(q, clipjax.Quantized)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12, 16])
def test_levels_follow_the_float_weights(bits):
    """The grid of a width, from the weights that were carried, not from those on the grid."""
    floats = {"kernel": PARAMS["a"]["kernel"]}
    tx = clipjax.fake_quantize(bits, step=steps.absmax())
    z = np.asarray(floats["kernel"])
    for i, (params, state) in enumerate(run(tx, 3, lambda i: {"kernel": noise(i)["a"]["kernel"]}, floats)):
        z = z + np.asarray(noise(i)["a"]["kernel"])
        ((q, p),) = grids(params, state)
        np.testing.assert_array_equal(p, levels(z, q.step, bits))
        assert len(np.unique(p)) <= max(2, 2**bits - 1)
        assert q.codes.dtype == (jnp.int8 if bits <= 8 else jnp.int16)


def test_biases_pass_untouched():
    for i, (params, state) in enumerate(run(clipjax.fake_quantize(4, step=steps.absmax()), 2, noise)):
        bias = sum((noise(j)["a"]["bias"] for j in range(i + 1)), PARAMS["a"]["bias"])
        np.testing.assert_allclose(params["a"]["bias"], bias, rtol=1e-6)
        chex.assert_trees_all_equal(clipjax.quantized(params, state)["a"]["bias"], params["a"]["bias"])


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_integers_give_the_weights_back_bit_for_bit(bits, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        *_, (params, state) = run(clipjax.fake_quantize(bits, axis=-1, step=steps.absmax()), 2, params=params)
    found = grids(params, state)
    assert len(found) == 2
    for q, p in found:
        back = clipjax.dequantize(q.codes, q.step, dtype)
        assert back.dtype == p.dtype == dtype
        np.testing.assert_array_equal(np.asarray(back, np.float32), np.asarray(p, np.float32))
        assert np.abs(q.codes).max() <= max(1, 2 ** (bits - 1) - 1) and q.bits == bits and int(q.zero_point) == 0


def test_bits_tree_of_choose_bits():
    """Leaves where it has None pass, whatever their rank."""
    bits = clipjax.choose_bits(PARAMS, target_db=15.0, allowed=(3, 6), where=lambda path, leaf: path == "b/kernel")
    assert bits["a"] == {"bias": None, "kernel": None}
    *_, (params, state) = run(clipjax.fake_quantize(bits), 1)
    chex.assert_trees_all_equal(params["a"], PARAMS["a"])
    ((q, _),) = grids(params, state)
    assert q.bits == bits["b"]["kernel"] in (3, 6)


def test_per_leaf_sees_the_params_in_their_own_dtype_at_every_update():
    params = {"a": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}, "b": {"kernel": jnp.full((2, 3), 0.3)}}
    bits = clipjax.per_leaf(lambda path, leaf: 3 if leaf.dtype == jnp.bfloat16 else None)
    tx = clipjax.fake_quantize(bits, step=steps.absmax())
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert list(state.projection.step) == ["a"] and not updates["b"]["kernel"].any()
    assert clipjax.quantized(params, state)["a"]["kernel"].bits == 3


def test_per_leaf_bits_and_axis():
    bits = clipjax.per_leaf(lambda path, leaf: 2 if path.startswith("a") else 5)
    axis = clipjax.per_leaf(lambda path, leaf: -1 if path.startswith("a") else None)
    *_, (params, state) = run(clipjax.fake_quantize(bits, axis=axis, step=steps.absmax()), 1)
    (a, _), (b, _) = grids(params, state)
    assert (a.bits, a.step.shape, a.axis) == (2, (1, 5), 1)
    assert (b.bits, b.step.shape, b.axis) == (5, (), None)


@pytest.mark.parametrize(("axis", "shape"), [(None, ()), (-1, (1, 1, 4)), (0, (3, 1, 1)), ((0, -1), (3, 1, 4))])
def test_axis_keeps_a_step_of_its_own(axis, shape):
    """One step per output unit, or per layer and unit where layers are stacked; each is its group's absmax."""
    w = RNG.normal(size=(3, 2, 4)).astype(np.float32)
    ((params, state),) = run(clipjax.fake_quantize(3, step=steps.absmax(), axis=axis), 1, params={"kernel": w})
    ((q, p),) = grids(params, state)
    kept = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    shared = tuple(i for i in range(3) if i not in {k % 3 for k in kept})
    largest = np.abs(w).max(axis=shared, keepdims=axis is not None)
    assert q.step.shape == shape
    np.testing.assert_allclose(q.step, largest / 3, rtol=1e-5)
    np.testing.assert_array_equal(p, levels(w, q.step, 3))


def test_one_bit_keeps_pruned_zeros():
    """{−s, s}, sign(0) = + in codes, and 0 where a weight is pruned."""
    tx = optax.chain(clipjax.prune_mask(0.5), clipjax.fake_quantize(1))
    for params, state in run(tx, 3, noise):
        for q, p in grids(params, state):
            values = np.unique(p)
            assert set(values) <= {-np.float32(q.step), np.float32(0), np.float32(q.step)}
            np.testing.assert_array_equal(clipjax.dequantize(q.codes, q.step), p)
        assert sum(int((p == 0).sum()) for _, p in grids(params, state)) == 25
    *_, (params, state) = run(clipjax.fake_quantize(1), 2, noise)  # one that moves by more than itself is a step late
    assert all((np.abs(p) == np.float32(q.step)).all() for q, p in grids(params, state))


def test_step_refreshes_every_and_always_at_stop_then_freezes():
    """Refreshes at 1, 3, 4, each fitted to the weights before the update; the step is 1 before the first."""
    tx = clipjax.fake_quantize(4, step=steps.absmax(), start=1, every=2, stop=4, inner=optax.identity())
    grow = {"kernel": jnp.ones((2, 3))}
    found = [float(s.projection.step["kernel"]) for _, s in run(tx, 7, lambda i: grow, {"kernel": jnp.ones((2, 3))})]
    np.testing.assert_allclose(found, [1, 2 / 7, 2 / 7, 4 / 7, 5 / 7, 5 / 7, 5 / 7], rtol=1e-4)


def test_start_leaves_earlier_updates_alone():
    (first, _), (second, state) = run(clipjax.fake_quantize(2, start=1, step=steps.absmax()), 2)
    chex.assert_trees_all_equal(first, PARAMS)
    assert all(len(np.unique(p)) <= 3 for _, p in grids(second, state))


def test_refresh_argument_forces_or_forbids():
    tx = clipjax.fake_quantize(4, step=steps.absmax())
    state, large = tx.init(PARAMS), jax.tree.map(lambda p: 2 * p, PARAMS)
    found = {}
    for refresh in (None, True, False):
        found[refresh] = tx.update(large, state._replace(count=state.count + 1), PARAMS, refresh=refresh)[1]
    assert float(found[False].projection.step["a"]["kernel"]) == float(found[None].projection.step["a"]["kernel"]) == 1
    largest = np.abs(PARAMS["a"]["kernel"]).max()  # before the update
    np.testing.assert_allclose(found[True].projection.step["a"]["kernel"], largest / 7, rtol=1e-4)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("step", [steps.mse(), steps.minmax()])
def test_levels_never_pass_what_transformations_before_allow(step, every):
    """A bound survives from the first update on, at both of its ends, though the step is fitted to what was before."""
    tx = optax.chain(clipjax.clamp_weights((-0.2, 0.5)), clipjax.fake_quantize(3, step=step, every=every))
    for params, _ in run(tx, 6, lambda i: jax.tree.map(lambda x: 20 * x, noise(i))):
        for p in (params["a"]["kernel"], params["b"]["kernel"]):
            assert p.min() >= np.float32(-0.2) and p.max() <= 0.5 and len(np.unique(p)) > 2


@pytest.mark.optimized
def test_interval_step_keeps_every_unit_inside_on_its_grid():
    """D0: every node's values lie in a given interval, also an asymmetric one."""
    tx = clipjax.fake_quantize(4, step=steps.interval(-0.25, 0.75), inner=optax.identity())
    *_, (params, _) = run(tx, 2, noise)
    s = np.float32(1.0 / 14)
    for p in (params["a"]["kernel"], params["b"]["kernel"]):
        assert p.min() >= -0.25 and p.max() <= 0.75
        np.testing.assert_allclose(p / s, np.round(p / s), atol=1e-4)
    assert params["a"]["kernel"].max() > 0.7 and len(np.unique(params["a"]["kernel"])) <= 15


def test_all_zero_and_nan_leaves():
    """All zero: s = 1 and zeros. A NaN weight is emitted and left out of the step."""
    params = {"w": jnp.zeros((2, 2)), "x": jnp.array([[jnp.nan, 0.7], [-0.3, 0.1]])}
    ((new, state),) = run(clipjax.fake_quantize(4, step=steps.absmax()), 1, params=params)
    assert float(state.projection.step["w"]) == 1 and not new["w"].any()
    s = float(state.projection.step["x"])
    np.testing.assert_allclose(s, 0.1, rtol=1e-5)
    np.testing.assert_allclose(new["x"], [[np.nan, 7 * s], [-3 * s, s]], rtol=1e-6)


def test_stochastic_rounding_without_a_key_takes_key_0():
    """As the docstring says: every run draws alike."""
    params = {"kernel": jnp.linspace(-2, 2, 64).reshape(8, 8)}

    def level(**kwargs):
        tx = clipjax.fake_quantize(4, step=1.0, rounding="stochastic", **kwargs)
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

    chex.assert_trees_all_equal(level(), level(), level(key=jax.random.key(0)))
    assert not np.array_equal(level()["kernel"], level(key=jax.random.key(1))["kernel"])


def test_stochastic_rounding_is_keyed_by_count():
    """Another draw at every update, the same ones for the same key; the mean is the weight."""
    w = {"kernel": jnp.full((50, 80), 0.3).at[0, 0].set(2.0)}  # a level lies within the reach

    @jax.jit
    def two(seed):
        key = jax.random.key(seed)
        tx = clipjax.fake_quantize(4, step=1.0, rounding="stochastic", inner=optax.identity(), key=key)

        def step(loop, _):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, w), *loop[::-1])
            params = optax.apply_updates(loop[0], updates)
            return (params, state), params["kernel"]

        return jax.lax.scan(step, (w, tx.init(w)), length=2)[1]

    runs = [np.asarray(two(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0][0] != runs[2][0]).any() and (runs[0][0] != runs[0][1]).any()
    assert set(np.unique(runs[0])) == {0, 1, 2}
    assert abs(np.mean(runs[0][1][1:]) - 0.3) < 4 * np.sqrt(0.21 / 3920)


def test_unbounded_codes_with_a_traced_step():
    """bits=None is D4's formula; the step may be traced, so one vmap is one sweep."""

    def once(s):
        tx = clipjax.fake_quantize(step=s)
        updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, updates)["a"]["kernel"]

    swept = jax.jit(jax.vmap(once))(jnp.array([0.25, 0.001]))
    for s, got in zip((0.25, 0.001), swept, strict=True):
        np.testing.assert_array_equal(got, np.round(PARAMS["a"]["kernel"] / np.float32(s)) * np.float32(s))


def test_a_rule_that_cuts_warns_where_refreshes_would_cut_again():
    """Without latent weights, and with more than one refresh; each of them shrinks the largest weight."""
    for step in (steps.percentile(), steps.sigma(1.5)):
        with pytest.warns(UserWarning, match=r"`step` cuts .* again.*carry=True"):
            tx = clipjax.fake_quantize(4, step=step, carry=False, every=1)
        for others in ({}, {"carry": False, "every": None}, {"carry": False, "stop": 0}):
            clipjax.fake_quantize(4, step=step, **others)
    *_, (params, _) = run(tx, 12)
    assert np.abs(params["a"]["kernel"]).max() < 0.9 * np.abs(PARAMS["a"]["kernel"]).max()


@pytest.mark.parametrize("step", [steps.mse(), steps.absmax(), steps.minmax()], ids=["mse", "absmax", "minmax"])
def test_refreshes_and_reloads_leave_weights_on_the_grid(step):
    """Refreshed at every update without latent weights, and begun anew from what was saved, they stay bit for bit."""
    kernels = {"a": PARAMS["a"]["kernel"], "b": PARAMS["b"]["kernel"].astype(jnp.bfloat16)}
    kernels |= {"c": jnp.asarray(RNG.uniform(-0.2, 1, (8, 4)), jnp.float32)}
    for bits, groups in (
        (8, {}),
        (3, {"axis": -1}),
        (4, {"group": clipjax.per_leaf(lambda path, leaf: leaf.shape[-2])}),
    ):
        with jax.numpy_dtype_promotion("standard"):
            tx = clipjax.fake_quantize(bits, step=step, carry=False, every=1, **groups)
            _, (_, _), *_, (once, _), (held, _) = run(tx, 5, params=kernels)
            *_, (again, _) = run(clipjax.fake_quantize(bits, step=step, **groups), 2, params=held)
        chex.assert_trees_all_equal(once, held, again)


def test_quantized_without_a_quantizer_names_the_remedy():
    with pytest.raises(ValueError, match=r"`opt_state` must hold a quantizer.*fake_quantize"):
        clipjax.quantized(PARAMS, optax.sgd(0.1).init(PARAMS))


def test_where_picks_leaves():
    ((params, _),) = run(clipjax.fake_quantize(2, where=lambda path, leaf: path == "a/bias"), 1, noise)
    assert len(np.unique(params["a"]["bias"])) <= 3
    chex.assert_trees_all_equal(params["b"], jax.tree.map(jnp.add, PARAMS["b"], noise(0)["b"]))


def test_update_traces_once():
    chex.clear_trace_counter()
    tx = clipjax.fake_quantize(4, every=1, step=steps.absmax())
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    state, params = tx.init(PARAMS), PARAMS
    for i in range(3):
        updates, state = update(noise(i), state, params)
        params = optax.apply_updates(params, updates)


def test_quantized_refuses_the_state_of_other_params():
    """It would return their floats as they are."""
    ((params, state),) = run(clipjax.fake_quantize(4), 1)
    with pytest.raises(ValueError, match=r"`state` must belong to these params, got \['b/kernel'\]"):
        clipjax.quantized({"a": params["a"]}, state)


@pytest.mark.parametrize("axis", [-2, -1], ids=["inputs", "outputs"])
def test_shrink_refuses_to_cut_the_inputs_of_groups(axis):
    """Two inputs share a step; with one of them gone the steps that are left would belong to other inputs."""
    kernel = PARAMS["a"]["kernel"]
    params = {"kernel": kernel.at[1].set(0.0) if axis == -2 else kernel.at[:, 1].set(0.0)}
    tx = clipjax.fake_quantize(4, group=2)
    if axis == -2:
        with pytest.raises(ValueError, match=r"step/kernel` must have no groups along an axis that is cut, got \(3, 1"):
            clipjax.shrink(params, [{"kernel": axis}], tx.init(params))
    else:
        small, state, _ = clipjax.shrink(params, [{"kernel": axis}], tx.init(params))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(small))
