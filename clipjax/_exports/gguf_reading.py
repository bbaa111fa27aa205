"""`import_gguf`: the tensors of a GGUF file in Flax's shapes, as floats or as the codes and scales that they are."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import gguf_blocks, gguf_metadata, reading_leaves
from clipjax._exports.reading_leaves import Stored
from clipjax.typing import Axis, PerLeaf, Rename, Tree


def import_gguf(
    path: str | os.PathLike[str],
    *,
    like: Tree | None = None,
    rename: Rename | None = None,
    axis: Axis | PerLeaf = None,
    dequantize: bool = True,
    partial: bool = False,
) -> Tree:
    """Read a GGUF file into a tree of params, the way back of `export_gguf`.

    `rename` is the one that writes such a file: it says for each leaf of `like` which tensors it becomes, and the
    tensors go back to their rows, layers and permutations. Its metadata, a tokenizer among them, are read by `gguf`:
    ``{key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}``.

    Args:
      path: the file.
      like: a tree of arrays or of their shapes and dtypes, as ``jax.eval_shape`` gives it, whose structure the result
        takes; leaves take the dtypes and shardings that stand here. None for a dict of all tensors by their names, as
        the file has them: contracted axes last.
      rename: see `export_gguf`; leaves that it leaves out stay as they are in `like`.
      axis: see `export_gguf`.
      dequantize: True returns arrays. False returns a `Quantized` for each leaf whose tensors are of one type that is a
        format of `clipjax.formats`: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, MXFP4. Of other types, K-quants among
        them, the values come back either way.
      partial: True leaves tensors unread that no leaf of `like` names. The factors of a scaled RoPE are anyway.

    Returns:
      The tree, or the dict.

    Raises:
      ValueError: for a file that is no GGUF file or is cut; tensors that `like` or the file lacks; shapes that differ;
        a leaf of which the names have a part; numbers that the dtype of a leaf does not have; a type whose values
        `gguf` cannot compute.
      ImportError: without `gguf`: ``pip install 'clipjax[export]'``.

    Example:
      >>> import jax.numpy as jnp, os, tempfile
      >>> from clipjax import export_gguf
      >>> params = {"stack": {"kernel": jnp.arange(24.0).reshape(2, 3, 4)}}
      >>> def rename(path, leaf):
      ...     return [(f"blk.{i}.weight", i, [1, 0, 3, 2]) for i in range(2)]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "net.gguf")
      ...     export_gguf(path, params, rename=rename)
      ...     import_gguf(path)["blk.1.weight"].tolist()
      ...     import_gguf(path, like=params, rename=rename)["stack"]["kernel"][1].tolist()
      [[13.0, 17.0, 21.0], [12.0, 16.0, 20.0], [15.0, 19.0, 23.0], [14.0, 18.0, 22.0]]
      [[12.0, 13.0, 14.0, 15.0], [16.0, 17.0, 18.0, 19.0], [20.0, 21.0, 22.0, 23.0]]
    """
    gguf = gguf_blocks.package()
    remedy = "`rename` names the leaves of `like`: give both."
    arguments.require(like is not None or rename is None, "like", "be given with `rename`", like, remedy)
    file = _Reader(gguf, path)
    if like is None:
        return {name: reading_leaves.alone(file.read(name), dequantize) for name in file.tensors}
    return reading_leaves.assemble(
        like,
        file.tensors,
        file.read,
        rename=rename,
        axis=axis,
        separator=".",
        dequantize=dequantize,
        partial=partial,
        spare=(gguf_metadata.FACTORS,),
    )


class _Reader:
    """The tensors of one file by their names."""

    def __init__(self, gguf: Any, path: str | os.PathLike[str]) -> None:
        with open(path, "rb"):  # a file that is not there is no damaged one
            pass
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # the package reads without checks: a damaged file raises anything
            raise ValueError(f"`path` must be a whole GGUF file, got {os.fspath(path)!r}: {error!r}.") from error
        little = reader.endianess == gguf.GGUFEndian.LITTLE
        arguments.require(little, "path", "be a little-endian file", os.fspath(path), "Convert it with gguf's script.")
        self.gguf, self.tensors = gguf, {tensor.name: tensor for tensor in reader.tensors}

    def read(self, name: str) -> Stored:
        """One tensor: codes and scales of a format, or numbers."""
        tensor = self.tensors[name]
        kind = tensor.tensor_type.name
        data = np.array(tensor.data)  # the file may be replaced later, from under an array that lies in it
        if kind.lower() in gguf_blocks.TYPES:
            form, codes, scales = gguf_blocks.unpacked(kind, data, self.gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
            return Stored(codes, scales, form)
        if kind == "BF16":
            return Stored(data.view(jnp.bfloat16))
        if data.dtype != np.uint8:
            return Stored(data)
        try:
            return Stored(self.gguf.quants.dequantize(data, tensor.tensor_type))
        except NotImplementedError:
            raise ValueError(f"Tensors must be of a type that `gguf` decodes, got {kind} at {name!r}.") from None
