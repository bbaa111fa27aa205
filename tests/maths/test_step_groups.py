"""Groups of weights that share a step, along the inputs of kernels of any rank."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import clipjax
from clipjax import steps, widths

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
ABSMAX = steps.absmax()  # one rule, so that compiled functions are shared


def run(tx, params, times=1):
    """Params and state after some updates by an optimizer that stands still."""
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(times):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def back(q):
    return clipjax.dequantize(q.codes, q.step, zero_point=q.zero_point)


def grouped(w, g, axis, fn):
    """`fn` of every g neighbours along all axes but these, flattened in order, put back to the shape of the weights."""
    own = [a % w.ndim for a in axis]
    order = [*[i for i in range(w.ndim) if i not in own], *own]
    moved = np.asarray(w).transpose(order)
    rows = moved.reshape(-1, g, int(np.prod([w.shape[i] for i in own])))
    return np.broadcast_to(fn(rows), rows.shape).reshape(moved.shape).transpose(np.argsort(order))


# Kernels of a dense layer, of convolutions, of an attention (query and output), one that is stored transposed, and one
# whose inputs do not lie next to each other: shape, axis, group, the shape of the steps.
GROUPED = {
    "dense": ((12, 5), None, 4, (3, 5)),
    "conv": ((3, 3, 8, 5), None, 4, (3, 3, 2, 5)),
    "conv rows": ((3, 4, 8, 5), None, 16, (3, 2, 1, 5)),
    "query": ((8, 2, 6), (-2, -1), 4, (2, 2, 6)),
    "out": ((2, 8, 5), -1, 4, (2, 2, 5)),
    "out heads": ((4, 3, 5), -1, 6, (2, 1, 5)),
    "all inputs": ((2, 8, 5), -1, 16, (1, 1, 5)),
    "transposed": ((5, 12), 0, 4, (5, 3)),
    "apart": ((4, 3, 2, 5), 1, 20, (2, 3, 1, 1)),
    "layers": ((2, 8, 5), (0, -1), 4, (2, 2, 5)),
    "vector": ((6,), (), 3, (2,)),
}


@pytest.mark.parametrize(("name", "bits"), [*((name, 4) for name in GROUPED), ("dense", 1), ("dense", 2), ("out", 1)])
def test_groups_along_the_inputs_have_steps_of_their_own(name, bits):
    """One step for g inputs, flattened in order, and output unit; dequantize repeats the steps block by block."""
    shape, axis, g, steps_shape = GROUPED[name]
    own = (-1,) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    w = {"kernel": jnp.asarray(RNG.normal(size=shape) * np.geomspace(0.01, 1, np.prod(shape)).reshape(shape))}
    w = jax.tree.map(lambda x: x.astype(jnp.float32), w)
    options = {"step": ABSMAX, "axis": axis, "group": g, "where": lambda path, leaf: True}
    params, state = run(clipjax.fake_quantize(bits, **options), w)
    q = clipjax.quantized(params, state)["kernel"]
    assert q.group == g and q.step.shape == steps_shape
    np.testing.assert_array_equal(back(q), params["kernel"])
    top = max(1, 2 ** (bits - 1) - 1)
    largest = grouped(w["kernel"], g, own, lambda rows: np.abs(rows).max(1, keepdims=True))
    spread = np.asarray(clipjax.dequantize(jnp.ones(shape, jnp.int8), q.step))
    np.testing.assert_allclose(spread, largest / top, rtol=1e-4)
    code = np.where(w["kernel"] < 0, -1, 1) if bits == 1 else np.round(np.asarray(w["kernel"]) / spread)
    np.testing.assert_array_equal(params["kernel"], code * spread)
    same = clipjax.choose_step(w["kernel"], bits, step=ABSMAX, axis=axis, group=g)
    np.testing.assert_array_equal(same, q.step)
    assert clipjax.check(params, state) == []
    loaded = clipjax.unpack(clipjax.pack({"kernel": q}), dequantize=False)["kernel"]
    chex.assert_trees_all_equal(jax.device_get(loaded), jax.device_get(q))
    assert (loaded.axis, loaded.group) == (q.axis, q.group)


def test_the_axes_of_quantized_are_those_behind_the_cut_one():
    found = {}
    for name, (shape, axis, g, _) in GROUPED.items():
        tx = clipjax.fake_quantize(4, step=ABSMAX, axis=axis, group=g, where=lambda path, leaf: True)
        params = {"w": jnp.ones(shape)}
        _, state = tx.update({"w": jnp.zeros(shape)}, tx.init(params), params)
        found[name] = clipjax.quantized(params, state)["w"].axis
    assert found == {
        **dict.fromkeys(("conv", "conv rows"), 3),
        **dict.fromkeys(("out", "out heads", "all inputs", "layers"), 2),
        **{"dense": 1, "query": (1, 2), "transposed": 0, "apart": 1, "vector": 0},
    }


def test_groups_of_minmax_and_of_widths_along_several_axes():
    """Zero points and chosen widths in the layout of the state, and what `shrink` makes of the steps."""
    outputs = clipjax.per_leaf(lambda path, leaf: (-2, -1) if path == "q" else (-1,))
    w = {"q": (8, 4, 6), "out": (4, 6, 8)}
    w = {name: jnp.asarray(RNG.uniform(-0.2, 1.0, size=shape), jnp.float32) for name, shape in w.items()}
    for bits, step in ((4, steps.minmax()), (widths.sqnr(20.0), ABSMAX)):
        tx = clipjax.fake_quantize(bits, step=step, axis=outputs, group=2, every=1)
        params, state = run(tx, w, 2)
        found = clipjax.quantized(params, state)
        for name, q in found.items():
            np.testing.assert_array_equal(back(q), params[name])
            error = np.abs(np.asarray(params[name]) - w[name])
            steps_of = np.asarray(clipjax.dequantize(jnp.ones(w[name].shape, jnp.int8), q.step))
            assert (
                error <= (0.501 if step is ABSMAX else 1.001) * steps_of
            ).all()  # minmax: no level beyond the weights
    assert found["q"].step.shape == (4, 4, 6) and found["out"].step.shape == (4, 3, 8)
    dead = {"q": w["q"].at[:, 1].set(0.0), "out": w["out"].at[1].set(0.0)}
    groups = [{"q": -2, "out": -3}]
    small, cut, _ = clipjax.shrink(dead, groups, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(cut, tx.init(small))


MOVES = ("all-gather", "all-to-all", "collective-permute", " sort(", " gather(", " scatter(")


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [P("x", None, "y"), P(None, "x"), P("x", "y")], ids=str)
def test_groups_of_sharded_kernels_are_those_of_one_device(kind, spec):
    """Groups of 4 inputs, of which each device has whole ones: between refreshes nothing moves."""
    tx = clipjax.fake_quantize(4, step=ABSMAX, axis=-1, group=4)
    w = np.random.default_rng(1).integers(-99, 100, (4, 16, 6)).astype(np.float32) / 100
    params, state = jax.device_get(run(tx, {"out": jnp.asarray(w)}))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        there = {"out": jax.device_put(w, jax.NamedSharding(mesh, spec))}
        got, got_state = run(tx, there)
        frozen = jax.jit(functools.partial(tx.update, refresh=False))
        text = frozen.lower(there, got_state, got).compile().as_text()
    chex.assert_trees_all_equal(jax.device_get((got, got_state)), (params, state))
    assert got["out"].sharding.is_equivalent_to(there["out"].sharding, 3)
    assert not [word for word in MOVES if word in text]
