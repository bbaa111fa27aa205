"""Contract rules 1 and 6: every transformation is pure, of static shape, sweepable, and lands exactly."""

import contextlib
import functools

import chex
import contract_table as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import optimized

import clipjax

every_path = pytest.mark.parametrize("row", table.paths(table.ALL))
every_kind = pytest.mark.parametrize("row", table.kinds(table.ALL))
SWEPT = [m for m in table.ALL if m.numbers]


def same(a, b, rtol=0.0):
    """Equal trees: bit for bit, or within a tolerance where another program computed them."""
    chex.assert_trees_all_equal_structs(a, b)
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = (np.asarray(plain(z)).astype(np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@functools.cache
def reference(name):
    """The trajectory [(params, state)] of one transformation in one step, donated and traced once.

    Updates are applied inside the compiled step and outside it: the constraint holds of both.
    """
    row = next(m for m in table.ALL if m.name == name)
    tx, grads = row.tx(), table.gradients()
    params = table.params()
    state = tx.init(params)

    def one(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), updates, state

    chex.clear_trace_counter()  # chex counts by source line, so that the transformations before would count too
    compiled = jax.jit(chex.assert_max_traces(one, 1), donate_argnums=(1, 2))
    path = []
    for i in range(table.STEPS):
        before = jax.tree.map(jnp.copy, params)
        with optimized() if row.holds else contextlib.nullcontext():  # a user's program must land
            params, updates, state = compiled(table.at(grads, i), params, state)
        if row.holds:
            row.holds(params, state)
            row.holds(optax.apply_updates(before, updates), state)
        path.append(jax.tree.map(np.asarray, (params, state)))
    # what `jax_debug_nans` and `jax_debug_infs` look at in what comes out of jit
    for x in jax.tree.leaves((path, updates)):
        assert not jnp.issubdtype(x.dtype, jnp.floating) or np.isfinite(np.asarray(x, np.float64)).all()
    return path


def test_every_code_path_has_a_row_that_runs_always():
    names = {m.name for m in table.ALL}
    assert set(table.ALIKE) <= names and set(table.ALIKE.values()) <= names - set(table.ALIKE)
    assert set(table.KINDS) <= names - set(table.ALIKE)


@every_path
def test_state_of_eager_init_shares_no_buffer(row):
    """Donation: XLA refuses a buffer that is given twice."""
    params = table.params()
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, row.tx().init(params)))]
    assert len(pointers) == len(set(pointers))


@every_path
def test_jit_donation_one_trace_and_landing(row):
    """Rule 6 inside `reference`; a second trace or a refused donation raises there; and every leaf learns."""
    params, state = reference(row.name)[-1]
    start = table.params()
    chex.assert_trees_all_equal_shapes_and_dtypes(params, start)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), start, params)))


def as_reference(row):
    """As the reference is where an optimizer works in bf16: how often XLA rounds there depends on the level."""
    return optimized() if row.side == "inner" and row.holds else contextlib.nullcontext()


def scan(tx):
    """Params and state after all steps but the last, which `lax.cond` around the update skips."""

    def body(carry, inputs):
        i, grads = inputs
        done = lambda: table.step(tx, *carry, grads)
        return jax.lax.cond(i < table.STEPS - 1, done, lambda: carry), None

    def run(params, state):
        return jax.lax.scan(body, (params, state), (jnp.arange(table.STEPS), table.gradients()))[0]

    return run


@every_path
def test_scan_with_cond_traces(row):
    """`lax.scan` refuses a carry, and `lax.cond` a branch, of another structure, shape or dtype."""
    tx, params = row.tx(), table.params()
    jax.eval_shape(lambda params: scan(tx)(params, tx.init(params)), params)


@every_kind
def test_scan_with_cond_equals_the_loop(row):
    tx, params = row.tx(), table.params()
    with as_reference(row):
        last = jax.jit(scan(tx))(params, tx.init(params))
    same(last, reference(row.name)[-2], rtol=1e-6)


@every_path
def test_eval_shape_of_init(row):
    """`jax.eval_shape(init)` on ShapeDtypeStructs is what eager init gives, with no zero-size array of ours."""
    tx, params = row.tx(), table.params()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    abstract, state = jax.eval_shape(tx.init, shapes), tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(shapes), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, reference(row.name)[-1][1])


def sweep(row):
    """All steps, mapped over every traceable argument at once, and its arguments: the values of two lanes."""
    grads = table.gradients()

    def run(numbers):
        tx, params = row.tx(**numbers), table.params()
        carry = params, tx.init(params)
        return jax.lax.scan(lambda c, g: (table.step(tx, *c, g), None), carry, grads)[0]

    lanes = {k: jnp.stack([jnp.asarray(v) for v in values]) for k, values in row.numbers.items()}
    return jax.vmap(run), lanes


@pytest.mark.parametrize("row", table.paths(SWEPT))
def test_one_vmap_traces(row):
    """Every traceable argument, and nothing else, gets the axis of the lanes."""
    swept, lanes = sweep(row)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(swept, lanes))]
    assert shapes == [((2, *x.shape), x.dtype) for x in jax.tree.leaves(reference(row.name)[-1])]


@pytest.mark.parametrize("row", table.kinds(SWEPT))
def test_one_vmap_is_one_sweep(row):
    """Lane 0 is the reference run, lane 1 the transformation built with the other values."""
    run, lanes = sweep(row)
    with as_reference(row):
        swept = jax.jit(run)(lanes)
    same(table.at(swept, 0), reference(row.name)[-1], rtol=1e-6)
    grads, other = table.gradients(), {k: values[1] for k, values in row.numbers.items()}
    tx, params = row.tx(**other), table.params()
    state = tx.init(params)
    with as_reference(row):
        step = jax.jit(functools.partial(table.step, tx))
        for i in range(table.STEPS):
            params, state = step(params, state, table.at(grads, i))
    same(table.at(swept, 1), (params, state), rtol=1e-6)


STATIC = {
    "ord": (clipjax.clip_norm, {"threshold": 1.0, "ord": 2}),
    "bits": (clipjax.fake_quantize, {"bits": 4}),
    "axis": (clipjax.fake_quantize, {"bits": 4, "axis": -1}),
    "quantize_carry": (clipjax.fake_quantize, {"bits": 4, "carry": True}),
    "prune_carry": (clipjax.prune_mask, {"sparsity": 0.5, "carry": True}),
    "project_carry": (clipjax.project, {"projection": clipjax.projections.identity(), "carry": True}),
    "unit_axis": (clipjax.structures.unit, {"axis": -1}),
    "unit_min_keep": (clipjax.structures.unit, {"min_keep": 1}),
    "element_min_keep": (clipjax.structures.element, {"min_keep": 1}),
    "block_min_keep": (clipjax.structures.block, {"height": 1, "width": 1, "min_keep": 1}),
}


@pytest.mark.parametrize("case", STATIC)
def test_traced_static_argument_says_how_to_keep_it_out(case):
    """What decides shapes or programs raises TypeError naming `inject_hyperparams(..., static_args=...)`."""
    factory, arguments = STATIC[case]
    name = case.split("_", 1)[-1]

    def trace(value):
        factory(**{**arguments, name: value})
        return value

    with pytest.raises(TypeError, match=rf"`{name}` must be .*inject_hyperparams\(.*static_args=\('{name}',\)"):
        jax.eval_shape(trace, jnp.asarray(arguments[name]))


@pytest.mark.parametrize("row", table.paths(SWEPT))
def test_traced_values_never_raise(row):
    """Rule 9: what would be refused as a Python number is computed with when traced; state keeps its shape."""
    params, grads = table.params(), table.at(table.gradients(), 0)
    lanes = {k: v[0] if k == "key" else jnp.float32(-2.5) for k, v in row.numbers.items()}

    def run(numbers):
        tx = row.tx(**numbers)
        state = tx.init(params)
        return state, table.step(tx, params, state, grads)[1]

    chex.assert_trees_all_equal_shapes_and_dtypes(*jax.eval_shape(run, lanes))
