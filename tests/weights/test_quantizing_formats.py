"""What fake_quantize says of formats: wrong arguments get a remedy, costly ones a warning, bits count all scales."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import formats, steps

RNG = np.random.default_rng(0)
PARAMS = {"a": {"kernel": jnp.asarray(RNG.normal(size=(256, 16)), jnp.float32)}}
PARAMS["b"] = {"kernel": PARAMS["a"]["kernel"][:32]}
W = PARAMS["a"]["kernel"]
CALL = r"got the function `formats.q4_0`\. Call it: `formats.q4_0\(\)`"
NAME = r"got 'q4_0'\. A format comes from its factory: `formats.q4_0\(\)`"

WRONG = {
    "factory": (lambda: clipjax.fake_quantize(formats.q4_0), TypeError, "`bits` must be .*" + CALL),
    "other_factory": (lambda: clipjax.fake_quantize(formats.int4), TypeError, r"Call it: `formats.int4\(\)`"),
    "name": (lambda: clipjax.fake_quantize("q4_0"), ValueError, "`bits` must be .*" + NAME),
    "tree_of_factories": (lambda: begun({"a": {"kernel": formats.q4_0}}), TypeError, "`bits` must be .*" + CALL),
    "per_leaf_name": (lambda: begun(clipjax.per_leaf(lambda path, leaf: "q4_0")), ValueError, NAME),
    "allowed": (lambda: clipjax.choose_bits(PARAMS, budget=5, allowed=(formats.q4_0,)), TypeError, CALL),
    "step": (lambda: clipjax.fake_quantize(step=formats.q4_0()), TypeError, "`step` .*in the place of `bits`"),
    "forward_factory": (lambda: clipjax.fake_quant(W, formats.q4_0), TypeError, "`step` must be a number or .*" + CALL),
    "forward_name": (lambda: clipjax.fake_quant(W, "q4_0"), TypeError, r"`step` .* got 'q4_0'.*`formats.q4_0\(\)`"),
    "whole_numbers": (
        lambda: clipjax.fake_quant(W.astype(jnp.int32), formats.q4_0()),
        TypeError,
        r"`x` must be a float array .*got int32\. Convert it: `x.astype\(jnp.float32\)`",
    ),
}


def begun(bits, **options):
    return clipjax.fake_quantize(bits, **options).init(PARAMS)


@pytest.mark.parametrize("name", WRONG)
def test_a_format_that_is_not_one_is_refused_with_the_call_that_makes_it(name):
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("every", [1, np.int32(1)])
def test_a_search_at_every_update_is_told_once(every):
    said = "searches for the scales of a format at every refresh"
    with pytest.warns(UserWarning, match=said) as found:
        tx = clipjax.fake_quantize(formats.q4_0(), step=steps.mse(), every=every)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init(PARAMS)
        begun(formats.q4_0(), every=every)
        begun(formats.q4_0(), step=steps.mse(), every=every, stop=0)
        begun(formats.q4_0(), step=steps.mse())
        begun(4, step=steps.mse(), every=every)
    assert len(found) == 1 and found[0].filename == __file__
    mixed = clipjax.per_leaf(lambda path, leaf: formats.q4_0() if path[0] == "a" else 4)
    with pytest.warns(UserWarning, match=said):
        begun(mixed, step=steps.mse(), every=every)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(
    "form, bits",
    [
        (formats.q4_0(), 4.5),
        (formats.int4(None), 4 + 16 / 256),
        (formats.nvfp4(), 4.5 + 32 / 4096),
        (formats.q4_1(), 5.0),
        (formats.fp8_e4m3("array"), 8 + 32 / 4096),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_reports_and_summaries_have_the_same_bits_with_all_scales(form, bits, carry):
    params, state = clipjax.hold_once(clipjax.fake_quantize(form, carry=carry), {"a": PARAMS["a"]})
    report = jax.jit(lambda state: clipjax.report(state, per_leaf=True))(state)
    names = ["fake_quantize/format_bits", "fake_quantize/format_bits/a/kernel"]
    assert {name: float(x) for name, x in report.items()} == dict.fromkeys(names, bits)
    assert clipjax.summarize(params, state).to_dict()["a/kernel"]["bits"] == bits
    stored = sum(x.nbytes for x in clipjax.quantized(params, state)["a"]["kernel"].scales)
    assert bits == form.code_bits + 8 * stored / W.size


def test_bits_and_steps_of_grids_are_reported_beside_those_of_formats():
    tx = clipjax.fake_quantize(clipjax.per_leaf(lambda path, leaf: formats.int4(None) if path[0] == "a" else 4))
    state = tx.init(PARAMS)
    before = {name: float(x) for name, x in clipjax.report(state).items()}
    assert before == {"fake_quantize/bits": 0, "fake_quantize/step": 0, "fake_quantize/format_bits": 0}
    report = clipjax.report(clipjax.hold_once(tx, PARAMS)[1])
    assert float(report["fake_quantize/bits"]) == 4 and float(report["fake_quantize/format_bits"]) == 4.0625
    assert float(report["fake_quantize/step"]) > 0
