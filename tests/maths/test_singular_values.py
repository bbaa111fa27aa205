"""Matrices within a bound of their largest singular value, and with all of them 1, against NumPy's decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections
from clipjax._arrays import leaf_axes
from clipjax._maths import singular_values

CASES = {  # shape, outputs, layers
    "dense": ((64, 40), None, None),
    "wide": ((20, 50), -1, None),
    "convolution": ((3, 3, 8, 20), None, None),
    "heads": ((12, 4, 6), (1, 2), None),
    "stack": ((5, 30, 60), None, 0),
    "stacked heads": ((12, 2, 4, 6), (2, 3), (1,)),
}
every_case = pytest.mark.parametrize("case", CASES)


def drawn(case, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(scale * np.random.default_rng(0).normal(size=CASES[case][0]), dtype)


def sides(case):
    shape, axis, layers = CASES[case]
    return leaf_axes.sides(axis, layers)("w", jax.ShapeDtypeStruct(shape, jnp.float32))


def matrices(x, case):
    """[layers, contracted, outputs], in f64."""
    of = sides(case)
    x = np.transpose(np.asarray(x, np.float64), (*of.layers, *of.inputs, *of.outputs))
    inputs = np.prod([np.asarray(CASES[case][0])[list(of.inputs)]], dtype=int)
    return x.reshape(-1, inputs, x.size // inputs // max(1, np.prod(x.shape[: len(of.layers)], dtype=int)))


def values(x, case):
    return np.linalg.svd(matrices(x, case), compute_uv=False)


@every_case
def test_the_largest_singular_value_is_found_from_above(case):
    x = drawn(case)
    x = x / jnp.sqrt(jnp.sum(jnp.square(x), axis=sides(case).matrix, keepdims=True))
    true = values(x, case)
    for squarings in (0, 2, 8):
        ratio = np.ravel(singular_values.largest(x, sides(case), squarings)) / true.max(-1)
        assert np.all(ratio > 1 - 1e-5) and np.all(ratio < true.shape[-1] ** (1 / 2 ** (squarings + 2)) + 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@every_case
def test_a_cap_is_held_and_what_is_within_it_stays(case, dtype):
    _, axis, layers = CASES[case]
    cap = projections.spectral_cap(3.0, axis=axis, layers=layers)
    tx = optax.chain(optax.sgd(0.5), clipjax.project(cap))
    params = {"w": drawn(case, dtype=dtype)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: (jnp.cos(9 * p + i)).astype(p.dtype), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        sigma = values(params["w"], case).max(-1)
        assert np.all(sigma <= 3.0) and np.all(sigma >= 3.0 * 0.98)
    again = cap.apply({"w": params["w"].astype(jnp.float32)}, (), None)[0]
    updates, _ = update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert not np.any(updates["w"])  # nothing shrinks from one update to the next
    assert np.abs(np.asarray(again["w"]) - np.asarray(params["w"], np.float32)).max() <= 0.02
    wide = projections.spectral_cap(1e3, axis=axis, layers=layers)
    np.testing.assert_array_equal(wide.apply(drawn(case), (), None)[0], drawn(case))


def test_each_matrix_of_a_stack_has_a_bound_of_its_own():
    x = jnp.stack([jnp.eye(3), 4 * jnp.eye(3)])
    got = projections.spectral_cap(2.0, layers=0).apply(x, (), None)[0]
    np.testing.assert_array_equal(got[0], np.eye(3))
    np.testing.assert_allclose(got[1], 2 * np.eye(3), rtol=0.005)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@every_case
def test_the_nearest_matrix_with_singular_values_of_1(case, scale):
    """Against the decomposition: U V^T, within 1e-6, whatever the size of the weights."""
    _, axis, layers = CASES[case]
    got = projections.orthonormal(16, axis=axis, layers=layers).apply(drawn(case, scale), (), None)[0]
    u, _, vt = np.linalg.svd(matrices(drawn(case), case), full_matrices=False)
    np.testing.assert_allclose(matrices(got, case), u @ vt, atol=3e-6)
    assert np.abs(values(got, case) - 1).max() <= 1e-6


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8), (jnp.float16, 2**-10)])
def test_a_frame_is_not_left(dtype, most):
    params = {"w": drawn("dense", dtype=dtype)}
    tx = clipjax.project(projections.orthonormal(), carry=True, inner=optax.sgd(0.05))

    def step(loop, i):
        params, state = loop
        grads = jax.tree.map(lambda p: jnp.cos(9 * p + i.astype(p.dtype)), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params, state = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(300.0))[0])()
    assert np.abs(values(params["w"], "dense") - 1).max() <= most
    assert not clipjax.check(params, state, tx)


def test_zeros_stay_and_entries_that_are_not_finite_count_for_nothing():
    for projection in (projections.spectral_cap(1.0), projections.orthonormal()):
        np.testing.assert_array_equal(projection.apply(jnp.zeros((3, 4)), (), None)[0], 0)
        got = projection.apply(jnp.array([[3.0, jnp.nan], [0.0, 2.0]]), (), None)[0]
        assert np.isnan(got[0, 1]) and np.isfinite(np.asarray(got)).sum() == 3


def test_sides_are_read_from_the_program():
    """A stack under `nn.scan`: its layers are what the program loops over."""
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(6)(x)), None

    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = scanned.init(jax.random.key(0), jnp.ones((2, 6)), None)
    analysis = clipjax.analyze(scanned.apply, variables, jnp.ones((2, 6)), None)
    cap = projections.spectral_cap(0.5, axis=analysis.outputs, layers=analysis.layers)
    tx = clipjax.project(cap, where=analysis.kernels)
    held = clipjax.hold_once(tx, variables)[0]
    kernel = held["params"]["Dense_0"]["kernel"]
    sigma = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False).max(-1)
    assert kernel.shape == (3, 6, 6) and np.all(sigma <= 0.5) and np.all(sigma > 0.49)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: projections.spectral_cap(0.0), "`bound` must be positive"),
        (lambda: projections.spectral_cap(1.0, -1), "`iterations` must be"),
        (lambda: projections.orthonormal(0), "`iterations` must be"),
        (lambda: projections.orthonormal().init({"b": jnp.ones(3)}), "`axis` must leave every picked leaf"),
        (lambda: projections.spectral_cap(1.0, layers=0).init({"w": jnp.ones((3, 2))}), "`axis` must leave"),
        (lambda: projections.spectral_cap(1.0, layers=5).init({"w": jnp.ones((3, 2))}), "`layers` must exist"),
    ],
)
def test_wrong_calls_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("projection", [projections.spectral_cap(1.0), projections.orthonormal()])
def test_derivatives_at_zero_are_finite(projection):
    slope = jax.grad(lambda x: jnp.sum(projection.apply(x, (), None)[0] * jnp.arange(12.0).reshape(3, 4)))
    assert np.isfinite(slope(jnp.zeros((3, 4)))).all()


def test_as_many_squarings_as_asked():
    got = projections.spectral_cap(1.0, 40).apply(2 * jnp.eye(3), (), None)[0]
    np.testing.assert_allclose(got, np.eye(3), rtol=1e-4)


@pytest.mark.parametrize(
    "make", [lambda: projections.spectral_cap(lambda c: 1.0), lambda: projections.sphere(lambda c: 1.0)]
)
def test_no_schedule_is_followed(make):
    with pytest.raises(TypeError, match="must be a number"):
        make()
