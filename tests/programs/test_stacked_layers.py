"""Layers that are stacked in one array: which of them may have units of their own."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import clipjax

RNG = np.random.default_rng(0)
SHAPES = {"in": (3, 8), "up": (4, 8, 6), "down": (4, 6, 8), "out": (8, 2), "gates": (4,)}
PARAMS = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
X = RNG.normal(size=(5, 3)).astype(np.float32)


def run(p, x, stacks):
    def layer(h, w):
        return h + jnp.tanh(h @ w[0]) @ w[1], None

    return lax.scan(layer, x @ p["in"], stacks)[0] @ p["out"]


OF_ONE_LAYER = {
    "as they are": lambda up, down: (up, down),
    "norms of each": lambda up, down: (up / jnp.sqrt((up * up).sum(1, keepdims=True) + 1), down),
    "products in each": lambda up, down: (up, down + jnp.einsum("ldu,ldk->luk", up, up.sum(2, keepdims=True)) * down),
}
OF_SEVERAL = {
    "reversed": lambda up, down: (up, down[::-1]),
    "reversed too": lambda up, down: (lax.rev(up, (0,)), down),
    "added up": lambda up, down: (jnp.cumsum(up, 0), down),
    "sorted": lambda up, down: (jnp.sort(up, 0), down),
    "products of all": lambda up, down: (up * jnp.einsum("ldu,mdu->lm", up, up).sum(0)[:, None, None], down),
    "sums over all": lambda up, down: (up / jnp.sqrt((up * up).sum(0) + 1), down),
}


def shrunk(make):
    """The group of units inside of the layers, and by how much outputs differ with half of its units gone."""
    model = lambda p, x: run(p, x, make(p["up"], p["down"]))
    analysis = clipjax.analyze(model, PARAMS, X)
    (group,) = [group for group in analysis.groups if group.units == 6]
    dead = np.stack([np.roll(np.arange(6) < 3, i if group.layered else 0) for i in range(4)])
    large = dict(PARAMS)
    large["up"] = large["up"] * ~dead[:, None, :]
    large["down"] = large["down"] * ~dead[:, :, None]
    small = clipjax.shrink(large, analysis).variables
    assert small["up"].shape == (4, 8, 3)
    return group, float(jnp.abs(model(small, X) - model(large, X)).max())


@pytest.mark.parametrize("name", OF_ONE_LAYER)
def test_units_that_stay_in_their_layer_are_its_own(name):
    group, change = shrunk(OF_ONE_LAYER[name])
    assert group.layered
    assert change < 1e-4


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_units_that_meet_those_of_another_layer_are_those_of_all(name):
    group, change = shrunk(OF_SEVERAL[name])
    assert not group.layered
    assert change < 1e-4


def test_a_number_for_each_layer_is_no_axis():
    model = lambda p, x: lax.scan(lambda h, gate: (h * (2 * gate), None), x @ p["in"], p["gates"])[0] @ p["out"]
    assert [group.units for group in clipjax.analyze(model, PARAMS, X).groups] == [8]


def test_a_stack_that_every_turn_reads_is_one():
    """Each layer multiplies with the units of all: by a sum over the stack, and in a loop inside of the loop."""

    def summed(p, x):
        def layer(h, w):
            return h + jnp.tanh(h @ (w[0] + p["up"].sum(0))) @ w[1], None

        return lax.scan(layer, x @ p["in"], (p["up"], p["down"]))[0] @ p["out"]

    def nested(p, x):
        def layer(h, w):
            inner = lambda c, up: (c + jnp.tanh(h @ up * (h @ w[0])) @ w[1], None)
            return lax.scan(inner, h, p["up"])[0] / 9, None

        return lax.scan(layer, x @ p["in"], (p["up"], p["down"]))[0] @ p["out"]

    for model in (summed, nested):
        found = clipjax.analyze(model, PARAMS, X).groups
        assert [group.layered for group in found if group.units == 6] == [False]
