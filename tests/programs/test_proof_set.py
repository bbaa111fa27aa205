"""The proof set: models as people write them; random halves of the units of all groups go, and the outputs stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import proof_equinox
import proof_functions
import proof_haiku
import proof_linen
import proof_nnx
import pytest
from proof_cases import arrays, params_of, replaced, with_params

import clipjax
from clipjax.structures import n_of_m, unit

MODULES = {
    "function": proof_functions,
    "linen": proof_linen,
    "nnx": proof_nnx,
    "equinox": proof_equinox,
    "haiku": proof_haiku,
}
CASES = {f"{name} {model}": case for name, module in MODULES.items() for model, case in module.CASES.items()}
TX = optax.adam(1e-3)


def analyzed(case):
    return clipjax.analyze(case.apply, case.variables, *case.args, rebuild=case.rebuild)


def is_statistic(path):
    return path.startswith(("batch_stats/", "state/")) or path.endswith(("/mean", "/var"))


def zeroed(variables, groups, rng):
    """The variables without a random half of the units of each group, layer by layer where layers have their own.

    Returns:
      The variables, and for each axis of a leaf bool[layers, entries], True for what is left.
    """
    values = {path: np.array(x) for path, x in arrays(variables).items()}
    left = {}
    for group in groups:
        layers = group.members[0].layers
        n = 1 if layers is None else values[group.members[0].path].shape[layers]
        dead = np.stack([rng.permutation(group.units) < group.units // 2 for _ in range(n)])
        for path, axis, places, layers in group.members:
            gone = dead[:, places] & (places >= 0)
            x = values[path][None] if layers is None else np.moveaxis(values[path], layers, 0)
            if not is_statistic(path):
                np.moveaxis(x, axis, 1)[gone] = 0  # a view, whose first two axes are layers and entries
            left[path, axis] = left.get((path, axis), True) & ~gone
    return replaced(variables, values), left


def halves(case, groups):
    """The model with halves of the groups set to zero, and an optimizer state in which every entry is told apart."""
    whole, left = zeroed(case.variables, groups, np.random.default_rng(0))
    params = params_of(whole)
    adam, *rest = TX.init(params)
    return whole, left, (adam._replace(mu=params, nu=jax.tree.map(np.square, params)), *rest)


def outputs(result):
    return result[0] if isinstance(result, tuple) else result


def cut(case, whole, groups, state):
    """`shrink`, which asks for a comparison where an epsilon belongs to the number of units."""
    verify = None if case.smaller is None else (case.smaller, case.args)
    return clipjax.shrink(whole, groups, state, verify=verify)


def check_small(case, whole, shrunk, repaired):
    """The small model has the outputs of the whole one, and a train step with what is left of the state is possible."""
    small, state, widths = shrunk
    apply = case.smaller or (case.apply if case.rebuild is None else case.rebuild(widths))

    @jax.jit
    def step(small, state, args):
        def loss_fn(params):
            found = outputs(apply(with_params(small, params), *args))
            return jnp.mean(jnp.square(found - 1.0)), found

        grads, found = jax.grad(loss_fn, has_aux=True)(params_of(small))
        updates, state = TX.update(grads, state, params_of(small))
        return found, optax.apply_updates(params_of(small), updates)

    wanted = outputs(jax.jit(case.apply)(whole, *case.args))
    given, after = step(small, state, case.args)
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))
    before, moments = arrays(params_of(small)), arrays(state[0].mu)
    for path, x in arrays(after).items():
        assert x.shape == before[path].shape and np.isfinite(x).all() and (x != before[path]).any(), path
        if path not in repaired:
            np.testing.assert_array_equal(moments[path], before[path], path)


@pytest.mark.parametrize("name", CASES)
def test_half_of_every_group_is_cut(name):
    case = CASES[name]
    analysis = analyzed(case)
    groups = [group for group in analysis.groups if group.proved]
    known = {(m.path, m.axis, group.units) for group in groups for m in group.members}
    assert not set(case.found) - known, str(analysis)
    whole, left, state = halves(case, groups)
    shrunk = cut(case, whole, groups, state)
    for (path, axis), kept in left.items():
        assert arrays(shrunk.variables)[path].shape[axis] == kept.sum(1).max() < kept.shape[1], (path, axis)
    check_small(case, whole, shrunk, {repair.path for group in groups for repair in group.repairs})


@pytest.mark.parametrize("name", ["function gpt", "linen stacked", "equinox grouped", "haiku resnet"])
def test_prune_mask_takes_the_groups_and_shrink_cuts_what_it_removed(name):
    case = CASES[name]
    groups = [group for group in analyzed(case).groups if group.proved]
    params = params_of(case.variables)
    tx = clipjax.prune_mask(0.5, structure=unit(groups=groups), scope="leaf")
    updates, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    pruned = optax.apply_updates(params, updates)
    shrunk = cut(case, with_params(case.variables, pruned), groups, TX.init(pruned))
    first = [group.members[0] for group in groups]
    small = arrays(shrunk.variables)
    assert all(small[m.path].shape[m.axis] < m.places.size for m in first)
    apply = case.smaller or (case.apply if case.rebuild is None else case.rebuild(shrunk.widths))
    wanted = outputs(jax.jit(case.apply)(with_params(case.variables, pruned), *case.args))
    given = outputs(jax.jit(apply)(shrunk.variables, *case.args))
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))


# For each kernel the axes that are summed over and the others, counted from the end.
MATRIX, HEADS, BACK = ((-2,), (-1,)), ((-3,), (-2, -1)), ((-3, -2), (-1,))
GPT = {"query": HEADS, "key": HEADS, "value": HEADS, "out": BACK, "gate_up": MATRIX, "down": MATRIX}
ATTENTION = {f"block1/attention/{name}/kernel": HEADS for name in ("query", "key", "value")}
ROLES = {
    "function gpt": {
        f"layers/{i}/{'mlp' if axes == MATRIX else 'attention'}/{name}": axes
        for i in range(2)
        for name, axes in GPT.items()
    },
    "linen vit": ATTENTION
    | {"block1/attention/out/kernel": BACK, "patches/kernel": ((-4, -3, -2), (-1,)), "head/kernel": MATRIX}
    | {f"block2/{name}/kernel": MATRIX for name in ("query", "key", "value", "out")}
    | {f"block{i}/{name}/kernel": MATRIX for i in (1, 2) for name in ("in", "back")},
}
NO_KERNELS = {"embed": "embedding", "cls": "scale or offset", "pos_embedding": "scale or offset"}


@pytest.mark.parametrize("name", ROLES)
def test_two_of_four_hold_in_the_matrices_that_are_multiplied(name):
    case, wanted = CASES[name], ROLES[name]
    analysis = analyzed(case)
    for row in analysis.rows:
        assert (row.inputs, row.outputs) == wanted.get(row.path, ((), ())), row.path
        assert row.role == ("kernel" if row.path in wanted else NO_KERNELS.get(row.path, "scale or offset")), row.path
    params = params_of(case.variables)
    tx = clipjax.prune_mask(structure=n_of_m(2, 4, axis=analysis.inputs), where=analysis.kernels)
    updates, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    for path, x in arrays(optax.apply_updates(params, updates)).items():
        rows = 0 if path not in wanted else np.prod([x.shape[axis] for axis in wanted[path][0]])
        # The inputs are the outer axes of all these kernels: what x @ w multiplies has one row for each.
        matrix = np.asarray(x).reshape(max(rows, 1), -1)
        matrix = np.pad(matrix, ((0, -len(matrix) % 4), (0, 0))).reshape(-1, 4, matrix.shape[1])
        assert ((matrix != 0).sum(1) <= 2).all() if rows else np.all(x), path
        assert not rows or (np.asarray(x) != 0).sum() == matrix.shape[0] * matrix.shape[2] * 2, path
