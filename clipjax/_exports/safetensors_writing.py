"""`export_safetensors`: params as a folder that vLLM and transformers read, in the layout of compressed-tensors."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from clipjax._arrays import arguments
from clipjax._exports import compressed_tensors, leaf_rows, tensor_names
from clipjax._exports.compressed_tensors import Scheme
from clipjax._exports.tensor_names import Tensor
from clipjax._files import atomic_file, container
from clipjax._maths import known_formats
from clipjax._maths.integers import Quantized
from clipjax.typing import Axis, PerLeaf, Rename, State, Tree

FILE, CONFIG = "model.safetensors", "config.json"
WEIGHTS = ("kernel", "embedding", "scale")
"""What Flax calls the array that PyTorch calls weight."""


def export_safetensors(
    folder: str | os.PathLike[str],
    params: Tree,
    opt_state: State | None = None,
    *,
    rename: Rename | None = None,
    axis: Axis | PerLeaf = None,
) -> None:
    """Write params as safetensors: leaves on a format of compressed-tensors as its arrays, all others as their values.

    Two files are written, ``model.safetensors`` and, in ``config.json``, the key ``quantization_config``; other keys of
    a config that is there are kept, as `transformers` wants them beside. A leaf becomes a matrix of rows,
    f32[in, out] is written as [out, in]; output axes are flattened in order, and so are input axes. Nothing is
    quantized here.

    | leaf | arrays of its module |
    | --- | --- |
    | on `int4`, `int8` | pack-quantized: weight_packed, weight_scale, weight_shape |
    | on `fp8_e4m3` | float-quantized: weight (F8_E4M3), weight_scale |
    | on `mxfp4`, by any rule | mxfp4-pack-quantized: weight_packed, weight_scale |
    | on `mxfp8` of E4M3 | mxfp8-quantized: weight (F8_E4M3), weight_scale |
    | on `nvfp4` of compressed-tensors | nvfp4-pack-quantized: weight_packed, weight_scale, weight_global_scale |
    | floats, other formats, grids | the values in the dtype of the leaf |
    | None, or without entries | none |

    What compressed-tensors decodes are the params bit for bit. It computes in the dtype of the scales: those of `int4`
    and `int8` are written as f32 where f32 params, or `Quantized` without any, have values that a narrower scale would
    round.

    Args:
      folder: where to write; made if it is not there. It must hold no other safetensors files.
      params: a tree of arrays, or of `Quantized` among arrays, as `clipjax.quantized` gives it.
      opt_state: the optimizer state of these params, with `fake_quantize` in it; None for params as they are.
      rename: as for `export_gguf`, with the names of the reader, "model.layers.0.mlp.up_proj.weight". What a module is
        called by is left of ".weight". By default a path is the name, with "." between its keys, and the last of them,
        kernel, embedding or scale, is "weight".
      axis: which axes of a leaf are outputs, as in `export_gguf`.

    Raises:
      ValueError: for a folder with other safetensors files or a config that is no JSON object; a leaf whose blocks run
        along another axis than the file needs; weights off their grid; a name that is used twice; an index or
        permutation that does not fit. Nothing is written then.
      TypeError: for leaves of a dtype that safetensors does not have.

    Example:
      >>> import jax.numpy as jnp, json, pathlib, tempfile
      >>> from clipjax import fake_quantize, formats, hold_once, import_safetensors
      >>> params = {"dense": {"kernel": jnp.linspace(-1, 1, 256, dtype=jnp.bfloat16).reshape(64, 4)}}
      >>> params, state = hold_once(fake_quantize(formats.int4(32)), params)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     export_safetensors(folder, params, state)
      ...     written = json.loads(pathlib.Path(folder, "config.json").read_text())["quantization_config"]
      ...     back = import_safetensors(folder, like=params)
      >>> written["format"], written["config_groups"]["group_0"]["targets"]
      ('pack-quantized', ['dense'])
      >>> bool((back["dense"]["kernel"] == params["dense"]["kernel"]).all())
      True

    References:
      compressed-tensors, https://github.com/vllm-project/compressed-tensors; the safetensors format,
      https://github.com/huggingface/safetensors.
    """
    found = tensor_names.tensors(_written(params, opt_state), None, resolve(rename), axis, ".")
    found = [one for one in found if all(one.shape)]
    dtypes = {path: np.dtype(leaf_rows.described(leaf).dtype) for path, leaf in tensor_names.whole_leaves(params)}
    schemes = {one.name: compressed_tensors.scheme(one.form) if len(one.shape) == 2 else None for one in found}
    _check(found, schemes)
    folder = os.fspath(folder)
    config = _config(folder, found, schemes)
    os.makedirs(folder, exist_ok=True)
    with container.Writer(folder) as writer:
        for one in found:
            for name, values in _arrays(one, schemes[one.name], dtypes[one.path]).items():
                data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
                writer.add(name, container.NAMES[values.dtype], values.shape, data)
        with atomic_file.replacing(os.path.join(folder, FILE)) as file:
            if config is None:
                writer.write(file, {"format": "pt"})
                return
            with atomic_file.replacing(os.path.join(folder, CONFIG)) as described:
                writer.write(file, {"format": "pt"})
                file.flush()  # all of it is on the disk before the config of the new weights stands there
                described.write(json.dumps(config, indent=2).encode() + b"\n")


def resolve(rename: Rename | None) -> Rename:
    """The argument `rename`, checked; by default the names of PyTorch's modules."""
    return tensor_names.resolve(_module_names if rename is None else rename, ".")


def _module_names(path: str, leaf: object) -> str:
    *outer, last = path.split("/")
    return ".".join([*outer, "weight" if outer and last in WEIGHTS else last])


def module_of(name: str) -> str:
    """The module that has the weight of a name."""
    return name.removesuffix(".weight")


def _written(params: Tree, opt_state: State | None) -> Tree:
    """The params, with `Quantized` for those on a format that the file has; others keep their values and dtypes."""
    coded = dict(tensor_names.leaves(params, opt_state))

    def one(path: str, leaf: Any) -> Any:
        q = coded[path]
        known = isinstance(q, Quantized) and q.format and compressed_tensors.scheme(known_formats.named(q.format))
        return q if known else leaf

    return tensor_names.map_whole_leaves(one, params)


def _check(found: list[Tensor], schemes: dict[str, Scheme | None]) -> None:
    for one in found:
        if one.dtype not in container.NAMES:
            raise TypeError(
                f"Leaves must be of a dtype that safetensors has, got {one.dtype} at {one.path!r}. Convert it, or"
                " leave it out: `rename` returns None for it."
            )
    named = ((name, one.path) for one in found for name in _names(one, schemes[one.name]))
    tensor_names.check_once(named)


def _names(one: Tensor, how: Scheme | None) -> list[str]:
    return [one.name] if how is None else [f"{module_of(one.name)}.{last}" for last in compressed_tensors.names(how)]


def _arrays(one: Tensor, how: Scheme | None, dtype: np.dtype) -> dict[str, np.ndarray]:
    if how is None or one.form is None:
        return {one.name: one.values()}
    made = compressed_tensors.arrays(one.form, *one.codes(), dtype)
    return {f"{module_of(one.name)}.{last}": values for last, values in made.items()}


def _config(folder: str, found: list[Tensor], schemes: dict[str, Scheme | None]) -> dict[str, Any] | None:
    """The config with its new `quantization_config`, checked; None where there is nothing to say."""
    there = sorted(n for n in os.listdir(folder) if n.endswith(".safetensors")) if os.path.isdir(folder) else []
    others = [name for name in there if name != FILE]
    remedy = "A reader would take them for parts of this model: write into a folder of its own."
    arguments.require(not others, "folder", "hold no other safetensors files", others[:8], remedy)
    path = os.path.join(folder, CONFIG)
    config = read_config(path) or {}
    quantization = _quantization(found, schemes)
    if quantization is None and "quantization_config" not in config:
        return None
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return kept if quantization is None else kept | {"quantization_config": quantization}


def read_config(path: str) -> dict[str, Any] | None:
    """The JSON object of a config, None where there is no file."""
    try:
        with open(path, "rb") as file:
            config = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        config = error
    arguments.require(isinstance(config, dict), "folder", "hold a config.json of an object", path, f"It has {config}.")
    return dict(config)


def _quantization(found: list[Tensor], schemes: dict[str, Scheme | None]) -> dict[str, Any] | None:
    """A `QuantizationConfig` of compressed-tensors: modules by their names, and those of plain matrices as ignored."""
    groups: list[tuple[Scheme, list[str]]] = []
    for one in found:
        how = schemes[one.name]
        if how is not None:
            targets = next((targets for other, targets in groups if other == how), None)
            if targets is None:
                groups.append((how, targets := []))
            targets.append(module_of(one.name))
    if not groups:
        return None
    formats = {how.format for how, _ in groups}
    plain = [one.name for one in found if schemes[one.name] is None and len(one.shape) == 2]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": how.weights, "format": how.format}
            for i, (how, targets) in enumerate(groups)
        },
        "ignore": [module_of(name) for name in plain if name.endswith(".weight")],
    }
