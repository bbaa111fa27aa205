"""clip and clip_norm: the formulas, dtypes, and norms that are right wherever they are representable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import selections
from clipjax._maths import norms
from clipjax.typing import Selection

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
GRADS = {"a": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32), "b": jnp.asarray(RNG.normal(size=7) * 3, jnp.float32)}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def reference_norm(leaves, p=2):
    """The p-norm in f64, scaled so that nothing overflows."""
    flat = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])
    unit = np.abs(flat).max() or 1.0
    return unit * np.linalg.norm(flat / unit, p)


def apply(tx, grads, count=0):
    state = tx.init(grads)
    for _ in range(count + 1):
        updates, state = jax.jit(tx.update)(grads, state)
    return updates, state


# clip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0.0, 0.3, 2.0, np.inf])
def test_clip_matches_numpy_and_keeps_the_dtype(limit, dtype):
    """g~ = clip(g, −C, C); C = 0 gives 0, C = inf everything."""
    grads = jax.tree.map(lambda g: g.astype(dtype), GRADS)
    updates, _ = apply(clipjax.clip(limit), grads)
    for name, g in grads.items():
        bound = np.asarray(jnp.asarray(limit, dtype), np.float32)
        assert updates[name].dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(updates[name], np.float32), np.clip(np.asarray(g, np.float32), -bound, bound)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_keeps_nan_and_maps_infinity_to_the_threshold(dtype):
    updates, _ = apply(clipjax.clip(0.5), jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.25], dtype))
    np.testing.assert_array_equal(np.asarray(updates, np.float32), [np.nan, 0.5, -0.5, 0.25])


def test_clip_threshold_beyond_f16_is_its_largest_value():
    updates, _ = apply(clipjax.clip(1e6), jnp.array([jnp.inf, -1.0], jnp.float16))
    np.testing.assert_array_equal(updates, np.array([65504, -1], np.float16))


def test_clip_schedule_counts_from_zero():
    def schedule(count):
        return jnp.where(count < 2, 0.25, 0.125)

    for count, limit in enumerate([0.25, 0.25, 0.125]):
        updates, state = apply(clipjax.clip(schedule), GRADS, count)
        assert float(jnp.abs(updates["b"]).max()) == limit == float(state.threshold)


def test_clip_equals_optax():
    updates, _ = apply(clipjax.clip(0.7), GRADS)
    expected, _ = optax.clip(0.7).update(GRADS, optax.clip(0.7).init(GRADS))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_clip_select_touches_chosen_entries_only():
    select = selections.bernoulli(0.5, key=jax.random.key(2))
    updates, _ = apply(clipjax.clip(0.1, select=select), GRADS)
    chosen = select.choose(GRADS, jax.random.fold_in(jax.random.key(2), 0))
    for name, g in GRADS.items():
        np.testing.assert_array_equal(
            updates[name], np.where(chosen[name], np.clip(g, -0.1, 0.1).astype(np.float32), g)
        )


@pytest.mark.parametrize("make", [clipjax.clip, clipjax.clip_norm])
def test_none_masked_empty_and_scalar_leaves_pass(make):
    grads = {"n": None, "m": optax.MaskedNode(), "e": jnp.zeros((0, 3)), "s": jnp.float32(3.0)}
    updates, _ = apply(make(1.0), grads)
    assert updates["n"] is None and updates["m"] == optax.MaskedNode() and updates["e"].shape == (0, 3)
    np.testing.assert_allclose(updates["s"], 1.0)


def test_vmap_over_thresholds_is_a_sweep():
    limits = jnp.array([0.1, 1.0])
    swept = jax.jit(jax.vmap(lambda c: clipjax.clip(c).update(GRADS, clipjax.clip(c).init(GRADS))[0]))(limits)
    for i, limit in enumerate(np.asarray(limits)):
        np.testing.assert_array_equal(swept["a"][i], np.clip(GRADS["a"], -limit, limit))


# clip_norm


@pytest.mark.parametrize("per", ["global", "leaf"])
@pytest.mark.parametrize("order", [1, 2, 3, np.inf])
def test_clip_norm_matches_numpy(per, order):
    updates, state = apply(clipjax.clip_norm(1.5, per=per, ord=order, eps=0.01), GRADS)
    groups = [["a", "b"]] if per == "global" else [["a"], ["b"]]
    for i, group in enumerate(groups):
        n = reference_norm([GRADS[k] for k in group], order)
        factor = 1.0 if n <= 1.5 else 1.5 / (n + 0.01)
        np.testing.assert_allclose(np.ravel(state.norm_pre)[i], n, rtol=1e-6)
        np.testing.assert_allclose(np.ravel(state.coefficient)[i], factor, rtol=1e-6)
        for k in group:
            np.testing.assert_allclose(updates[k], GRADS[k] * np.float32(factor), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_norm_within_the_threshold_is_bit_identical(dtype):
    """N ≤ C, C = n included."""
    grads = {"a": jnp.asarray(RNG.normal(size=50), dtype), "one": jnp.array([1.0, -0.0, 5e-8], dtype)}
    norm = float(apply(clipjax.clip_norm(np.inf), grads)[1].norm_pre)
    for limit in (np.inf, 2 * norm, norm):
        updates, state = apply(clipjax.clip_norm(limit), grads)
        assert int(state.clipped) == 0
        for name, g in grads.items():
            assert np.asarray(updates[name]).tobytes() == np.asarray(g).tobytes()


def test_clip_norm_zero_threshold_gives_zero_and_zero_gradient_stays():
    updates, _ = apply(clipjax.clip_norm(0.0), GRADS)
    assert not any(u.any() for u in updates.values())
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    for limit in (0.0, 1.0):
        updates, state = apply(clipjax.clip_norm(limit), zero)
        assert not any(u.any() for u in updates.values()) and float(state.norm_pre) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("per", ["global", "leaf"])
def test_clip_norm_non_finite_is_counted_and_yields_nan_in_all_it_governs(per, bad):
    grads = {"a": GRADS["a"], "b": GRADS["b"].at[2].set(bad)}
    updates, state = apply(clipjax.clip_norm(100.0, per=per), grads)
    assert int(state.nonfinite) == 1
    assert np.isnan(updates["b"]).all()
    assert np.isnan(updates["a"]).all() == (per == "global")


def test_clip_norm_infinite_threshold_only_records():
    updates, state = apply(clipjax.clip_norm(np.inf), GRADS, 2)
    jax.tree.map(np.testing.assert_array_equal, updates, GRADS)
    np.testing.assert_allclose(state.norm_pre, reference_norm(GRADS.values()), rtol=1e-6)
    assert (int(state.count), int(state.clipped)) == (3, 0)


def test_clip_norm_counts_clipped_updates():
    _, state = apply(clipjax.clip_norm(lambda count: jnp.where(count < 2, 0.1, 1e6)), GRADS, 3)
    assert (int(state.count), int(state.clipped)) == (4, 2)


def test_clip_norm_equals_optax_where_semantics_coincide():
    for limit in (0.5, 1e3):
        updates, _ = apply(clipjax.clip_norm(limit), GRADS)
        expected, _ = optax.clip_by_global_norm(limit).update(GRADS, optax.EmptyState())
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)


def test_clip_norm_select_measures_and_rescales_chosen_entries():
    select = Selection(lambda tree, key: {"a": jnp.zeros((), bool), "b": jnp.arange(7) < 3})
    updates, state = apply(clipjax.clip_norm(0.5, select=select), GRADS)
    n = reference_norm([GRADS["b"][:3]])
    np.testing.assert_allclose(state.norm_pre, n, rtol=1e-6)
    np.testing.assert_array_equal(updates["a"], GRADS["a"])
    np.testing.assert_array_equal(updates["b"][3:], GRADS["b"][3:])
    np.testing.assert_allclose(updates["b"][:3], GRADS["b"][:3] * (0.5 / n), rtol=1e-5)


def test_clip_norm_bf16_with_array_threshold_keeps_dtype():
    """Optax raises here; and no threshold promotes updates."""
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS)
    updates, _ = jax.jit(lambda c: clipjax.clip_norm(c).update(grads, clipjax.clip_norm(c).init(grads)))(
        jnp.float32(0.5)
    )
    assert {u.dtype for u in updates.values()} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(reference_norm(updates.values()), 0.5, rtol=0.01)


# norms


def test_norm_accumulates_in_f32_across_bf16_leaves():
    """Many leaves of 0.1: accumulating in the leaf dtype would stop at 2.0 (2000 of them make 4.48)."""
    got = float(jax.jit(lambda x: norms.norm([x] * 600))(jnp.full((), 0.1, jnp.bfloat16)))
    np.testing.assert_allclose(got, np.sqrt(600) * float(jnp.bfloat16(0.1)), rtol=1e-5)
    one = jnp.full(2000, 0.1, jnp.bfloat16)
    np.testing.assert_allclose(norms.norm([one]), 4.48, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-19, 1.0, 1e15, 3e19, 4e19, 1e30, 2e37])
def test_norm_is_right_wherever_it_is_representable(scale):
    """Neither overflow nor underflow of the squares."""
    leaves = [
        np.float32([3, -4]) * np.float32(scale),
        np.float32([12]) * np.float32(scale),
        np.zeros((1, 1), np.float32),
    ]
    got = float(jax.jit(norms.norm)([jnp.asarray(x) for x in leaves]))
    if scale < np.finfo(np.float32).tiny:
        assert got <= 2e-37  # denormals may be flushed
    else:
        np.testing.assert_allclose(got, reference_norm(leaves), rtol=1e-5)


def test_norm_of_mixed_magnitudes():
    for values in ([1e-25, 1e-20, 1.0], [1e-30, 3e-23], [1e25, 1.0], [1e-22, 1e20]):
        got = jax.jit(norms.norm)([jnp.float32(v)[None] for v in values])
        np.testing.assert_allclose(got, reference_norm([[v] for v in values]), rtol=1e-5)


def test_clip_norm_at_huge_and_tiny_gradients_reaches_the_threshold():
    for scale in (1e-25, 4e19):
        grads = jnp.float32([3, -4]) * jnp.float32(scale)
        updates, _ = apply(clipjax.clip_norm(float(scale)), grads)
        np.testing.assert_allclose(updates, np.float32([0.6, -0.8]) * np.float32(scale), rtol=1e-5)


def test_norm_overflow_is_infinite_and_nan_is_nan():
    assert np.isinf(norms.norm([jnp.full(4, 3e38)])) and np.isnan(norms.norm([jnp.array([1.0, jnp.nan])]))
    assert float(norms.norm([])) == float(norms.norm([jnp.zeros((0,))])) == 0


@pytest.mark.parametrize(
    "tx",
    [
        clipjax.clip(1.0, carry=True),
        clipjax.clip(clipjax.thresholds.spam()),
        clipjax.clip_norm(1.0, carry=True),
        clipjax.clip_norm(1.0, carry=True, per="leaf"),
    ],
)
def test_an_empty_leaf_has_no_empty_state(tx):
    """Rule 1; Orbax refuses to save what has no entries."""
    grads = {"w": jnp.full(3, 2.0), "none": jnp.zeros((0, 2))}
    state = tx.init(grads)
    for _ in range(2):
        updates, new = jax.jit(tx.update)(grads, state)
        assert updates["none"].shape == (0, 2) and all(x.size for x in jax.tree.leaves(new))
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        state = new
