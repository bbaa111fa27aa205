"""Layers that must not vanish, and stacked layers that must shrink alike, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import clipjax
from clipjax import selections, structures
from clipjax.typing import Selection

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
MOVES = ("all-gather", "all-to-all", "collective-permute", " sort(", " gather(", " scatter(")


def lowest(values, count):
    """The positions of the lowest, the later ones first among equals."""
    return np.lexsort((-np.arange(len(values)), values))[:count]


def reference(scores, sparsity, min_keep=1, candidates=None):
    """Masks of single weights: the best `min_keep` candidates of each stay, as do all that are none."""
    values = np.concatenate([np.ravel(x) for x in scores]).astype(np.float64)
    chosen = np.ones(len(values), bool) if candidates is None else np.concatenate([np.ravel(c) for c in candidates])
    n, at = chosen.sum(), np.split(np.arange(len(values)), np.cumsum([np.size(x) for x in scores])[:-1])
    for places in at:
        places = places[chosen[places]]
        chosen[np.setdiff1d(places, places[lowest(values[places], max(len(places) - min_keep, 0))])] = False
    gone = lowest(np.where(chosen, values, np.inf), min(round(sparsity * n), chosen.sum()))
    keep = np.isin(np.arange(len(values)), gone, invert=True)
    return [keep[places].reshape(np.shape(x)) for places, x in zip(at, scores, strict=True)]


def weights(few=False):
    """A body, a head of weights a hundred times smaller, two layers that are alike, and one weight alone."""
    fill = (lambda *shape: RNG.integers(1, 4, shape)) if few else (lambda *shape: np.abs(RNG.normal(size=shape)))
    shapes = {"body": (20, 21), "head": (1, 10), "l_0": (3, 4), "l_1": (3, 4), "one": (1, 1)}
    return {name: np.float32(fill(*shape) * (0.01 if name == "head" else 1)) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnames="min_keep")
def global_masks(scores, sparsity, min_keep):
    return clipjax.make_mask(scores, sparsity, structure=structures.element(min_keep))


@pytest.mark.parametrize("min_keep", [0, 1, 3])
def test_no_layer_vanishes_and_the_others_give_more(min_keep):
    """min(round(sparsity n), n - leaves) go; ties to the earlier position, as NaN the lowest."""
    for few in (False, True):
        tree = weights(few)
        n = sum(x.size for x in tree.values())
        kept_at_least = sum(min(min_keep, x.size) for x in tree.values())
        for sparsity in (0.25, 0.5, 0.9375, 0.9990234375):
            got = global_masks(tree, jnp.float32(sparsity), min_keep)
            removed = sum(int((~m).sum()) for m in got.values())
            assert removed == min(round(sparsity * n), n - kept_at_least)
            for mask, expected in zip(got.values(), reference(tree.values(), sparsity, min_keep), strict=True):
                np.testing.assert_array_equal(mask, expected)


def test_a_layer_of_forty_weights_keeps_its_best_at_99_percent():
    x = np.float32(RNG.permutation(40))
    np.testing.assert_array_equal(clipjax.make_mask(x, 0.99), x == 39)
    np.testing.assert_array_equal(clipjax.make_mask({"a": x, "b": x}, 0.99, scope="leaf")["b"], x == 39)
    np.testing.assert_array_equal(clipjax.make_mask(np.ones(40, np.float32), 0.99), np.arange(40) == 0)
    np.testing.assert_array_equal(clipjax.make_mask(np.full(4, np.nan, np.float32), 0.99), [True, False, False, False])
    assert not np.any(clipjax.make_mask(x, 0.99, structure=structures.element(min_keep=0)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_scores_keep_one_too(dtype):
    tree = {name: jnp.asarray(x, dtype) for name, x in weights(few=True).items()}
    got = clipjax.make_mask(tree, 0.95)
    expected = reference([np.float32(x) for x in tree.values()], 0.95)
    for mask, wanted in zip(got.values(), expected, strict=True):
        np.testing.assert_array_equal(mask, wanted)


def test_blocks_keep_one_of_each_array():
    tree = {"a": np.ones((4, 6), np.float32), "b": np.full((5, 4), 0.1, np.float32)}
    got = clipjax.make_mask(tree, 0.5, structure=structures.block(2, 2))
    assert int(got["b"].sum()) == 4 and bool(got["b"][0, 0])  # one block of six; the other five, and one of `a`, go
    assert int((~got["a"]).sum()) == 4 and not got["a"][2, 4]
    vanish = clipjax.make_mask(tree, 0.5, structure=structures.block(2, 2, min_keep=0))
    assert not vanish["b"].any() and vanish["a"].all()


def prune(tx, params, steps=1):
    """Params after updates of zero, jitted."""
    state, update = tx.init(params), jax.jit(tx.update)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(steps):
        updates, state = update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_prune_mask_keeps_one_weight_of_a_weak_head():
    tree = {name: jnp.asarray(x) for name, x in weights().items()}
    got = prune(clipjax.prune_mask(0.5), tree)
    assert int((got["head"] != 0).sum()) == 1 and got["head"].max() == tree["head"].max()
    zeros = sum(int((x == 0).sum()) for x in got.values())
    assert zeros == round(0.5 * sum(x.size for x in tree.values()))


def test_candidates_are_kept_from_vanishing_among_themselves():
    """With `select`, n is the number of candidates: of each array its best candidate stays."""
    tree = {name: jnp.asarray(x) for name, x in weights().items()}
    among = {name: jnp.asarray(RNG.random(x.shape) < 0.5) for name, x in tree.items()}
    select = Selection(lambda tree, key: {name: among[name] for name in tree})
    got = prune(clipjax.prune_mask(0.97, select=select), tree)
    expected = reference(tree.values(), 0.97, candidates=among.values())
    for x, mask in zip(got.values(), expected, strict=True):
        np.testing.assert_array_equal(x != 0, mask)


@pytest.mark.parametrize("structure", [structures.element(), structures.unit()], ids=["element", "unit"])
def test_growth_keeps_one_of_each_array(structure):
    """What grows again takes the place of others, and no array is left empty."""
    tree = {"big": jnp.asarray(RNG.normal(size=(6, 30)), jnp.float32) + 9, "small": jnp.full((6, 5), 1e-3)}
    tx = clipjax.prune_mask(0.8, structure=structure, every=1, stop=4, regrow=0.5, inner=optax.sgd(0.1))
    got = tx.init(tree), tree
    update = jax.jit(tx.update)
    for i in range(4):
        grads = jax.tree.map(lambda w, i=i: jnp.cos(w * (i + 1)), got[1])
        updates, state = update(grads, got[0], got[1])
        got = state, optax.apply_updates(got[1], updates)
        masks = jax.tree.leaves(state.projection.mask)
        assert all(bool(m.any()) for m in masks)
        assert sum(int((~m).sum()) for m in masks) == round(0.8 * sum(m.size for m in masks))


# Stacked layers


def stacks():
    """Two stacks of layers, units along the last axis, and one layer alone as a stack of one."""
    shapes = {"enc": (4, 5, 8), "dec": (3, 5, 6), "out": (1, 5, 7)}
    return {
        name: np.float32(np.abs(RNG.normal(size=shape)) * (1 + i / 9)) for i, (name, shape) in enumerate(shapes.items())
    }


def stacked_reference(scores, sparsity, min_keep=1):
    """The largest threshold with at most round(sparsity n) units: floor(c / L) of each layer, where c are below it."""
    units = [x.mean(1).astype(np.float32) for x in scores.values()]
    open_ = [np.sort(u, axis=1)[:, : u.shape[1] - min_keep] for u in units]
    wanted = round(sparsity * sum(u.size for u in units))
    values = np.sort(np.concatenate([np.ravel(u) for u in open_]))
    counts = lambda t: [int((u < t).sum()) // len(u) for u in open_]
    total = lambda t: sum(c * len(u) for c, u in zip(counts(t), units, strict=True))
    best = max((t for t in [*values, np.inf] if total(t) <= wanted), key=total)
    return dict(zip(scores, counts(best), strict=True)), wanted


BY_LAYER = structures.unit(axis=(0, -1))


@functools.partial(jax.jit, static_argnames="scope")
def stacked_masks(scores, sparsity, scope):
    return clipjax.make_mask(scores, sparsity, structure=BY_LAYER, scope=scope)


def dead(mask):
    """Which units of each layer are removed, whole ones."""
    gone = ~np.asarray(mask)
    assert (gone.all(1) == gone.any(1)).all()
    return gone.all(1)


@pytest.mark.parametrize("sparsity", [0.0, 0.125, 0.3125, 0.5, 0.75, 0.9375])
def test_every_layer_of_a_stack_loses_as_many_units_of_its_own(sparsity):
    scores = stacks()
    each, wanted = stacked_reference(scores, sparsity)
    got = {name: dead(mask) for name, mask in stacked_masks(scores, jnp.float32(sparsity), "global").items()}
    for name, gone in got.items():
        assert (gone.sum(1) == each[name]).all()
        for layer, units in zip(gone, scores[name].mean(1), strict=True):
            assert set(np.flatnonzero(layer)) == set(lowest(units, each[name]))
    removed = sum(int(gone.sum()) for gone in got.values())
    most = sum(x.shape[0] * (x.shape[2] - 1) for x in scores.values())
    assert min(wanted, most) - 3 <= removed <= wanted
    alone = stacked_masks(scores, jnp.float32(sparsity), "leaf")
    for name, mask in alone.items():
        units = scores[name].shape[2]
        assert (dead(mask).sum(1) == min(round(sparsity * units), units - 1)).all()


def test_ties_of_a_stack_are_removed_from_the_back_of_every_layer():
    got = dead(clipjax.make_mask(np.ones((3, 2, 4), np.float32), 0.5, structure=BY_LAYER))
    np.testing.assert_array_equal(got, [[False, False, True, True]] * 3)


# Units in multiples


def rounded(kept, n, step, min_keep=1):
    """The nearest of 0, step, 2 step, ..., n that is not below `min_keep`; the larger one of two."""
    allowed = [m for m in (*range(0, n, step), n) if m >= min(min_keep, n)]
    return min(allowed, key=lambda m: (abs(m - kept), -m))


WIDE = {"a": 24, "b": 20, "few": 5, "one": 1, "l_0": 16, "l_1": 16}  # units of each; 20 and 5 are no multiples


@functools.partial(jax.jit, static_argnames=("scope", "min_keep"))
def rounded_masks(scores, sparsity, scope, min_keep):
    structure = structures.unit(round_to=8, min_keep=min_keep)
    return clipjax.make_mask(scores, sparsity, structure=structure, scope=scope)


@pytest.mark.parametrize("min_keep", [0, 1, 9])
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_units_stay_in_multiples(scope, min_keep):
    """Of each array the nearest multiple of 8 or all, ties to more; globally of what the common threshold leaves."""
    scores = {name: np.float32(np.abs(RNG.normal(size=(3, n)))) for name, n in WIDE.items()}
    plain = structures.unit(min_keep=min_keep)
    for sparsity in (0.0, 0.125, 0.25, 0.5, 0.75, 0.9375):
        got = rounded_masks(scores, jnp.float32(sparsity), scope, min_keep)
        before = clipjax.make_mask(scores, sparsity, structure=plain, scope=scope)
        for name, mask in jax.device_get(got).items():
            kept = int(before[name][0].sum())
            expected = rounded(kept, WIDE[name], 8, min_keep)
            assert (mask == mask[0]).all() and int(mask[0].sum()) == expected, (name, sparsity, kept)
            order = np.argsort(-scores[name].mean(0))
            assert mask[0][order[:expected]].all()  # the best ones


def test_units_of_layers_and_of_groups_stay_in_multiples():
    stack = {"a": np.float32(np.abs(RNG.normal(size=(3, 5, 24)))), "b": np.float32(np.abs(RNG.normal(size=(2, 5, 12))))}
    by_layer = structures.unit(axis=(0, -1), round_to=8)
    for scope in ("leaf", "global"):
        for name, mask in clipjax.make_mask(stack, 0.55, structure=by_layer, scope=scope).items():
            kept = np.asarray(mask)[:, 0].sum(-1)
            assert (kept == 8).all(), (scope, name, kept)  # 11 of 24, and 5 of 12, of each layer
    kernel = np.float32(np.abs(RNG.normal(size=(4, 20))))
    groups = structures.unit(groups=[{"in": -1, "bias": 0, "out": 0}], round_to=8)
    tree = {"in": kernel, "bias": np.zeros(20, np.float32), "out": kernel.T}
    masks = clipjax.make_mask(tree, 0.4, structure=groups)  # 12 would stay: 16 is as near as 8
    np.testing.assert_array_equal(masks["bias"], kernel.mean(0) >= np.sort(kernel.mean(0))[4])
    np.testing.assert_array_equal(masks["out"][:, 0], masks["bias"])


@pytest.mark.parametrize("arguments", [{}, {"regrow": 0.3, "inner": optax.sgd(0.1)}], ids=["nested", "regrow"])
def test_units_stay_in_multiples_all_along_a_schedule(arguments):
    """In bf16 too; without growth what is removed stays removed."""
    tree = {name: jnp.asarray(RNG.normal(size=(6, n)) + 1, jnp.bfloat16) for name, n in WIDE.items()}
    ramp = optax.linear_schedule(0.0, 0.7, 6)
    tx = clipjax.prune_mask(ramp, structure=structures.unit(round_to=4), every=1, stop=6, **arguments)
    state, update, before = tx.init(tree), jax.jit(tx.update), None
    with jax.numpy_dtype_promotion("standard"):
        for i in range(8):
            grads = jax.tree.map(lambda w, i=i: jnp.cos(w * (i + 1)), tree)
            updates, state = update(grads, state, tree)
            tree = optax.apply_updates(tree, updates)
            masks = {name: np.ravel(mask) for name, mask in state.projection.mask.items()}
            assert all(m.sum() % 4 == 0 or m.all() for m in masks.values())
            assert arguments or before is None or not any((m > before[name]).any() for name, m in masks.items())
            before = masks
    assert sum(m.sum() for m in masks.values()) <= 0.3 * 82 + 2 * 6 + 4


def test_round_to_is_checked():
    for value in (0, 2.5, 2**16):
        with pytest.raises(ValueError, match=rf"`round_to` must be .*, got {value}\. Give what"):
            structures.unit(round_to=value)
    structure = structures.unit(round_to=8)
    with pytest.raises(ValueError, match=r"`select` must be None with `round_to`"):
        clipjax.prune_mask(0.5, structure=structure, select=selections.bernoulli(0.5))


def test_one_axis_removes_the_same_units_in_all_layers():
    scores = stacks()["enc"]
    gone = dead(clipjax.make_mask(scores, 0.5, structure=structures.unit()))
    expected = np.isin(np.arange(8), lowest(scores.mean((0, 1)), 4))
    np.testing.assert_array_equal(gone, np.broadcast_to(expected, (4, 8)))


@pytest.mark.parametrize(
    "options", [{}, {"carry": True}, {"regrow": 0.5, "inner": optax.sgd(0.1)}], ids=["plain", "carry", "regrow"]
)
def test_a_ramp_over_stacks_keeps_their_layers_alike(options):
    """At every refresh each layer of a stack has lost the same number, whatever comes back."""
    params = {name: jnp.asarray(x) for name, x in stacks().items()}
    ramp = optax.linear_schedule(0.25, 0.75, 3)
    tx = clipjax.prune_mask(ramp, structure=BY_LAYER, every=1, stop=3, **options)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(5):
        updates, state = update(jax.tree.map(lambda w, i=i: 0.1 * jnp.cos(9 * w + i), params), state, params)
        params = optax.apply_updates(params, updates)
        for mask in jax.tree.leaves(state.projection.mask):
            assert len(set((~np.asarray(mask)).sum((1, 2)))) == 1
    removed = sum(int((~m).sum()) for m in jax.tree.leaves(state.projection.mask))
    assert 0.75 * 57 - 4 <= removed <= round(0.75 * 57)


def test_candidates_of_a_stack_leave_its_layers_alike():
    params = {name: jnp.asarray(x) for name, x in stacks().items()}
    tx = clipjax.prune_mask(0.5, structure=BY_LAYER, select=selections.bernoulli(0.6))
    got = prune(tx, params)
    numbers = [np.asarray((x == 0).all(1).sum(1)) for x in got.values()]
    assert all(len(set(n.tolist())) == 1 for n in numbers) and sum(n.sum() for n in numbers) > 0


LAYERS_APART, LAYERS_WHOLE = P("data", None, "model"), P(None, "model", "data")


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("Auto", LAYERS_APART),
        ("Explicit", LAYERS_WHOLE),
        pytest.param("Auto", LAYERS_WHOLE, marks=pytest.mark.slow),
        pytest.param("Explicit", LAYERS_APART, marks=pytest.mark.slow),
    ],
)
def test_stacks_on_many_devices_move_no_weights(kind, spec):
    """Also where the layers are on several devices; two stacks are alike, and stacked once more."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    host = {f"l{i}": np.float32(np.abs(RNG.normal(size=(4, 6, 8)))) for i in range(2)} | {"w": np.ones((2, 4, 4), "f4")}
    params = {name: jax.device_put(x, jax.NamedSharding(mesh, spec)) for name, x in host.items()}
    tx = clipjax.prune_mask(optax.linear_schedule(0.25, 0.75, 3), structure=BY_LAYER, every=1, stop=3)
    state = tx.init(params)
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert not [line for line in text.splitlines() if any(word in line for word in MOVES)]
    got = prune(tx, params, steps=2)
    expected = prune(tx, {name: jnp.asarray(x) for name, x in host.items()}, steps=2)
    for name in host:
        np.testing.assert_array_equal(np.asarray(got[name]) != 0, np.asarray(expected[name]) != 0)
