"""Rules inside transformations: no non-finite norm in a history, a state for each norm or entry, error feedback."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import thresholds

pytestmark = pytest.mark.usefixtures("strict")


def u_clip(grads, limit, per):
    """Elesedy and Hutter, 2023, arXiv 2302.02971, in f64: what is emitted at every step, and the carry at the end."""
    carry, out = jax.tree.map(lambda g: np.zeros(g.shape), grads[0]), []
    for g in grads:
        total = jax.tree.map(lambda g, c: np.asarray(g, np.float64) + c, g, carry)
        norms = jax.tree.map(lambda x: np.sqrt(np.sum(x**2)), total)
        if per == "global":
            norms = jax.tree.map(lambda n, norms=norms: np.sqrt(sum(m**2 for m in norms.values())), norms)
        if per == "entry":
            out.append(jax.tree.map(lambda x: np.clip(x, -limit, limit), total))
        else:
            out.append(jax.tree.map(lambda x, n: x * min(1, limit / n), total, norms))
        carry = jax.tree.map(np.subtract, total, out[-1])
    return out, carry


RULES = {
    "zscore": functools.partial(thresholds.zscore, 1.0, decay=0.8, warmup=3),
    "zscore_mean": functools.partial(thresholds.zscore, 1.0, decay=0.8, warmup=3, mode="mean"),
    "zscore_percentile": functools.partial(thresholds.zscore, 1.0, decay=0.8, warmup=3, mode="percentile"),
    "ema_ratio": functools.partial(thresholds.ema_ratio, 1.1, decay=0.8, warmup=3, warmup_max=5.0),
    "percentile": functools.partial(thresholds.percentile, 60.0, window=4),
    "mean_sigma": functools.partial(thresholds.mean_sigma, 1.0, window=3),
    "quantile_track": functools.partial(thresholds.quantile_track, 0.5, init=4.0),
    "spam": functools.partial(thresholds.spam, 1.5, decay=0.8),
}
SCALARS = sorted(set(RULES) - {"percentile", "mean_sigma"})  # can follow every entry
every_rule = pytest.mark.parametrize("rule", RULES)
per_what = pytest.mark.parametrize("per", ["global", "leaf"])

RNG = np.random.default_rng(5)
SPIKES = np.array([1, 1.2, 0.8, 9, 1, 0.1, 5, 1.1])


def gradient(scale, dtype=np.float32):
    shapes = {"a": (4, 5), "b": (7,), "c": ()}
    return {k: jnp.asarray(RNG.normal(size=s) * scale, dtype) for k, s in shapes.items()}


GRADS = [gradient(s) for s in SPIKES]
ZERO = jax.tree.map(jnp.zeros_like, GRADS[0])


@functools.cache
def build(kind, rule):
    """A transformation with a rule, and its compiled update; traced once for each kind of tree."""
    made = RULES[rule]()
    tx = {
        "global": lambda: clipjax.clip_norm(made),
        "leaf": lambda: clipjax.clip_norm(made, per="leaf"),
        "norm_carry": lambda: clipjax.clip_norm(made, carry=True),
        "entry": lambda: clipjax.clip(made),
        "entry_carry": lambda: clipjax.clip(made, carry=True),
        "skip": lambda: clipjax.skip_spikes(optax.sgd(1.0), made),
    }[kind]()
    return tx, jax.jit(tx.update)


ROWS = [("global", rule) for rule in RULES]
ROWS += [("leaf", "zscore"), ("leaf", "percentile"), ("norm_carry", "ema_ratio"), ("norm_carry", "mean_sigma")]
ROWS += [("skip", "zscore"), ("skip", "percentile"), ("entry", "spam"), ("entry_carry", "quantile_track")]
every_row = pytest.mark.parametrize(("kind", "rule"), ROWS)


def follow(tx_update, grads, state=None):
    """The updates of every step and the last state."""
    tx, update = tx_update
    state, out = tx.init(grads[0]) if state is None else state, []
    for g in grads:
        updates, state = update(g, state)
        out.append(updates)
    return out, state


def spoiled(tree, name, bad):
    leaf = tree[name]
    return tree | {name: leaf.at[(0,) * leaf.ndim].set(bad)}


def same(a, b):
    """Bit for bit, NaN of any sign included."""
    chex.assert_trees_all_equal_structs(a, b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def history(state, name=None):
    """The state of the rule, all of it or that of one leaf."""
    return state.rule if name is None else jax.tree.map(lambda x: x["abc".index(name)], state.rule)


# A norm that is not finite, or 0.


@per_what
@every_rule
def test_nan_and_inf_norm_give_nan_are_counted_and_leave_the_history(rule, per):
    clean, end = follow(build(per, rule), GRADS)
    _, state = follow(build(per, rule), GRADS[:5])
    for bad in (np.nan, np.inf, -np.inf):
        for name in ("b", "c"):
            (updates,), after = follow(build(per, rule), [spoiled(GRADS[5], name, bad)], state)
            governed = updates if per == "global" else {name: updates[name]}
            assert all(np.isnan(u).all() for u in governed.values()) and int(after.nonfinite) == 1
            same(*(history(s, None if per == "global" else name) for s in (after, state)))
    if per == "global":
        rest, after = follow(build(per, rule), GRADS[5:], after)
        same(rest, clean[5:])
        same(after.rule, end.rule)


@every_rule
def test_nan_of_one_leaf_touches_no_other_leaf(rule):
    clean, end = follow(build("leaf", rule), GRADS)
    grads = [spoiled(g, "b", np.nan) if i in (0, 4) else g for i, g in enumerate(GRADS)]
    updates, after = follow(build("leaf", rule), grads)
    for name in "ac":
        same([u[name] for u in updates], [u[name] for u in clean])
        same(history(after, name), history(end, name))
    assert int(after.nonfinite) == 2 and np.isnan(updates[4]["b"]).all() and np.isfinite(updates[5]["b"]).all()


@pytest.mark.parametrize("kind", ["global", "leaf", "skip"])
@every_rule
def test_50_zero_steps_of_a_zero_head_never_were(rule, kind):
    """Zero-initialised heads: all of the warm-up may be zeros, and more may come later."""
    clean, end = follow(build(kind, rule), GRADS)
    zeros, state = follow(build(kind, rule), [ZERO] * 50)
    assert not any(u.any() for step in zeros for u in jax.tree.leaves(step))
    first, state = follow(build(kind, rule), GRADS[:4], state)
    _, state = follow(build(kind, rule), [ZERO] * 3, state)
    rest, state = follow(build(kind, rule), GRADS[4:], state)
    same(first + rest, clean)
    same(state.rule, end.rule)
    assert int(state.nonfinite) == 0


@per_what
@every_rule
def test_empty_gradients_enter_no_history(rule, per):
    for grads in ({"e": jnp.zeros((0, 3)), "n": None}, {}):
        updates, state = follow(build(per, rule), [grads] * 5)
        same(updates[-1], grads)
        same(state.rule, build(per, rule)[0].init(grads).rule)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_rule_threshold_that_is_not_positive_clips_nothing(value):
    rule = clipjax.Rule(lambda: jnp.zeros(()), lambda norm, state: (jnp.full_like(norm, value), norm))
    for tx in (clipjax.clip_norm(rule), clipjax.clip_norm(rule, per="leaf"), clipjax.clip(rule)):
        updates, state = follow((tx, jax.jit(tx.update)), GRADS[:2])
        same(updates, GRADS[:2])
        assert int(getattr(state, "clipped", 0)) == 0
        shown = clipjax.report(state)
        assert (
            np.isnan(shown["clip/threshold"]) if "clip/threshold" in shown else shown["clip_norm/threshold"] == np.inf
        )
    tx = clipjax.skip_spikes(optax.identity(), rule)
    updates, state = follow((tx, jax.jit(tx.update)), [GRADS[0], spoiled(GRADS[1], "a", np.nan), GRADS[2]])
    same(updates, [GRADS[0], ZERO, GRADS[2]])
    assert (int(state.skipped), int(state.nonfinite)) == (1, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rule_reads_nan_and_inf_as_the_largest_float(bad):
    tx = clipjax.clip_norm(clipjax.Rule(lambda: jnp.zeros(()), lambda norm, state: (norm, state)))
    _, state = follow((tx, jax.jit(tx.update)), [jnp.array([bad, 1.0])])
    assert state.threshold == jnp.finfo(jnp.float32).max and not np.isfinite(state.norm_pre)


# Entries.


@pytest.mark.parametrize("rule", SCALARS)
def test_entry_nan_stays_inf_becomes_the_threshold_and_histories_stay(rule):
    grads = jnp.asarray(np.random.default_rng(6).uniform(0.5, 2.0, size=(8, 5)), jnp.float32)
    _, state = follow(build("entry", rule), list(grads))
    odd = jnp.array([np.nan, np.inf, -np.inf, 100.0, 1.0], jnp.float32)
    (updates,), after = follow(build("entry", rule), [odd], state)
    limit = jax.vmap(RULES[rule]().update)(jnp.full(5, 3.4e38, jnp.float32), state.rule)[0]
    np.testing.assert_array_equal(updates[:3], jnp.stack([odd[0], limit[1], -limit[2]]))
    same(*(jax.tree.map(lambda x: x[:3], s.rule) for s in (after, state)))
    assert any((x[3:] != y[3:]).all() for x, y in zip(*map(jax.tree.leaves, (after.rule, state.rule)), strict=True))


def test_entry_of_zero_enters_its_history():
    """A second moment halves at 0, so C² = 2v is 6 for the first entry and 2 for the second."""
    tx = clipjax.clip(thresholds.spam(2.0, decay=0.5))
    grads = [jnp.array([2.0, 2.0]), jnp.array([2.0, 0.0]), jnp.array([-9.0, -9.0])]
    updates, state = follow((tx, tx.update), grads)
    np.testing.assert_allclose(updates[2], [-np.sqrt(6), -np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(state.rule, [4.5, 1.5], rtol=1e-6)


@pytest.mark.parametrize("factory", [thresholds.percentile, thresholds.mean_sigma])
def test_entry_window_is_refused_or_keeps_its_shape(factory):
    with pytest.raises(ValueError, match="`threshold` must remember single numbers"):
        clipjax.clip(factory(window=2))
    try:
        tx = clipjax.clip(factory(window=1))
    except ValueError:
        return
    _, state = follow((tx, jax.jit(tx.update)), [jnp.arange(3.0)] * 2)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(jnp.arange(3.0)), state)


# The carry.

LIMITED = {
    "entry": lambda limit: clipjax.clip(limit, carry=True),
    "global": lambda limit: clipjax.clip_norm(limit, carry=True),
    "leaf": lambda limit: clipjax.clip_norm(limit, per="leaf", carry=True),
}
TWENTY = [gradient(s) for s in np.resize(SPIKES, 20)]


def summed(*trees):
    return jax.tree.map(lambda *x: np.sum([np.asarray(y, np.float64) for y in x], axis=0), *trees)


@pytest.mark.parametrize("kind", LIMITED)
def test_carry_emits_what_u_clip_emits(kind):
    limit = 1.5 if kind == "entry" else 4.0
    tx = LIMITED[kind](limit)
    updates, state = follow((tx, jax.jit(tx.update)), TWENTY)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, (updates, state.carry), u_clip(TWENTY, limit, kind))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [*LIMITED, "spam", "zscore"])
def test_carry_and_all_that_was_emitted_add_up_to_the_gradients(kind, dtype):
    """To f32 rounding also where 8 or 11 bits are emitted: the rounding error is part of the error feedback."""
    by_rule = {"spam": build("entry_carry", "spam")[0], "zscore": build("norm_carry", "zscore")[0]}
    tx = by_rule.get(kind) or LIMITED[kind](1.5)
    grads = jax.tree.map(lambda x: x.astype(dtype), TWENTY)
    updates, state = follow((tx, jax.jit(tx.update)), grads)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    jax.tree.map(close, summed(*updates, state.carry), summed(*grads))
    assert any(np.abs(c).max() > 0 for c in jax.tree.leaves(state.carry))
    assert {c.dtype.name for c in jax.tree.leaves(state.carry)} == {"float32"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", LIMITED)
def test_carry_stays_where_a_step_is_nan_or_inf(kind, bad):
    tx = LIMITED[kind](1.5)
    update = jax.jit(tx.update)
    _, state = follow((tx, update), TWENTY[:5])
    (updates,), after = follow((tx, update), [spoiled(TWENTY[5], "b", bad)], state)
    _, clean = follow((tx, update), [TWENTY[5]], state)
    expected = {"global": state.carry, "leaf": clean.carry | {"b": state.carry["b"]}}
    expected["entry"] = clean.carry | {"b": clean.carry["b"].at[0].set(state.carry["b"][0])}
    same(after.carry, expected[kind])
    assert kind != "entry" or updates["b"][0] == 1.5 or np.isnan(bad)


def test_carry_f16_limit_beyond_the_dtype_is_its_largest_value():
    """As without a carry: 60000 cut to 1 and 60000 more are 119999, of which 65504 can be emitted."""
    tx = clipjax.clip(lambda count: jnp.where(count < 1, 1.0, 1e6), carry=True)
    updates, state = follow((tx, jax.jit(tx.update)), [jnp.array([6e4, -6e4], jnp.float16)] * 2)
    np.testing.assert_array_equal(np.asarray(updates[1], np.float32), [65504, -65504])
    np.testing.assert_array_equal(state.carry, [119999 - 65504, 65504 - 119999])


# Numbers and dtypes.

SWEEPS = {
    "zscore": lambda x: thresholds.zscore(x, decay=x / 2, eps=x, warmup=2),
    "zscore_warmup": lambda x: thresholds.zscore(0.5, warmup=(4 * x).astype(jnp.int32)),
    "ema_ratio": lambda x: thresholds.ema_ratio(x, decay=x / 2, warmup=1, warmup_max=2 * x),
    "percentile": lambda x: thresholds.percentile(60 * x, window=4),
    "mean_sigma": lambda x: thresholds.mean_sigma(x, window=2),
    "quantile_track": lambda x: thresholds.quantile_track(x / 2, init=3 * x, lr=x),
    "spam": lambda x: thresholds.spam(x, decay=x / 2),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_vmap_over_the_numbers_of_a_rule_is_one_sweep(name):
    grads = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)

    def trained(x):
        tx = clipjax.clip_norm(SWEEPS[name](x))
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(ZERO), grads)

    numbers = jnp.array([0.25, 0.8, 1.5])
    swept = jax.jit(jax.vmap(trained))(numbers)
    lanes = map(jax.jit(trained), numbers)
    chex.assert_trees_all_close(swept, jax.tree.map(lambda *x: jnp.stack(x), *lanes), rtol=1e-6)
    assert len(np.unique(np.asarray(swept[1]["a"]), axis=0)) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_row
def test_bf16_and_f16_gradients_keep_their_dtype_and_states_are_f32(kind, rule, dtype):
    grads = jax.tree.map(lambda x: x.astype(dtype), GRADS[3])
    tx, _ = build(kind, rule)
    updates, state = jax.eval_shape(lambda g: tx.update(g, tx.init(g)), grads)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float32", "int32"}


# Structure.


@every_row
def test_state_keeps_structure_shape_and_dtype_through_jit_and_scan_without_a_retrace(kind, rule):
    tx, _ = build(kind, rule)
    odd = {"none": None, "hole": optax.MaskedNode(), "empty": jnp.zeros((0, 3)), "in": [(jnp.float32(3.0),), {}]}
    grads = odd | {"deep": {"a": GRADS[3]["a"], "b": (GRADS[3]["b"],)}}
    state = tx.init(grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, grads), state)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda g, s: tx.update(g, s), 1))
    after = state
    for _ in range(3):
        updates, after = update(grads, after)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    last, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: (tx.update(grads, s)[1], None), s, length=3))(state)
    chex.assert_trees_all_close(last, after, rtol=1e-6)


@per_what
def test_masked_leaves_are_left_out_of_norm_and_history(per):
    plain, _ = build(per, "ema_ratio")
    tx = optax.masked(plain, {"a": True, "b": False, "c": False})
    updates, state = follow((tx, jax.jit(tx.update)), GRADS)
    expected, alone = follow((plain, jax.jit(plain.update)), [{"a": g["a"]} for g in GRADS])
    same([u["a"] for u in updates], [u["a"] for u in expected])
    same([u["b"] for u in updates], [g["b"] for g in GRADS])
    same(jax.tree.leaves(state.inner_state.rule), jax.tree.leaves(alone.rule))
