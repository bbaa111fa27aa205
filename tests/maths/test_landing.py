"""Contract rule 6, as a property: after every chained step each constraint holds exactly, in every form.

One tree holds a leaf for each of four widths (in `make slow` for each width from 1 to 8 bits), and every number is
traced, so that a form compiles once per dtype and hundreds of cases run through it. Updates are applied inside the jit
and outside it; both must agree bit for bit. What is jitted is compiled as a user's program is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import optimized
from hypothesis import given, settings
from hypothesis import strategies as st

import clipjax

STEPS = 6
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}
SHAPES = {1: (9, 7), 2: (1, 1), 3: (3, 5), 4: (101, 100), 5: (2, 3, 4), 6: (17, 31), 7: (5, 1), 8: (64, 32)}
FEW = (1, 2, 4, 8)
FORMS = ("clamp", "prune", "quantize", "chain", "inner")

BITS = clipjax.per_leaf(lambda path, leaf: int(path.split("/")[-1]))
AXIS = clipjax.per_leaf(lambda path, leaf: -1 if int(path) % 2 else None)


def build(form, bound, sparsity, every, rate):
    """One of the five forms; every number may be traced."""
    clamp = clipjax.clamp_weights(bound)
    quantize = functools.partial(clipjax.fake_quantize, BITS, axis=AXIS, every=every)
    prune = functools.partial(clipjax.prune_mask, sparsity)
    if form == "chain":
        return optax.chain(optax.adam(rate, eps=1e-4), clamp, prune(), quantize())
    if form == "inner":
        return quantize(inner=prune(inner=optax.chain(optax.sgd(rate), clamp)))
    return optax.chain(optax.sgd(rate), {"clamp": clamp, "prune": prune(), "quantize": quantize()}[form])


@functools.cache
def compiled(form):
    """init, and a step that returns the params updated inside the jit, the updates, and the state."""

    @jax.jit
    def step(params, state, grads, numbers):
        updates, state = build(form, **numbers).update(grads, state, params)
        return optax.apply_updates(params, updates), updates, state

    return jax.jit(lambda params, numbers: build(form, **numbers).init(params)), step


def start(case, widths):
    """Leaves of very different size, some weights exactly zero, some leaves all zero."""
    rng = np.random.default_rng(case["seed"])
    far = case["far"] * case["bound"]
    params = {}
    for bits, shape in ((bits, SHAPES[bits]) for bits in widths):
        x = np.clip(rng.normal(size=shape), -3, 3) * far / 3 * (rng.random(shape) < 0.9) * (rng.random() < 0.9)
        params[str(bits)] = jnp.asarray(x, DTYPES[case["dtype"]])
    return params


def run(form, case, widths):
    """Yield (before, params, state) after each step."""
    numbers = {k: jnp.float32(case[k]) for k in ("bound", "sparsity", "rate")} | {"every": jnp.int32(case["every"])}
    init, step = compiled(form)
    params = start(case, widths)
    with optimized():
        state = init(params, numbers)
    rng = np.random.default_rng(case["seed"] + 1)
    for _ in range(STEPS):
        grads = {k: jnp.asarray(rng.normal(size=p.shape) * case["bound"], p.dtype) for k, p in params.items()}
        with optimized():
            inside, updates, state = step(params, state, grads, numbers)
        outside = optax.apply_updates(params, updates)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), inside, outside)
        before, params = params, inside
        yield before, params, state


def exact(x):
    return np.asarray(x, np.float64)


def check_clamp(case, params):
    """|w| <= T, T read as f32."""
    for p in params.values():
        assert np.abs(exact(p)).max() <= np.float64(np.float32(case["bound"]))


def check_prune(case, params):
    """At least round(sparsity * n) exact zeros, the f32 sparsity multiplied exactly."""
    n = sum(p.size for p in params.values())
    zeros = sum(int((exact(p) == 0).sum()) for p in params.values())
    assert zeros >= round(np.float64(np.float32(case["sparsity"])) * n)


def check_grid(before, params, state):
    """Every weight is code * s, rounded to its dtype; one that had to move by more than itself is one step late."""
    for name, q in clipjax.quantized(params, state).items():
        dtype, step, codes = params[name].dtype, np.asarray(q.step), np.asarray(q.codes, np.float32)
        levels, now, old = exact((codes * step).astype(dtype)), exact(params[name]), exact(before[name])
        was_on = old == exact((np.rint(old.astype(np.float32) / step) * step).astype(dtype))
        most = max(1, 2 ** (int(name) - 1) - 1)
        top = exact((np.float32(most) * step).astype(dtype))
        # Fewer levels may be in use than the width has: those within a bound, or multiples of a step that fits exactly.
        shared = tuple(i for i in range(now.ndim) if step.ndim == 0 or step.shape[i] == 1)
        was_on &= np.abs(old) <= np.abs(levels).max(shared, keepdims=True)
        due = was_on | (np.abs(levels - old) <= np.abs(levels))
        np.testing.assert_array_equal(now[due], levels[due])
        assert np.abs(codes).max() <= most
        assert np.all(np.abs(now) <= top)


cases = st.fixed_dictionaries(
    {
        "bound": st.floats(2.0**-8, 2.0, width=32),
        "far": st.sampled_from([0.5, 1.0, 3.0, 100.0]),
        "sparsity": st.floats(0.0, 0.9375, width=32),
        "rate": st.sampled_from([1e-3, 1e-1, 1.0]),
        "every": st.sampled_from([1, 2, 100]),
        "seed": st.integers(0, 2**16),
    }
)


# A form compiles a program for each dtype. The chain has all three constraints at once, in two dtypes, and
# the inner form has them in the narrowest one; the other cases run in `make slow`.
QUICKLY = {"chain": (("bf16", "f32"), FEW), "inner": (("f16",), FEW)}
REST = [pytest.param(form, sorted(DTYPES), SHAPES, marks=pytest.mark.slow) for form in FORMS]


@pytest.mark.parametrize(("form", "dtypes", "widths"), [(form, *how) for form, how in QUICKLY.items()] + REST)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases, data=st.data())
def test_constraints_hold_after_every_step(form, dtypes, widths, case, data):
    """D2, D3, D4: each transformation alone, all in one chain, and with `inner=`."""
    case = case | {"dtype": data.draw(st.sampled_from(dtypes))}
    for before, params, state in run(form, case, widths):
        if form in ("clamp", "chain", "inner"):
            check_clamp(case, params)
        if form in ("prune", "chain", "inner"):
            check_prune(case, params)
        if form in ("quantize", "chain", "inner"):
            check_grid(before, params, state)
