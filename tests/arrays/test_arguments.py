"""Bad input: every message names the argument, the value and the remedy; what is traced never raises."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import projections, scores, selections, steps, structures, thresholds

pytestmark = pytest.mark.usefixtures("strict")

PARAMS = {"kernel": jnp.ones((2, 3))}
NARROW = {"kernel": jnp.ones((2, 3), jnp.bfloat16)}
SCHEDULE = optax.constant_schedule(0.5)
NAN = math.nan


def init(tx, params=PARAMS):
    return lambda: tx.init(params)


def update(tx, params=PARAMS, **extra):
    return lambda: tx.update(params, tx.init(params), params, **extra)


# Each row: what is called, the exception, the argument that the message names, how it shows the value.
FACTORY = {
    "clip/negative": (lambda: clipjax.clip(-1.0), "threshold", "-1.0"),
    "clip/nan": (lambda: clipjax.clip(NAN), "threshold", "nan"),
    "clip_norm/negative": (lambda: clipjax.clip_norm(-1.0), "threshold", "-1.0"),
    "clip_norm/nan": (lambda: clipjax.clip_norm(NAN), "threshold", "nan"),
    "clip_norm/per": (lambda: clipjax.clip_norm(1.0, per="layer"), "per", "'layer'"),
    "clip_norm/ord-zero": (lambda: clipjax.clip_norm(1.0, ord=0), "ord", "0"),
    "clip_norm/ord-nan": (lambda: clipjax.clip_norm(1.0, ord=NAN), "ord", "nan"),
    "clip_norm/eps": (lambda: clipjax.clip_norm(1.0, eps=-1.0), "eps", "-1.0"),
    "clamp_weights/negative": (lambda: clipjax.clamp_weights(-1.0), "bound", "-1.0"),
    "clamp_weights/nan": (lambda: clipjax.clamp_weights(NAN), "bound", "nan"),
    "clamp_weights/nan-array": (lambda: clipjax.clamp_weights(np.float32(NAN)), "bound", "nan"),
    "clamp_weights/lo>hi": (lambda: clipjax.clamp_weights((1.0, -1.0)), "bound", "(1.0, -1.0)"),
    "clamp_weights/nan-end": (lambda: clipjax.clamp_weights((NAN, 1.0)), "bound", "(nan, 1.0)"),
    "clamp_weights/triple": (lambda: clipjax.clamp_weights((0.0, 1.0, 2.0)), "bound", "(0.0, 1.0, 2.0)"),
    "clamp_weights/when": (lambda: clipjax.clamp_weights(1.0, when="during"), "when", "'during'"),
    "clamp/negative": (lambda: clipjax.clamp(jnp.ones(2), -1.0), "bound", "-1.0"),
    "clamp/lo>hi": (lambda: clipjax.clamp(jnp.ones(2), (2.0, 1.0)), "bound", "(2.0, 1.0)"),
    "projections.clamp/nan": (lambda: projections.clamp(NAN), "bound", "nan"),
    "projections.clamp/lo>hi": (lambda: projections.clamp((2.0, 1.0)), "bound", "(2.0, 1.0)"),
    "projections.max_norm/negative": (lambda: projections.max_norm(-1.0), "bound", "-1.0"),
    "project/start": (lambda: clipjax.project(projections.identity(), start=-1), "start", "-1"),
    "prune_mask/one": (lambda: clipjax.prune_mask(1.0), "sparsity", "1.0"),
    "prune_mask/negative": (lambda: clipjax.prune_mask(-0.1), "sparsity", "-0.1"),
    "prune_mask/nan": (lambda: clipjax.prune_mask(NAN), "sparsity", "nan"),
    "prune_mask/none": (lambda: clipjax.prune_mask(), "sparsity", "None"),
    "prune_mask/both": (lambda: clipjax.prune_mask(0.5, mask={"kernel": True}), "sparsity", "0.5"),
    "prune_mask/no-stop": (lambda: clipjax.prune_mask(SCHEDULE), "stop", "None"),
    "prune_mask/stop<start": (lambda: clipjax.prune_mask(SCHEDULE, start=5, stop=4), "stop", "4"),
    "prune_mask/every-zero": (lambda: clipjax.prune_mask(0.5, every=0), "every", "0"),
    "prune_mask/every-fraction": (lambda: clipjax.prune_mask(0.5, every=1.5), "every", "1.5"),
    "prune_mask/start": (lambda: clipjax.prune_mask(0.5, start=-1), "start", "-1"),
    "prune_mask/scope": (lambda: clipjax.prune_mask(0.5, scope="layer"), "scope", "'layer'"),
    "prune_mask/regrow": (lambda: clipjax.prune_mask(0.5, regrow=0.1), "inner", "None"),
    "make_mask/one": (lambda: clipjax.make_mask(jnp.ones(3), 1.0), "sparsity", "1.0"),
    "make_mask/nan": (lambda: clipjax.make_mask(jnp.ones(3), NAN), "sparsity", "nan"),
    "make_mask/none": (lambda: clipjax.make_mask(jnp.ones(3)), "sparsity", "None"),
    "make_mask/scope": (lambda: clipjax.make_mask(jnp.ones(3), 0.5, scope="all"), "scope", "'all'"),
    "make_mask/axis": (lambda: clipjax.make_mask(jnp.ones(3), 0.5, structure=structures.unit(2)), "axis", "2"),
    "fake_quantize/bits-zero": (lambda: clipjax.fake_quantize(0), "bits", "0"),
    "fake_quantize/bits-17": (lambda: clipjax.fake_quantize(17), "bits", "17"),
    "fake_quantize/bits-fraction": (lambda: clipjax.fake_quantize(2.5), "bits", "2.5"),
    "fake_quantize/bits-bool": (lambda: clipjax.fake_quantize(True), "bits", "True"),
    "fake_quantize/no-step": (lambda: clipjax.fake_quantize(), "step", "None"),
    "fake_quantize/no-float-step": (lambda: clipjax.fake_quantize(step=steps.mse()), "step", "Step"),
    "fake_quantize/step-negative": (lambda: clipjax.fake_quantize(4, step=-0.5), "step", "-0.5"),
    "fake_quantize/step-zero": (lambda: clipjax.fake_quantize(4, step=0.0), "step", "0.0"),
    "fake_quantize/step-nan": (lambda: clipjax.fake_quantize(4, step=NAN), "step", "nan"),
    "fake_quantize/step-inf": (lambda: clipjax.fake_quantize(4, step=math.inf), "step", "inf"),
    "fake_quantize/rounding": (lambda: clipjax.fake_quantize(4, rounding="up"), "rounding", "'up'"),
    "fake_quantize/stop<start": (lambda: clipjax.fake_quantize(4, start=9, stop=8), "stop", "8"),
    "fake_quantize/every": (lambda: clipjax.fake_quantize(4, every=0), "every", "0"),
    "quantize/bits": (lambda: clipjax.quantize(jnp.ones(2), 0.5, 17), "bits", "17"),
    "quantize/step": (lambda: clipjax.quantize(jnp.ones(2), 0.0, 4), "step", "0.0"),
    "round_to_step/step": (lambda: clipjax.round_to_step(jnp.ones(2), -1.0), "step", "-1.0"),
    "round_to_step/key": (lambda: clipjax.round_to_step(jnp.ones(2), 1.0, rounding="stochastic"), "key", "None"),
    "choose_step/bits": (lambda: clipjax.choose_step(jnp.ones(2), 0), "bits", "0"),
    "choose_step/axis": (lambda: clipjax.choose_step(jnp.ones(2), 4, axis=1), "axis", "1"),
    "choose_bits/neither": (lambda: clipjax.choose_bits(PARAMS), "target_db", "None"),
    "choose_bits/both": (lambda: clipjax.choose_bits(PARAMS, target_db=20.0, budget=4.0), "target_db", "20.0"),
    "choose_bits/empty": (lambda: clipjax.choose_bits(PARAMS, budget=4.0, allowed=()), "allowed", "()"),
    "choose_bits/width": (lambda: clipjax.choose_bits(PARAMS, budget=4.0, allowed=(0, 4)), "allowed", "0"),
    "choose_bits/budget": (lambda: clipjax.choose_bits(PARAMS, budget=1.0), "budget", "1.0"),
    "choose_bits/target-nan": (lambda: clipjax.choose_bits(PARAMS, target_db=NAN), "target_db", "nan"),
    "choose_bits/budget-nan": (lambda: clipjax.choose_bits(PARAMS, budget=NAN), "budget", "nan"),
    "steps.interval/order": (lambda: steps.interval(0.5, -0.5), "lo, hi", "(0.5, -0.5)"),
    "steps.interval/no-zero": (lambda: steps.interval(1.0, 2.0), "lo, hi", "(1.0, 2.0)"),
    "steps.interval/nan": (lambda: steps.interval(NAN, 1.0), "lo, hi", "(nan, 1.0)"),
    "steps.interval/one-bit": (
        lambda: clipjax.choose_step(jnp.ones(2), 1, step=steps.interval(0.0, 1.0)),
        "lo, hi",
        "(0.0, 1.0)",
    ),
    "steps.fixed/zero": (lambda: steps.fixed(0.0), "step", "0.0"),
    "structures.unit/reduce": (lambda: structures.unit(reduce="median"), "reduce", "'median'"),
    "structures.unit/min_keep": (lambda: structures.unit(min_keep=-1), "min_keep", "-1"),
    "structures.element/min_keep": (lambda: structures.element(min_keep=-1), "min_keep", "-1"),
    "structures.block/min_keep": (lambda: structures.block(2, 2, min_keep=1.5), "min_keep", "1.5"),
    "structures.unit/axis": (lambda: structures.unit(axis="in"), "axis", "'in'"),
    "structures.n_of_m/axis": (lambda: structures.n_of_m(2, 4, axis=None), "axis", "None"),
    "selections.bernoulli/p": (lambda: selections.bernoulli(1.5), "p", "1.5"),
    "selections.leaves/p": (lambda: selections.leaves(-0.5), "p", "-0.5"),
    "selections.largest/zero": (lambda: selections.largest(0.0), "fraction", "0.0"),
    "scores.gradient/decay": (lambda: scores.gradient(1.0), "decay", "1.0"),
    "scores.taylor/decay": (lambda: scores.taylor(-0.5), "decay", "-0.5"),
    "scores.magnitude/normalize": (lambda: scores.magnitude("max"), "normalize", "'max'"),
}

INIT = {
    "clamp_weights/dtype": (init(clipjax.clamp_weights((1.001, 1.002)), NARROW), "bound", "(1.001, 1.002)"),
    "clamp_weights/per_leaf": (init(clipjax.clamp_weights(clipjax.per_leaf(lambda path, leaf: -2.0))), "bound", "-2.0"),
    "prune_mask/per_leaf": (init(clipjax.prune_mask(clipjax.per_leaf(lambda path, leaf: 1.0))), "sparsity", "1.0"),
    "prune_mask/axis": (init(clipjax.prune_mask(0.5, structure=structures.unit(5))), "axis", "5"),
    "prune_mask/mask-shape": (init(clipjax.prune_mask(mask={"kernel": jnp.ones(7, bool)})), "mask", "(7,)"),
    "prune_mask/mask-dtype": (init(clipjax.prune_mask(mask={"kernel": jnp.ones((2, 3))})), "mask", "float32"),
    "fake_quantize/axis": (init(clipjax.fake_quantize(4, axis=2)), "axis", "2"),
    "fake_quantize/axis-tuple": (init(clipjax.fake_quantize(4, axis=(0, -3))), "axis", "(0, -3)"),
    "fake_quantize/per_leaf": (init(clipjax.fake_quantize(clipjax.per_leaf(lambda path, leaf: 0))), "bits", "0"),
    "fake_quantize/bits-tree": (init(clipjax.fake_quantize({"kernel": 17})), "bits", "17"),
    "fake_quantize/other-tree": (init(clipjax.fake_quantize({"other": 4})), "bits", "other"),
    "fake_quantize/narrow": (init(clipjax.fake_quantize(9), NARROW), "bits", "9"),
}


@pytest.mark.parametrize("name", [*FACTORY, *(f"{name}@init" for name in INIT)])
def test_bad_value_names_argument_value_and_remedy(name):
    """Contract rule 9: "`bits` must be between 1 and 16, got 0." and a sentence that says what to do."""
    call, argument, value = INIT[name[:-5]] if name.endswith("@init") else FACTORY[name]
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    found = re.fullmatch(rf"`{re.escape(argument)}` must (.+?), got (.+?)\. ([A-Z0-9`|].+\.)", message, re.DOTALL)
    assert found, message
    assert value in found[2], message


WEIGHT_SIDE = {
    "project": clipjax.project(projections.identity()),
    "clamp_weights": clipjax.clamp_weights(1.0),
    "prune_mask": clipjax.prune_mask(0.5),
    "prune_mask/mask": clipjax.prune_mask(mask={"kernel": jnp.ones((2, 3), bool)}),
    "fake_quantize": clipjax.fake_quantize(4),
}


@pytest.mark.parametrize("name", WEIGHT_SIDE)
def test_missing_params_raises_the_optax_message(name):
    tx = WEIGHT_SIDE[name]
    with pytest.raises(ValueError, match=r"`params` when calling `update`.*tx\.update\(updates, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("score", [scores.gradient(), scores.gradient(0.0), scores.taylor(), scores.taylor(0.0)])
def test_missing_grad_says_how_to_pass_it(score):
    with pytest.raises(ValueError, match=r"needs `grad`.*with_gradient.*grad=grads"):
        update(clipjax.prune_mask(0.5, score=score))()


TYPES = {
    "clip/string": (lambda: clipjax.clip("tight"), "`threshold` must .*'tight'\\. [A-Z]"),
    "clip/none": (lambda: clipjax.clip(None), "`threshold` must .*None.* C >= 0"),
    "clip_norm/string": (lambda: clipjax.clip_norm("tight"), "`threshold` must .*'tight'\\. [A-Z]"),
    "project/number": (lambda: clipjax.project(3), "`projection` must .*3.* factory"),
    "prune_mask/score": (lambda: clipjax.prune_mask(0.5, score="magnitude"), "`score` must .*'magnitude'.* factory"),
    "prune_mask/structure": (lambda: clipjax.prune_mask(0.5, structure="unit"), "`structure` must .*'unit'.* factory"),
    "prune_mask/select": (lambda: clipjax.prune_mask(0.5, select=0.5), "`select` must .*0.5.* factory"),
    "clamp_weights/select": (lambda: clipjax.clamp_weights(1.0, select=0.5), "`select` must .*0.5.* factory"),
    "clip/select": (lambda: clipjax.clip(1.0, select="all"), "`select` must .*'all'.* factory"),
    "fake_quantize/step": (lambda: clipjax.fake_quantize(4, step="mse"), "`step` must .*'mse'.* factory"),
    "fake_quantize/schedule": (lambda: clipjax.fake_quantize(SCHEDULE), "`bits` must .*per_leaf"),
    "clamp_weights/none": (lambda: clipjax.clamp_weights(None), "`bound` must be a number, got None"),
    "clamp_weights/string": (lambda: clipjax.clamp_weights("1"), "`bound` must be a number, got '1'"),
    "prune_mask/where": (lambda: clipjax.prune_mask(0.5, where="kernel"), "`where` must be a function .*'kernel'"),
    "selections.bernoulli/none": (lambda: selections.bernoulli(None), "`p` must be a number, got None.*0.5"),
    "selections.leaves/string": (lambda: selections.leaves("x"), "`p` must be a number, got 'x'.*0.5"),
    "selections.largest/none": (lambda: selections.largest(None), "`fraction` must be a number, got None.*0.1"),
    "scores.taylor/decay": (lambda: scores.taylor(decay=None), "`decay` must be a number, got None"),
    "steps.sigma/none": (lambda: steps.sigma(None), "`k` must be a number, got None"),
    "structures.block/none": (lambda: structures.block(None, 4), "`height` must be a number, got None"),
    "structures.unit/min_keep": (lambda: structures.unit(min_keep=None), "`min_keep` must be a number, got None"),
    "thresholds.percentile/window": (
        lambda: thresholds.percentile(50, window=None),
        "`window` must be a number, got None",
    ),
    "refresh": (update(clipjax.prune_mask(0.5), refresh="yes"), "`refresh` must .*'yes'.* static"),
}


@pytest.mark.parametrize("name", TYPES)
def test_bad_type_names_argument_and_remedy(name):
    call, pattern = TYPES[name]
    with pytest.raises(TypeError, match=pattern):
        call()


@pytest.mark.parametrize("tx", [clipjax.clip(1.0), clipjax.clip_norm(1.0)])
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_complex_or_integer_gradients_raise_type_error(tx, dtype):
    grads = {"w": jnp.ones(3, dtype)}
    with pytest.raises(TypeError, match=rf"real floats, got {jnp.dtype(dtype).name} at 'w'.*(Split|mask)"):
        tx.update(grads, tx.init(grads))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("bits", lambda x: clipjax.fake_quantize(x)),
        ("axis", lambda x: clipjax.fake_quantize(4, axis=x)),
        ("ord", lambda x: clipjax.clip_norm(1.0, ord=x)),
        ("axis", lambda x: structures.unit(x)),
        ("per", lambda x: clipjax.clip_norm(1.0, per=x)),
        ("when", lambda x: clipjax.clamp_weights(1.0, when=x)),
        ("rounding", lambda x: clipjax.round_to_step(jnp.ones(2), 0.5, rounding=x)),
    ],
)
def test_traced_static_argument_names_inject_hyperparams(name, build):
    def trace(x):
        build(x)
        return x

    with pytest.raises(TypeError, match=rf"`{name}` must be a static .*inject_hyperparams.*static_args=\('{name}',\)"):
        jax.eval_shape(trace, jnp.int32(4))


def test_traced_values_never_raise():
    """A number that is known only on the device is not checked, whatever it is."""

    def trace(x, i):
        txs = [
            clipjax.clip(x),
            clipjax.clip_norm(x, eps=x),
            clipjax.clamp_weights(x),
            clipjax.clamp_weights((x, -x)),
            clipjax.prune_mask(x, start=i, every=i, stop=i),
            clipjax.fake_quantize(4, step=x, start=i, every=i, stop=i),
        ]
        return [tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0] for tx in txs]

    out = jax.eval_shape(trace, jnp.float32(-1.0), jnp.int32(-1))
    assert len(out) == 6


def test_where_that_picks_nothing_warns_once_and_passes_updates():
    tx = clipjax.fake_quantize(4)
    params = {"bias": jnp.ones(3)}
    with pytest.warns(UserWarning, match="`where` picks no float array") as caught:
        state = tx.init(params)
    assert len(caught) == 1
    np.testing.assert_array_equal(tx.update(params, state, params)[0]["bias"], params["bias"])


@pytest.mark.parametrize("tree", [{}, {"empty": None}, ()])
def test_tree_without_arrays_is_legal_and_silent(tree):
    for tx in WEIGHT_SIDE.values():
        updates, _ = tx.update(tree, tx.init(tree), tree)
        assert updates == tree
