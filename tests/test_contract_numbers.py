"""Contract rules 3, 4, 5 and 9: odd leaves, dtypes, non-finite numbers, early errors, for every transformation."""

import functools

import contract_table as table
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax

every_path = pytest.mark.parametrize("row", table.paths(table.ALL))
weight_row = pytest.mark.parametrize("row", table.paths(table.WEIGHT))
KERNEL = table.params()["dense"]["kernel"]


def alone(row, **numbers):
    """The transformation without an optimizer before it, so that updates reach it as they are."""
    return row.tx(optimizer=optax.identity(), **numbers)


@functools.cache
def compiled(name):
    """Init and update of one row alone, which several rules run on params of the same shapes."""
    tx = alone(next(m for m in table.ALL if m.name == name))
    return jax.jit(tx.init), jax.jit(tx.update)


@every_path
def test_leaves_none_masked_empty_scalar_pass(row):
    """Rule 3: None, MaskedNode, empty and scalar leaves pass; integer leaves pass untouched on the weight side."""
    odd = {"none": None, "hole": optax.MaskedNode(), "empty": jnp.zeros((0, 3)), "scalar": jnp.float32(0.05)}
    if row in table.WEIGHT:
        odd["steps"] = jnp.arange(3)
    params = odd | {"dense": {"kernel": KERNEL, "bias": None}, "out": {"kernel": None}}
    tx = alone(row)

    def update(params):
        updates, _ = tx.update(params, tx.init(params), params)
        assert row not in table.WEIGHT or updates["steps"] is params["steps"]
        return updates

    updates = jax.eval_shape(update, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert updates["empty"].shape == (0, 3) and updates["scalar"].shape == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_path
def test_dtype_of_updates(row, dtype):
    """Rule 4: the gradient's dtype is kept before the optimizer; f32 comes out after it, never the narrow dtype."""
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((8, 16), dtype), "bias": None}, "out": {"kernel": None}}
    tx = alone(row)
    updates, state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    expected = "float32" if row in table.WEIGHT else dtype
    assert updates["dense"]["kernel"].dtype == expected
    assert all(x.dtype != dtype for x in jax.tree.leaves(state)) or dtype == "float32"


SAME_VALUES = ("reshape", "broadcast_in_dim", "squeeze", "transpose", "slice", "select_n", "concatenate")
SAME_VALUES += ("max", "min", "neg", "abs", "copy")


def there_and_back(jaxpr, narrow, given=()):
    """Conversions to `narrow` that are converted back, and whether each output has just been converted to it."""
    found, just = [], set(given)

    def marks(variables):
        return [isinstance(v, jax.extend.core.Var) and v in just for v in variables]

    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0] if eqn.outvars else None
        if name == "convert_element_type":
            found += [eqn] if any(marks(eqn.invars)) else []
            just.update([out] if out.aval.dtype == narrow else [])
        elif name in SAME_VALUES:
            just.update([out] if any(marks(eqn.invars)) else [])
        given = eqn.invars[1:] if name == "cond" else eqn.invars if name in ("jit", "pjit") else []
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            inside, kept = there_and_back(
                sub, narrow, [v for v, ok in zip(sub.invars, marks(given), strict=bool(given)) if ok]
            )
            found += inside
            just.update(v for v, mark in zip(eqn.outvars, kept, strict=bool(given)) if mark and given)
    return found, marks(jaxpr.outvars)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_path
def test_nothing_is_rounded_by_converting_there_and_back(row, dtype):
    """Rule 6 on GPUs: XLA drops such a pair there, and a carry would be compared with what no weight can hold."""
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((8, 16), dtype), "bias": None}, "out": {"kernel": None}}
    tx = alone(row)
    state = jax.eval_shape(tx.init, params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
    assert not there_and_back(jaxpr.jaxpr, dtype)[0]


@every_path
def test_state_keeps_its_dtypes_in_f64(row):
    """Rule 1: where x64 is on, the state of f64 params has after an update the dtypes that it had."""
    with jax.enable_x64(True):
        params = {"dense": {"kernel": jax.ShapeDtypeStruct((8, 16), "float64"), "bias": None}, "out": {"kernel": None}}
        tx = alone(row)
        before = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, before, params)
    assert updates["dense"]["kernel"].dtype == "float64"
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(before)]


@every_path
def test_zero_updates_stay_finite(row):
    """Rule 5: an all-zero gradient and all-zero weights give finite updates and state."""
    zeros = jax.tree.map(jnp.zeros_like, table.params())
    init, update = compiled(row.name)
    updates, state = update(zeros, init(zeros), zeros)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    assert not any(bool(jnp.isnan(x).any()) for x in numbers_of(state, row))


# Numbers of a state that are not finite on purpose.
ON_PURPOSE = {
    "clamp_per_leaf": ("bound", "a bound that differs by leaf is recorded as NaN"),
    "quantize_d4": ("reach", "unbounded codes reach everywhere"),
    "clip_spam": ("threshold", "a rule has a threshold for every entry"),
    "clip_spam_carry": ("threshold", "a rule has a threshold for every entry"),
}


def numbers_of(state, row):
    """The float arrays of a state, without those that are infinite or NaN by design."""
    field, _ = ON_PURPOSE.get(row.name, ("", ""))
    keyed, _ = jax.tree_util.tree_flatten_with_path(state)
    return [x for path, x in keyed if jnp.issubdtype(x.dtype, jnp.floating) and field not in _fields(path)]


def _fields(path):
    return [getattr(key, "name", None) for key in path]


@pytest.mark.parametrize(("place", "bad"), [("updates", np.nan), ("updates", np.inf), ("params", -np.inf)])
@pytest.mark.parametrize("row", table.paths(table.WEIGHT))
def test_nonfinite_target_is_emitted_and_left_out(row, place, bad):
    """Rule 5: one bad entry comes out as it is, everything else lands, and no state but its own entry hears of it."""
    params = table.params()
    updates = jax.tree.map(lambda p: p * 0.1, params)
    spoilt = {"updates": updates, "params": params}[place]["dense"]
    spoilt["kernel"] = spoilt["kernel"].at[2, 4].set(bad)
    init, update = compiled(row.name)
    state = init(params)
    out, state = update(updates, state, params)
    new = optax.apply_updates(params, out)
    spoiled = np.asarray(new["dense"]["kernel"])
    np.testing.assert_array_equal(spoiled[2, 4], bad)
    others = [np.isfinite(np.asarray(x, np.float32)) for x in jax.tree.leaves(new)]
    assert sum(int((~ok).sum()) for ok in others) <= 1
    for x in numbers_of(state, row):
        assert int((~jnp.isfinite(x)).sum()) <= (x.shape == KERNEL.shape), x.shape
    # whoever repairs the weight by hand gets a finite one: nothing bad was carried
    new["dense"]["kernel"] = new["dense"]["kernel"].at[2, 4].set(0.0)
    calm = jax.tree.map(jnp.zeros_like, params)
    again, state = update(calm, state, new)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(again))
    if row.holds:
        row.holds(optax.apply_updates(new, again), state)


@pytest.mark.parametrize("row", table.paths(table.GRADIENT))
def test_nonfinite_gradient(row):
    """Rule 5: elementwise, NaN stays and ±inf becomes ±C; a norm yields NaN in all that it governs, and is counted."""
    bad = table.at(table.gradients(), 0)
    bad["dense"]["kernel"] = bad["dense"]["kernel"].at[0, :3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    init, update = compiled(row.name)
    out, state = update(bad, init(bad), table.params())
    first = np.asarray(out["dense"]["kernel"])
    if row.name.startswith(("clip_norm", "scale_to_norm")):
        assert int(optax.tree.get(state, "nonfinite")) == 1
        if row.name in ("clip_norm_largest", "clip_norm_random"):  # which govern a part of the entries
            assert 1 < np.isnan(first).sum() < first.size
            return
        assert np.isnan(first).all()
        assert np.isnan(np.asarray(out["out"]["kernel"], np.float32)).all() != row.name.endswith("_leaf")
        return
    assert np.isnan(first[0, 0]) and np.isfinite(first[1:]).all()
    if row.name in ("clip", "clip_schedule"):
        np.testing.assert_array_equal(first[0, 1:3], np.float32([0.05, -0.05]))


@pytest.mark.parametrize("factory", [clipjax.clip, clipjax.clip_norm])
def test_threshold_zero_gives_zero(factory):
    """Rule 4: C = 0 gives 0."""
    grads = table.params()
    tx = factory(0.0)
    out, _ = tx.update(grads, tx.init(grads))
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(out))


@weight_row
def test_missing_params_raise_the_optax_message(row):
    tx, params = alone(row), table.params()
    with pytest.raises(ValueError, match="requires the current value of parameters, but you are not passing `params`"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("row", table.paths(m for m in table.WEIGHT if m.gradient))
def test_missing_gradient_says_how_to_pass_it(row):
    tx, params = row._replace(gradient=False).tx(), table.params()
    with pytest.raises(ValueError, match=r"`grad`.*with_gradient.*grad=grads"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("factory", [clipjax.prune_mask, clipjax.fake_quantize, clipjax.clamp_weights, clipjax.project])
def test_where_that_picks_nothing_warns_once(factory):
    """Rule 9: one warning at init; none where the tree holds no arrays."""
    first = {clipjax.fake_quantize: 4, clipjax.project: clipjax.projections.identity()}.get(factory, 0.5)
    tx, params = factory(first, where=lambda path, leaf: False), table.params()
    with pytest.warns(UserWarning, match="`where` picks no float array") as caught:
        state = tx.init(params)
        out, _ = tx.update(params, state, params)
    assert len(caught) == 1
    assert all(a is b for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True))
    tx.update({"none": None}, tx.init({"none": None}), {"none": None})


BAD = [
    ("bound", lambda: clipjax.clamp_weights(-1.0)),
    ("bound", lambda: clipjax.clamp_weights(float("nan"))),
    ("bound", lambda: clipjax.clamp_weights((1.0, -1.0))),
    ("when", lambda: clipjax.clamp_weights(1.0, when="between")),
    ("threshold", lambda: clipjax.clip(-1.0)),
    ("threshold", lambda: clipjax.clip_norm(float("nan"))),
    ("eps", lambda: clipjax.clip_norm(1.0, eps=-1.0)),
    ("ord", lambda: clipjax.clip_norm(1.0, ord=0)),
    ("per", lambda: clipjax.clip_norm(1.0, per="layer")),
    ("sparsity", lambda: clipjax.prune_mask(1.0)),
    ("sparsity", lambda: clipjax.prune_mask(-0.1)),
    ("sparsity", lambda: clipjax.prune_mask()),
    ("scope", lambda: clipjax.prune_mask(0.5, scope="layer")),
    ("stop", lambda: clipjax.prune_mask(lambda count: 0.5)),
    ("stop", lambda: clipjax.prune_mask(0.5, start=5, every=1, stop=3)),
    ("every", lambda: clipjax.prune_mask(0.5, every=0)),
    ("inner", lambda: clipjax.prune_mask(0.5, regrow=0.1)),
    ("bits", lambda: clipjax.fake_quantize(0)),
    ("bits", lambda: clipjax.fake_quantize(17)),
    ("step", lambda: clipjax.fake_quantize()),
    ("step", lambda: clipjax.fake_quantize(4, step=-0.5)),
    ("rounding", lambda: clipjax.fake_quantize(4, rounding="up")),
    ("every", lambda: clipjax.fake_quantize(4, every=0)),
    ("start", lambda: clipjax.project(clipjax.projections.identity(), start=-1)),
    ("axis", lambda: clipjax.fake_quantize(4, axis=2).init(table.params())),
    ("bits", lambda: clipjax.fake_quantize(clipjax.per_leaf(lambda path, leaf: 0)).init(table.params())),
    ("bound", lambda: clipjax.clamp_weights((0.1, 0.1)).init({"w": jnp.ones(2, jnp.bfloat16)})),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_name_argument_rule_value_and_remedy(case):
    """Rule 9: "`bits` must be between 1 and 16, got 0. <what to do>"."""
    name, call = BAD[case]
    with pytest.raises(ValueError, match=rf"^`{name}` must .+, got .+\. .+\.$"):
        call()
