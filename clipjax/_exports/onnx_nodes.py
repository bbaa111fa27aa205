"""Nodes that decode: the operators of ONNX that take codes and scales in the place of float weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import onnx_codes, onnx_packing
from clipjax._exports.onnx_codes import Coded
from clipjax._exports.onnx_editing import Editor
from clipjax._exports.onnx_weights import Proto, Use, Weight
from clipjax._maths import block_bytes

MICROSOFT = "com.microsoft"
SMALLEST = 16
"""The smallest block of MatMulNBits and GatherBlockQuantized, whose blocks are powers of two."""

INTEGERS = {2: (25, ml_dtypes.int2), 4: (21, ml_dtypes.int4), 8: (13, np.int8), 16: (21, np.int16), 32: (13, np.int32)}
"""Whole numbers of DequantizeLinear by their bits: the opset that has them first, and their dtype."""

FLOATS = {"float8_e4m3fn": 19, "float8_e5m2": 19, "float4_e2m1fn": 23}
"""The opset that has these floats first."""

E8M0, BLOCKED = 24, 21
"""The opsets that have scales of E8M0, and blocks, first."""


def put(editor: Editor, weight: Weight, found: Coded, path: str, contrib: bool, pack: bool = False) -> None:
    """Put codes and scales in the place of a weight: MatMulNBits, GatherBlockQuantized, packed or DequantizeLinear.

    Raises:
      ValueError: for an opset that does not have what the codes need.
    """
    packed = pack and found.bits in (2, 4, 8)
    # Where an operator of com.microsoft takes the codes, packing is for those that are narrower than it stores them.
    narrow = packed and onnx_packing.width(found) < (found.bits or 0)
    axis = _contracted(weight, found) if contrib and found.bits in (2, 4, 8) and not narrow else None
    if axis is not None:
        _multiply(editor, weight, found, axis)
    elif contrib and found.bits in ((4, 8) if pack else (2, 4, 8)) and not narrow and _looked_up(weight, found):
        _look_up(editor, weight, found)
    elif packed:
        onnx_packing.put(editor, weight, found, path)
    else:
        _dequantize(editor, weight, found, path)
    editor.drop(weight)


def _dequantize(editor: Editor, weight: Weight, found: Coded, path: str) -> None:
    """DequantizeLinear before all other nodes, with the output in the place of the weight: any operator may use it."""
    scale, zero, stored, axis, block = _scales(found)
    codes, opset = _element(found, editor.opset, path)
    opset = max(opset, BLOCKED if block else 13)
    remedy = (
        f"Leaf {path!r} needs opset {opset}: `jax2onnx.to_onnx(…, opset={opset})`, or"
        f" `onnx.version_converter.convert_version(model, {opset})`."
    )
    arguments.require(editor.opset >= opset, "model_in", "have an opset with these codes", editor.opset, remedy)
    graph, name = weight.graph, weight.name
    wide = weight.dtype == np.float32
    inputs = [editor.constant(graph, f"{name}_codes", codes)]
    if stored is not None and (stored.dtype == ml_dtypes.float8_e4m3fn or editor.opset >= E8M0):
        inputs.append(_stored_scale(editor, weight, stored, found.total))
    else:
        inputs.append(editor.constant(graph, f"{name}_scale", scale))
    if zero is not None:
        inputs.append(editor.constant(graph, f"{name}_zero", zero.astype(codes.dtype)))
    attributes = {} if axis is None else {"axis": axis} | ({"block_size": block} if block else {})
    output = name if wide else editor.fresh(f"{name}_f32")
    editor.front(graph, "DequantizeLinear", inputs, output, **attributes)
    if not wide:
        editor.front(graph, "Cast", [output], name, to=weight.proto.data_type)


def _element(found: Coded, opset: int, path: str) -> tuple[np.ndarray, int]:
    """The codes in the narrowest dtype that the opset has, and the opset that they need."""
    if found.bits is None:
        return found.codes, FLOATS[found.codes.dtype.name]
    has = [(first, dtype) for bits, (first, dtype) in INTEGERS.items() if bits >= found.bits]
    first, dtype = next((pair for pair in has if pair[0] <= opset), has[0])
    return found.codes.astype(dtype), first


def _scales(
    found: Coded,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, int | None, int | None]:
    """Scale, zero point and stored scale as DequantizeLinear takes them, its axis, and the size of blocks along it.

    One for all is a scalar, one for each index of an axis a vector. Else there are blocks along one axis, the one where
    they are longest, and a scale at each index of the others.
    """
    several = [i for i, n in enumerate(found.scale.shape) if n > 1]
    arrays = (found.scale, found.zero, found.stored)
    if len(several) > 1:
        axis = max(range(len(found.box)), key=lambda i: found.box[i])
        made = [None if x is None else onnx_codes.spread(x, found, axis) for x in arrays]
        block: int | None = found.box[axis]
    else:
        axis, block = (several or [-1])[0], None
        size = found.box[axis] if several else 1
        made = [None if x is None else np.repeat(x.reshape(-1), size) for x in arrays]
        made = made if several else [None if x is None else x.reshape(()) for x in made]
    scale, zero, stored = made
    assert scale is not None
    return scale, zero, stored, axis if several else None, block


def _stored_scale(editor: Editor, weight: Weight, stored: np.ndarray, total: tuple[str, np.float32] | None) -> str:
    """The scales as the format stores them, and the nodes that make f32 of them."""
    graph, name = weight.graph, weight.name
    given = editor.constant(graph, f"{name}_stored", stored)
    scale = editor.fresh(f"{name}_scale")
    if total is None:
        return editor.front(graph, "Cast", [given], scale, to=1)
    wide = editor.front(graph, "Cast", [given], editor.fresh(f"{name}_block_scale"), to=1)
    by = editor.constant(graph, f"{name}_total", np.asarray(total[1]))
    return editor.front(graph, total[0], [wide, by], scale)


def _takes(weight: Weight, found: Coded, block: int) -> bool:
    """True where the operators of onnxruntime take the weight: a matrix with blocks and scales of its own dtype."""
    exact = weight.dtype in (np.float32, np.float16) and (found.scale.astype(weight.dtype) == found.scale).all()
    power = block >= SMALLEST and block & (block - 1) == 0
    return bool(exact) and power and found.grouped and found.zero is None and len(weight.shape) == 2


def _contracted(weight: Weight, found: Coded) -> int | None:
    """The contracted axis of a weight that MatMulNBits can multiply with wherever it is used; else None."""
    if len(weight.shape) != 2 or any(use.kind == "Cast" for use in weight.between):
        return None
    known = ((use, order, use.contracted) for use, order in weight.ends)
    axes = {
        None if i is None or (use.kind == "Gemm" and not _plain_gemm(use)) else order[i] for use, order, i in known
    } or {None}
    axis = axes.pop()
    return axis if not axes and axis is not None and _takes(weight, found, found.box[axis]) else None


def _plain_gemm(use: Use) -> bool:
    factors = use.attribute("alpha", 1.0), use.attribute("beta", 1.0)
    return not use.attribute("transA", 0) and factors[0] == 1 and (factors[1] == 1 or not _added(use))


def _added(use: Use) -> str:
    """What a Gemm adds, "" for nothing."""
    given = len(use.node.input) > 2 and use.attribute("beta", 1.0) != 0
    return use.node.input[2] if given else ""


def _multiply(editor: Editor, weight: Weight, found: Coded, axis: int) -> None:
    """MatMulNBits in the place of each MatMul and Gemm, and of its Transpose, followed by the addition of the Gemm."""
    bits, block = found.bits or 8, found.box[axis]
    codes, scale = (np.moveaxis(x, axis, -1) for x in (found.codes, onnx_codes.spread(found.scale, found, axis)))
    outputs, inputs = codes.shape
    blocks = (codes + (1 << (bits - 1))).astype(np.uint8).reshape(outputs, inputs // block, block)
    blob, scale = block_bytes.blobs(blocks, (scale[..., None],), bits)
    given = [
        editor.constant(weight.graph, f"{weight.name}_codes", blob),
        editor.constant(weight.graph, f"{weight.name}_scale", scale.astype(weight.dtype)),
    ]
    sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
    for use in weight.between:
        editor.replace(use, [])
    for use, _ in weight.ends:
        output, added = use.node.output[0], _added(use) if use.kind == "Gemm" else ""
        product = editor.fresh(f"{output}_product") if added else output
        nodes = [editor.node("MatMulNBits", [use.node.input[0], *given], product, domain=MICROSOFT, **sizes)]
        if added:
            nodes.append(editor.node("Add", [product, added], output))
        editor.replace(use, nodes)


def _looked_up(weight: Weight, found: Coded) -> bool:
    """True for a table that GatherBlockQuantized can look up wherever it is used."""
    gathers = all(use.kind == "Gather" and use.place == 0 and use.attribute("axis", 0) == 0 for use in weight.uses)
    return gathers and len(weight.shape) == 2 and _takes(weight, found, found.box[1])


def _look_up(editor: Editor, weight: Weight, found: Coded) -> None:
    """GatherBlockQuantized in the place of each Gather; bytes stand for 8-bit codes from 0 on."""
    whole = found.bits == 8
    codes = (found.codes + 128).astype(np.uint8) if whole else found.codes.astype(ml_dtypes.int4)
    given = [
        editor.constant(weight.graph, f"{weight.name}_codes", codes),
        editor.constant(
            weight.graph, f"{weight.name}_scale", onnx_codes.spread(found.scale, found, 1).astype(weight.dtype)
        ),
    ]
    sizes = {"gather_axis": 0, "quantize_axis": 1, "block_size": found.box[1]} | ({"bits": 8} if whole else {})
    for use in weight.uses:
        inputs = [given[0], use.node.input[1], given[1]]
        node: Proto = editor.node("GatherBlockQuantized", inputs, use.node.output[0], domain=MICROSOFT, **sizes)
        editor.replace(use, [node])
