"""`export_gguf`: params as a GGUF file, which llama.cpp and what is built on it read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import casting, gguf_blocks, gguf_metadata, tensor_names
from clipjax._exports.tensor_names import Tensor
from clipjax._files import atomic_file
from clipjax.typing import Axis, PerLeaf, Rename, State, Tree

FLOATS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
KINDS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
EXPERTS = "_exps."  # in llama.cpp's names of arrays with an axis of experts
LONGEST = 63  # bytes of a name, GGML_MAX_NAME without the zero at the end


def export_gguf(
    path: str | os.PathLike[str],
    params: Tree,
    opt_state: State | None = None,
    *,
    rename: Rename | None = None,
    metadata: Mapping[str, object] | None = None,
    architecture: str = "llama",
    axis: Axis | PerLeaf = None,
    float_type: Literal["f32", "f16", "bf16"] = "f32",
) -> None:
    """Write params as a GGUF file: leaves on a format of GGUF as their own bytes, all others as floats.

    A leaf becomes a tensor of rows: GGUF has the contracted axes last, so that a kernel f32[in, out] is written as
    [out, in]. Output axes are flattened in order, and so are input axes. Of what has "_exps." in its name, as llama.cpp
    has it for experts, the first output axis stays: [experts, out, in]. Nothing is quantized here: a leaf that
    `fake_quantize` holds on a format is written as the codes and scales that it has, and llama.cpp computes with these.

    | leaf | tensor |
    | --- | --- |
    | on a format of GGUF | Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, MXFP4 |
    | floats | `float_type`; F32 where it is a vector or a scalar, as llama.cpp wants them |
    | i8, i16, i32, i64 | I8, I16, I32, I64 |
    | None, or without entries | none |

    Leaves on a grid of `fake_quantize(bits=...)`, which GGUF does not have, are floats. The file is written leaf by
    leaf, beside the old one, which it replaces when all of it is on disk.

    Args:
      path: where to write.
      params: a tree of arrays, or of `Quantized` among arrays, as `clipjax.quantized` gives it.
      opt_state: the optimizer state of these params, with `fake_quantize` in it; None for params as they are.
      rename: `rename(path, leaf)` returns the name of a leaf in the file; or a list of (name, index, permutation); or
        None, which leaves the leaf out. A path reads "layers/0/attn/q/kernel", and `leaf` has its shape and dtype. An
        index is None for all of the leaf; a number for one layer of a stack, along the first axis; a slice for a range
        of the outputs, flattened in order; or a pair (layer, slice). Slices that divide a leaf have all of its rows;
        a single one may cut some off, such as those that pad a vocabulary. A permutation has the numbers of the rows
        that the index picks, in the order that the file shall have; codes and scales are permuted, and never quantized
        again. `llama_names` makes one for Llama. By default a path is the name, with "." between its keys.
      metadata: keys and values of the file: str, bool, int, float, NumPy's numbers, or lists and arrays of one kind.
        `llama_metadata` has those of Llama's shape; a file that llama.cpp runs has a tokenizer too. The factors of a
        scaled RoPE stand here as an array, "rope_freqs.weight", and become the tensor that llama.cpp reads.
      architecture: llama.cpp's name of the architecture, "general.architecture".
      axis: which axes of a leaf are outputs, as in `fake_quantize`: ``analysis.outputs``, or `per_leaf`. By default the
        last one; of an embedding, and of a weight of which none is named, all but the last; of vectors, and of what is
        named bias, b, scale or offset, all. A leaf on a format says so itself.
      float_type: of the floats: "f32", "f16" or "bf16".

    Raises:
      ValueError: for a leaf on a format that GGUF does not have, or whose blocks run along another axis than the file
        needs; weights off their grid; a name that is used twice or has more than 63 bytes; an index or permutation that
        does not fit; weights beyond the range of their type. Nothing is written then.
      TypeError: for leaves that GGUF has no type for, and for metadata of another kind.
      ImportError: without `gguf`: ``pip install 'clipjax[export]'``.

    Example:
      >>> import gguf, jax.numpy as jnp, os, tempfile
      >>> params = {"dense": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "net.gguf")
      ...     export_gguf(path, params, metadata={"net.width": 8}, architecture="net", float_type="f16")
      ...     [(t.name, t.tensor_type.name, t.data.shape) for t in gguf.GGUFReader(path).tensors]
      [('dense.bias', 'F32', (8,)), ('dense.kernel', 'F16', (8, 64))]

    References:
      The GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    gguf = gguf_blocks.package()
    arguments.choice(float_type, "float_type", tuple(FLOATS))
    named = isinstance(architecture, str) and bool(architecture)
    arguments.require(named, "architecture", "be a name", architecture, "llama.cpp's is 'llama'.")
    values = gguf_metadata.read(metadata)
    found = [one for one in tensor_names.tensors(params, opt_state, rename, axis, ".") if math.prod(one.shape)]
    if metadata and gguf_metadata.FACTORS in metadata:
        found += tensor_names.tensors({gguf_metadata.FACTORS: metadata[gguf_metadata.FACTORS]}, None, None, None, ".")
        tensor_names.check_once((one.name, one.path) for one in found)
    stored = [_Stored(one, _type(one, float_type), _shape(one)) for one in found]
    for one in stored:
        _check(one)
    kinds = gguf.GGUFValueType
    with atomic_file.replacing_by_name(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for key, value in values.items():
            entries = value.entries and kinds[value.entries]
            writer.add_key_value(key, value.value, kinds[value.kind], sub_type=entries)
        if any(one.tensor.form for one in stored):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        try:
            _write(gguf, writer, stored)
        finally:
            writer.close()


class _Stored(NamedTuple):
    """A tensor, the name of its type in GGUF, and its shape there."""

    tensor: Tensor
    type: str
    shape: tuple[int, ...]


def _type(one: Tensor, float_type: str) -> str:
    if one.form is not None:
        return gguf_blocks.type_of(one.form, one.path)
    if jnp.issubdtype(one.dtype, jnp.floating):
        return FLOATS[float_type] if len(one.shape) > 1 else "F32"
    if one.dtype.name in ("int8", "int16", "int32", "int64"):
        return f"I{one.dtype.itemsize * 8}"
    raise TypeError(
        f"Leaves must be floats or signed integers in GGUF, got {one.dtype} at {one.path!r}. Leave it out: `rename`"
        " returns None for it."
    )


def _shape(one: Tensor) -> tuple[int, ...]:
    """Rows by inputs; those of experts, which llama.cpp names so, are apart."""
    if EXPERTS not in one.name:
        return one.shape or (1,)
    sizes, rows = one.picked.sizes, one.shape[:1]
    remedy = f"Leaf {one.path!r} has {sizes} as outputs: name the axes of experts and of outputs, `axis=(0, -1)`."
    whole = len(sizes) > 1 and rows == (math.prod(sizes),)
    arguments.require(whole, "axis", "name experts and outputs of each", one.name, remedy)
    return (sizes[0], math.prod(sizes[1:]), *one.shape[1:])


def _check(one: _Stored) -> None:
    """What is known of a tensor only by its name and its values."""
    tensor, size = one.tensor, len(one.tensor.name.encode())
    remedy = f"It names leaf {tensor.path!r}. Give it a shorter one by `rename`."
    arguments.require(size <= LONGEST, "rename", f"return names of at most {LONGEST} bytes", tensor.name, remedy)
    if one.type in KINDS and tensor.dtype != KINDS[one.type]:
        lost = casting.lost(tensor.values(), KINDS[one.type])
        remedy = f"Leaf {tensor.path!r} has {lost}. 'bf16' and 'f32' reach to 3.4e38."
        arguments.require(lost is None, "float_type", "hold every weight", one.type.lower(), remedy)


def _write(gguf: Any, writer: Any, stored: list[_Stored]) -> None:
    """Names, shapes and types of all tensors, then their bytes one after the other."""
    for tensor, name, shape in stored:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # Raw bytes are described by their own shape, from which the writer computes that of the entries.
        raw = (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(tensor.name, raw, np.dtype(np.uint8), math.prod(raw), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, name, _ in stored:
        writer.write_tensor_data(_bytes(tensor, name))


def _bytes(tensor: Tensor, name: str) -> np.ndarray:
    if tensor.form is not None:
        return np.ascontiguousarray(gguf_blocks.packed(name, *tensor.codes()))
    x = tensor.values()
    kind = KINDS.get(name, x.dtype)
    return np.ascontiguousarray(x.astype(kind)).reshape(-1).view(np.uint8)
