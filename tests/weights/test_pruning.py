"""make_mask and prune_mask: exact counts, deterministic ties, the life cycle, and zeros that stay zero."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import scores, selections, structures

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"bias": jnp.zeros(5), "kernel": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)},
}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def reference_mask(tree, sparsity):
    """Without the round(sparsity·n) lowest of all; NaN lowest; of equals the earlier is kept."""
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)
    flat = np.where(np.isnan(flat), -np.inf, flat)
    keep = np.ones(flat.size, bool)
    keep[np.lexsort((-np.arange(flat.size), flat))[: round(sparsity * flat.size)]] = False
    leaves, treedef = jax.tree.flatten(tree)
    parts = np.split(keep, np.cumsum([x.size for x in leaves])[:-1])
    return treedef.unflatten([m.reshape(x.shape) for m, x in zip(parts, leaves, strict=True)])


def kernels(tree):
    return {"a": tree["a"]["kernel"], "b": tree["b"]["kernel"]}


def run(tx, count, gradient=None, params=PARAMS, **extra):
    """Yields the params after each of `count` jitted updates; `gradient(i)` gives the incoming updates."""
    update = jax.jit(functools.partial(tx.update, **extra))
    state = tx.init(params)
    for i in range(count):
        updates, state = update(ZEROS if gradient is None else gradient(i), state, params)
        params = optax.apply_updates(params, updates)
        yield params


def noise(i):
    return jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(i).normal(size=p.shape), jnp.float32), PARAMS)


def zeros(params):
    return {k: np.asarray(p) == 0 for k, p in kernels(params).items()}


def count_zeros(params):
    return sum(int(z.sum()) for z in zeros(params).values())


# make_mask


@pytest.mark.parametrize("n", [1, 5, 10])
def test_make_mask_removes_exactly_pythons_round(n):
    """round(2.5) = 2: halves go to even, as Python has it; the best one stays unless told otherwise."""
    for sparsity in (0, 0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999):
        for min_keep in (0, 1):
            mask = clipjax.make_mask(jnp.arange(n, 0, -1), sparsity, structure=structures.element(min_keep))
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, np.arange(n) < max(n - round(sparsity * n), min_keep))


@pytest.mark.parametrize("values", ["random", "equal", "ties", "nan", "infinite"])
def test_make_mask_matches_a_sort(values):
    """Tree order, then row-major; NaN goes first."""
    base = {"b": RNG.normal(size=(4, 3)), "a": RNG.normal(size=(2, 2, 2)), "c": RNG.normal(size=())}
    edit = {
        "random": lambda x: x,
        "equal": lambda x: x * 0 + 2,
        "ties": lambda x: np.round(x),
        "nan": lambda x: np.where(x > 0.5, np.nan, x),
        "infinite": lambda x: np.where(x > 0.5, np.inf, np.where(x < -0.5, -np.inf, x)),
    }[values]
    tree = jax.tree.map(lambda x: edit(x).astype(np.float32), base)
    got = clipjax.make_mask(tree, 0.4, structure=structures.element(min_keep=0))
    chex.assert_trees_all_equal(got, reference_mask(tree, 0.4))


def test_make_mask_scope_leaf_prunes_each_alone():
    tree = kernels(PARAMS)
    got = clipjax.make_mask(tree, 0.4, scope="leaf")
    chex.assert_trees_all_equal(got, {k: reference_mask(x, 0.4) for k, x in tree.items()})


def test_make_mask_per_leaf_sparsity():
    sparsity = clipjax.per_leaf(lambda path, leaf: 0.5 if path == "a" else 0.0)
    got = clipjax.make_mask(kernels(PARAMS), sparsity, scope="leaf")
    assert int((~got["a"]).sum()) == 10 and bool(got["b"].all())


def test_make_mask_passes_none_and_empty_leaves_and_compares_integers():
    got = clipjax.make_mask({"none": None, "empty": jnp.zeros((0, 3)), "x": jnp.array([3, 1, 2])}, 1 / 3)
    assert got["none"] is None and got["empty"].shape == (0, 3)
    np.testing.assert_array_equal(got["x"], [True, False, True])


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 2, 3, 8)])
def test_make_mask_removes_whole_units(shape, reduce):
    x = np.abs(RNG.normal(size=shape)).astype(np.float32)
    got = np.asarray(clipjax.make_mask(x, 0.5, structure=structures.unit(reduce=reduce)))
    strength = getattr(np, reduce)(x.reshape(-1, 8), axis=0)
    expected = np.isin(np.arange(8), np.argsort(strength)[4:])
    np.testing.assert_array_equal(got, np.broadcast_to(expected, shape))


@pytest.mark.parametrize(("min_keep", "left"), [(0, 0), (1, 1), (3, 3)])
def test_make_mask_keeps_min_keep_units_of_every_leaf(min_keep, left):
    """A weak layer does not die; what it keeps, the others lose."""
    tree = {"strong": jnp.full((2, 8), 9.0), "weak": jnp.arange(8.0).reshape(2, 4) + 0.1}
    got = clipjax.make_mask(tree, 0.5, structure=structures.unit(min_keep=min_keep))
    assert int(got["weak"].all(0).sum()) == left
    assert int(got["strong"].all(0).sum()) == 6 - left


# prune_mask: the life cycle


def test_prunes_the_lowest_once_and_holds_them():
    """A constant sparsity without `every` fires once, on the weights before the update: then masks stay."""
    expected = reference_mask(jax.tree.map(jnp.abs, kernels(PARAMS)), 0.7)
    for params in run(clipjax.prune_mask(0.7), 4, noise):
        chex.assert_trees_all_equal(zeros(params), jax.tree.map(np.logical_not, expected))
        assert not np.any(np.asarray(params["a"]["bias"]) == 0)  # biases are not picked


def test_start_leaves_earlier_updates_alone():
    counts = [count_zeros(p) for p in run(clipjax.prune_mask(0.5, start=2), 4, noise)]
    assert counts == [0, 0, 25, 25]


@pytest.mark.parametrize(("every", "stop", "refreshes"), [(2, 6, [1, 3, 5, 6]), (3, 7, [1, 4, 7]), (100, 5, [1, 5])])
def test_schedule_refreshes_every_and_always_at_stop_then_freezes(every, stop, refreshes):
    """The schedule counts from `start`, as the cycle does; `stop` is a count of the run."""

    def schedule(count):
        return 0.1 * (count.astype(jnp.float32) + 1)

    expected, now = [], 0
    for count in range(9):
        now = round(float(np.float32(0.1) * np.float32(count)) * 50) if count in refreshes else now
        expected.append(now)
    tx = clipjax.prune_mask(schedule, start=1, every=every, stop=stop)
    assert [count_zeros(p) for p in run(tx, 9, noise)] == expected


def test_masks_nest_and_refreshes_of_equal_count_keep_the_mask():
    """Without carry a removed weight stays removed, whatever its gradient; more are added to them."""
    schedule = optax.linear_schedule(0.2, 0.8, 4)
    before = None
    for params in run(
        clipjax.prune_mask(schedule, every=1, stop=4), 7, lambda i: jax.tree.map(lambda x: 9 * x, noise(i))
    ):
        now = zeros(params)
        assert before is None or all((now[k] >= before[k]).all() for k in now)
        before = now
    assert count_zeros(params) == 40
    masks = [zeros(p) for p in run(clipjax.prune_mask(0.5, every=1), 4, noise)]
    chex.assert_trees_all_equal(*masks)


def test_carry_lets_a_weight_come_back():
    """Straight-through: the float weight goes on learning under its mask."""
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 0.5]])}
    push = {"kernel": jnp.array([[0.0, 0.0, 0.0, 1.0]])}
    tx = clipjax.prune_mask(0.5, every=1, carry=True)
    got = [np.asarray(p["kernel"])[0] for p in run(tx, 3, lambda i: push, params)]
    np.testing.assert_array_equal(got, [[0, 2, 3, 0], [0, 0, 3, 2.5], [0, 0, 3, 3.5]])


@pytest.mark.parametrize("optimizer", [optax.adamw(0.1, weight_decay=0.5), optax.sgd(0.1, momentum=0.9)])
def test_weight_decay_and_momentum_keep_zeros(optimizer):
    with jax.numpy_dtype_promotion("standard"):  # for optax's bias correction
        for params in run(optax.chain(optimizer, clipjax.prune_mask(0.6)), 4, noise):
            assert count_zeros(params) == 30


def test_inner_sees_the_float_weights_and_the_mask_holds_outside():
    tx = clipjax.prune_mask(0.5, every=2, carry=True, inner=optax.adamw(0.1, weight_decay=0.5))
    with jax.numpy_dtype_promotion("standard"):
        assert [count_zeros(p) for p in run(tx, 3, noise)] == [25, 25, 25]


def test_refresh_argument_forces_or_forbids():
    """`refresh=False` compiles no selection at all; `refresh=True` selects whatever the count."""
    tx = clipjax.prune_mask(0.5, start=100)
    assert [count_zeros(p) for p in run(tx, 1, refresh=True)] == [0]  # not started
    late = clipjax.prune_mask(optax.linear_schedule(0.2, 0.6, 2), every=50, stop=50)
    assert [count_zeros(p) for p in run(late, 3)] == [10, 10, 10]
    assert [count_zeros(p) for p in run(late, 3, refresh=True)] == [10, 20, 30]
    assert [count_zeros(p) for p in run(late, 3, refresh=False)] == [0, 0, 0]
    frozen = jax.jit(functools.partial(late.update, refresh=False)).lower(ZEROS, late.init(PARAMS), PARAMS)
    assert "while" not in frozen.as_text() and "conditional" not in frozen.compile().as_text()


def test_update_traces_once():
    chex.clear_trace_counter()
    tx = clipjax.prune_mask(optax.linear_schedule(0.2, 0.6, 2), every=1, stop=2)
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(4):
        updates, state = update(ZEROS, state, params)
        params = optax.apply_updates(params, updates)


# prune_mask: what is compared


def test_scope_leaf_and_per_leaf_sparsity():
    for tx, expected in (
        (clipjax.prune_mask(0.4, scope="leaf"), {"a": 8, "b": 12}),
        (clipjax.prune_mask(clipjax.per_leaf(lambda p, x: 0.5 if "a/" in p else 0.1), scope="leaf"), {"a": 10, "b": 3}),
    ):
        (params,) = run(tx, 1)
        assert {k: int(z.sum()) for k, z in zeros(params).items()} == expected


def test_where_and_non_float_leaves_pass():
    params = {"kernel": jnp.ones((2, 3)), "table": jnp.ones((2, 3)), "ids": jnp.ones((2, 3), jnp.int32), "none": None}
    tx = clipjax.prune_mask(0.5, where=lambda path, leaf: path == "kernel")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["kernel"], [[1, 1, 1], [0, 0, 0]])
    chex.assert_trees_all_equal(*({k: tree[k] for k in ("table", "ids")} for tree in (new, params)))


def test_select_restricts_candidates_and_is_redrawn_at_each_refresh():
    """Sparsity counts candidates; others are never removed."""
    select = selections.bernoulli(0.5, key=jax.random.key(5))
    tx = clipjax.prune_mask(0.5, select=select, every=1)
    shapes, gone, draws = kernels(PARAMS), None, []
    draw = jax.jit(lambda count: select.choose(shapes, jax.random.fold_in(jax.random.key(5), count)))
    for count, params in enumerate(run(tx, 3)):
        chosen = draw(count)
        draws.append(np.asarray(chosen["a"]))
        if gone is None:
            picked = np.concatenate([np.ravel(chosen[k]) for k in shapes])
            size = np.where(picked, np.concatenate([np.abs(np.ravel(x)) for x in shapes.values()]), np.inf)
            gone = np.isin(np.arange(50), np.argsort(size)[: round(0.5 * picked.sum())])
            np.testing.assert_array_equal(np.concatenate([np.ravel(z) for z in zeros(params).values()]), gone)
    assert any((d != draws[0]).any() for d in draws[1:])


def test_given_mask_is_held_and_may_be_traced():
    mask = {"a": {"kernel": jnp.arange(20).reshape(4, 5) % 3 == 0}, "b": {"kernel": True}}

    @jax.jit
    def once(mask):
        tx = clipjax.prune_mask(mask={"a": mask["a"], "b": {"kernel": True}})
        updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, updates)

    (held,) = run(clipjax.prune_mask(mask=mask), 1)
    for new in (held, once({"a": mask["a"]})):
        np.testing.assert_array_equal(new["a"]["kernel"], np.where(mask["a"]["kernel"], PARAMS["a"]["kernel"], 0))
        chex.assert_trees_all_equal(new["b"], PARAMS["b"])


def test_with_gradient_hands_over_the_incoming_gradient_and_a_callers_own_wins():
    """Behind SGD the transformation sees updates −η·g; the score must see |g|, or what the caller passes."""
    tx = clipjax.with_gradient(optax.chain(optax.sgd(0.5), clipjax.prune_mask(0.5, score=scores.gradient(0.0))))
    grads, other = noise(1), noise(2)
    for given, extra in ((grads, {}), (other, {"grad": other})):
        (params,) = run(tx, 1, lambda i: grads, **extra)
        expected = reference_mask(jax.tree.map(jnp.abs, kernels(given)), 0.5)
        chex.assert_trees_all_equal(zeros(params), jax.tree.map(np.logical_not, expected))


def test_non_finite_target_is_emitted_and_left_out():
    """NaN and infinite weights are neither pruned nor hidden."""
    params = {"kernel": jnp.array([[jnp.nan, 1.0, jnp.inf, 0.1, 0.2, 3.0]])}
    (new,) = run(clipjax.prune_mask(0.5), 1, lambda i: {"kernel": jnp.zeros((1, 6))}, params)
    np.testing.assert_array_equal(new["kernel"], [[np.nan, 0, np.inf, 0, 0, 3]])


def test_keys_make_random_scores_reproducible():

    @jax.jit
    def once(seed):
        tx = clipjax.prune_mask(0.5, score=scores.random(), key=jax.random.key(seed))
        return optax.apply_updates(PARAMS, tx.update(ZEROS, tx.init(PARAMS), PARAMS)[0])

    masks = [zeros(once(seed))["b"] for seed in (1, 1, 2)]
    assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_params_are_exactly_zero(dtype):
    params = {"kernel": PARAMS["b"]["kernel"].astype(dtype)}
    with jax.numpy_dtype_promotion("standard"):
        (new,) = run(clipjax.prune_mask(0.5), 1, lambda i: {"kernel": jnp.ones((5, 6), dtype)}, params)
    assert new["kernel"].dtype == dtype and int((new["kernel"] == 0).sum()) == 15


def test_units_die_together():
    (params,) = run(clipjax.prune_mask(0.5, structure=structures.unit(), scope="leaf"), 1)
    for name, units in (("a", 2), ("b", 3)):
        dead = zeros(params)[name]
        assert dead.all(0).sum() == units and dead.any(0).sum() == units


def test_a_removed_weight_with_a_non_finite_target_is_emitted_as_it_is():
    """Rule 5: what is not finite passes, so that an outer `apply_if_finite` or a NaN check sees it."""
    tx = clipjax.prune_mask(0.5)
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    updates, state = tx.update({"kernel": jnp.zeros((1, 4))}, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    updates, state = tx.update({"kernel": jnp.array([[jnp.inf, jnp.nan, -jnp.inf, 0.5]])}, state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], [[np.inf, np.nan, -np.inf, 4.5]])


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_report_of_more_weights_than_an_i32_counts(scope):
    sizes = [40_000] if scope == "global" else [32_768, 32_768]
    params = {f"w{i}": jax.ShapeDtypeStruct((65_536, n), jnp.float32) for i, n in enumerate(sizes)}
    told = jax.eval_shape(lambda p: clipjax.report(clipjax.prune_mask(0.5, scope=scope).init(p), per_leaf=True), params)
    assert told["prune_mask/sparsity"].dtype == jnp.float32
