"""ONNX graphs of one or a few nodes, and what they compute by onnx's own evaluator. Tests with them skip without it."""

import importlib

import numpy as np
import pytest

from clipjax import Quantized, dequantize

onnx = pytest.importorskip("onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
ReferenceEvaluator = importlib.import_module("onnx.reference").ReferenceEvaluator


def graph(nodes, weights, x, opset=25, ir_version=10, rank=2):
    """A model from x to y, of this rank, with these initializers."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    floats = {w.dtype for w in weights.values() if w.dtype.kind == "f" or w.dtype.name == "bfloat16"}
    out = helper.np_dtype_to_tensor_dtype(floats.pop())
    inputs = [helper.make_tensor_value_info("x", kind, x.shape)]
    initializers = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    made = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", out, [None] * rank)], initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def matmul(w, opset=25, **attributes):
    """A model of x @ w, as Gemm where there are attributes; x is what gives w back."""
    transposed = attributes.get("transB", 0)
    x = np.eye(w.shape[1 if transposed else 0], dtype=w.dtype)
    node = helper.make_node("Gemm" if attributes else "MatMul", ["x", "w"], ["y"], **attributes)
    return graph([node], {"w": w}, x, opset), x


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def evaluated(path, x):
    onnx.checker.check_model(str(path), full_check=True)
    return ReferenceEvaluator(str(path)).run(None, {"x": x})[0]


def values(leaf):
    return np.asarray(dequantize(leaf) if isinstance(leaf, Quantized) else leaf)
