"""Projections as plain functions of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections

pytestmark = pytest.mark.usefixtures("strict")

W = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 2


def apply(projection, x):
    return projection.apply(x, projection.init(x), None)[0]


def reference_norms(x, axis):
    return np.sqrt(np.sum(np.square(x.astype(np.float64)), axis=axis, keepdims=axis is not None))


def test_identity_moves_nothing():
    np.testing.assert_array_equal(apply(projections.identity(), W), W)


@pytest.mark.parametrize("bound", [0.5, (-0.25, 1.0)])
def test_clamp(bound):
    low, high = bound if isinstance(bound, tuple) else (-bound, bound)
    got = apply(projections.clamp(bound), {"w": jnp.asarray(W), "none": None})
    np.testing.assert_array_equal(got["w"], np.clip(W, low, high))


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("bound", [0.5, 3.0, 1e3])
def test_max_norm_scales_what_is_too_long(axis, bound):
    n = reference_norms(W, axis)
    got = apply(projections.max_norm(bound, axis=axis), jnp.asarray(W))
    np.testing.assert_allclose(got, W * np.minimum(1, bound / n), rtol=1e-5)
    kept = np.broadcast_to(n <= bound, W.shape)
    np.testing.assert_array_equal(np.asarray(got)[kept], W[kept])


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_unit_norm(axis):
    got = apply(projections.unit_norm(axis=axis), jnp.asarray(W))
    np.testing.assert_allclose(got, W / reference_norms(W, axis), rtol=1e-5)


@pytest.mark.parametrize("projection", [projections.max_norm(1.0), projections.unit_norm(), projections.max_norm(0.0)])
def test_norm_of_zero_stays_zero(projection):
    np.testing.assert_array_equal(apply(projection, jnp.zeros((2, 2))), np.zeros((2, 2)))


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 5e37])
def test_norms_are_right_wherever_weights_are_floats(size, axis):
    x = np.float32(size) * W
    expected = W / reference_norms(W, axis)
    np.testing.assert_allclose(apply(projections.unit_norm(axis=axis), jnp.asarray(x)), expected, rtol=1e-5)
    got = apply(projections.max_norm(size / 8, axis=axis), jnp.asarray(x))
    np.testing.assert_allclose(got, expected * size / 8, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_norms_leave_out_what_is_not_finite(bad):
    x = jnp.array([3.0, bad, 4.0])
    for projection in (projections.max_norm(1.0), projections.unit_norm()):
        np.testing.assert_allclose(apply(projection, x), [0.6, bad, 0.8], rtol=1e-6)


def test_a_function_or_a_projection_is_accepted():
    """Both do the same; the error says to call the factory."""
    double = lambda tree: jax.tree.map(lambda x: 2 * x, tree)
    for given in (double, projections.stateless(double)):
        tx, params = clipjax.project(given), {"kernel": jnp.asarray(W)}
        updates, _ = tx.update({"kernel": jnp.zeros_like(W)}, tx.init(params), params)
        np.testing.assert_array_equal(params["kernel"] + updates["kernel"], 2 * W)
    with pytest.raises(TypeError, match="Call the factory"):
        clipjax.project("identity")


def test_in_a_train_step_after_the_optimizer():
    """Each unit's incoming weights stay in a ball, whatever the gradients."""
    tx = optax.chain(optax.sgd(1.0), clipjax.project(projections.max_norm(1.0, axis=0)))
    params = {"kernel": jnp.asarray(W)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update({"kernel": jnp.asarray(W)}, state, params)
        params = optax.apply_updates(params, updates)
        assert (reference_norms(np.asarray(params["kernel"]), 0) <= 1 + 1e-6).all()


SHAPES = {
    "kernel": ((64, 48), 0),
    "rows": ((48, 64), (1,)),
    "conv": ((3, 3, 8, 16), (0, 1, 2)),
    "whole": ((300, 200), None),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("bound", [1.0, 0.1, 0.7])
def test_max_norm_holds_exactly_in_every_dtype(bound, dtype):
    """Norms in NumPy's f64 of the params that result, of normal, equal and nearly short enough weights.

    And a norm that is short enough stays bit for bit, so that weights which were projected once stay as they are.
    """
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        rng = np.random.default_rng(2)
        for shape, axis in SHAPES.values():
            axes = tuple(range(len(shape))) if axis is None else axis
            x = np.where(rng.random(shape[-1]) < 0.5, rng.normal(size=shape), 1.0)
            x /= np.sqrt(np.sum(np.square(x), axis=axes, keepdims=True))
            scales = np.resize(
                [3.0, 0.5, 1.0, 1 - 1e-7, 1 + 1e-7, 1.001, 1e3, 0.0], np.shape(x.sum(axis=axes, keepdims=True))
            )
            params = jnp.asarray(x * bound * scales, dtype)
            tx = clipjax.project(projections.max_norm(bound, axis=axis))
            step = jax.jit(lambda u, p, s, tx=tx: tx.update(u, s, p))
            state, zero = tx.init(params), jnp.zeros(shape)
            narrow = {"bfloat16": 2.0**-9, "float16": 2.0**-12}.get(dtype, 0.0)
            first = jnp.asarray(np.asarray(params, np.float64) * rng.uniform(-narrow, narrow, size=shape), zero.dtype)
            for update in (first, zero):  # half an ulp at most: the params that result are rounded either way
                updates, state = step(update, params, state)
                old, params = params, optax.apply_updates(params, updates)
                values, before = (np.asarray(p, np.float64) for p in (params, old))
                norms = np.sqrt(np.sum(np.square(values), axis=axes, keepdims=True))
                assert norms.max() <= bound
                assert norms[scales >= 1].min() >= bound * (1 - max(1e-4, 4 * narrow))
            kept = np.broadcast_to(scales == 0.5, values.shape)
            np.testing.assert_array_equal(values[kept], before[kept])
            again = optax.apply_updates(params, step(zero, params, state)[0])
            np.testing.assert_array_equal(np.asarray(again, np.float64), np.asarray(params, np.float64))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_clamp_in_a_narrow_dtype_is_rounded_inwards_by_project(dtype):
    """0.1 is no value of bf16; the nearest one is larger."""
    params = jnp.asarray(W, dtype)
    for bound in (0.1, (-0.3, 0.1), (0.1, 0.3)):
        tx = clipjax.project(projections.clamp(bound))
        with jax.numpy_dtype_promotion("standard"):  # of `apply_updates`
            new = optax.apply_updates(params, tx.update(jnp.zeros_like(params), tx.init(params), params)[0])
        low, high = bound if isinstance(bound, tuple) else (-bound, bound)
        assert float(new.min()) >= low and float(new.max()) <= high
    with pytest.raises(ValueError, match="`bound` must hold a value of the leaf's dtype"):
        clipjax.project(projections.clamp((0.1, 0.1))).init(params)


def test_a_traced_norm_below_0_counts_as_0():
    new = jax.jit(lambda c: projections.max_norm(c).apply(jnp.asarray(W), (), None)[0])(jnp.float32(-1.0))
    assert not np.any(new)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_max_norm_of_many_weights_is_as_long_as_it_may_be(dtype):
    """10^7 normal weights, all the same, and one large among small ones: 10^-6 short at most, but for the dtype."""
    n = 10_000_000 if dtype == "float32" else 100_000
    x = np.random.default_rng(3).normal(size=n)
    spike = np.where(np.arange(n) == 5, 1.0, 2.0**-13)
    scale = jax.jit(lambda x, p: projections.max_norm(0.7).apply(x, (), clipjax.Context(0, p, p, None, None))[0])
    for values in (x, np.ones(n), spike):
        wide = jnp.asarray(values, jnp.float32)
        new = scale(wide, wide.astype(dtype))
        np.testing.assert_array_equal(new, new.astype(dtype).astype(jnp.float32))
        norm = np.sqrt(np.sum(np.square(np.asarray(new, np.float64))))
        short = {"float32": 1e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
        assert 0.7 * (1 - short) <= norm <= 0.7
        np.testing.assert_array_equal(scale(new, new.astype(dtype)), new)


@pytest.mark.parametrize("size", [2e38, 3e-38])
def test_max_norm_leaves_what_is_short_at_both_ends_of_the_floats(size):
    x = jnp.asarray([size, size / 4], jnp.float32)
    np.testing.assert_array_equal(apply(projections.max_norm(size * 1.1), x), x)


def drift(projection, params, dtype=jnp.float32, steps=2000):
    """The largest relative distance of a norm from its radius after so many updates."""
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    tx = optax.chain(optax.sgd(0.1), clipjax.project(projection))
    state = tx.init(params)

    def step(loop, i):
        params, state = loop
        grads = jax.tree.map(lambda p: jnp.cos(9 * p + i.astype(p.dtype)), params)
        updates, state = tx.update(grads, state, params)
        moved = jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)
        return (moved, state), None

    params, state = jax.jit(lambda: jax.lax.scan(step, (params, state), jnp.arange(float(steps)))[0])()
    assert clipjax.check(params, state, tx) == []
    worst = 0.0
    for p, r in zip(jax.tree.leaves(params), jax.tree.leaves(state[1].projection), strict=True):
        axes = tuple(i for i, n in enumerate(r.shape) if n == 1)
        norm = np.sqrt(np.square(np.asarray(p, np.float64)).sum(axes, keepdims=True))
        worst = max(worst, float(np.abs(norm / np.float64(r) - 1).max()))
    return worst


KERNELS = {"a": W, "heads": np.random.default_rng(1).normal(size=(5, 3, 4))}


@pytest.mark.parametrize("axis", [None, -1, (0, -1)])
@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8), (jnp.float16, 2**-10)])
def test_a_sphere_is_not_left(axis, dtype, most):
    kernels = {"heads": KERNELS["heads"]} if axis == (0, -1) else KERNELS
    assert drift(projections.sphere(axis=axis), kernels, dtype) <= most


@pytest.mark.slow
def test_a_sphere_is_not_left_in_a_hundred_thousand_updates():
    assert drift(projections.sphere(), KERNELS, steps=100_000) <= 1e-6


def test_a_radius_is_given_or_that_of_the_start():
    np.testing.assert_allclose(reference_norms(np.asarray(apply(projections.sphere(2.0), jnp.asarray(W))), None), 2.0)
    sphere = projections.sphere()
    state = sphere.init(jnp.asarray(W))
    got = sphere.apply(3 * jnp.asarray(W), state, None)[0]
    np.testing.assert_allclose(got, W, rtol=1e-6)
    radii = projections.sphere(clipjax.per_leaf(lambda path, leaf: 3.0 if path == "a" else None), axis=-1)
    tree = {"a": jnp.asarray(W), "b": jnp.asarray(2 * W)}
    got = radii.apply(jax.tree.map(lambda x: 5 * x, tree), radii.init(tree), None)[0]
    np.testing.assert_allclose(reference_norms(np.asarray(got["a"]), 0), 3.0, rtol=1e-6)
    np.testing.assert_allclose(got["b"], 2 * W, rtol=1e-6)


def test_what_is_zero_at_the_start_is_held_to_no_sphere_and_zero_stays_zero():
    sphere = projections.sphere()
    state = sphere.init(jnp.zeros(3))
    np.testing.assert_array_equal(sphere.apply(jnp.array([1.0, 2.0, 3.0]), state, None)[0], [1, 2, 3])
    np.testing.assert_array_equal(apply(projections.sphere(1.0), jnp.zeros(3)), 0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_sphere_of_any_size(scale):
    x = jnp.array([3.0, 4.0]) * jnp.float32(scale)
    np.testing.assert_allclose(apply(projections.sphere(), x), x, rtol=1e-6)


def test_entries_that_are_not_finite_stay_and_count_for_nothing():
    got = apply(projections.sphere(5.0), jnp.array([3.0, jnp.nan, 4.0]))
    np.testing.assert_allclose(got, [3.0, np.nan, 4.0], rtol=1e-6)


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), clipjax.per_leaf(lambda path, leaf: -1.0)])
def test_a_radius_must_be_positive(radius):
    with pytest.raises(ValueError, match="`radius` must be positive"):
        projections.sphere(radius).init(jnp.ones(3))
