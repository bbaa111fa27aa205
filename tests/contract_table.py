"""The transformations of the contract: every public transformation in each of its forms, one row each.

A row says how to build it, which numbers may be traced (the value used everywhere, and a second one for sweeps) and
what holds of the params after every step. `tests/test_contract*.py` run the rows through the rules.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract_formats import FORMAT_ROWS
from contract_gradients import GRADIENT_SIDE
from contract_leaves import kernels as kernels
from contract_leaves import named as named
from contract_projections import PROJECTION_ROWS
from contract_row import ALIKE as ALIKE
from contract_row import KEY, TIMES, row
from contract_row import KINDS as KINDS
from contract_row import cases as cases
from contract_row import kinds as kinds
from contract_row import paths as paths

import clipjax
from clipjax import roundings, scores, selections, steps, structures, widths


def bounded(low, high):
    def holds(params, state):
        for _, x in named(params):
            assert x.min() >= np.float64(np.float32(low)) and x.max() <= np.float64(np.float32(high))

    return holds


def sparse(sparsity, *, each=False, unit=False):
    """At least round(sparsity * n) exact zeros, in all kernels together or in each; n counts units for `unit`."""

    def holds(params, state):
        dead = [(x == 0).all(axis=tuple(range(x.ndim - 1))) if unit else x == 0 for x in kernels(params)]
        pools = dead if each else [np.concatenate([d.ravel() for d in dead])]
        for pool in pools:
            assert pool.sum() >= round(sparsity * pool.size)

    return holds


def on_grid(bits):
    """Every kernel is bit for bit what its integers stand for, of few values in every step group.

    From the second update on: a weight that had to move by more than itself is on the grid one step late.
    """

    def leaf(q, p):
        if not isinstance(q, clipjax.Quantized):
            return
        values = np.asarray(clipjax.dequantize(q.codes, q.step, p.dtype, zero_point=q.zero_point), np.float64)
        np.testing.assert_array_equal(values, np.asarray(p, np.float64))
        parts = values.reshape(*values.shape[:-2], -1, q.group or values.shape[-2], values.shape[-1])
        groups = np.moveaxis(parts, -2, 0).reshape(parts.shape[-2], -1).T if q.step.size > 1 else [values]
        most = 0 if bits is None else max(2, 2**bits - 1)  # one bit: and 0 where pruned
        assert bits is None or max(len(np.unique(g[g != 0] if bits == 1 else g)) for g in groups) <= most

    def holds(params, state):
        if int(optax.tree.get_all_with_path(state, "count")[0][1]) < 2:
            return
        found = clipjax.quantized(params, state)
        is_grid = lambda x: isinstance(x, clipjax.Quantized)
        assert sum(map(is_grid, jax.tree.leaves(found, is_leaf=is_grid))) == len(kernels(params))
        jax.tree.map(leaf, found, params, is_leaf=is_grid)

    return holds


def both(*checks):
    return lambda params, state: [check(params, state) for check in checks] and None


def within(params, state):
    for x in kernels(params):
        assert x.min() >= np.float32(-0.2) and x.max() <= np.float32(0.3)


HALF = {"sparsity": (0.5, 0.75)}
ramp = optax.polynomial_schedule(0.0, 0.5, 3, 3)
by_name = clipjax.per_leaf(lambda path, leaf: 0.2 if path.endswith("bias") else 0.25)

PAIRS = clipjax.per_leaf(lambda path, leaf: None if leaf.shape[-2] % 2 else 2)

ROWS = [
    *GRADIENT_SIDE,
    row("clamp", "weight", lambda _, bound: clipjax.clamp_weights(bound), bounded(-0.2, 0.2), bound=(0.2, 0.1)),
    row("clamp_before", "weight", lambda _, bound: clipjax.clamp_weights(bound, when="before"), bound=(0.2, 0.1)),
    row(
        "clamp_pair",
        "weight",
        lambda _, low, high: clipjax.clamp_weights((low, high)),
        bounded(-0.1, 0.3),
        low=(-0.1, -0.2),
        high=(0.3, 0.1),
    ),
    row(
        "clamp_schedule", "weight", lambda _: clipjax.clamp_weights(lambda count: 0.3 / (1 + count)), bounded(-0.3, 0.3)
    ),
    row("clamp_per_leaf", "weight", lambda _: clipjax.clamp_weights(by_name), bounded(-0.25, 0.25)),
    row(
        "clamp_random",
        "weight",
        lambda _, key: clipjax.clamp_weights(0.2, select=selections.bernoulli(0.5, key=key)),
        key=KEY,
    ),
    row(
        "prune_once",
        "weight",
        lambda _, sparsity, start: clipjax.prune_mask(sparsity, start=start),
        sparse(0.5),
        **HALF,
        start=(0, 1),
    ),
    row("prune", "weight", lambda _, **numbers: clipjax.prune_mask(**numbers), sparse(0.5), **HALF, **TIMES),
    row(
        "prune_schedule",
        "weight",
        lambda _, **numbers: clipjax.prune_mask(ramp, **numbers),
        sparse(0.0),
        **TIMES,
    ),
    row(
        "prune_leaf",
        "weight",
        lambda _, sparsity: clipjax.prune_mask(sparsity, scope="leaf"),
        sparse(0.5, each=True),
        **HALF,
    ),
    row(
        "prune_units",
        "weight",
        lambda _, sparsity: clipjax.prune_mask(sparsity, structure=structures.unit()),
        sparse(0.5, unit=True),
        **HALF,
    ),
    row(
        "prune_gradient",
        "weight",
        lambda _, sparsity: clipjax.prune_mask(sparsity, score=scores.gradient(), every=2),
        sparse(0.5),
        gradient=True,
        **HALF,
    ),
    row(
        "prune_taylor",
        "weight",
        lambda _, sparsity: clipjax.prune_mask(sparsity, score=scores.taylor(decay=0), every=2),
        sparse(0.5),
        gradient=True,
        **HALF,
    ),
    row(
        "prune_random",
        "weight",
        lambda _, key: clipjax.prune_mask(0.5, score=scores.random(), key=key),
        sparse(0.5),
        key=KEY,
    ),
    row(
        "prune_select",
        "weight",
        lambda _, sparsity, key: clipjax.prune_mask(
            sparsity, select=selections.bernoulli(0.5), structure=structures.unit(), key=key
        ),
        **HALF,
        key=KEY,
    ),
    row(
        "prune_carry",
        "weight",
        lambda _, sparsity: clipjax.prune_mask(sparsity, every=2, carry=True),
        sparse(0.5),
        **HALF,
    ),
    row(
        "prune_n_of_m",
        "weight",
        lambda _: clipjax.prune_mask(structure=structures.n_of_m(1, 2)),
        sparse(0.5, each=True),
    ),
    row(
        "prune_block",
        "weight",
        lambda _, sparsity: clipjax.prune_mask(sparsity, structure=structures.block(2, 2)),
        sparse(0.5),
        **HALF,
    ),
    row("prune_erk", "weight", lambda _, sparsity: clipjax.prune_mask(sparsity, scope="erk"), sparse(0.5), **HALF),
    row(
        "prune_rigl",
        "inner",
        lambda opt, sparsity, regrow: clipjax.prune_mask(sparsity, every=2, inner=opt, regrow=regrow),
        sparse(0.5),
        **HALF,
        regrow=(0.3, 0.1),
    ),
    row("prune_inner", "inner", lambda opt, sparsity: clipjax.prune_mask(sparsity, inner=opt), sparse(0.5), **HALF),
    row("quantize", "weight", lambda _, **numbers: clipjax.fake_quantize(4, **numbers), on_grid(4), **TIMES),
    row("quantize_binary", "weight", lambda _: clipjax.fake_quantize(1, every=2), on_grid(1)),
    row("quantize_axis", "weight", lambda _: clipjax.fake_quantize(3, axis=-1, step=steps.absmax()), on_grid(3)),
    row(
        "quantize_interval",
        "weight",
        lambda _: clipjax.fake_quantize(4, step=steps.interval(-0.2, 0.3)),
        both(on_grid(4), within),
    ),
    row(
        "quantize_d4",
        "weight",
        lambda _, step: clipjax.fake_quantize(step=step, rounding="half_away"),
        on_grid(None),
        step=(0.125, 0.25),
    ),
    row(
        "quantize_stochastic",
        "weight",
        lambda _, key: clipjax.fake_quantize(4, step=0.0625, rounding="stochastic", key=key),
        on_grid(4),
        key=KEY,
    ),
    row("quantize_groups", "weight", lambda _: clipjax.fake_quantize(3, group=PAIRS, step=steps.absmax()), on_grid(3)),
    *FORMAT_ROWS,
    row("quantize_affine", "weight", lambda _: clipjax.fake_quantize(4, step=steps.minmax(), every=2), on_grid(4)),
    row("quantize_sqnr", "weight", lambda _: clipjax.fake_quantize(widths.sqnr(12.0, (2, 4)), every=2), on_grid(4)),
    row("quantize_parq", "weight", lambda _: clipjax.fake_quantize(4, step=0.0625, rounding=roundings.parq(2))),
    row(
        "quantize_rate",
        "weight",
        lambda _, lam: clipjax.fake_quantize(4, rounding=roundings.rate(lam), every=2),
        on_grid(4),
        lam=(0.02, 0.2),
    ),
    row(
        "quantize_rate_budget",
        "weight",
        lambda _: clipjax.fake_quantize(3, axis=-1, rounding=roundings.rate(budget=200), every=2),
        on_grid(3),
    ),
    row("quantize_no_carry", "weight", lambda _: clipjax.fake_quantize(4, carry=False), on_grid(4)),
    row("quantize_inner", "inner", lambda opt: clipjax.fake_quantize(4, inner=opt), on_grid(4)),
    *PROJECTION_ROWS,
]

MASK = {"dense": {"kernel": jnp.arange(128).reshape(8, 16) % 3 > 0, "bias": None}, "out": {"kernel": None}}


def held_zeros(params, state):
    dropped = np.arange(128).reshape(8, 16) % 3 == 0
    assert np.all(np.asarray(params["dense"]["kernel"], np.float32)[dropped] == 0)


# A given mask, and a group, belong to one tree: they run wherever that tree does.
GIVEN = row(
    "prune_mask", "weight", lambda _, start: clipjax.prune_mask(mask=MASK, start=start), held_zeros, start=(0, 1)
)


def dead_together(params, state):
    """Half of the units of the group, in all that the tree has of it."""
    leaves = [np.asarray(params[m][k], np.float32) for m, k in (("dense", "kernel"), ("out", "kernel"))]
    dead = (leaves[0] == 0).all(axis=0)
    assert dead.sum() >= 8 and (np.asarray(params["dense"]["bias"])[dead] == 0).all()
    assert (leaves[1][dead] == 0).all()


GROUP = {"dense/kernel": -1, "dense/bias": 0, "out/kernel": 0}
GROUPED = row(
    "prune_groups",
    "weight",
    lambda _, sparsity: clipjax.prune_mask(sparsity, structure=structures.unit(groups=[GROUP])),
    dead_together,
    **HALF,
)
ALL = [*ROWS, GIVEN, GROUPED]

WEIGHT = [m for m in ALL if m.side in ("weight", "inner")]
GRADIENT = [m for m in ALL if m.side == "gradient"]

STEPS = 3


def tree(fill):
    """The tree of every rule: two kernels and a bias that divide by eight devices, one of them in bf16."""
    return {
        "dense": {"kernel": fill(jnp.float32, 8, 16), "bias": fill(jnp.float32, 16)},
        "out": {"kernel": fill(jnp.bfloat16, 16, 8)},
    }


def params():
    rng = np.random.default_rng(0)
    return tree(lambda dtype, *shape: jnp.asarray(rng.normal(size=shape) * 0.3, dtype))


def gradients():
    """One gradient per step, stacked along axis 0."""
    rng = np.random.default_rng(1)
    return tree(lambda dtype, *shape: jnp.asarray(rng.normal(size=(STEPS, *shape)) * 0.2, dtype))


def at(stacked, i):
    return jax.tree.map(lambda x: x[i], stacked)


def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
