"""OpenVINO reads the graphs that `export_onnx` writes: FP4, FP8 and whole numbers, with scales as bytes."""

import warnings

import jax
import numpy as np
import pytest
from on_format import on_format
from onnx_graphs import graph, helper, matmul, operators, values

from clipjax import export_onnx, formats

with warnings.catch_warnings():  # it asks the system which one it is, by a fork
    warnings.simplefilter("ignore")
    openvino = pytest.importorskip("openvino")

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def run(path, x):
    """The outputs and the element types of the constants, which are read as they lie in the file."""
    model = openvino.Core().read_model(str(path))
    held = {op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant"}
    return openvino.Core().compile_model(model, "CPU", EXACT)([x])[0], held


CASES = [
    (formats.mxfp4(), 24, {"f4e2m1", "f8e8m0"}),
    (formats.mxfp4("qwix"), 23, {"f4e2m1", "f32"}),
    (formats.nvfp4(), 24, {"f4e2m1", "f8e4m3"}),
    (formats.nvfp4("modelopt"), 23, {"f4e2m1", "f8e4m3"}),
    (formats.mxfp8(), 24, {"f8e4m3", "f8e8m0"}),
    (formats.mxfp8("e5m2", "ocp"), 24, {"f8e5m2", "f8e8m0"}),
    (formats.fp8_e4m3((128, 128)), 21, {"f8e4m3"}),
    (formats.int4(64), 21, {"i4"}),
    (formats.int8(), 21, {"i8"}),
]


@pytest.mark.parametrize(("form", "opset", "kinds"), CASES, ids=lambda value: str(getattr(value, "name", "")))
def test_products_are_those_of_the_decoded_bytes(form, opset, kinds, tmp_path):
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((256, 128), (256, 256)))
    q = on_format(form, w / 16)
    model, _ = matmul(w, opset)
    export_onnx(model, tmp_path / "m.onnx", {"w": q}, source={"w": w}, contrib=False)
    y, held = run(tmp_path / "m.onnx", x)
    assert kinds <= held
    np.testing.assert_allclose(y, x @ values(q), rtol=0, atol=1e-5)


def test_a_convolution_and_the_operators_of_onnxruntime(tmp_path):
    rng = np.random.default_rng(1)
    kernel, w, table = (rng.standard_normal(s).astype(np.float32) / 8 for s in ((3, 3, 32, 16), (64, 32), (9, 64)))
    params = {"k": on_format(formats.mxfp4(), kernel), "w": on_format(formats.nbits(4, 32), w)}
    params |= {"t": on_format(formats.q8_0(), table, 0)}
    make = helper.make_node
    nodes = [make("Gather", ["t", "x"], ["a"]), make("MatMul", ["a", "w"], ["b"])]
    nodes += [make("Transpose", ["b"], ["c"], perm=[0, 2, 1]), make("Unsqueeze", ["c", "axes"], ["d"])]
    nodes += [make("Conv", ["d", "k"], ["y"], pads=[1, 1, 1, 1])]
    at = np.arange(9, dtype=np.int64).reshape(1, 9)
    weights = {"t": table, "w": w, "k": kernel.transpose(3, 2, 0, 1), "axes": np.array([3])}
    export_onnx(graph(nodes, weights, at, 24, rank=4), tmp_path / "m.onnx", params, rename=lambda path, leaf: path)
    assert {"GatherBlockQuantized", "MatMulNBits", "DequantizeLinear"} <= set(operators(tmp_path / "m.onnx"))
    y, held = run(tmp_path / "m.onnx", at)
    assert {"u8", "u4", "f4e2m1", "f8e8m0"} <= held
    image = (values(params["t"])[at] @ values(params["w"]))[:, :, None]
    layout = ("NHWC", "HWIO", "NCHW")
    wanted = jax.lax.conv_general_dilated(image, values(params["k"]), (1, 1), "SAME", dimension_numbers=layout)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
