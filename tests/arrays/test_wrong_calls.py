"""Calls that are wrong by a slip, as a factory that is not called: each raises one sentence that says what to write."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections, roundings, scores, selections, steps, structures, widths

pytestmark = pytest.mark.usefixtures("strict")

PARAMS = {"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
SGD = optax.sgd(0.1)
VECTOR = jnp.array([0.5, 0.25])
prune, quantize = functools.partial(clipjax.prune_mask, 0.5), functools.partial(clipjax.fake_quantize, 4)

UNCALLED = {
    "score": (lambda: prune(score=scores.magnitude), "scores.magnitude"),
    "grow": (lambda: prune(grow=scores.random, regrow=0.1, inner=SGD), "scores.random"),
    "structure": (lambda: prune(structure=structures.unit), "structures.unit"),
    "structure/make_mask": (lambda: clipjax.make_mask(PARAMS, 0.5, structure=structures.block), "structures.block"),
    "select": (lambda: prune(select=selections.largest), "selections.largest"),
    "select/clamp": (lambda: clipjax.clamp_weights(1.0, select=selections.bernoulli), "selections.bernoulli"),
    "sparsity": (lambda: clipjax.prune_mask(scores.magnitude, stop=9), "scores.magnitude"),
    "regrow": (lambda: prune(regrow=scores.random, inner=SGD), "scores.random"),
    "bound": (lambda: clipjax.clamp_weights(projections.clamp), "projections.clamp"),
    "step": (lambda: quantize(step=steps.mse), "steps.mse"),
    "step/choose_step": (lambda: clipjax.choose_step(jnp.ones(4), 4, step=steps.absmax), "steps.absmax"),
    "step/choose_bits": (lambda: clipjax.choose_bits(PARAMS, budget=4.0, step=steps.mse), "steps.mse"),
    "bits": (lambda: clipjax.fake_quantize(widths.sqnr), "widths.sqnr"),
    "rounding": (lambda: quantize(rounding=roundings.parq), "roundings.parq"),
    "projection": (lambda: clipjax.project(projections.identity), "projections.identity"),
    "projection/with_arguments": (lambda: clipjax.project(projections.max_norm), "projections.max_norm"),
}


@pytest.mark.parametrize("name", UNCALLED)
def test_a_factory_that_is_not_called_says_to_call_it(name):
    call, factory = UNCALLED[name]
    argument = re.escape(name.split("/")[0])
    text = rf"^`{argument}` must be .+, got the function `{factory}`\. Call it: `{factory}\(\)`\.$"
    with pytest.raises(TypeError, match=text):
        call()


one, two = lambda path: True, lambda path, leaf: 0.5
mark = clipjax.per_leaf(two)
SIGNATURES = {
    "where/prune": (lambda: prune(where=one), "`where` must be a function of (path, leaf), got one of (path). Try"),
    "where/clamp": (lambda: clipjax.clamp_weights(1.0, where=one), "got one of (path). Try `lambda path, leaf: ...`."),
    "where/quantize": (lambda: quantize(where=one), "`where` must be a function of (path, leaf)"),
    "where/project": (lambda: clipjax.project(projections.identity(), where=one), "`where` must be a function of"),
    "where/choose_bits": (lambda: clipjax.choose_bits(PARAMS, budget=4.0, where=one), "`where` must be a function of"),
    "per_leaf/one": (lambda: clipjax.per_leaf(one), "`fn` must be a function of (path, leaf), got one of (path)."),
    "per_leaf/number": (
        lambda: clipjax.per_leaf(0.5),
        "`fn` must be a function (path, leaf) -> value, got 0.5. Give a",
    ),
    "sparsity": (lambda: clipjax.prune_mask(two, stop=9), "function of (count), got one of (path, leaf). Mark a"),
    "bound": (lambda: clipjax.clamp_weights(two), "`bound` must be a function of (count), got one of (path, leaf)."),
    "axis": (lambda: quantize(axis=two), "Mark a function (path, leaf) by `per_leaf`."),
    "group": (lambda: quantize(group=two), "Mark a function (path, leaf) by `per_leaf`."),
    "projection": (
        lambda: clipjax.project(two),
        "`projection` must be a function of (params), got one of (path, leaf).",
    ),
    "start": (lambda: prune(start=lambda count: 1), "`start` must be a number, got <function"),
    "inner": (lambda: clipjax.prune_mask(0.5, inner=optax.adam), "Call its factory: `inner=optax.adam(1e-3)`."),
    "key": (lambda: prune(key=3), "`key` must be a PRNG key, got 3. Make one: `jax.random.key(0)`."),
    "with_gradient": (lambda: clipjax.with_gradient(optax.adam), "Call its factory: `inner=optax.adam(1e-3)`."),
    "with_gradient/none": (lambda: clipjax.with_gradient(None), "got None. Give the whole chain."),
    "check": (lambda: clipjax.check(PARAMS, (), optax.adam), "`tx` must be an optax.GradientTransformation"),
    "hold_once": (lambda: clipjax.hold_once(PARAMS, prune()), "`tx` must be an optax.GradientTransformation"),
    "hold_once/uncalled": (lambda: clipjax.hold_once(clipjax.prune_mask, PARAMS), "`tx` must be an optax.Gradient"),
    "summarize": (lambda: clipjax.summarize(PARAMS, tx=clipjax.prune_mask), "`tx` must be an optax.Gradient"),
}
NO_PER_LEAF = {
    "start": lambda: prune(start=mark),
    "every": lambda: quantize(every=mark),
    "stop": lambda: prune(stop=mark),
    "step": lambda: quantize(step=mark),
    "regrow": lambda: prune(regrow=mark, inner=SGD),
    "structure": lambda: prune(structure=mark),
    "score": lambda: prune(score=mark),
    "select": lambda: prune(select=mark),
    "scope": lambda: prune(scope=mark),
    "where": lambda: prune(where=mark),
    "mask": lambda: clipjax.prune_mask(mask=mark),
    "carry": lambda: prune(carry=mark),
    "inner": lambda: prune(inner=mark),
    "key": lambda: prune(key=mark),
    "rounding": lambda: quantize(rounding=mark),
    "projection": lambda: clipjax.project(mark),
    "bound": lambda: projections.max_norm(mark),
    "target_db": lambda: widths.sqnr(mark),
}
VECTORS = {
    "sparsity": lambda: clipjax.prune_mask(VECTOR),
    "sparsity/schedule": lambda: clipjax.prune_mask(lambda count: VECTOR, stop=9),
    "sparsity/leaf": lambda: clipjax.prune_mask({"dense": {"kernel": VECTOR}}),
    "bound": lambda: clipjax.clamp_weights(VECTOR),
    "bound/end": lambda: clipjax.clamp_weights((VECTOR, 1.0)),
    "bound/schedule": lambda: clipjax.clamp_weights(lambda count: VECTOR),
    "bound/per_leaf": lambda: clipjax.clamp_weights(clipjax.per_leaf(lambda path, leaf: VECTOR)),
    "bound/max_norm": lambda: clipjax.project(projections.max_norm(VECTOR)),
    "start": lambda: prune(start=jnp.array([1, 2])),
    "every": lambda: quantize(every=jnp.array([1, 2])),
    "step": lambda: quantize(step=VECTOR),
    "step/list": lambda: quantize(step=[0.5, 0.25]),
    "regrow": lambda: prune(regrow=VECTOR, inner=SGD),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_of_other_arguments_is_refused_when_it_is_given(name):
    call, text = SIGNATURES[name]
    with pytest.raises(TypeError, match=re.escape(text)):
        call()


@pytest.mark.parametrize("name", NO_PER_LEAF)
def test_per_leaf_is_refused_where_it_is_not_taken(name):
    with pytest.raises((TypeError, ValueError), match=rf"^`{name}` must be .+, got .*PerLeaf\(.*\. [A-Z]"):
        NO_PER_LEAF[name]()


@pytest.mark.parametrize("name", VECTORS)
def test_an_array_of_numbers_is_refused_where_one_is_meant(name):
    """Eagerly and in a trace alike: a shape is always known."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    with pytest.raises(
        ValueError, match=rf"^`{name.split('/')[0]}` must be one number, got an array of shape \([23],\)"
    ):
        tx = VECTORS[name]()
        jax.eval_shape(lambda: tx.update(zeros, tx.init(PARAMS), PARAMS))


def test_functions_that_can_be_called_pass():
    """A default, a star, a partial and a class are fine, and so is what does not tell its arguments."""

    class Where:
        def __call__(self, path, leaf):
            return leaf.ndim == 2

    partial = functools.partial(lambda rank, path, leaf: leaf.ndim == rank, 2)
    for where in (
        Where(),
        partial,
        lambda *args: True,
        lambda path, leaf, rank=2: True,
        np.vectorize(lambda a, b: True),
    ):
        clipjax.prune_mask(0.5, where=where)
    clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.5, 3, 9), stop=9)
    clipjax.project(jnp.abs)
    clipjax.project(jax.jit(jnp.abs))


def test_errors_of_the_users_own_function_are_not_masked():
    with pytest.raises(TypeError, match="can only concatenate str"):
        prune(where=lambda path, leaf: path + 1).init(PARAMS)


@pytest.mark.parametrize("build", [prune, quantize, lambda **kw: clipjax.clamp_weights(1.0, **kw)])
def test_a_complex_leaf_is_refused_unless_where_leaves_it_out(build):
    params = {"fourier": jnp.full((4, 4), 3 + 4j), "kernel": jnp.full((4, 4), 3.0)}
    for run in (build().init, lambda p: jax.eval_shape(build().init, p)):
        with pytest.raises(TypeError, match=r"must be real, got complex64 in leaf 'fourier'\. Leave it out by `where`"):
            run(params)
    tx = build(where=lambda path, leaf: path == "kernel")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert updates["fourier"].dtype == jnp.complex64 and not updates["fourier"].any()


REAL = {
    "scores": lambda x: clipjax.make_mask({"w": x}, 0.5),
    "x/round_to_step": lambda x: clipjax.round_to_step(x, 0.5),
    "x/quantize": lambda x: clipjax.quantize(x, 0.5, 4),
    "x/fake_quant": lambda x: clipjax.fake_quant(x, 0.5, 4),
    "x/clamp": lambda x: clipjax.clamp(x, 1.0),
}


@pytest.mark.parametrize("name", REAL)
def test_functions_of_arrays_refuse_complex_numbers(name):
    """They would work on the real parts alone."""
    with pytest.raises(TypeError, match=rf"^`{name.split('/')[0]}` must be real, got complex64\. Pass"):
        REAL[name](jnp.full(4, 3 + 4j))
    assert REAL[name](jnp.full(4, 3.0)) is not None


@pytest.mark.parametrize("name", ["start", "every", "stop"])
def test_a_count_is_no_infinity(name):
    for build in (prune, quantize):
        with pytest.raises(ValueError, match=rf"^`{name}` must be a whole number >= [01], got inf\."):
            build(**{name: np.inf})


def test_a_mask_names_leaves_of_the_params():
    kernel = jnp.ones((4, 4), bool)
    wrong = clipjax.prune_mask(mask={"dense": {"kernel": kernel}, "dens": {"kernel": kernel}})
    with pytest.raises(ValueError, match=r"^`mask` must match the params by path, got \['dens/kernel'\]\. Build it"):
        wrong.init(PARAMS)
    group = optax.masked(wrong, {"dense": True, "rest": False})  # the other masks belong to other groups
    group.init(PARAMS | {"rest": {"kernel": kernel}})
