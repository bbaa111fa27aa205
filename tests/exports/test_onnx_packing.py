"""`export_onnx(pack=True)`: whole numbers of any width take their own bits of the file, and their values are exact."""

import jax.numpy as jnp
import numpy as np
import pytest
from onnx_graphs import evaluated, graph, helper, matmul, numpy_helper, onnx, operators

import clipjax
from clipjax import export_onnx

PLANES = {1: 1, 2: 1, 3: 2, 4: 1, 5: 2, 6: 2, 7: 3, 8: 2}
"""How many planes of 4, 2 and 1 bits the codes of a width have."""


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def in_halves(rule):
    return rule._replace(fit=lambda x, bits, axes: rule.fit(x, bits, axes).astype(jnp.float16).astype(jnp.float32))


def initializers(path, dtype):
    held = [numpy_helper.to_array(proto) for proto in onnx.load(path).graph.initializer]
    return [x for x in held if x.dtype == dtype and x.size > 16]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("axis", "group", "scales"), [(None, None, 1), (1, None, 21), (1, 8, 63), (0, 7, 72)])
def test_codes_take_their_bits_and_values_are_exact(bits, axis, group, scales, tmp_path):
    """Of 504 weights; a grid of 1 bit has -1 and 1 alone, which lie two apart."""
    tx = clipjax.fake_quantize(bits, step=clipjax.steps.absmax(), axis=axis, group=group)
    params, state = clipjax.hold_once(tx, {"w": jnp.asarray(random(24, 21))})
    model, x = matmul(np.asarray(params["w"]), 21)
    export_onnx(model, tmp_path / "m", params, state, pack=True)
    assert sum(codes.nbytes for codes in initializers(tmp_path / "m", np.uint8)) == 504 * bits / 8
    assert operators(tmp_path / "m").count("BitShift") == PLANES[bits]
    assert [x.size for x in initializers(tmp_path / "m", np.float32)] == ([scales] if scales > 16 else [])
    np.testing.assert_array_equal(evaluated(tmp_path / "m", x), params["w"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_scales_that_f16_has_take_16_bits(dtype, tmp_path):
    """5 x 13 codes: the last byte of each plane is not full. A graph of f16 gets the values rounded once."""
    tx = clipjax.fake_quantize(5, step=in_halves(clipjax.steps.mse()), axis=0)
    params, state = clipjax.hold_once(tx, {"w": jnp.asarray(random(25, 13))})
    node = helper.make_node("Gather", ["w", "x"], ["y"])
    at = np.array([[0, 24], [7, 7]], np.int64)
    source = np.asarray(params["w"]).astype(dtype)
    model = graph([node], {"w": source}, at, 21, rank=3)
    export_onnx(model, tmp_path / "m", params, state, source={"w": jnp.asarray(source, jnp.float32)}, pack=True)
    assert [x.shape for x in initializers(tmp_path / "m", np.float16)] == [(25, 1, 1, 1)]
    np.testing.assert_array_equal(evaluated(tmp_path / "m", at), source[at])


def test_zero_points_of_one_sided_grids(tmp_path):
    tx = clipjax.fake_quantize(3, step=clipjax.steps.minmax(), axis=1)
    params, state = clipjax.hold_once(tx, {"w": jnp.asarray(random(16, 20) + 1.0)})
    q = clipjax.quantized(params, state)["w"]
    assert np.unique(q.zero_point).size > 1
    model, x = matmul(np.asarray(params["w"]), 21)
    export_onnx(model, tmp_path / "m", params, state, pack=True)
    np.testing.assert_array_equal(evaluated(tmp_path / "m", x), params["w"])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("kind", ["MatMul", "Gather"])
def test_operators_that_store_codes_in_their_own_bits_are_as_before(kind, bits, tmp_path):
    """GatherBlockQuantized stores 2 bits in 4."""
    tables, x = kind == "Gather", np.array([[0, 63]], np.int64)
    tx = clipjax.fake_quantize(bits, axis=0 if tables else 1, group=32)
    params, state = clipjax.hold_once(tx, {"w": jnp.asarray(random(64, 64))})
    w = np.asarray(params["w"])
    model = graph([helper.make_node("Gather", ["w", "x"], ["y"])], {"w": w}, x, 21, rank=3) if tables else matmul(w)[0]
    export_onnx(model, tmp_path / "m", params, state, pack=True)
    whole = {"MatMul": {2: "MatMulNBits", 4: "MatMulNBits", 8: "MatMulNBits"}}
    whole["Gather"] = {4: "GatherBlockQuantized", 8: "GatherBlockQuantized"}
    found = operators(tmp_path / "m")
    if bits in whole[kind]:
        assert found == [whole[kind][bits]]
    else:
        assert ("BitShift" in found) == (bits < 9) and ("DequantizeLinear" in found) == (bits == 9)


def test_an_old_opset_raises(tmp_path):
    params, state = clipjax.hold_once(clipjax.fake_quantize(3), {"w": jnp.asarray(random(8, 8))})
    model, _ = matmul(np.asarray(params["w"]), 17)
    with pytest.raises(ValueError, match=r"`model_in` must have an opset with BitwiseAnd, got 17\. Leaf 'w' is packed"):
        export_onnx(model, tmp_path / "m", params, state, pack=True)
    assert not list(tmp_path.iterdir())
