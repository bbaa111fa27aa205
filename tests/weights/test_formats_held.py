"""fake_quantize with a format: weights that are the decode of bytes, after every step, and stay so for a reference."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import formats, steps
from clipjax._maths import format_blocks, known_formats

KINDS = {
    "Q4_0": formats.q4_0(),
    "Q4_1": formats.q4_1(),
    "Q5_0": formats.q5_0(),
    "Q8_0": formats.q8_0(),
    "TQ2_0": formats.tq2_0(),
    "MXFP4": formats.mxfp4(),
}
OTHERS = [
    formats.mxfp4("qwix"),
    formats.mxfp4("compressed-tensors"),
    formats.mxfp8(),
    formats.nvfp4(),
    formats.nvfp4("modelopt"),
    formats.int4(64),
    formats.int8(),
    formats.nbits(4, 16),
    formats.fp8_e4m3("array"),
    formats.fp8_e4m3((8, 128)),
    formats.fp8_e5m2(),
    formats.nf4(),
]
SHAPE = (256, 16)


def normal(seed, dtype, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32).astype(dtype)


def trained(tx, params, steps):
    """Params and state after some updates by noise."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: normal(i + 1, p.dtype, p.shape), params)
        params, state = step(params, state, grads)
    return params, state


def packed(q):
    """The bytes of a kernel, a row for each output."""
    form = known_formats.named(q.format)
    codes, scales = format_blocks.matrix(q.codes, q.scales, q.axis)
    blocks = codes.reshape(*codes.shape[:-1], -1, form.block)
    return form.pack(blocks, tuple(s[..., None] for s in scales))[0]


def reference(w, kind):
    return gguf.quants.quantize(np.ascontiguousarray(np.asarray(w, np.float32).T), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_weights_are_a_fixed_point_of_the_reference(kind, dtype):
    """With every=1, behind clamp and mask: the reference quantizer gives the bytes that the state has."""
    form = KINDS[kind]
    mask = [clipjax.prune_mask(0.3)] if form.zero else []
    quantizer = clipjax.fake_quantize(form, every=1)
    tx = optax.chain(optax.sgd(0.1), clipjax.clamp_weights(1.5), *mask, quantizer)
    params, state = trained(tx, {"kernel": normal(0, dtype)}, 8)
    w = params["kernel"]
    q = clipjax.quantized(params, state)["kernel"]
    assert q.format == form.name and q.axis == (1,) and q.step is None
    np.testing.assert_array_equal(clipjax.dequantize(q, dtype=dtype), w)
    np.testing.assert_array_equal(packed(q), reference(w, kind))
    assert not clipjax.check(params, state, tx) and not clipjax.check(params, state)
    assert float(jnp.abs(w.astype(jnp.float32)).max()) <= 1.5
    assert not mask or float(jnp.mean(w == 0)) >= 0.3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form", OTHERS, ids=lambda form: form.name)
def test_between_refreshes_weights_are_the_decode_of_bytes_within_a_bound(form, dtype):
    tx = optax.chain(
        optax.sgd(0.1), clipjax.clamp_weights(1.5), clipjax.prune_mask(0.3), clipjax.fake_quantize(form, every=3)
    )
    params, state = trained(tx, {"kernel": normal(0, dtype)}, 8)
    w, q = params["kernel"], clipjax.quantized(params, state)["kernel"]
    level = clipjax.dequantize(q, dtype=dtype)
    if form.exact:
        np.testing.assert_array_equal(level, w)
    else:  # a level that is no exact sum may be landed on a unit beside
        np.testing.assert_allclose(level, w, rtol=2.0**-22)
    assert float(jnp.abs(w.astype(jnp.float32)).max()) <= 1.5 and float(jnp.mean(w == 0)) >= 0.3
    assert not clipjax.check(params, state, tx)


def test_a_bound_that_binds_in_bf16_holds_for_wide_codes():
    """Scales are fitted so that no level, once it is rounded to the dtype, is beyond the bound."""
    bound = 0.7
    for form in (formats.q8_0(), formats.int8(), formats.q4_0(), formats.mxfp4()):
        tx = optax.chain(optax.sgd(1.0), clipjax.clamp_weights(bound), clipjax.fake_quantize(form, every=1))
        params, _ = trained(tx, {"kernel": normal(0, jnp.bfloat16)}, 3)
        assert float(jnp.abs(params["kernel"].astype(jnp.float32)).max()) <= np.float32(bound), form.name


@pytest.mark.parametrize("bound", [0.07, 0.08, 0.7, 1.3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "TQ2_0"])
def test_a_short_scale_is_lowered_by_a_unit_of_its_own_where_a_bound_binds(kind, dtype, bound):
    """All of it stays exact, the outermost code is kept, and the reference finds the same bytes."""
    tx = optax.chain(optax.sgd(0.01), clipjax.clamp_weights(bound), clipjax.fake_quantize(KINDS[kind], every=1))
    params, state = trained(tx, {"kernel": normal(0, dtype)}, 3)
    w, q = params["kernel"], clipjax.quantized(params, state)["kernel"]
    np.testing.assert_array_equal(clipjax.dequantize(q), w.astype(jnp.float32))
    np.testing.assert_array_equal(packed(q), reference(w, kind))
    assert bound * 0.8 <= float(jnp.abs(w.astype(jnp.float32)).max()) <= bound and float(jnp.mean(w != 0)) > 0.3


def test_no_scale_is_infinite_for_finite_weights():
    huge = normal(0, jnp.float32).at[3, 3].set(1e30)
    for form in KINDS.values():
        params, state = clipjax.hold_once(clipjax.fake_quantize(form), {"kernel": huge})
        assert bool(jnp.all(jnp.isfinite(params["kernel"]))) and not clipjax.check(params, state), form.name


def test_a_kernel_is_no_table_whatever_its_module_is_called():
    params = {"embedding": {"kernel": normal(0, jnp.float32, (64, 64)), "embedding": normal(1, jnp.float32, (64, 64))}}
    state = clipjax.fake_quantize(formats.q8_0(), where=lambda path, leaf: True).init(params)
    found = state.projection.scales["embedding"]
    assert found["kernel"]["0"].shape == (2, 64) and found["embedding"]["0"].shape == (64, 2)


def test_a_bound_of_two_sides_holds_on_both_sides():
    for form in (formats.q4_0(), formats.q8_0(), formats.q4_1(), formats.nvfp4(), formats.int4(32, "float32")):
        tx = optax.chain(optax.sgd(1.0), clipjax.clamp_weights((-0.11, 1.0)), clipjax.fake_quantize(form, every=1))
        params, _ = trained(tx, {"kernel": normal(0, jnp.float32)}, 3)
        w = np.asarray(params["kernel"])
        assert w.min() >= np.float32(-0.11) and w.max() <= 1 and len(np.unique(w)) >= 8, form.name


def test_a_latent_weight_behind_a_zero_of_the_format_waits_there():
    """An update that is -w, as that of a weight at 0 whose gradient is 0, is not taken for the zero of a mask."""
    kernel = jnp.full((32, 1), 1.0).at[0, 0].set(-8.0).at[1, 0].set(0.49)
    params, tx = {"kernel": kernel}, optax.chain(optax.sgd(1.0), clipjax.fake_quantize(formats.q4_0()))
    state = tx.init(params)
    for grad in (0.0, 0.0, -0.02):
        grads = {"kernel": jnp.zeros((32, 1)).at[1, 0].set(grad)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert params["kernel"][1, 0] == (grad < 0)


def test_scales_are_fitted_to_what_a_mask_leaves_at_the_same_update():
    """A pruned weight that is the largest of its block does not set the scale."""
    kernel = jnp.full((32, 1), 1.0).at[0, 0].set(-8.0).at[5, 0].set(0.5)
    mask = {"kernel": jnp.ones((32, 1), bool).at[0].set(False)}
    tx = optax.chain(clipjax.prune_mask(mask=mask), clipjax.fake_quantize(formats.mxfp4(), every=1))
    params, state = trained(tx, {"kernel": kernel}, 0)
    updates, state = tx.update({"kernel": jnp.zeros((32, 1))}, state, params)
    assert optax.apply_updates(params, updates)["kernel"][[0, 1, 5], 0].tolist() == [0.0, 1.0, 0.5]
    assert int(state[1].projection.scales["kernel"]["0"][0, 0]) == 125  # 2 ** (0 - 2)


def test_scales_are_not_fitted_to_what_a_weight_leaves_behind_that_is_pruned_at_the_same_update():
    """Its latent weight is .9 beside its level, more than all others of the block."""
    kernel = jnp.full((32, 1), 0.2).at[0, 0].set(-6.9)
    mask = {"kernel": jnp.ones((32, 1), bool).at[0].set(False)}
    tx = optax.chain(clipjax.prune_mask(mask=mask, start=1), clipjax.fake_quantize(formats.mxfp4(), every=1))
    params = {"kernel": kernel}
    state = tx.init(params)
    for exponent, pruned in ((0, -6.0), (-5, 0.0)):
        updates, state = tx.update({"kernel": jnp.zeros((32, 1))}, state, params)
        params = optax.apply_updates(params, updates)
        assert int(state[1].projection.scales["kernel"]["0"][0, 0]) - 127 == exponent
        assert params["kernel"][0, 0] == pruned


@pytest.mark.parametrize("kind", KINDS)
def test_held_once_params_have_the_bytes_of_the_reference(kind):
    """Post-training quantization, for raw values: the scale divides before it is rounded, as in the reference."""
    for w in (normal(3, jnp.float32, (512, 64)), normal(4, jnp.bfloat16, (512, 64)).astype(jnp.float32)):
        params, state = clipjax.hold_once(clipjax.fake_quantize(KINDS[kind]), {"kernel": w})
        expected = reference(w, kind)
        values = gguf.quants.dequantize(expected, gguf.GGMLQuantizationType[kind]).T
        np.testing.assert_array_equal(params["kernel"], values)
        again, _ = clipjax.hold_once(clipjax.fake_quantize(KINDS[kind]), params)
        np.testing.assert_array_equal(again["kernel"], params["kernel"])
        assert not clipjax.check(params, state)


def test_latent_weights_live_behind_nf4():
    """Small updates add up, also where a level is a product that f32 rounds."""
    tx = optax.chain(optax.sgd(1.0), clipjax.fake_quantize(formats.nf4(), every=4))
    params = {"kernel": normal(0, jnp.float32)}
    floats, (params, state) = params["kernel"], trained(tx, params, 0)
    step = jax.jit(tx.update)
    for i in range(12):
        grads = {"kernel": 1e-3 * normal(i + 1, jnp.float32)}
        updates, state = step(grads, state, params)
        params, floats = optax.apply_updates(params, updates), floats - grads["kernel"]
    np.testing.assert_allclose(state[1].carry["kernel"], floats, atol=1e-6)


def test_blocks_run_along_the_inputs_of_any_kernel():
    """`axis` names the outputs; the inputs are all other axes, flattened in order; a table is read along its rows."""
    shapes = {"dense": (64, 4), "heads": (64, 2, 3), "out": (4, 16, 5), "stack": (3, 32, 4), "embed": (7, 32)}
    outputs = {"dense": -1, "heads": (-2, -1), "out": -1, "stack": (0, -1), "embed": None}
    params = {name: normal(i, jnp.float32, shape) for i, (name, shape) in enumerate(shapes.items())}
    axis = clipjax.per_leaf(lambda path, leaf: outputs[path])
    tx = clipjax.fake_quantize(formats.q4_0(), axis=axis, where=lambda path, leaf: True)
    held, state = clipjax.hold_once(tx, params)
    scales = {name: state.projection.scales[name]["0"].shape for name in shapes}
    assert scales == {"dense": (2, 4), "heads": (2, 2, 3), "out": (2, 1, 5), "stack": (3, 1, 4), "embed": (7, 1)}
    rows = {
        "heads": params["heads"].reshape(64, 6),
        "out": params["out"].reshape(64, 5),
        "embed": params["embed"].T,
        "stack": params["stack"].transpose(1, 0, 2).reshape(32, 12),
    }
    found = clipjax.quantized(held, state)
    for name, w in rows.items():
        np.testing.assert_array_equal(packed(found[name]).reshape(w.shape[1], -1), reference(w, "Q4_0"))


def test_reports_and_summaries_know_formats():
    params = {"a": {"kernel": normal(0, jnp.float32)}, "b": {"kernel": normal(1, jnp.float32)}}
    bits = clipjax.per_leaf(lambda path, leaf: formats.q8_0() if path[0] == "a" else 4)
    tx = clipjax.fake_quantize(bits)
    held, state = clipjax.hold_once(tx, params)
    report = jax.jit(functools.partial(clipjax.report, per_leaf=True))(state)
    assert float(report["fake_quantize/format_bits/a/kernel"]) == 8.5 and float(report["fake_quantize/bits"]) == 4
    rows = clipjax.summarize(held, state).to_dict()
    assert rows["a/kernel"]["format"] == "q8_0" and rows["a/kernel"]["bits"] == 8.5 and rows["b/kernel"]["bits"] == 4
    moved = {"a": {"kernel": held["a"]["kernel"] * 1.01}, "b": held["b"]}
    assert [v.path for v in clipjax.check(moved, state)] == ["a/kernel"]
    with pytest.raises(ValueError, match="weights of 'a/kernel' are between its levels"):
        clipjax.quantized(moved, state)


def test_a_writer_refuses_weights_that_are_not_finite(tmp_path):
    params, state = clipjax.hold_once(
        clipjax.fake_quantize(formats.q8_0()), {"kernel": normal(0, jnp.float32).at[3, 3].set(jnp.nan)}
    )
    with pytest.raises(ValueError, match="`params` must be finite, got 'kernel'"):
        clipjax.export_gguf(tmp_path / "net.gguf", params, state)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_with_a_remedy():
    kernel = {"kernel": normal(0, jnp.float32, (40, 4))}
    with pytest.raises(ValueError, match=r"have blocks that divide the inputs .*, got 'q4_0'.*'kernel'"):
        clipjax.fake_quantize(formats.q4_0()).init(kernel)
    for given in ({"step": 0.5}, {"group": 32}, {"rounding": "stochastic"}):
        with pytest.raises(ValueError, match=f"`{next(iter(given))}` must be .* with a format, got"):
            clipjax.fake_quantize(formats.q4_0(), **given).init({"kernel": normal(0, jnp.float32)})
    with pytest.raises(ValueError, match="`step` must be None with a format that has a scale for all"):
        clipjax.fake_quantize(formats.nvfp4(), step=steps.mse()).init({"kernel": normal(0, jnp.float32)})
    tx = optax.chain(clipjax.prune_mask(0.5), clipjax.fake_quantize(formats.q4_1()))
    params = {"kernel": normal(0, jnp.float32)}
    with pytest.raises(ValueError, match=r"be a format that has an exact 0, got 'q4_1'.*'kernel'"):
        tx.update(params, tx.init(params), params)
    other = clipjax.fake_quantize(formats.nbits(4, 16))
    with pytest.raises(ValueError, match="scales of shape"):
        other.update(params, clipjax.fake_quantize(formats.nbits(4, 32)).init(params), params)
    state = clipjax.hold_once(clipjax.fake_quantize(formats.q8_0()), params)[1]
    unknown = state._replace(projection=state.projection._replace(format={"kernel": jnp.uint32(7)}))
    with pytest.raises(ValueError, match="id must be that of a known format, got 7"):
        clipjax.quantized(params, unknown)


def test_another_format_of_the_same_blocks_takes_effect_on_resume():
    params = {"kernel": normal(0, jnp.float32)}
    held, state = trained(clipjax.fake_quantize(formats.mxfp4("gguf")), params, 2)
    tx = clipjax.fake_quantize(formats.mxfp4("qwix"))
    updates, state = tx.update({"kernel": jnp.zeros(SHAPE)}, state, held)
    assert clipjax.quantized(optax.apply_updates(held, updates), state)["kernel"].format == formats.mxfp4("qwix").name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fake_quant_on_a_format(dtype):
    x = normal(0, dtype).at[3, 3].set(jnp.nan)
    value, pull = jax.jit(jax.value_and_grad(lambda x: clipjax.fake_quant(x, formats.q8_0()).sum()))(x)
    assert jnp.isnan(value) and jnp.all(pull == 1)
    x = normal(0, dtype)
    held, _ = clipjax.hold_once(clipjax.fake_quantize(formats.q8_0()), {"kernel": x})
    np.testing.assert_array_equal(clipjax.fake_quant(x, formats.q8_0()), held["kernel"])
    with pytest.raises(ValueError, match="`step` must be given without more than `axis`"):
        clipjax.fake_quant(x, formats.q8_0(), 4)
    with pytest.raises(ValueError, match="`axis` must be given with a format alone"):
        clipjax.fake_quant(x, 0.5, 4, axis=-1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "TQ2_0", "MXFP4"])
def test_scales_of_least_squared_error_are_found_again_by_the_reference(kind):
    """No scale of the reference is better, ternary ones are much worse, and the reference keeps the weights."""
    w = normal(5, jnp.float32, (512, 32))
    error = lambda params: float(jnp.mean(jnp.square(params["kernel"] - w)))
    plain, _ = clipjax.hold_once(clipjax.fake_quantize(KINDS[kind]), {"kernel": w})
    params, state = clipjax.hold_once(clipjax.fake_quantize(KINDS[kind], step=steps.mse()), {"kernel": w})
    assert error(params) <= error(plain) * {"Q4_0": 0.95, "Q8_0": 1.0, "TQ2_0": 0.4, "MXFP4": 1.0}[kind]
    np.testing.assert_array_equal(packed(clipjax.quantized(params, state)["kernel"]), reference(params["kernel"], kind))
    assert not clipjax.check(params, state)
