"""What `shrink` leaves of groups that an analysis found: rounded widths, repaired scales, heads, stacked layers."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax._programs.analysis import Analysis
from clipjax._programs.groups import Group, Member, Repair
from clipjax._programs.shrinking import Shrunk, shrink

RNG = np.random.default_rng(0)
EPSILON = 1e-2


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def whole(units):
    return np.arange(units)


def found(units, axes, proved=True, repairs=(), statistics=()):
    """A group of an analysis whose leaves have each unit once."""
    return Group(units, [Member(path, axis, whole(units)) for path, axis in axes.items()], proved, repairs, statistics)


def dead(tree, units, axes):
    """The tree with these units at 0."""
    return tree | {path: _without(tree[path], axis, units) for path, axis in axes.items()}


def _without(x, axis, units):
    return jnp.moveaxis(jnp.moveaxis(x, axis, 0).at[np.array(units)].set(0), 0, axis)


MLP = {"in": -1, "bias": -1, "out": -2}
MLP_DEAD = [0, 2, 3, 7, 9]


def mlp(dtype=jnp.float32):
    params = {"in": normal(4, 11), "bias": normal(11), "out": normal(11, 3)}
    return jax.tree.map(lambda x: x.astype(dtype), dead(params, MLP_DEAD, MLP))


@pytest.mark.parametrize(("multiple", "kept"), [(None, 6), (1, 6), (4, 8), (5, 10), (8, 8), (7, 7), (9, 9), (16, 11)])
def test_round_to_keeps_the_first_dead_units_in_order(multiple, kept):
    params = mlp()
    small, _, widths = shrink(params, [found(11, MLP)], round_to=multiple)
    assert widths == {"in": kept, "bias": kept, "out": kept}
    left = sorted([*np.delete(np.arange(11), MLP_DEAD), *MLP_DEAD[: kept - 6]])
    chex.assert_trees_all_equal(small, {k: jnp.take(x, np.array(left), MLP[k]) for k, x in params.items()})
    if multiple == 4:  # groups by hand, too
        by_hand = shrink(params, [{"in": -1, "bias": 0, "out": 0}], round_to=multiple)
        chex.assert_trees_all_equal(by_hand.variables, small)


@pytest.mark.parametrize("multiple", [0, 2.5, -8])
def test_round_to_must_be_a_whole_number(multiple):
    with pytest.raises(ValueError, match=r"`round_to` must be a whole number >= 1, got .*e\.g\. 8"):
        shrink(mlp(), [found(11, MLP)], round_to=multiple)


def test_every_leaf_of_an_analysis_says_whether_a_unit_is_alive_but_statistics():
    params = {"in": jnp.zeros((2, 4)), "bn/scale": jnp.array([0.0, 1, 0, 0]), "bn/mean": jnp.ones(4)}
    params |= {"out": jnp.zeros((4, 2)).at[3].set(jnp.nan)}
    group = found(4, {"in": -1, "bn/scale": -1, "bn/mean": -1, "out": -2})
    small, _, widths = shrink(params, [group])
    assert (
        widths == {"in": 2, "bn/scale": 2, "out": 2}
        and small["bn/scale"].tolist() == [1, 0]
        and small["bn/mean"].shape == (2,)
    )


def test_query_heads_are_left_where_their_key_head_and_their_place_is():
    """6 query heads, 2 for each of 3 key heads: unit i // 2 of one group, i % 2 of the other, on one axis."""
    query, out, key = normal(4, 6, 5), normal(6, 5, 4), normal(4, 3, 5)
    heads = np.arange(6)
    members = [Member("key", -2, whole(3)), Member("query", -2, heads // 2), Member("out", -3, heads // 2)]
    keys = Group(3, members, True)
    places = Group(2, [Member("query", -2, heads % 2), Member("out", -3, heads % 2)], True)
    params = {"query": _without(query, -2, [2, 3]), "out": _without(out, 0, [2, 3]), "key": _without(key, -2, [1])}
    small, _, widths = shrink(params, [keys, places])
    assert widths == {"key": 2, "query": 4, "out": 4} and small["out"].shape == (4, 5, 4)
    gone = [1, 2, 3, 5]
    params = {"query": _without(query, -2, gone), "out": _without(out, 0, gone), "key": params["key"]}
    small, _, widths = shrink(params, [keys, places])
    assert widths == {"key": 2, "query": 2, "out": 2}
    chex.assert_trees_all_equal(small["query"], query[:, np.array([0, 4])])


STREAM = {"embed": -1, "norm": -1, "head": -2}


def stream_apply(offset):
    def apply(params, x, epsilon=EPSILON):
        h = params["embed"][x]
        wide = jnp.float64 if h.dtype == jnp.float64 else jnp.float32
        rms = jnp.sqrt((h.astype(wide) ** 2).mean(-1, keepdims=True) + epsilon)
        normed = (h / rms.astype(h.dtype)) * (params["norm"] + jnp.asarray(offset, h.dtype))
        return normed @ params["head"]

    return apply


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 3e-2), ("float16", 4e-3), ("float64", 1e-10)]
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_scale_makes_up_for_a_mean_over_fewer_units(offset, dtype, limit):
    with jax.enable_x64(dtype == "float64"):
        params = {"embed": 0.3 * normal(9, 12), "norm": normal(12), "head": normal(12, 5)}
        params = jax.tree.map(lambda x: x.astype(dtype), dead(params, [1, 4, 5, 6, 11], STREAM))
        repair = Repair("norm", offset, EPSILON)
        # Two groups name the repair, and what both cut is made up for once.
        lower = Group(6, [Member(p, a, np.r_[:6, [-1] * 6]) for p, a in STREAM.items()], True, [repair])
        upper = Group(6, [Member(p, a, np.r_[[-1] * 6, :6]) for p, a in STREAM.items()], True, [repair])
        apply, x = stream_apply(offset), jnp.arange(9)
        new = EPSILON * 12 / 7
        for groups in ([found(12, STREAM, True, [repair])], [lower, upper]):
            with pytest.raises(ValueError, match=r"`verify` must be given.* Let the model add \{'norm': 0.0171428"):
                shrink(params, groups)
            shrunk = shrink(params, groups, exact=False)
            np.testing.assert_allclose(shrunk.epsilons["norm"], new, rtol=1e-12)
            assert shrunk.variables["norm"].dtype == dtype and shrunk.variables["norm"].shape == (7,)
            wanted, got = apply(params, x), apply(shrunk.variables, x, new)
            assert float(jnp.abs(wanted - got).max()) <= limit * float(jnp.ptp(wanted))
        analysis = Analysis([], groups, (), apply)
        small = lambda params, x: apply(params, x, new)
        assert shrink(params, analysis, verify=(small, x)).change <= limit
        if dtype == "float32":
            with pytest.raises(ValueError, match=r"`verify/output` must change by at most 1e-05.*\{'norm': 0.0171428"):
                shrink(params, analysis, verify=(apply, x))


def test_a_repair_without_epsilon_or_with_nothing_dead_changes_nothing():
    params = {"embed": normal(9, 12), "norm": normal(12), "head": normal(12, 5)}
    shrunk = shrink(params, [found(12, STREAM, True, [Repair("norm", 0.0, EPSILON)])])
    assert shrunk.epsilons == {}
    chex.assert_trees_all_equal(shrunk.variables, params)
    shrunk = shrink(dead(params, [3], STREAM), [found(12, STREAM, True, [Repair("norm", 0.0, 0.0)])])
    assert shrunk.epsilons == {}
    np.testing.assert_allclose(shrunk.variables["norm"], np.delete(params["norm"], 3) * (12 / 11) ** 0.5, rtol=1e-6)


def test_shrunk_is_three_values_with_two_beside_them():
    shrunk = Shrunk({"a": 1}, None, {"a": 2}, {"norm": 0.5}, 0.25)
    variables, state, widths = shrunk
    assert (variables, state, widths) == ({"a": 1}, None, {"a": 2}) == shrunk
    for again in (copy.copy(shrunk), copy.deepcopy(shrunk), pickle.loads(pickle.dumps(shrunk))):
        assert again == shrunk and type(again) is Shrunk
        assert again.epsilons == {"norm": 0.5} and again.change == 0.25
    again = shrunk._replace(opt_state=3)
    assert again.opt_state == 3 and again.epsilons == {"norm": 0.5} and again.change == 0.25
    plain = Shrunk(*shrunk)
    assert plain.epsilons == {} and plain.change is None
    assert jax.tree.leaves(jax.tree.map(lambda x: x + 1, shrunk)) == [2, 3]


LAYERED = {"in": -1, "bias": -1, "out": -2}
LAYER_DEAD = ([1, 2, 5], [0, 3], [0, 1, 2, 6])


def stacked():
    """Three layers of 7 units, of which each has lost its own."""
    params = {"in": normal(3, 4, 7), "bias": normal(3, 7), "out": normal(3, 7, 4)}
    layers = [dead({k: x[i] for k, x in params.items()}, units, LAYERED) for i, units in enumerate(LAYER_DEAD)]
    return {k: jnp.stack([layer[k] for layer in layers]) for k in params}


def layered(axes=LAYERED, of=None):
    at = {"in": -3, "bias": -2, "out": -3} if of is None else of
    return Group(7, [Member(path, axis, whole(7), at[path]) for path, axis in axes.items()], True)


@pytest.mark.parametrize(("multiple", "kept"), [(None, 5), (3, 6)])
def test_each_layer_of_a_stack_loses_units_of_its_own(multiple, kept):
    params, tx = stacked(), optax.adam(1e-2)
    _, state = tx.update(params, tx.init(params), params)
    small, small_state, widths = shrink(params, [layered()], state, round_to=multiple)
    assert widths == {"in": kept, "bias": kept, "out": kept}
    for i, units in enumerate(LAYER_DEAD):
        alive = np.delete(np.arange(7), units)
        left = np.sort([*alive, *units[: kept - len(alive)]])
        layer = {k: jnp.take(x[i], left, LAYERED[k]) for k, x in params.items()}
        chex.assert_trees_all_equal({k: x[i] for k, x in small.items()}, layer)
        moments = small_state[0].mu["in"][i], state[0].mu["in"][i][:, left]
        chex.assert_trees_all_equal(*moments)
    chex.assert_trees_all_equal_shapes_and_dtypes(small_state, tx.init(small))

    def apply(params, x):
        layer = lambda h, p: (h + jax.nn.relu(h @ p["in"] + p["bias"]) @ p["out"], None)
        return jax.lax.scan(layer, x, params)[0]

    assert shrink(params, [layered()], verify=(apply, normal(2, 4))).change < 1e-5


def test_layers_behind_their_units_and_sharded_stacks():
    before = stacked()["in"]
    params = {"in": jnp.transpose(before, (2, 1, 0))}  # [units, inputs, layers]
    group = layered({"in": -3}, {"in": -1})
    small = shrink(params, [group]).variables["in"]
    wanted = shrink({"in": before}, [layered({"in": -1})]).variables["in"]
    chex.assert_trees_all_equal(small, jnp.transpose(wanted, (2, 1, 0)))
    mesh = jax.make_mesh((3,), ("layers",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:3])
    placed = {"in": jax.device_put(params["in"], jax.NamedSharding(mesh, jax.P(None, None, "layers")))}
    got = shrink(placed, [group]).variables["in"]
    assert got.sharding.spec == jax.P(None, None, "layers")
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(small))


def test_a_step_of_all_layers_is_refused_where_each_loses_its_own():
    params = stacked()
    for axis, ok in ((-1, False), ((0, -1), True)):
        tx = clipjax.fake_quantize(4, axis=axis, where=lambda path, leaf: path == "in")
        if ok:
            small, state, _ = shrink(params, [layered()], tx.init(params))
            chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(small))
        else:
            with pytest.raises(ValueError, match=r"step/in` must have a value for each layer, got \(1, 1, 7\)"):
                shrink(params, [layered()], tx.init(params))


def test_a_mask_of_units_is_cut_as_they_are_where_its_leaf_has_several_entries_of_each():
    def apply(params, x):
        heads = jnp.tanh(x @ params["value"]).reshape(*x.shape[:-1], 3, -1)
        gate, up = jnp.split(heads.reshape(*x.shape[:-1], -1) @ params["gate_up"], 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ params["down"]

    def masked(params):
        """The groups, and an optimizer whose masks lie at the leaves of them that have more entries than units."""
        analysis = clipjax.analyze(apply, params, x)
        groups = [group for group in analysis.groups if group.units != 3]
        structure = clipjax.structures.unit(groups=groups)
        tx = optax.chain(optax.adam(1e-2), clipjax.prune_mask(0.5, structure=structure, scope="leaf"))
        return groups, tx, tx.init(params)

    x = normal(2, 5)
    params = {"value": normal(5, 24), "gate_up": normal(24, 20), "down": normal(10, 3)}
    groups, tx, state = masked(params)
    assert [next(iter(group)) for group in groups] == ["gate_up", "value"]
    assert [group.units for group in groups] == [10, 8]
    update, state = tx.update(params, state, params)
    params = optax.apply_updates(params, update)
    small, small_state, _ = shrink(params, groups, state, round_to=4, verify=(apply, x))
    mask, before = (s[1].projection.mask for s in (small_state, state))
    for path, units in (("gate_up", 8), ("value", 4)):
        kept = np.asarray(before[path][0])
        left = kept | (~kept & (np.cumsum(~kept) <= units - kept.sum()))
        chex.assert_trees_all_equal(mask[path][0], kept[left])
    chex.assert_trees_all_equal_shapes_and_dtypes(small_state, masked(small)[2])
