"""unit(groups=) for groups of an analysis: each of the layers that are stacked in a leaf has units of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax._programs.groups import Group, Member
from clipjax.structures import unit

RNG = np.random.default_rng(0)
LAYERED_PLACES = {
    "a": np.arange(6),
    "d": np.arange(12) // 2,
    "bias": np.r_[-1, np.arange(6), -1],
    "c": np.arange(12) % 6,
}
LAYERED_AXES = {"a": (-1, -3), "d": (-3, -2), "bias": (-1, -2), "c": (-2, -3)}


def layered_tree():
    shapes = {"a": (3, 4, 6), "d": (12, 3, 2), "bias": (3, 8), "c": (3, 12, 2), "plain": (4, 5)}
    return {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def layered_groups():
    members = [Member(p, axis, LAYERED_PLACES[p], layers) for p, (axis, layers) in LAYERED_AXES.items()]
    return [Group(6, members, True), Group(5, [Member("plain", -1, np.arange(5))], True)]


def layered_rows(x, name):
    """[layers, entries, others] of a leaf."""
    axis, layers = LAYERED_AXES[name]
    return np.moveaxis(np.asarray(x), (layers, axis), (0, 1)).reshape(3, len(LAYERED_PLACES[name]), -1)


@pytest.mark.parametrize("kind", [None, "Auto", "Explicit"])
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_each_layer_of_a_stack_has_units_of_its_own(scope, kind):
    """Axes of layers before and behind that of the units, maps with repeats and with gaps, and a group beside it."""
    tree = layered_tree()
    totals = np.zeros((3, 6))
    for name in ("a", "d", "c"):
        rows = layered_rows(jnp.abs(tree[name]), name)
        totals += np.stack([rows[:, LAYERED_PLACES[name] == i].sum((1, 2)) for i in range(6)], 1)
    tx = clipjax.prune_mask(0.5, structure=unit(groups=layered_groups()), scope=scope)
    update = jax.jit(tx.update)
    if kind is None:
        updates, state = update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
        assert state.projection.mask["a"].shape == (3, 1, 6)
    else:
        types = (getattr(jax.sharding.AxisType, kind),) * 2
        mesh = jax.make_mesh((3, 2), ("x", "y"), axis_types=types, devices=jax.devices()[:6])
        specs = {"a": ("x", None, "y"), "d": ("y", "x"), "bias": (None, "y"), "c": ("x", "y"), "plain": ("y",)}
        placed = {k: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*specs[k]))) for k, x in tree.items()}
        with jax.set_mesh(mesh):
            updates, _ = update(jax.tree.map(jnp.zeros_like, placed), tx.init(placed), placed)
        assert all(updates[name].sharding.is_equivalent_to(x.sharding, x.ndim) for name, x in placed.items())
    pruned = jax.tree.map(lambda x, u: np.asarray(x) + np.asarray(u), tree, jax.device_get(updates))
    of_plain = int((pruned["plain"] == 0).all(0).sum())
    gone = 3 if scope == "leaf" else int((pruned["a"][0] == 0).all(0).sum())
    assert of_plain == 2 if scope == "leaf" else 12 - 2 <= 3 * gone + of_plain <= 12  # of 23, at most L - 1 less
    alive = np.argsort(np.argsort(totals, 1, kind="stable"), 1) >= gone
    for name in LAYERED_AXES:
        places = LAYERED_PLACES[name]
        kept = np.where(places < 0, True, alive[:, places])
        got = layered_rows(pruned[name], name) != 0
        np.testing.assert_array_equal(got, np.broadcast_to(kept[..., None], got.shape), err_msg=name)
    if kind is None:
        small, _, widths = clipjax.shrink(jax.tree.map(jnp.asarray, pruned), layered_groups(), state)
        assert widths == {
            "plain": 5 - of_plain,
            "a": 6 - gone,
            "d": 12 - 2 * gone,
            "bias": 8 - gone,
            "c": 12 - 2 * gone,
        }
        assert small["d"].shape == (12 - 2 * gone, 3, 2) and small["bias"].shape == (3, 8 - gone)
