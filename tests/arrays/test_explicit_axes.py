"""Explicit mesh axes under `jax.set_mesh`, where arrays have their sharding in their type: what one device computes."""

import contextlib
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import clipjax
from clipjax import roundings, scores, selections, steps, structures, typing, widths
from clipjax._arrays import sharding

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
FLAT = P(("data", "model"), None)
CHAINS = {
    "columns": lambda: clipjax.fake_quantize(4, step=steps.absmax(), axis=-1, every=2),
    "rows, zero point": lambda: clipjax.fake_quantize(4, step=steps.minmax(), axis=0, every=2),
    "small groups": lambda: clipjax.fake_quantize(4, step=steps.absmax(), axis=-1, group=8, every=2),
    "groups over shards": lambda: clipjax.fake_quantize(4, step=steps.absmax(), axis=-1, group=32, every=2),
    "widths": lambda: clipjax.fake_quantize(widths.sqnr(20.0), step=steps.absmax(), axis=-1, every=2),
    "stochastic": lambda: clipjax.fake_quantize(4, step=steps.absmax(), axis=-1, rounding="stochastic"),
    "soft": lambda: clipjax.fake_quantize(4, step=steps.absmax(), axis=-1, rounding=roundings.parq(4)),
    "random clamp": lambda: clipjax.clamp_weights(0.2, select=selections.bernoulli(0.5)),
    "random mask": lambda: clipjax.prune_mask(0.5, score=scores.random(), every=2, stop=2),
    "16 of 32": lambda: clipjax.prune_mask(structure=structures.n_of_m(16, 32), every=2, stop=2),
    "blocks over shards": lambda: clipjax.prune_mask(0.5, structure=structures.block(32, 4), every=2, stop=2),
}


USUAL = ("columns", "groups over shards", "random mask")


def trained(build, mesh=None, spec=None):
    """Params and state after three updates of one scan: it refuses a state whose types change."""
    tx = optax.chain(clipjax.clip(0.1, select=selections.bernoulli(0.5)), optax.sgd(0.1), build())
    fill = np.random.default_rng(0).integers(-99, 100, (64, 32)) / 100  # sums of absolute values are exact
    params = {"kernel": jnp.asarray(fill, jnp.float32)}
    if mesh is not None:
        params = jax.device_put(params, jax.NamedSharding(mesh, spec))

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=3)[0]

    return run(params, tx.init(params))


def rounded(w):
    """The forward form with a step in each of two groups of rows, and its gradients."""
    step = clipjax.choose_step(w, 4, step=steps.absmax(), axis=-1, group=32)
    level = lambda w, step: clipjax.fake_quant(w, step, 4)
    return level(w, step), jax.grad(lambda *args: jnp.sum(jnp.square(level(*args))), (0, 1))(w, step)


@functools.cache
def on_one_device(name):
    return jax.device_get(trained(CHAINS[name]))


# Every chain under both axes; outside of the mesh, and over one flat axis, those that draw, group or reduce.
PLACES = [
    pytest.param(name, spec, inside, marks=[] if usual or name in USUAL else pytest.mark.slow)
    for name in CHAINS
    for spec, inside, usual in (
        (P("data", "model"), True, True),
        (P("data", "model"), False, False),
        (FLAT, True, False),
    )
]


@pytest.mark.parametrize(("name", "spec", "inside"), PLACES, ids=str)
def test_explicit_axes_compute_what_one_device_computes(name, spec, inside):
    with jax.set_mesh(MESH) if inside else contextlib.nullcontext():
        params, state = trained(CHAINS[name], MESH, spec)
    assert params["kernel"].sharding.is_equivalent_to(jax.NamedSharding(MESH, spec), 2)
    for x in jax.tree.leaves(state) if inside else []:
        assert x.sharding.is_fully_replicated or x.dtype == bool or x.shape == (64, 32)  # masks, the carry
    assert len(np.unique(params["kernel"])) > 2
    # between the levels of a soft rounding two programs may round differently
    same = functools.partial(chex.assert_trees_all_close, rtol=1e-6) if name == "soft" else chex.assert_trees_all_equal
    same(jax.device_get((params, state)), on_one_device(name))


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_the_forward_form_with_groups_over_shards(transform):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    with jax.set_mesh(MESH):
        got = transform(rounded)(jax.device_put(w, jax.NamedSharding(MESH, P("data", "model"))))
    wanted = transform(rounded)(w)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(wanted))
    assert got[0].sharding.spec == P("data", "model")
    chex.assert_trees_all_equal(wanted[1][1], jnp.zeros((2, 32)))  # straight through, so the step has no gradient


def test_functions_compiled_around_an_array_that_exists_keep_its_sharding():
    """What JAX makes like an array that is not traced has no sharding in the program."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32)), jnp.float32)
    codes = lambda w: jax.jit(lambda step: clipjax.quantize(w, step, 4))(0.25)
    wanted = codes(w)
    with jax.set_mesh(MESH):
        placed = jax.device_put(w, jax.NamedSharding(MESH, P("data", "model")))
        got = codes(placed)
        full = jax.jit(lambda value: sharding.filled(value, placed))(0.25)
    assert full.sharding == got.sharding == placed.sharding
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(wanted))


def test_random_scores_are_laid_out_as_their_weights():
    context = typing.Context(jnp.int32(0), None, None, None, jax.random.key(0))
    with jax.set_mesh(MESH):
        w = jax.device_put(jnp.zeros((8, 32)), jax.NamedSharding(MESH, P("data", "model")))
        draws = jax.jit(lambda w: scores.random().score(w, (), context))(w)
    assert draws.sharding == w.sharding


# Eagerly a branch sees arrays that exist, and constants like them are not sharded.
EAGER = {
    **{name: CHAINS[name] for name in ("columns", "random clamp", "random mask")},
    "soft": lambda: clipjax.fake_quantize(4, step=0.0625, rounding=roundings.parq(4)),
    "units": lambda: clipjax.prune_mask(0.5, structure=structures.unit(), every=2),
    "latent weights": lambda: clipjax.prune_mask(0.5, carry=True, every=2),
    "averaged score": lambda: clipjax.prune_mask(0.5, score=scores.taylor(), every=2),
    "moments": lambda: clipjax.prune_mask(0.5, inner=optax.adam(0.1), regrow=0.3, every=2),
    "one bit": lambda: clipjax.fake_quantize(1, step=steps.absmax(), every=2),
}


# Inside of the mesh all of them; outside of it those that make a constant, draw, or choose.
EAGERLY = [pytest.param(name, True) for name in EAGER] + [
    pytest.param(name, False, marks=[] if name in (*USUAL, "soft", "latent weights") else pytest.mark.slow)
    for name in EAGER
]


@pytest.mark.parametrize(("name", "inside"), EAGERLY)
def test_eager_updates_need_no_mesh(name, inside):
    tx = clipjax.with_gradient(optax.chain(optax.sgd(0.1), EAGER[name]()))
    local = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 32)), jnp.float32)}
    wanted, _ = tx.update(local, tx.init(local), local)
    with jax.set_mesh(MESH) if inside else contextlib.nullcontext():
        params = jax.device_put(local, jax.NamedSharding(MESH, P("data", "model")))
        got, _ = tx.update(params, tx.init(params), params)
    assert got["kernel"].sharding.spec == P("data", "model")
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(wanted))


@pytest.mark.parametrize(
    ("name", "refresh", "most"),
    [
        ("columns", False, 0),
        ("small groups", False, 0),
        ("columns", True, 32),
        ("small groups", True, 8 * 32),
        ("groups over shards", False, 64 * 32),
    ],
)
def test_what_is_gathered(name, refresh, most):
    """Nothing between refreshes, one number a step in them; leaves only where a shard splits their groups."""
    tx = CHAINS[name]()
    with jax.set_mesh(MESH):
        params = {"kernel": jax.device_put(jnp.ones((64, 32)), jax.NamedSharding(MESH, P("data", "model")))}
        update = jax.jit(functools.partial(tx.update, refresh=refresh))
        text = update.lower(params, tx.init(params), params).compile().as_text()
    shapes = re.findall(r"\w+\[([\d,]*)\]\S* all-gather\(", text)
    assert max([math.prod(int(n) for n in shape.split(",")) for shape in shapes], default=0) <= most
    assert ("all-gather" in text) == (most > 0)
    assert not [line for line in text.splitlines() if any(word in line for word in ("all-to-all", "permute", " sort("))]
