"""`import_safetensors`: the arrays of safetensors files in Flax's shapes, as floats or as codes and scales."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import compressed_tensors, reading_leaves, safetensors_writing, tensor_names
from clipjax._exports.compressed_tensors import Scheme
from clipjax._exports.reading_leaves import Stored
from clipjax._files import container
from clipjax.typing import Axis, PerLeaf, Rename, Tree

ORDER = "weight_g_idx"
"""The array of a module whose groups are no neighbours, as GPTQ's `actorder="group"` made them."""


def import_safetensors(
    path: str | os.PathLike[str],
    *,
    like: Tree | None = None,
    rename: Rename | None = None,
    axis: Axis | PerLeaf = None,
    dequantize: bool = True,
    partial: bool = False,
) -> Tree:
    """Read safetensors files into a tree of params, the way back of `export_safetensors`.

    Args:
      path: a folder, whose safetensors files are read together, or one file; a ``config.json`` beside them says by its
        ``quantization_config`` which modules compressed-tensors has quantized.
      like: a tree of arrays or of their shapes and dtypes, as ``jax.eval_shape`` gives it, whose structure the result
        takes; leaves take the dtypes and shardings that stand here. None for a dict of all by their names, as the files
        have them: contracted axes last.
      rename: see `export_safetensors`, what is quantized with or without ".weight"; leaves that it leaves out stay as
        they are in `like`.
      axis: see `export_gguf`.
      dequantize: True returns arrays. False returns a `Quantized` for each leaf that is quantized in the files.
      partial: True leaves arrays unread that no leaf of `like` names.

    Returns:
      The tree, or the dict.

    Raises:
      ValueError: for files that are damaged or no safetensors files; names that `like` or the files lack; shapes that
        differ; a leaf of which the names have a part; numbers that the dtype of a leaf does not have; a scheme with
        zero points, with groups in another order (``weight_g_idx``), or of other bits.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from clipjax import export_safetensors
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     export_safetensors(folder, {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}})
      ...     import_safetensors(folder)["dense.weight"].tolist()
      [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    remedy = "`rename` names the leaves of `like`: give both."
    arguments.require(like is not None or rename is None, "like", "be given with `rename`", like, remedy)
    files = _Files(os.fspath(path))
    if like is None:
        return {name: reading_leaves.alone(files.read(name), dequantize) for name in files.names}
    return reading_leaves.assemble(
        like,
        files.names,
        files.read,
        rename=files.whole(safetensors_writing.resolve(rename)),
        axis=axis,
        separator=".",
        dequantize=dequantize,
        partial=partial,
    )


class _Files:
    """The weights of some safetensors files by their names."""

    def __init__(self, path: str) -> None:
        inside = os.path.isdir(path)
        folder = path if inside else os.path.dirname(path)
        files = sorted(n for n in os.listdir(path) if n.endswith(".safetensors")) if inside else [path]
        remedy = "Name a folder with safetensors files, or one of them."
        arguments.require(files, "path", "hold safetensors files", path, remedy)
        self._arrays: dict[str, np.ndarray] = {}
        for file in files:
            for name, values in _arrays(os.path.join(folder, file) if inside else file):
                remedy = "Two of the files have it: leave in the folder those of one model."
                arguments.require(name not in self._arrays, "path", "hold each name once", name, remedy)
                self._arrays[name] = values
        config = safetensors_writing.read_config(os.path.join(folder, safetensors_writing.CONFIG)) or {}
        self._modules = _modules(config.get("quantization_config") or {}, self._arrays)
        parts = {f"{m}.{last}" for m, how in self._modules.items() for last in (*compressed_tensors.names(how), ORDER)}
        self.names = [n for n in self._arrays if n not in parts] + [f"{module}.weight" for module in self._modules]

    def whole(self, rename: Rename) -> Rename:
        """The same where a quantized module may be named without ".weight", which the writer puts behind any name."""

        def named(path: str, leaf: Any) -> Any:
            found = tensor_names.entries(rename(path, leaf), path)
            return [(f"{name}.weight" if name in self._modules else name, *picked) for name, *picked in found]

        return named

    def read(self, name: str) -> Stored:
        """Codes and scales, or numbers."""
        module = name.removesuffix(".weight")
        how = self._modules.get(module) if name != module else None
        if how is None:
            return Stored(np.asarray(self._arrays[name]))
        remedy = (
            f"Module {module!r} has its inputs in groups of another order: decode it by its own package, as floats."
        )
        ordered = f"{module}.{ORDER}" not in self._arrays
        arguments.require(ordered, "path", "hold groups of neighbours", ORDER, remedy)
        found = {last: np.asarray(self._arrays[f"{module}.{last}"]) for last in compressed_tensors.names(how)}
        return compressed_tensors.stored(module, how, found)


def _arrays(path: str) -> list[tuple[str, np.ndarray]]:
    """Names and arrays of a file; an array is read when it is looked at."""
    with open(path, "rb") as file:
        reader = container.Reader(file)
    return [
        (e.name, np.memmap(path, e.kind, "r", reader.begin + e.begin, e.shape) if e.end > e.begin else _empty(e))
        for e in reader.entries
    ]


def _empty(entry: container.Entry) -> Any:
    return np.zeros(entry.shape, entry.kind)


def _modules(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Scheme]:
    """The modules that a `quantization_config` speaks of, and that have the arrays of its schemes."""
    method = config.get("quant_method", "compressed-tensors")
    remedy = "Other methods are decoded by their own packages: read the floats that these write."
    arguments.require(method == "compressed-tensors", "path", "be quantized by compressed-tensors", method, remedy)
    candidates = {name.rsplit(".", 1)[0] for name in arrays if name.endswith(".weight_scale")}
    found: dict[str, Scheme] = {}
    for group in config.get("config_groups", {}).values():
        how = Scheme(group.get("format") or config.get("format", ""), group.get("weights") or {})
        for module in sorted(candidates - found.keys()):
            named = any(_matches(module, target) for target in group.get("targets", ()))
            ignored = any(_matches(module, target) for target in config.get("ignore") or ())
            if named and not ignored and all(f"{module}.{last}" in arrays for last in compressed_tensors.names(how)):
                found[module] = how
    return found


def _matches(module: str, target: str) -> bool:
    """True for a target that is the name, a regular expression after "re:", or a class of modules."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, "Linear", "Embedding")
