"""choose_bits among formats: true bits with scales, errors of the format itself, formats that do not fit left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import formats, steps

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
SHAPES = {"a": (64, 8), "b": (96, 8), "c": (40, 8), "wide": (256, 4)}
PARAMS = {name: {"kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32)} for name, shape in SHAPES.items()}
PARAMS["b"]["kernel"] *= 5
Q4, Q8, INT4 = formats.q4_0(), formats.q8_0(), formats.int4(None, "bfloat16")


def chosen(params=PARAMS, **kwargs):
    found = clipjax.choose_bits(params, **kwargs)
    return {name: layer["kernel"] for name, layer in found.items()}


def held(kernel, form):
    params, _ = clipjax.hold_once(clipjax.fake_quantize(form), {"kernel": kernel})
    return params["kernel"]


def sqnr(kernel, form):
    w = np.asarray(kernel, np.float64)
    return 10 * np.log10(np.sum(w**2) / np.sum((np.asarray(held(kernel, form), np.float64) - w) ** 2))


def fitting(*names):
    return {name: PARAMS[name] for name in names}


def test_the_leaf_that_loses_most_error_gets_the_bits():
    params = fitting("a", "b", "wide")
    assert chosen(params, budget=4.6, allowed=(Q4, Q8)) == {"a": Q4, "b": Q4, "wide": Q4}
    enough = 4.5 + 4 * (96 * 8) / (64 * 8 + 96 * 8 + 256 * 4)  # for b in 8.5 bits
    assert chosen(params, budget=enough, allowed=(Q8, Q4)) == {"a": Q4, "b": Q8, "wide": Q4}
    assert chosen(params, budget=enough - 1e-6, allowed=(Q4, Q8))["b"] is Q4
    assert set(chosen(params, budget=8.5, allowed=(Q4, Q8)).values()) == {Q8}
    with pytest.raises(ValueError, match=r"`budget` must be at least the smallest width, got 4\.4.*4\.5"):
        chosen(params, budget=4.4, allowed=(Q4, Q8))


@pytest.mark.parametrize("target", [15.0, 25.0, 60.0])
def test_a_target_is_reached_by_the_fewest_bits(target):
    allowed = (formats.tq2_0(), Q4, formats.q5_0(), Q8)
    for name, form in chosen(target_db=target, allowed=(*allowed, INT4)).items():
        fits = [f for f in (*allowed, INT4) if f.block is None or SHAPES[name][0] % f.block == 0]
        reached = [f for f in fits if sqnr(PARAMS[name]["kernel"], f) >= target]
        bits = lambda f, name=name: f.bits if f.block else f.code_bits + 16 / SHAPES[name][0]
        assert form == (min(reached, key=bits) if reached else max(fits, key=bits)), name


def test_what_no_block_divides_takes_the_next_that_fits():
    of_int4 = {"a": 4.25, "b": 4 + 1 / 6, "c": 4.4, "wide": 4.0625}
    weights = {name: x["kernel"].size for name, x in PARAMS.items()}
    least = sum(of_int4[name] * n for name, n in weights.items()) / sum(weights.values())
    assert set(chosen(budget=least, allowed=(Q4, INT4)).values()) == {INT4}
    assert chosen(budget=9, allowed=(Q4, INT4)) == {"a": Q4, "b": Q4, "c": INT4, "wide": Q4}
    assert chosen(fitting("a", "c"), budget=9, allowed=(Q8, INT4)) == {"a": Q8, "c": INT4}
    with pytest.raises(ValueError, match=r"blocks that divide .*got 'q4_0'.*'c/kernel'.*`where`"):
        chosen(budget=9, allowed=(Q4, Q8))
    with pytest.raises(ValueError, match=r"smallest widths of all leaves, got 4\.3.* take 4\.4 bits a weight"):
        chosen(fitting("c"), budget=4.3, allowed=(INT4, Q8))


def test_a_format_that_another_beats_is_passed_over():
    """TQ1_0 and TQ2_0 have one error, and their step is no step up; INT4 lies below in bits and above in error."""
    ternary = formats.tq1_0(), formats.tq2_0()
    assert chosen(fitting("wide"), budget=2.1, allowed=ternary)["wide"] is ternary[0]
    assert chosen(fitting("wide"), budget=9, allowed=(*ternary, Q8))["wide"] is Q8


def test_numbers_beside_formats_count_with_their_steps():
    params = {"kernel": PARAMS["c"]["kernel"]}
    assert clipjax.choose_bits(params, budget=4.05, allowed=(2, Q4), axis=-1) == {"kernel": 2}
    found = clipjax.choose_bits(params, budget=4.79, allowed=(2, 4), axis=-1)
    assert found == {"kernel": 4}  # numbers alone count as before
    assert clipjax.choose_bits(params, budget=4.79, allowed=(2, 4, Q4), axis=-1) == {"kernel": 2}
    assert clipjax.choose_bits(params, budget=4.81, allowed=(2, 4, Q4), axis=-1) == {"kernel": 4}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_tree_goes_to_fake_quantize(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS) | {"bias": jnp.ones(3, dtype), "none": None}
    bits = clipjax.choose_bits(params, budget=6, allowed=(Q4, formats.nvfp4(), Q8, INT4))
    assert bits["bias"] is None and bits["none"] is None
    tx = clipjax.fake_quantize(bits)
    found = clipjax.quantized(*clipjax.hold_once(tx, params))
    assert {name: found[name]["kernel"].format for name in SHAPES} == {
        name: bits[name]["kernel"].name for name in SHAPES
    }


def test_sensitivity_weighs_errors():
    params = fitting("a", "b")
    quiet = {"a": {"kernel": jnp.asarray(1e4)}, "b": {"kernel": jnp.asarray(1.0)}}
    enough = 4.5 + 4 * (64 * 8) / (64 * 8 + 96 * 8)
    assert chosen(params, budget=enough, allowed=(Q4, Q8), sensitivity=quiet) == {"a": Q8, "b": Q4}


def test_scales_that_are_searched_for_reach_more():
    """Ternary codes of Gaussians: by the largest weight, or by the scale of least squared error."""
    ternary, kernel = formats.tq2_0(), PARAMS["wide"]["kernel"]
    found, _ = clipjax.hold_once(clipjax.fake_quantize(ternary, step=steps.mse()), {"kernel": kernel})
    reached = 10 * np.log10(float(jnp.sum(kernel**2) / jnp.sum((found["kernel"] - kernel) ** 2)))
    assert reached > sqnr(kernel, ternary) + 1
    for target, form in ((reached - 0.01, ternary), (reached + 0.01, Q8)):
        assert chosen(fitting("wide"), target_db=target, allowed=(ternary, Q8), step=steps.mse())["wide"] is form
    assert chosen(fitting("wide"), target_db=reached - 0.01, allowed=(ternary, Q8))["wide"] is Q8
    with pytest.raises(ValueError, match=r"`step` must be None or `steps\.mse"):
        chosen(fitting("wide"), budget=9, allowed=(4, Q8), step=steps.absmax())


def test_a_rule_among_formats_is_for_before_a_run():
    with pytest.raises(ValueError, match="choose among formats before a run"):
        clipjax.fake_quantize(clipjax.widths.budget(5, allowed=(Q4, Q8)))
