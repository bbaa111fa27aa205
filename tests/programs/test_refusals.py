"""What stands in the way of a cut: pinned where it touches, with the equation and its line, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.extend import core
from jax.interpreters import mlir

import clipjax

RNG = np.random.default_rng(0)
PARAMS = {
    "free": {"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4)},
    "hidden": {"kernel": RNG.normal(size=(4, 6)), "bias": RNG.normal(size=6)},
    "out": {"kernel": RNG.normal(size=(6, 2))},
    "order": RNG.normal(size=6),
    "scale": RNG.normal(size=6),
}
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), PARAMS)
X = RNG.normal(size=(5, 3)).astype(np.float32)
TABLE = RNG.normal(size=(1, 6)).astype(np.float32)
HIDDEN = {("hidden/kernel", -1), ("hidden/bias", -1), ("out/kernel", -2)}

mystery = core.Primitive("mystery")
mystery.def_impl(lambda x: x * 2)
mystery.def_abstract_eval(lambda x: x)
mlir.register_lowering(mystery, mlir.lower_fun(lambda x: x * 2, multiple_results=False))


def double(ref, out):
    out[...] = ref[...] * 2


def model(between):
    """Two hidden layers, of which the first has nothing in its way."""

    def apply(p, x):
        h = jnp.tanh(x @ p["free"]["kernel"] + p["free"]["bias"][None])
        h = between(p, h @ p["hidden"]["kernel"] + p["hidden"]["bias"][None])
        return jax.tree.map(lambda h: h @ p["out"]["kernel"] if h.shape[-1:] == p["out"]["kernel"].shape[:1] else h, h)

    return apply


class Case(NamedTuple):
    """What stands between the second hidden layer and its reader.

    Attributes:
      between: `between(params, h)`, of one line, to which the reason points.
      reason: of its equation.
      pinned: the leaves and axes that have the reason.
      entries: those of the hidden layer that are pinned; None for all.
    """

    between: Callable[..., Any]
    reason: str
    pinned: set[tuple[str, int]]
    entries: list[int] | None


OPAQUE: dict[str, Case] = {}
STATISTICS: dict[str, Case] = {}


def case(reason, pinned=HIDDEN, entries=None, cases=OPAQUE):
    """A reason begins with the name of the equation; that of a decorated function's only line stands behind it."""

    def register(between):
        equation, _, rest = reason.partition(": ")
        place = f"{equation} (test_refusals.py:{between.__code__.co_firstlineno + 2}) {rest}" if rest else reason
        cases[between.__name__] = Case(between, place, pinned, entries)
        return between

    return register


def like(h):
    return jax.ShapeDtypeStruct(h.shape, h.dtype)


@case("pure_callback: is not known to clipjax")
def a_callback(p, h):
    return jax.pure_callback(np.tanh, like(h), h)


@case("mystery: is not known to clipjax")
def a_primitive_of_ones_own(p, h):
    return mystery.bind(h)


@case("ffi_call: is not known to clipjax")
def a_foreign_function(p, h):
    return jax.ffi.ffi_call("unknown", like(h))(h)


@case("pallas_call: is not known to clipjax")
def a_pallas_kernel(p, h):
    return pl.pallas_call(double, like(h), interpret=True)(h)


@case("dynamic_slice: takes entries that the data decide")
def a_slice_by_the_data(p, h):
    return h * lax.dynamic_slice_in_dim(h, jnp.int32(h[0, 0]), 1, 1)


@case("gather: looks it up by index")
def a_gather_by_the_data(p, h):
    return h * jnp.take_along_axis(h, jnp.int32(h[:, :1]), -1)


@case("gather: looks it up by index", {("hidden/kernel", -1), ("hidden/bias", -1)})
def a_gather_by_the_weights(p, h):
    return h[:, jnp.argsort(p["order"])]


@case("sort: orders its entries", {("order", -1), ("out/kernel", -2)})
def an_order_by_the_weights(p, h):
    return h[:, jnp.argsort(p["order"])]


@case("cumsum: adds up along it")
def a_cumulative_sum(p, h):
    return jnp.cumsum(h, -1)


@case("argmax: gives a position in it")
def the_place_of_the_largest(p, h):
    return h * h.argmax(-1, keepdims=True).astype(h.dtype)


@case("iota: counts along it")
def the_place_of_each(p, h):
    return h * jnp.arange(h.shape[1], dtype=h.dtype)[None]


@case("a number in div: depends on the number of units")
def the_root_of_the_width(p, h):
    return h / np.sqrt(h.shape[1], dtype=np.float32)


@case("mul: reads a constant that differs along it")
def a_table(p, h):
    return h * TABLE


@case("an output of the model")
def an_output(p, h):
    return (h, h[:, :, None])


@case("the shape in slice: depends on the number of units", entries=[0, 1])
def a_slice_of_literal_width(p, h):
    return jnp.concatenate([h[:, 2:], h[:, :2]], -1)


@case("where it begins in slice: depends on the number of units", entries=[0, 1, 2, 3])
def one_unit(p, h):
    return h * h[:, 3:4]


statistic = functools.partial(case, cases=STATISTICS)


@statistic("div: is a mean over it", HIDDEN | {("scale", -1)})
def layer_norm(p, h):
    return (h - h.mean(-1, keepdims=True)) * p["scale"][None]


@statistic("reduce_max: is taken over it")
def softmax(p, h):
    return jax.nn.softmax(h)


@statistic("reduce_sum: sums over units that are not 0 where their parameters are")
def sum_behind_a_sigmoid(p, h):
    return h * jax.nn.sigmoid(h).sum(-1, keepdims=True)


@statistic("div: is a mean over it")
def mean(p, h):
    return h * h.mean(-1, keepdims=True)


@statistic("reduce_sum: sums over units that are not 0 where their parameters are")
def what_decides_between_branches(p, h):  # 16.5 with a dead unit, 11.5 without it
    return lax.cond(jnp.cos(h).sum() > 14.0, lambda h: h * 2, jnp.tanh, h)


@statistic("reduce_min: is taken over it")
def the_smallest(p, h):
    return h * jnp.abs(h).min(-1, keepdims=True)


def read(between):
    """The analysis; the first layer's units are found, whatever stands behind the second."""
    analysis = clipjax.analyze(model(between), PARAMS, X)
    (free,) = (group for group in analysis.groups if "free/kernel" in group)
    assert dict(free) == {"free/kernel": -1, "free/bias": -1, "hidden/kernel": -2}
    assert free.proved
    return analysis


def check_cut_of_the_rest(between, analysis):
    """Half of the first layer's units go, and nothing else is smaller; the outputs are those of the large model."""
    large = jax.tree.map(np.copy, PARAMS)
    large["free"]["kernel"][:, [0, 2]] = large["free"]["bias"][[0, 2]] = large["hidden"]["kernel"][[0, 2]] = 0
    small = clipjax.shrink(large, analysis, verify=(model(between), X)).variables
    shapes = jax.tree.map(np.shape, PARAMS)
    shapes["free"] = {"kernel": (3, 2), "bias": (2,)}
    shapes["hidden"]["kernel"] = (2, 6)
    assert jax.tree.map(np.shape, small) == shapes


def entries(groups):
    """The entries of the hidden layer's outputs that belong to a group."""
    places = [m.places for group in groups for m in group.members if (m.path, m.axis) == ("hidden/kernel", -1)]
    return sorted({int(i) for found in places for i in np.flatnonzero(found >= 0)})


@pytest.mark.parametrize("name", OPAQUE)
def test_units_in_whose_way_it_stands_are_pinned(name):
    between, reason, pinned, pinned_entries = OPAQUE[name]
    analysis = read(between)
    rows = {line.split()[0]: line for line in str(analysis).splitlines()}
    own = [(row.path, i - len(row.shape), why) for row in analysis.rows for i, why in enumerate(row.pins)]
    outputs = {("out/kernel", -1)} if name == "an_output" else set()
    assert {(path, axis) for path, axis, why in own if any(x.startswith(reason) for x in why)} == pinned | outputs
    assert all(reason in rows[path] for path, _ in pinned)
    assert not analysis.inexact
    assert entries(analysis.groups) == [i for i in range(6) if pinned_entries and i not in pinned_entries]
    if name != "a_foreign_function":  # there is none to call
        check_cut_of_the_rest(between, analysis)


@pytest.mark.parametrize("name", STATISTICS)
def test_units_that_a_statistic_runs_over_are_left_to_exact_false(name):
    between, reason, members, _ = STATISTICS[name]
    analysis = read(between)
    (group,) = analysis.inexact
    assert {(m.path, m.axis) for m in group.members} == members
    assert any(why.startswith(reason) for why in group.statistics)
    note = str(analysis).splitlines()[-1]
    assert note.startswith("group 1: 6 units of hidden/kernel") and reason in note
    assert all(row.groups[axis] == (1,) for row in analysis.rows for path, axis in members if row.path == path)
    assert entries(analysis.groups) == []
    check_cut_of_the_rest(between, analysis)
    dead = jax.tree.map(np.copy, PARAMS)
    dead["hidden"]["kernel"][:, 1] = dead["hidden"]["bias"][1] = dead["out"]["kernel"][1] = dead["scale"][1] = 0
    assert clipjax.shrink(dead, analysis).variables["hidden"]["kernel"].shape == (4, 6)
    small, _, _ = shrunk = clipjax.shrink(dead, analysis, exact=False, verify=(model(between), X))
    assert small["hidden"]["kernel"].shape == (4, 5)
    assert shrunk.change > 1e-3  # what a cut without a word would have come to


def test_a_reshape_to_literal_sizes_is_pinned_or_waits_for_a_comparison():
    """The model takes no other number of these units, so nothing is known of one; the first layer is cut."""
    between = lambda p, h: jnp.tanh(h.reshape(h.shape[0], 2, 3)).reshape(h.shape[0], 6)
    analysis = read(between)
    assert len(analysis.groups) == 1 and "the model refuses another number of units: TypeError: cannot" in str(analysis)
    check_cut_of_the_rest(between, analysis)
    analysis = clipjax.analyze(model(between), PARAMS, X, rebuild=lambda widths: model(between))
    assert [(group.units, group.proved) for group in analysis.groups[1:]] == [(2, False), (3, False)]
    assert "2 units of hidden/kernel, read from one trace" in str(analysis)
    check_cut_of_the_rest(between, analysis)
    dead = jax.tree.map(np.copy, PARAMS)
    for entries in (dead["hidden"]["kernel"].T, dead["hidden"]["bias"], dead["out"]["kernel"]):
        entries[:3] = 0
    with pytest.raises(ValueError, match="`hidden/kernel` must have units proved to be free"):
        clipjax.shrink(dead, analysis)
    with pytest.raises(ValueError, match="`verify` must run the smaller model, got TypeError: cannot reshape"):
        clipjax.shrink(dead, analysis, verify=(model(between), X))
