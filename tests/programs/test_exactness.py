"""Where entries of dead units count as 0: operations that make something else of 0 keep units from being cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import clipjax

RNG = np.random.default_rng(0)
PARAMS = {k: RNG.normal(size=s).astype(np.float32) for k, s in {"in": (3, 8), "out": (8, 2)}.items()}
X = RNG.normal(size=(5, 3)).astype(np.float32)

SUMMED = {
    "array sorted along": lambda h: lax.sort((h, jnp.cos(h)), dimension=0, num_keys=1)[1],
    "order": lambda h: jnp.argsort(h, axis=0),
    "positions of the largest": lambda h: lax.top_k(h.T, 2)[1],
    "cumulative logsumexp": lambda h: lax.cumlogsumexp(h, axis=0),
    "function at an index": lambda h: h.at[0].apply(jnp.cos),
    "fill": lambda h: h.at[jnp.array([0, 77])].get(mode="fill", fill_value=1.0),
    "fill of integers": lambda h: (h > 0).astype(jnp.int32).at[jnp.array([0, 77])].get(mode="fill"),
    "window of a user": lambda h: lax.reduce_window(h, 1.0, lambda a, b: a * b + 1, (2, 1), (1, 1), "VALID"),
    "border of a window": lambda h: lax.reduce_window(h, 1.0, lax.mul, (1, 1), (1, 1), ((0, 1), (0, 0))),
    "differences of pairs": lambda h: (h[:, :, None] - h[:, None, :]) ** 2,
    "larger of pairs": lambda h: jnp.maximum(h[:, :, None], h[:, None, :]),
    "pairs under a cosine": lambda h: h[:, :, None] * jnp.cos(h[:, None, :]),
    "repeated pairs": lambda h: jnp.broadcast_to(h[:, :, None], (*h.shape, h.shape[1])) * jnp.cos(h)[:, None],
    "contracted pairs": lambda h: h.T @ jnp.exp(h),
    "contracted pairs in a batch": lambda h: jnp.einsum("bi,bj->bij", jnp.exp(h), h),
}


@pytest.mark.parametrize("name", SUMMED)
def test_what_is_not_zero_at_a_dead_unit_is_no_exact_sum(name):
    def model(p, x):
        h = x @ p["in"]
        return SUMMED[name](h).sum() + h @ p["out"]

    analysis = clipjax.analyze(model, PARAMS, X)
    assert not analysis.groups
    assert "sums over units that are not 0" in str(analysis.inexact[0].statistics)


EXACT = {
    "products of pairs": lambda h: h[:, :, None] * jnp.tanh(h[:, None, :]),
    "contracted pairs": lambda h: h.T @ jnp.tanh(h),
    "rows": lambda h: jnp.take(h, jnp.array([0, 2]), axis=0),
    "largest": lambda h: lax.top_k(h.T, 2)[0],
    "weights of pairs in batches": lambda h: jnp.einsum("bi,bi->bi", jnp.exp(h), h),
}


@pytest.mark.parametrize("name", EXACT)
def test_sums_of_zeros_are_exact(name):
    def model(p, x):
        h = x @ p["in"]
        return EXACT[name](h).sum() + h @ p["out"]

    large = {"in": PARAMS["in"] * (np.arange(8) % 2), "out": PARAMS["out"] * (np.arange(8) % 2)[:, None]}
    large = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), large)
    small = clipjax.shrink(large, clipjax.analyze(model, large, X)).variables
    assert small["in"].shape == (3, 4)
    np.testing.assert_allclose(model(small, X), model(large, X), atol=1e-4)


def test_a_carry_that_divides_comes_to_an_end():
    def model(p, x):
        return lax.scan(lambda c, row: (row @ p["in"] / c, None), x[0] @ p["in"], x)[0] @ p["out"]

    assert "is not finite where its units are 0" in str(clipjax.analyze(model, PARAMS, X))
