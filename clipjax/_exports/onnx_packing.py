"""Whole numbers of 1 to 8 bits in as many bits of an ONNX file, and the nodes that unpack them when it is loaded."""

from __future__ import annotations

import numpy as np

from clipjax._arrays import arguments
from clipjax._exports.onnx_codes import Coded
from clipjax._exports.onnx_editing import Editor
from clipjax._exports.onnx_weights import Proto, Weight

PLANES = (4, 2, 1)
"""How many bits of a code lie together: a byte holds 2, 4 or 8 codes of a plane, the first code in its lowest bits."""

FIRST = 18
"""The opset that has BitwiseAnd first."""


def _stride(found: Coded) -> int:
    """What divides the distances of all codes: 2 on a grid of -1 and 1."""
    return max(1, int(np.gcd.reduce(found.codes - found.codes.min(), axis=None)))


def width(found: Coded) -> int:
    """The bits that the codes of a leaf take from the least one on."""
    return max(1, (int(found.codes.max() - found.codes.min()) // _stride(found)).bit_length())


def put(editor: Editor, weight: Weight, found: Coded, path: str) -> None:
    """Put packed codes and nodes that decode them in the place of a weight.

    All inputs are initializers, so that onnxruntime runs these nodes once, when it loads the graph.

    Raises:
      ValueError: for an opset without bitwise operators.
    """
    remedy = f"Leaf {path!r} is packed, which needs opset {FIRST}: `onnx.version_converter.convert_version(model, 21)`."
    arguments.require(editor.opset >= FIRST, "model_in", "have an opset with BitwiseAnd", editor.opset, remedy)
    build = _Builder(editor, weight.graph, weight.name)
    least, stride = int(found.codes.min()), _stride(found)
    raw = ((found.codes - least) // stride).astype(np.uint8).reshape(-1)
    total, low = None, 0
    for bits in _planes(width(found)):
        plane = build.scaled(build.plane((raw >> low) & ((1 << bits) - 1), bits), stride * 2.0**low)
        total = plane if total is None else build.node("Add", total, plane)
        low += bits
    assert total is not None
    # One axis for the blocks and one for the entries of a block, where the weight has one axis.
    blocks = [n for pair in zip(found.scale.shape, found.box, strict=True) for n in pair]
    spread = [n for size in found.scale.shape for n in (size, 1)]
    offset = np.float32(least) if found.zero is None else (least - found.zero.astype(np.float32)).reshape(spread)
    codes = build.node("Reshape", total, build.constant(np.array(blocks, np.int64)))
    centred = build.node("Add", codes, build.constant(np.asarray(offset, np.float32)))
    values = build.node("Mul", centred, build.floats(found.scale.reshape(spread)))
    wide = weight.dtype == np.float32
    shape = build.constant(np.array(weight.shape, np.int64))
    laid = build.node("Reshape", values, shape, output=weight.name if wide else None)
    if not wide:
        build.node("Cast", laid, output=weight.name, to=weight.proto.data_type)


def _planes(bits: int) -> list[int]:
    """The planes of a width: 4 and 4 of 8, 4 and 2 of 6, 4 and 1 of 5."""
    return [PLANES[0]] * (bits // PLANES[0]) + [plane for plane in PLANES[1:] if bits & plane]


class _Builder:
    """Nodes before all others of a graph, with names that begin as a weight's."""

    def __init__(self, editor: Editor, graph: Proto, name: str) -> None:
        self._editor, self._graph, self._name = editor, graph, name

    def constant(self, values: np.ndarray) -> str:
        return self._editor.constant(self._graph, f"{self._name}_c", values)

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: int | str) -> str:
        output = output or self._editor.fresh(f"{self._name}_n")
        return self._editor.front(self._graph, kind, list(inputs), output, **attributes)

    def floats(self, values: np.ndarray) -> str:
        """An f32 array, stored as f16 where that has its values."""
        half = values.astype(np.float16)
        if not (half.astype(np.float32) == values).all():
            return self.constant(values.astype(np.float32))
        return self.node("Cast", self.constant(half), to=1)

    def scaled(self, x: str, factor: float) -> str:
        return x if factor == 1 else self.node("Mul", x, self.constant(np.asarray(factor, np.float32)))

    def plane(self, codes: np.ndarray, bits: int) -> str:
        """F32 of some bits of every code: [bytes, 1] shifted by [0, bits, …], and the rest of the shifted bytes cut."""
        each = 8 // bits
        whole = np.pad(codes, (0, -codes.size % each)).reshape(-1, each)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        packed = np.bitwise_or.reduce(whole << shifts, axis=1, dtype=np.uint8)[:, None]
        shifted = self.node("BitShift", self.constant(packed), self.constant(shifts), direction="RIGHT")
        cut = self.node("BitwiseAnd", shifted, self.constant(np.array((1 << bits) - 1, np.uint8)))
        flat = self.node("Reshape", cut, self.constant(np.array([-1], np.int64)))
        if codes.size % each:
            bounds = (self.constant(np.array([n], np.int64)) for n in (0, codes.size))
            flat = self.node("Slice", flat, *bounds)
        return self.node("Cast", flat, to=1)
