"""Means over units: which scales make up for them, and which units they leave to `exact=False`. D0, section 2.2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reading import X, read, shapes

import clipjax
from clipjax._programs.groups import Repair


def test_root_mean_square_is_made_up_for_by_its_scale():
    def model(p, x, epsilon=1e-5):
        h = x @ p["e"]
        for name in ("s", "g"):
            h = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + epsilon)
            h = h * (p[name] if name == "s" else 1 + p[name])
        return h @ p["o"]

    analysis = read(model, e=(4, 16), s=(16,), g=(16,), o=(16, 3))
    (group,) = analysis.groups
    assert group.proved
    assert group.repairs == (Repair("s", 0.0, float(np.float32(1e-5))), Repair("g", 1.0, float(np.float32(1e-5))))


def test_a_model_that_follows_the_width_with_its_epsilon_is_given_none():
    def model(p, x):
        h = x @ p["e"]
        epsilon = 1e-2 * 16 / p["s"].size
        return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + epsilon) * p["s"] @ p["o"]

    (group,) = read(model, e=(4, 16), s=(16,), o=(16, 3)).groups
    assert group.repairs == (Repair("s", 0.0, 0.0),)
    params = {name: jnp.ones(x.shape) for name, x in shapes(e=(4, 16), s=(16,), o=(16, 3)).items()}
    params |= {"e": params["e"].at[:, 3:].set(0), "o": params["o"].at[3:].set(0), "s": params["s"].at[3:].set(0)}
    shrunk = clipjax.shrink(params, [group], verify=(model, jnp.ones((2, 4))))
    assert shrunk.epsilons == {} and shrunk.change < 1e-6 and shrunk.variables["s"].shape == (3,)


def test_sums_of_a_model_that_refuses_other_widths_are_refused():
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dense(8)(x).sum(-1, keepdims=True) / 7 * nn.Dense(5)(x))

    variables = jax.eval_shape(Sum().init, jax.random.key(0), X)
    analysis = clipjax.analyze(Sum().apply, variables, X)
    assert [group.units for group in analysis.groups] == [5]
    assert "sums over it, and a fixed number may divide the sum" in str(analysis)


def test_a_scale_over_concatenated_units_makes_up_for_their_mean():
    def model(p, x):
        h = jnp.concatenate([x @ p["a"], x @ p["b"]], -1)
        return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True)) * p["s"] @ p["o"]

    analysis = read(model, a=(4, 5), b=(4, 7), s=(12,), o=(12, 3))
    assert [(group.units, group.repairs) for group in analysis.groups] == [
        (n, (Repair("s", 0.0, 0.0),)) for n in (5, 7)
    ]


def test_another_leaf_of_as_many_entries_is_no_scale_of_the_mean():
    def model(p, x):
        h = jnp.einsum("td,dhk->thk", x, p["a"])
        root = jax.lax.rsqrt(jnp.mean(h * h, (1, 2)))
        return (root[:, None, None] * p["s"]).sum(1) @ p["o"], jnp.einsum("thk,hko->to", h, p["b"])

    analysis = read(model, a=(4, 2, 8), b=(2, 8, 3), s=(8, 2), o=(2, 3))
    assert not any("a" in group for group in analysis.groups)
    assert any("a" in group for group in analysis.inexact)


NORM = {
    "no scale": lambda p, h: h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5),
    "mean taken away": lambda p, h: h - h.mean(-1, keepdims=True),
    "a number under the root": lambda p, h: (
        h * p["s"] * jax.lax.rsqrt(jnp.maximum((h * h).mean(-1, keepdims=True), 1.0))
    ),
    "scale used elsewhere": lambda p, h: h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True)) * p["s"] + p["s"],
    "softmax": lambda p, h: jax.nn.softmax(h) * p["s"],
    "maximum": lambda p, h: h - h.max(-1, keepdims=True),
    "sum behind a sigmoid": lambda p, h: h / jax.nn.sigmoid(h).sum(-1, keepdims=True),
}


@pytest.mark.parametrize("norm", NORM.values(), ids=NORM)
def test_a_statistic_over_units_leaves_them_to_exact_false(norm):
    analysis = read(
        lambda p, x: jax.nn.relu(norm(p, x @ p["e"]) @ p["f"]) @ p["o"], e=(4, 16), s=(16,), f=(16, 5), o=(5, 3)
    )
    assert [group.units for group in analysis.groups] == [5]
    (stream,) = analysis.inexact
    assert stream.units == 16
    assert "test_means.py:" in stream.statistics[0]


def test_a_mean_over_units_is_no_pin_where_it_is_not_used():
    analysis = read(lambda p, x: (x @ p["a"], (x @ p["a"]).mean() * 0)[0] @ p["b"], a=(4, 8), b=(8, 3))
    assert [group.units for group in analysis.groups] == [8]


def test_a_norm_that_is_rounded_to_integers_is_not_made_up_for():
    def model(p, x):
        h = x @ p["in"]
        h = (16 * h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True))).astype(jnp.int8)
        return h.astype(jnp.float32) * p["scale"] @ p["out"]

    analysis = read(model, **{"in": (4, 6), "scale": (6,), "out": (6, 2)})
    assert not analysis.groups
    assert analysis.inexact[0].statistics
