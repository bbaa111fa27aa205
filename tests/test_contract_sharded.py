"""Contract rules 7 and 8: on eight devices each transformation keeps shardings, moves scalars only, decides alike."""

import functools
import math
import re

import contract_table as table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import clipjax

every_path = pytest.mark.parametrize("row", table.paths(table.ALL))
SPECS = {"dense": {"kernel": P("data", "model"), "bias": P("model")}, "out": {"kernel": P("model", "data")}}
MOVES = ("all-gather", "all-to-all", "collective-permute", " sort(", "custom-call")

# What a partition may change: sums run in another order, so that steps and norms may differ in the last bits.
ANOTHER_ORDER = {row.name: "the sum of powers" for row in table.GRADIENT if "norm" in row.name} | {
    "project_norm": "the sum of squares",
    "prune_units": "the mean of a unit",
    "prune_select": "the mean of a unit",
    "prune_groups": "the mean of a unit",
    "quantize": "the squared errors of steps.mse",
    "quantize_inner": "the squared errors of steps.mse",
    "quantize_no_carry": "the squared errors of steps.mse",
    "quantize_binary": "the mean of |w|",
    "quantize_sqnr": "the squared errors of steps.mse",
    "quantize_parq": "values between two levels",
    "project_cap": "the products of matrices",
    "project_frame": "the products of matrices",
}

PRODUCTS = ("project_cap", "project_frame")  # of matrices with themselves


def gathered(line):
    """The sizes of the arrays that an instruction of a compiled program makes, and takes."""
    return [math.prod(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", line)]


@functools.cache
def mesh(devices=8):
    shape = {8: (4, 2), 2: (2, 1), 1: (1, 1)}[devices]
    return jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[:devices])


def shardings(devices=8):
    return jax.tree.map(lambda spec: NamedSharding(mesh(devices), spec), SPECS, is_leaf=lambda x: isinstance(x, P))


def once(row):
    """An update of a transformation built, traced and compiled for it, on one device."""
    tx, params = row.tx(optax.sgd(0.25)), table.params()
    return jax.jit(tx.update)(table.at(table.gradients(), 0), jax.jit(tx.init)(params), params)


@functools.cache
def on_one_device(name):
    return once(next(m for m in table.ALL if m.name == name))


@every_path
def test_sharded_state_update_and_decisions(row):
    """Eager init shards like the params, the update keeps it, nothing but reductions moves, values are the same."""
    tx = row.tx(optax.sgd(0.25))
    params = jax.device_put(table.params(), shardings())
    grads = jax.device_put(table.at(table.gradients(), 0), shardings())
    state = tx.init(params)
    by_shape = {p.shape: p.sharding for p in jax.tree.leaves(params) if p.ndim > 1}
    for x in jax.tree.leaves(state):
        if x.shape in by_shape:
            assert x.sharding.is_equivalent_to(by_shape[x.shape], x.ndim)

    compiled = jax.jit(tx.update).lower(grads, state, params).compile()
    text = compiled.as_text()
    moves = [line for line in text.splitlines() if any(word in line for word in MOVES)]
    if row.name in PRODUCTS:  # parts of the arrays move for a product, and no array as a whole
        kernels = min(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
        moves = [line for line in moves if "all-gather" not in line or max(gathered(line)) >= kernels]
    assert not moves
    updates, new_state = compiled(grads, state, params)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert u.sharding.is_equivalent_to(p.sharding, p.ndim)
    for x in jax.tree.leaves(new_state):
        if x.shape in by_shape:
            assert x.sharding.is_equivalent_to(by_shape[x.shape], x.ndim)

    expected, _ = on_one_device(row.name)
    rtol = 1e-4 if row.name in ANOTHER_ORDER else 0
    for u, v, p in zip(*map(jax.tree.leaves, (updates, expected, params)), strict=True):
        # a value between two levels may lie between two of bf16 as well, and then be rounded to either
        ulps = np.abs(np.asarray(p, np.float32)) * (
            2.0**-7 if row.name == "quantize_parq" and p.dtype != u.dtype else 0
        )
        assert np.all(np.abs(np.asarray(u) - v) <= rtol + rtol * np.abs(np.asarray(v)) + ulps)


@pytest.mark.parametrize(("devices", "scope"), [(1, "global"), (2, "global"), (8, "global"), (8, "leaf")])
def test_same_mask_on_any_number_of_devices(devices, scope):
    """Rule 7: ties, many of them on the boundary, break by position wherever the arrays live."""
    rng = np.random.default_rng(3)
    scores = table.tree(lambda dtype, *shape: jnp.asarray(rng.integers(0, 4, shape), jnp.float32))
    mask = jax.jit(functools.partial(clipjax.make_mask, sparsity=0.4, scope=scope))
    got = mask(jax.device_put(scores, shardings(devices)))
    flat = [np.asarray(x).ravel() for x in jax.tree.leaves(scores)]
    pools = [np.concatenate(flat)] if scope == "global" else flat
    removed = [(n := len(p), round(0.4 * n)) for p in pools]
    # lowest first, later positions first among equals
    orders = [np.lexsort((-np.arange(len(p)), p))[:k] for p, (_, k) in zip(pools, removed, strict=True)]
    keep = [np.isin(np.arange(len(p)), gone, invert=True) for p, gone in zip(pools, orders, strict=True)]
    np.testing.assert_array_equal(
        np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(got)]), np.concatenate(keep)
    )


@every_path
def test_same_key_same_result_other_count_other_draw(row):
    """Rule 7: two runs agree bit for bit, whatever was drawn in between."""
    first = on_one_device(row.name)
    jax.random.normal(jax.random.key(9), (3,))
    second = once(row)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), first[0], second[0])


def test_a_partitioned_optimizer_state_is_replicated_where_it_is_scalar():
    """Rule 8: steps, norms and counts are plain arrays, everywhere the same."""
    tx = optax.chain(clipjax.clip_norm(1.0), optax.sgd(0.1), clipjax.fake_quantize(4, axis=-1))
    state = tx.init(jax.device_put(table.params(), shardings()))
    for x in jax.tree.leaves((state[0], state[2].projection)):
        assert x.sharding.is_fully_replicated
