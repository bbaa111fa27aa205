"""unit(groups=): units that several leaves share, in every cycle and sharding, against a naive reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import scores, selections
from clipjax.structures import unit

RNG = np.random.default_rng(0)
FIRST = {"a/kernel": -1, "a/bias": 0, "bn/scale": 0, "bn/mean": 0, "batch_stats/bn/var": 0, "b/kernel": 2}
SECOND = {"b/kernel": -1, "params/out/kernel": {0: 4}}
GROUPS = [FIRST, SECOND]
# leaf -> (axis, group) for each group that it is in; `out` reads a flattened map of 2 x 2 x 4: entry i is of unit i % 4
SITES = {
    ("a", "kernel"): [(3, 0)],
    ("a", "bias"): [(0, 0)],
    ("bn", "scale"): [(0, 0)],
    ("b", "kernel"): [(2, 0), (3, 1)],
    ("out", "kernel"): [(0, 1)],
}
SCORED, SIZES = [("a", "kernel"), ("b", "kernel"), ("out", "kernel")], (6, 4)


def params(dtype=jnp.float32):
    shapes = {
        "a": {"kernel": (3, 3, 2, 6), "bias": (6,)},
        "bn": {"scale": (6,)},
        "b": {"kernel": (1, 1, 6, 4)},
        "out": {"kernel": (16, 5), "bias": (5,)},
    }
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s) * 0.3 + 0.1, dtype), shapes, is_leaf=is_shape)


def reference_scores(tree, reduce="mean"):
    """Unit by unit, the entries of all weights of its group, one list per group."""
    found = []
    for group, size in enumerate(SIZES):
        entries = [[] for _ in range(size)]
        for module, name in SCORED:
            for axis, of in SITES[module, name]:
                rows = np.moveaxis(np.asarray(tree[module][name], np.float64), axis, 0)
                for i, row in enumerate(rows if of == group else ()):
                    entries[i % size].extend(row.ravel())
        found.append(np.array([getattr(np, reduce)(x) for x in entries]))
    return found


def reference_masks(tree, alive):
    """True where every unit that the entry belongs to is alive; leaves that no group names are kept."""
    masks = jax.tree.map(lambda x: np.ones(x.shape, bool), tree)
    for (module, name), sites in SITES.items():
        for axis, group in sites:
            rows = np.moveaxis(masks[module][name], axis, 0)
            for i in range(len(rows)):
                rows[i] &= alive[group][i % SIZES[group]]
    return masks


def lowest(values, count):
    return np.isin(np.arange(len(values)), np.argsort(values, kind="stable")[:count], invert=True)


def alive_units(values, sparsity, scope, min_keep):
    """Which units stay, group by group: the lowest go, of all together or of each, but for `min_keep` of each."""
    open_ = [np.where(lowest(v, len(v) - min_keep), np.inf, v) for v in values]
    pools = open_ if scope == "leaf" else [np.concatenate(open_)]
    kept = [lowest(v, min(round(sparsity * len(v)), np.isfinite(v).sum())) for v in pools]
    return kept if scope == "leaf" else np.split(kept[0], [SIZES[0]])


@pytest.mark.parametrize("min_keep", [1, 3])
@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_make_mask_and_prune_mask_against_the_reference(reduce, scope, min_keep):
    tree = params()
    structure = unit(reduce=reduce, groups=GROUPS, min_keep=min_keep)
    size = jax.tree.map(jnp.abs, tree)
    alive = alive_units(reference_scores(size, reduce), 0.5, scope, min_keep)
    wanted = reference_masks(tree, alive)
    tx = clipjax.prune_mask(0.5, structure=structure, scope=scope)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        masks = jax.jit(lambda x: clipjax.make_mask(x, 0.5, structure=structure, scope=scope))(size)
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    chex.assert_trees_all_equal(masks, wanted)
    pruned = optax.apply_updates(tree, updates)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x != 0, pruned), wanted)
    assert sorted(state.projection.mask) == ["a", "b"]
    assert state.projection.mask["a"]["kernel"].shape == (1, 1, 1, 6)
    assert float(clipjax.report(state)["prune_mask/removed"]) == sum((~a).sum() for a in alive)


def test_a_group_of_one_leaf_is_the_plain_unit():
    x = {"w": jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32), "v": jnp.asarray(RNG.normal(size=(7, 3)), jnp.float32)}
    alone = clipjax.make_mask(x, 0.4, structure=unit(groups=[{"w": -1}, {"v": -1}]))
    chex.assert_trees_all_equal(alone, clipjax.make_mask(x, 0.4, structure=unit()))


def test_where_picks_the_scored_leaves_and_units_leave_all():
    """Where only the kernel that makes the units is scored, the large entries of the next one count for nothing."""
    tree = {"in": jnp.array([[1.0, 2.0]]), "bias": jnp.array([9.0, 9.0]), "out": jnp.array([[100.0], [0.5]])}
    group = [{"in": -1, "bias": 0, "out": 0}]
    for where, alive in ((None, [True, False]), (lambda path, leaf: path == "in", [False, True])):
        tx = clipjax.prune_mask(0.5, structure=unit(groups=group), where=where)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
        pruned = optax.apply_updates(tree, updates)
        assert [(x != 0).ravel().tolist() for x in jax.tree.leaves(pruned)] == [alive] * 3


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(0.01),
}
KERNELS = {"a": (3, 3, 2, 6), "b": (1, 1, 6, 4), "out": (16, 5)}
CYCLES = {
    "once": {"start": 1},
    "schedule": {"sparsity": optax.polynomial_schedule(0.0, 0.5, 3, 4), "every": 2, "stop": 4},
    "carry": {"every": 2, "carry": True},
    "inner": {"every": 2, "inner": True},
    "gradient": {"every": 2, "score": scores.gradient()},
    "fisher": {"every": 2, "score": scores.fisher(), "scope": "leaf"},
    "random": {"score": scores.random(), "scope": "erk"},
    "external": {"score": scores.external({name: {"kernel": jnp.ones(shape)} for name, shape in KERNELS.items()})},
    "tree": {"sparsity": {"a": {"kernel": 0.5}, "b": {"kernel": 0.5}}},
    "select": {"select": selections.bernoulli(0.9), "key": jax.random.key(2)},
}  # fmt: skip


def run(tx, tree, steps=6):
    """Params and state after each step of a scan on random gradients."""

    def step(carry, key):
        tree, state = carry
        draws = jax.random.split(key, len(jax.tree.leaves(tree)))
        keys = jax.tree.unflatten(jax.tree.structure(tree), list(draws))
        grads = jax.tree.map(lambda k, x: jax.random.normal(k, x.shape, x.dtype), keys, tree)
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
        return (tree, state), (tree, state)

    start = (tree, tx.init(tree))

    keys = jax.random.split(jax.random.key(3), steps)
    return jax.jit(lambda: jax.lax.scan(step, start, keys))()[1]


def build(cycle, optimizer):
    arguments = dict(CYCLES[cycle])
    if arguments.pop("inner", False):
        return clipjax.prune_mask(0.5, structure=unit(groups=GROUPS), inner=optimizer, **arguments)
    tx = clipjax.prune_mask(arguments.pop("sparsity", 0.5), structure=unit(groups=GROUPS), **arguments)
    return clipjax.with_gradient(optax.chain(optimizer, tx))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cycle", CYCLES)
def test_every_cycle_keeps_dead_units_at_zero_in_all_their_leaves(cycle, dtype):
    optimizer = list(OPTIMIZERS.values())[len(cycle) % 3]()
    path, state = run(build(cycle, optimizer), params(dtype))
    held = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mask")) if hasattr(s, "mask"))
    units = [np.asarray(held.mask[name]["kernel"]).reshape(6, -1) for name in "ab"]
    for step in range(6):
        masks = reference_masks(params(), [u[step] for u in units])
        for (module, name), _ in SITES.items():
            assert (np.asarray(path[module][name][step], np.float32)[~masks[module][name]] == 0).all()
    removed = sum(int((~u[-1]).sum()) for u in units)
    assert removed == 5 or (cycle == "select" and 1 <= removed < 5)
    others = np.asarray(path["out"]["bias"], np.float32)
    assert (others != 0).all() and (np.diff(others, axis=0) != 0).any()


def test_inner_moments_of_dead_units_are_zero():
    path, state = run(build("inner", optax.adam(0.1)), params())
    for name in ("mu", "nu"):
        moments = optax.tree.get(state, name)
        for (module, leaf), _ in SITES.items():
            gone = np.asarray(path[module][leaf][-1]) == 0
            moment = np.asarray(moments[module][leaf][-1])
            assert gone.any() and (moment[gone] == 0).all() and (moment[~gone] != 0).all()


def test_vmap_over_sparsity_equals_the_runs_one_by_one():
    def mask(sparsity):
        tx = clipjax.prune_mask(sparsity, structure=unit(groups=GROUPS))
        return tx.update(tree, tx.init(tree), tree)

    tree = params()
    swept = jax.jit(jax.vmap(mask))(jnp.array([0.3, 0.6]))
    alone = jax.tree.map(lambda *lanes: jnp.stack(lanes), mask(0.3), mask(0.6))
    chex.assert_trees_all_close(swept, alone, rtol=1e-6)


SPECS = {
    "aligned": {"a": jax.P(None, "y"), "bias": jax.P("y"), "b": jax.P("y", "x")},
    "crossed": {"a": jax.P("y", "x"), "bias": jax.P(), "b": jax.P("y", None)},
    "flat": {"a": jax.P(None, "x"), "bias": jax.P("x"), "b": jax.P(("x", "y"), None)},
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("case", SPECS)
def test_sharded_masks_are_the_local_ones_and_shardings_stay(case, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    shapes = {"a": (8, 16), "bias": (16,), "b": (48 if case == "flat" else 16, 8)}
    local = {name: jnp.asarray(RNG.integers(1, 3, shape) / 4, jnp.float32) for name, shape in shapes.items()}
    placed = {name: jax.device_put(x, jax.NamedSharding(mesh, SPECS[case][name])) for name, x in local.items()}
    tx = clipjax.prune_mask(0.5, structure=unit(groups=[{"a": -1, "bias": 0, "b": {0: shapes["b"][0] // 16}}]))
    wanted, _ = tx.update(local, tx.init(local), local)
    with jax.set_mesh(mesh):
        compiled = jax.jit(tx.update).lower(placed, tx.init(placed), placed).compile()
        got, _ = compiled(placed, tx.init(placed), placed)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(wanted))
    for name, x in got.items():
        assert x.sharding.is_equivalent_to(placed[name].sharding, x.ndim)
    moves = ("all-gather", "all-to-all", "collective-permute", " sort(")
    assert not [line for line in compiled.as_text().splitlines() if any(word in line for word in moves)]


MLP = {"a/kernel": -1, "a/bias": 0, "b/kernel": 0}
FIRST_LEAF = "`groups` must begin with a leaf that `where` picks, got 'a/"
BAD = {
    "typo": ([MLP | {"a/biass": 0}], {}, r"`groups` must name one array by each path, got 'a/biass'. Did .*'a/bias'"),
    "typo everywhere": ([{"c/kernel": -1}], {}, "got 'c/kernel'. Did you mean one of"),
    "statistics elsewhere": ([MLP | {"bn/average": 0}], {}, "name one array by each path, got 'bn/average'"),
    "statistics alone": ([{"bn/mean": 0}], {}, "`groups` must each name a param"),
    "bias first": ([{"a/bias": 0, "a/kernel": -1}], {}, FIRST_LEAF + "bias'"),
    "not picked": ([MLP], {"where": lambda path, leaf: path == "b/kernel"}, FIRST_LEAF + "kernel'"),
    "same first": ([{"a/kernel": -1}, {"a/kernel": -2}], {}, "`groups` must begin with different leaves, got 'a/ker"),
    "axis": ([{"a/kernel": 2}], {}, "`groups` must name an axis that exists, got 2"),
    "size": ([MLP | {"b/bias": 0}], {}, "`b/bias` must have 8 entries along the axis of its units"),
    "twice": ([MLP, {"b/kernel": 0}], {}, "`b/kernel` must be cut once along each axis, got -2"),
    "regrow": ([MLP], {"inner": optax.sgd(0.1), "regrow": 0.1}, "`regrow` must be None with groups, got 0.1. A unit"),
    "tree": ([MLP], {"sparsity": {"b": {"kernel": 0.5}}}, r"`sparsity` must name every picked leaf, got \['a/ker"),
}


def mlp():
    shapes = {"a": {"kernel": (5, 8), "bias": (8,)}, "b": {"kernel": (8, 3), "bias": (3,)}}
    return jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.filterwarnings("ignore:`where` picks no float array")
@pytest.mark.parametrize("case", BAD)
def test_bad_groups_name_argument_value_and_remedy(case):
    groups, arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        clipjax.prune_mask(**{"sparsity": 0.5} | arguments, structure=unit(groups=groups)).init(mlp())


HEADS = {"a": jnp.ones((2, 3, 4)), "w": jnp.ones(12)}
FLAT = {"a": jnp.ones((2, 4)), "w": jnp.ones((36, 3))}
TIMES = {
    "unsaid": ({"a": -1, "w": 0}, FLAT, r"`w` must have 4 .*, got 36. .*flattened map, say .*: `'w': \{-2: 9\}`"),
    "other": ({"a": -1, "w": {0: 8}}, FLAT, r"`w` must have 32 entries .*got 36. .*: `'w': \{-2: 9\}`"),
    "heads": ({"a": -2, "w": {0: 4}}, HEADS, "`w` must have 3 entries along the axis of its units, got 12. .* 'a'.$"),
    "owner": ({"a": {-1: 2}}, FLAT, "`a` must have the units of its group, got 4. .* have its size, 4, once"),
    "none": ({"a": -1, "w": {0: 0}}, FLAT, r"`groups\[0\]` must be a whole number >= 1, got 0"),
}


@pytest.mark.parametrize("case", TIMES)
def test_sizes_that_divide_by_chance_are_refused_with_what_to_write(case):
    group, tree, message = TIMES[case]
    for call in (
        lambda: clipjax.shrink(tree, [group]),
        lambda: clipjax.prune_mask(0.5, structure=unit(groups=[group])).init(tree),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("groups", [MLP, [{}], ["a/kernel"], [{1: 0}]])
def test_groups_that_are_no_dicts_are_refused_in_the_factory(groups):
    with pytest.raises(TypeError, match="must be a list of dicts path -> axis"):
        unit(groups=groups)
    with pytest.raises(ValueError, match="`axis` must be left out with `groups`, got -2"):
        unit(-2, groups=[MLP])


def test_none_leaves_pass_and_a_tree_without_leaves_is_legal():
    tree = mlp()
    tree["a"]["bias"] = None
    tx = clipjax.prune_mask(0.5, structure=unit(groups=[MLP]))
    updates, state = tx.update(tree, tx.init(tree), tree)
    assert updates["a"]["bias"] is None and int((~state.projection.mask["a"]["kernel"]).sum()) == 4
    optax.tree_utils.tree_map_params(tx, lambda x: x, state)


def test_widths_of_a_leaf_that_several_groups_own_do_not_collide():
    """Heads and what is in a head: the same kernels own both, along different axes."""
    query = jnp.ones((3, 4, 5)).at[:, 1].set(0.0).at[:, :, 2:].set(0.0)
    params = {"query": query, "key": query, "out": jnp.ones((5, 3))}
    groups = [{"query": -2, "key": -2}, {"query": -1, "key": -1, "out": 0}]
    small, _, widths = clipjax.shrink(params, groups)
    assert widths == {("query", -2): 3, ("key", -2): 3, ("query", -1): 2, ("key", -1): 2}
    assert small["query"].shape == small["key"].shape == (3, 3, 2) and small["out"].shape == (2, 3)
    assert clipjax.shrink(params, groups[:1]).widths == {"query": 3, "key": 3}
