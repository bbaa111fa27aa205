"""The layout of compressed-tensors: the arrays of one quantized matrix, and the scheme that says how to read them.

A matrix [outputs, inputs] of a module is stored as `weight_packed` or, a byte a code, as `weight`; with `weight_scale`,
and what else its format needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from clipjax._arrays import arguments
from clipjax._exports.reading_leaves import Stored
from clipjax._maths import block_bytes, float_blocks, free_formats
from clipjax._maths.float_codes import E2M1, E4M3
from clipjax._maths.known_formats import made
from clipjax.typing import Format

Arrays = Mapping[str, np.ndarray]
"""The arrays of a module by the last part of their names."""

E4M3FN = np.dtype(ml_dtypes.float8_e4m3fn)
BYTES = "torch.uint8"


class Scheme(NamedTuple):
    """How the weights of some modules are stored.

    Attributes:
      format: compressed-tensors' name, as "pack-quantized".
      weights: the `QuantizationArgs` of the weights, as JSON has them.
    """

    format: str
    weights: dict[str, Any]


def scheme(form: Format | None) -> Scheme | None:
    """The scheme of a format; None where compressed-tensors does not have it."""
    kind = form.name.split("(")[0] if form else ""
    args: dict[str, Any] = {"symmetric": True, "dynamic": False, "group_size": form.block if form else None}
    if kind in ("int4", "int8"):
        strategy = "group" if args["group_size"] else "channel"
        return Scheme("pack-quantized", {"num_bits": int(kind[3:]), "type": "int", "strategy": strategy, **args})
    if kind == "fp8_e4m3" and form:
        args |= {"num_bits": 8, "type": "float", "group_size": None}
        if form.block is not None:
            return Scheme("float-quantized", args | {"strategy": "block", "block_structure": [form.across, form.block]})
        return Scheme("float-quantized", args | {"strategy": "channel" if form.across else "tensor"})
    if kind == "mxfp4":
        args |= {"num_bits": 4, "type": "float", "strategy": "group", "scale_dtype": BYTES}
        return Scheme("mxfp4-pack-quantized", args)
    if form and form.name.startswith("mxfp8(element='e4m3'"):
        args |= {"num_bits": 8, "type": "float", "strategy": "group", "scale_dtype": BYTES}
        return Scheme("mxfp8-quantized", args)
    if form and form.name == "nvfp4(scale='compressed-tensors')":
        args |= {"num_bits": 4, "type": "float", "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        return Scheme("nvfp4-pack-quantized", args)
    return None


def arrays(form: Format, codes: np.ndarray, scales: tuple[np.ndarray, ...], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The arrays of a module, from codes [outputs, inputs] and scales [blocks of outputs, blocks of inputs].

    Readers compute in the dtype of the scales. Those of whole numbers are written as f32 where params of a wider dtype
    than theirs have values that theirs does not.
    """
    how = scheme(form)
    assert how is not None
    codes, first, bits = np.ascontiguousarray(codes), scales[0], how.weights["num_bits"]
    if how.format == "pack-quantized":
        name = form.name.split("'")[1]
        blocks = codes.reshape(len(codes), first.shape[-1], -1)
        words, _ = block_bytes.words(blocks, (first[..., None],), bits)
        scale = first if first.dtype == np.float32 else first.view(np.dtype(getattr(ml_dtypes, name, name)))
        wide = scale.astype(np.float32)
        values = blocks.astype(np.float32) * wide[..., None]
        if dtype.itemsize > scale.dtype.itemsize and (values.astype(scale.dtype).astype(np.float32) != values).any():
            scale = wide
        shape = np.array(codes.shape, np.int64)
        return {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}
    if bits == 8:
        scale = first.reshape(1) if how.weights["strategy"] == "tensor" else first
        return {"weight": codes.astype(np.uint8).view(E4M3FN), "weight_scale": scale}
    packed = block_bytes.pairs(codes[:, None], ())[0]
    if how.format == "mxfp4-pack-quantized":
        return {"weight_packed": packed, "weight_scale": first}
    total = np.asarray(scales[1], np.float32).reshape(1)
    return {"weight_packed": packed, "weight_scale": first.view(E4M3FN), "weight_global_scale": total}


def names(how: Scheme) -> tuple[str, ...]:
    """The arrays that a module of this scheme has, the one of the codes first."""
    packed = how.format in ("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
    more = {"pack-quantized": ("weight_shape",), "nvfp4-pack-quantized": ("weight_global_scale",)}
    return ("weight_packed" if packed else "weight", "weight_scale", *more.get(how.format, ()))


def stored(module: str, how: Scheme, found: Arrays) -> Stored:
    """Codes and scales from the arrays of a module.

    Raises:
      ValueError: for zero points, and for schemes that no format of `clipjax.formats` is.
    """
    codes, scale = found[names(how)[0]], _narrowed(found["weight_scale"])
    form = _format(module, how, scale)
    if how.format == "pack-quantized":
        bits, (rows, columns) = how.weights["num_bits"], (int(n) for n in found["weight_shape"])
        codes = (_apart(codes, bits)[:, :columns].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
        codes = codes.reshape(rows, columns)
    elif codes.dtype == np.uint8:
        codes = _apart(codes, 4)
    else:
        codes = codes.view(np.int8 if codes.dtype == np.int8 else np.uint8)
    if how.weights.get("strategy") in ("tensor", "channel"):
        scale = scale.reshape(-1, 1)
    if form.name.startswith("fp8"):
        return Stored(codes, (scale.astype(np.float32),), form)
    if how.format == "nvfp4-pack-quantized":
        total = found["weight_global_scale"].astype(np.float32).reshape(())
        return Stored(codes, (scale.view(np.uint8), total), form)
    return Stored(codes, (scale.view(np.uint16) if scale.dtype.itemsize == 2 else scale,), form)


def _narrowed(scale: np.ndarray) -> np.ndarray:
    """Scales of f32 in the dtype of 16 bits that has them all, which `arrays` may have widened."""
    short = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)] if scale.dtype == np.float32 else []
    with np.errstate(over="ignore"):
        return next((scale.astype(d) for d in short if (scale.astype(d).astype(scale.dtype) == scale).all()), scale)


def _apart(packed: np.ndarray, bits: int) -> np.ndarray:
    """The codes in bytes, the first in the lowest bits; a row stays one."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _format(module: str, how: Scheme, scale: np.ndarray) -> Format:
    """The format of a scheme."""
    args = how.weights
    bits, kind, strategy, group = (args.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    remedy = f"Module {module!r} has it. Decode the file by `compressed_tensors`, and read the floats."
    arguments.require(args.get("symmetric", True), "path", "hold schemes without zero points", args, remedy)
    if kind == "int" and bits in (4, 8) and strategy in ("group", "channel"):
        make = free_formats.int4 if bits == 4 else free_formats.int8
        return make(group if strategy == "group" else None, scale.dtype.name)  # type: ignore[arg-type]
    if how.format == "mxfp4-pack-quantized":
        rule = "compressed-tensors"
        return made(f"mxfp4(scale={rule!r})", lambda name: float_blocks.mx(name, E2M1, rule))
    if how.format == "mxfp8-quantized":
        rule = "compressed-tensors"
        return made(f"mxfp8(element='e4m3', scale={rule!r})", lambda name: float_blocks.mx(name, E4M3, rule))
    if how.format == "nvfp4-pack-quantized":
        return made("nvfp4(scale='compressed-tensors')", lambda name: float_blocks.nvfp4(name, divisor=True))
    tile = {"tensor": "array", "channel": "channel"}.get(str(strategy))
    if kind == "float" and bits == 8 and (tile or strategy == "block"):
        return free_formats.fp8_e4m3(tile or tuple(args["block_structure"]))  # type: ignore[arg-type]
    arguments.require(False, "path", "hold schemes of `clipjax.formats`", how._asdict(), remedy)
    raise AssertionError
