"""`export_onnx`: the float weights of an existing ONNX graph replaced by codes and scales."""

from __future__ import annotations

import os
import tempfile
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from clipjax._arrays import arguments, leaf_axes, picked_leaves
from clipjax._exports import (
    casting,
    leaf_rows,
    onnx_codes,
    onnx_layouts,
    onnx_matching,
    onnx_nodes,
    onnx_weights,
    tensor_names,
)
from clipjax._exports.onnx_editing import Editor
from clipjax._exports.onnx_matching import Match, Wanted
from clipjax._files import atomic_file
from clipjax._maths.integers import Quantized
from clipjax.typing import Axis, PerLeaf, Rename, State, Tree

if TYPE_CHECKING:
    from onnx import ModelProto

LIMIT = 2**31 - 2**20
"""Above this size, protobuf's limit, the initializers go into a file of their own."""


def export_onnx(
    model_in: str | os.PathLike[str] | ModelProto,
    model_out: str | os.PathLike[str],
    params: Tree,
    opt_state: State | None = None,
    *,
    rename: Rename | None = None,
    source: Tree | None = None,
    axis: Axis | PerLeaf = None,
    contrib: bool = True,
    pack: bool = False,
) -> None:
    r"""Write an ONNX graph again, with the codes and scales of trained params in the place of its float weights.

    The graph comes from `jax2onnx`, or is a user's own. The nodes that multiply with a weight stay, or become one node:

    - a leaf on a format with blocks, used by MatMul or Gemm: `MatMulNBits` (com.microsoft), in 2, 4 or 8 bits, where
      its codes are whole numbers (`nbits`, `q4_0`, `q5_0`, `q8_0`, `tq1_0`, `tq2_0`, `int4`, `int8`) and its blocks run
      along the contracted axis, a power of two long from 16 on;
    - such a leaf used by Gather: `GatherBlockQuantized` (com.microsoft), where blocks run along the last axis;
    - every other one, as kernels of convolutions, and formats of small floats (`fp8_e4m3`, `fp8_e5m2`, `mxfp4`,
      `mxfp8`, `nvfp4`): `DequantizeLinear`, per array, per axis or in blocks, in front of the nodes that use it;
    - a leaf on a grid of `fake_quantize(bits)`: the same with its steps and zero points;
    - with `pack` whole numbers for which there is no operator that stores them in their own bits, 1 to 8, take these:
      BitShift and BitwiseAnd unpack them when a reader loads the graph. Their scales take 16 bits if f16 has them;
    - a float leaf takes the place of its initializer.

    The values that the new graph computes with are the decoded bytes exactly, rounded once where its weights are not
    f32. onnxruntime fuses DequantizeLinear with MatMul, and then rounds activations to 8 bits, unless its session
    option ``session.qdq_matmulnbits_accuracy_level`` is "0". It has no FP4; OpenVINO reads all of them but 2-bit
    integers of DequantizeLinear.

    Args:
      model_in: the graph, a file or a `ModelProto`, which is not changed.
      model_out: where to write. Initializers of 2 GB and more go into a second file, ``model_out`` with ".data".
      params: the trained params; with `opt_state` plain arrays, without it some leaves may be `Quantized`.
      opt_state: the state of an optimizer with `fake_quantize`, for `quantized(params, opt_state)`.
      rename: `rename(path, leaf)`: the name of the initializer, None to leave a leaf out, or a list of (name, index,
        permutation) for a leaf whose rows of outputs are several initializers: the layers of a stack, a fused matrix.
      source: the float params that the graph was made from, `params` by default. Without `rename` a leaf takes the
        place of the initializer that equals its source, up to the order of axes and their product: [in, out] and
        [out, in], [H, W, I, O] and [O, I, H, W]. Float leaves that equal their source stay as they are.
      axis: the output axes of float leaves, the last by default, which tell how a leaf that `rename` names lies in the
        initializer, where no `source` does.
      contrib: False leaves out the operators of com.microsoft, for readers that know those of ONNX alone.
      pack: True makes a smaller file of grids of 3, 5, 6 and 7 bits, which no dtype of ONNX has. In memory the weights
        are then floats, and products with them are those of floats.

    Raises:
      ValueError: for a leaf that the graph does not have, or that `source` finds in several initializers; a name that
        is used twice; a leaf off its grid, or beyond the range of its initializer; a format that is no code times a
        scale, as `q4_1` and `nf4`; and an opset that does not have what the codes need: 21 for blocks and 4 bits, 18
        for `pack`, 19 for FP8, 23 for FP4, 24 for its scales as bytes (else they are written as f32), 25 for 2 bits.
        Nothing is written then.
      TypeError: for a `rename` that returns something else.
      ImportError: where `onnx` is missing: `pip install 'clipjax[export]'`.

    Example:
      A model of Flax NNX, after training with ``fake_quantize(formats.nbits(4, 32))``::

        graph = jax2onnx.to_onnx(model, [("batch", 64)])
        clipjax.export_onnx(graph, "model.onnx", nnx.state(model, nnx.Param), opt_state)
        options = onnxruntime.SessionOptions()  # without this one its activations have 8 bits where it can
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        session = onnxruntime.InferenceSession("model.onnx", options)

    References:
      ONNX operators, DequantizeLinear, https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html; onnxruntime,
      contrib operators, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
    """
    onnx = _onnx()
    leaf_axes.check(axis)
    if rename is not None:
        arguments.takes(rename, "rename", ("path", "leaf"), "Return None or the name of an initializer.")
    model = onnx.ModelProto()
    model.CopyFrom(model_in if isinstance(model_in, onnx.ModelProto) else onnx.load(os.fspath(model_in)))
    found = onnx_weights.weights(model)
    wanted = _wanted(params, opt_state, source, axis)
    matches = onnx_matching.by_name(wanted, found, rename) if rename else onnx_matching.by_values(wanted, found)
    editor = Editor(model)
    for match in matches:
        _put(editor, match, contrib, pack)
    editor.finish()
    _write(onnx, model, os.fspath(model_out))


def _wanted(params: Tree, opt_state: State | None, source: Tree | None, axis: Axis | PerLeaf) -> list[Wanted]:
    """Every float leaf and `Quantized` that has entries, with the values of its source."""
    coded = tensor_names.coded_leaves(params, opt_state)
    sources = dict(tensor_names.whole_leaves(params if source is None else source))
    found = []
    for path, leaf in coded:
        if not (picked_leaves.floating(leaf) or (isinstance(leaf, Quantized) and leaf.codes.size)):
            continue
        remedy = f"It has no leaf {path!r}: give the tree that the graph was made from, with the paths of `params`."
        arguments.require(path in sources, "source", "have every leaf of the params", sorted(sources)[:8], remedy)
        values, like = onnx_matching.values(sources[path]), leaf_rows.described(leaf)
        remedy = f"Leaf {path!r} has shape {like.shape} in the params."
        arguments.require(values.shape == like.shape, "source", "have the shapes of the params", values.shape, remedy)
        found.append(Wanted(path, leaf, values, leaf_rows.outputs(axis, path, leaf)))
    return found


def _put(editor: Editor, match: Match, contrib: bool, pack: bool) -> None:
    """Put one leaf in the place of its initializer."""
    wanted, weight, order = match
    if isinstance(wanted.leaf, Quantized):
        found = onnx_codes.coded(wanted.path, wanted.leaf, order, weight.shape)
        onnx_nodes.put(editor, weight, found, wanted.path, contrib, pack)
        return
    values = onnx_layouts.laid(np.asarray(wanted.leaf), order, weight.shape)
    lost = casting.lost(values, weight.dtype)
    remedy = f"Leaf {wanted.path!r} has {lost}, and its initializer {weight.name!r} is {weight.dtype}."
    arguments.require(lost is None, "model_in", "have dtypes that hold the params", weight.dtype.name, remedy)
    editor.change(weight, values.astype(weight.dtype))


def _onnx() -> ModuleType:
    try:
        import onnx
    except ImportError as error:
        raise ImportError("ONNX graphs need `onnx`: pip install 'clipjax[export]'.") from error
    module: ModuleType = onnx
    return module


def _write(onnx: Any, model: Any, path: str) -> None:
    """Write a model, its initializers beside it where they are too large for one file."""
    size = sum(proto.ByteSize() for graph in onnx_weights.graphs(model.graph) for proto in graph.initializer)
    if size < LIMIT:
        with atomic_file.replacing(path) as file:
            file.write(model.SerializeToString())
        return
    name = os.path.basename(path)
    with tempfile.TemporaryDirectory(dir=atomic_file.folder_of(path), prefix=f".{name}.") as folder:
        written = os.path.join(folder, name)
        onnx.save_model(model, written, save_as_external_data=True, location=f"{name}.data")
        os.replace(f"{written}.data", f"{path}.data")
        os.replace(written, path)
