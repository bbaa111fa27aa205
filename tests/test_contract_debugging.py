"""`jax_debug_nans` and `jax_debug_infs`: no transformation makes a NaN or an infinity of its own, even for a moment.

Outside of jit every operation is checked. Inside of it what comes out is: updates and states, which are looked at for
every transformation in `test_contract.py`, and here for those without a limit.
"""

import contextlib

import contract_table as table
import jax
import numpy as np
import optax
import pytest

import clipjax
from clipjax import steps, thresholds, widths


@contextlib.contextmanager
def debugging():
    """Both flags; and no cached result of before, which nothing would check."""
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def train(tx, jit):
    params = table.params()
    with debugging():
        init, update = (jax.jit(tx.init), jax.jit(tx.update)) if jit else (tx.init, tx.update)
        state = init(params)
        for i in range(2):
            updates, state = update(table.at(table.gradients(), i), state, params)
            params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("row", table.paths(table.ALL))
def test_no_transformation_raises_where_all_numbers_are_finite(row):
    train(row.tx(), jit=False)


def test_the_flags_find_what_they_are_for():
    bad = clipjax.project(lambda params: jax.tree.map(lambda x: x / 0.0, params))
    for jit in (False, True):
        with pytest.raises(FloatingPointError):
            train(bad, jit)


REFRESHING = {
    "mse": lambda: clipjax.fake_quantize(4, every=1),
    "absmax": lambda: clipjax.fake_quantize(4, step=steps.absmax(), every=1),
    "minmax": lambda: clipjax.fake_quantize(4, step=steps.minmax(), every=1),
    "percentile": lambda: clipjax.fake_quantize(4, step=steps.percentile(99.0), every=1),
    "interval": lambda: clipjax.fake_quantize(4, step=steps.interval(-0.2, 0.3), every=1),
    "sqnr": lambda: clipjax.fake_quantize(widths.sqnr(12.0, (2, 4)), every=1),
    "prune": lambda: clipjax.prune_mask(0.5, every=1),
}


@pytest.mark.parametrize("name", REFRESHING)
def test_a_refresh_outside_of_a_branch_makes_no_infinity_either(name):
    """`every=1` has no branch, so that each of its operations is checked."""
    train(REFRESHING[name](), jit=False)


@pytest.mark.parametrize("rule", [steps.mse(), steps.twn(), steps.absmax()], ids=["mse", "twn", "absmax"])
def test_a_column_of_zeros_has_a_step_without_a_nan_on_the_way(rule):
    params = {"kernel": np.zeros((4, 2), np.float32)}
    params["kernel"][:, 0] = (0.5, -0.25, 0.0, 1.0)
    tx = clipjax.fake_quantize(2, step=rule, axis=-1, every=1)
    with debugging():
        _, state = tx.update({"kernel": np.zeros((4, 2), np.float32)}, tx.init(params), params)
    assert float(state.projection.step["kernel"][0, 1]) == 1.0


UNLIMITED = {
    "clip": lambda: clipjax.clip(np.inf),
    "clip_norm": lambda: clipjax.clip_norm(np.inf),
    "leaf": lambda: clipjax.clip_norm({"dense/kernel": 1.0}, per="leaf"),
    "skip": lambda: clipjax.skip_spikes(optax.sgd(0.1), np.inf),
    "warmup": lambda: clipjax.clip_norm(thresholds.ema_ratio(warmup_max=np.inf)),
    "one_sided": lambda: clipjax.clamp_weights((0.0, np.inf)),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", UNLIMITED)
def test_an_infinite_threshold_or_bound_is_no_infinite_state(name, jit):
    """The report still says that there is no limit."""
    _, state = train(UNLIMITED[name](), jit)
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(state))
    found = clipjax.report(state, per_leaf=True)
    key = {"leaf": "clip_norm/threshold/out/kernel", "one_sided": "clamp_weights/high"}
    limit = found[key[name]] if name in key else next(x for k, x in found.items() if k.endswith("/threshold"))
    assert np.isinf(limit)
