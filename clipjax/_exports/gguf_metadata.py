"""Metadata of GGUF files: Python's values as the typed values of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from clipjax._arrays import arguments

VALUES = "Values are str, bool, int, float, NumPy's numbers, or lists and arrays of one kind of these."
FACTORS = "rope_freqs.weight"
"""The tensor of what llama.cpp divides the frequencies of RoPE by, which are no parameters and follow from a config."""

OWN = ("general.architecture", "general.alignment", "general.quantization_version")


class Value(NamedTuple):
    """One value.

    Attributes:
      value: what `gguf` packs.
      kind: the name of its type in GGUF.
      entries: of an array, the type of its entries.
    """

    value: Any
    kind: str
    entries: str | None = None


def read(metadata: Mapping[str, Any] | None) -> dict[str, Value]:
    """The values of all keys with their types, but `FACTORS`.

    A Python int takes the narrowest of u32, i32, u64 and i64, in a list i32 before i64; a float is f32, and f64 beyond
    its range. NumPy's numbers
    and arrays have the type that they say.

    Raises:
      TypeError: for a value of another kind, and for a key that is no string.
      ValueError: for an empty list, and for keys that are written anyway.
    """
    found: dict[str, Value] = {}
    for key, value in ({} if metadata is None else metadata).items():
        if not isinstance(key, str) or not key:
            raise TypeError(f"`metadata` must have strings as keys, got {key!r}. Try 'llama.block_count'.")
        arguments.require(key not in OWN, "metadata", "leave out what is written anyway", key, "Drop this key.")
        if key != FACTORS:
            found[key] = _value(key, value)
    return found


def _value(key: str, value: Any) -> Value:
    value = np.asarray(value) if isinstance(value, jax.Array) else value
    if isinstance(value, str):
        return Value(value, "STRING")
    listed = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1)
    if not listed:
        return Value(value.item() if hasattr(value, "item") else value, _scalar(key, value, ("UINT32", "INT32")))
    arguments.require(len(value), "metadata", "have no empty lists, which GGUF cannot type", key, "Drop this key.")
    if isinstance(value, np.ndarray) and value.dtype.kind != "U":
        return Value(value.tolist(), "ARRAY", _scalar(key, value, ()))
    entries = [str(v) if isinstance(v, str) else v for v in value]
    return Value([v.item() if hasattr(v, "item") else v for v in entries], "ARRAY", _common(key, entries))


def _common(key: str, entries: list[Any]) -> str:
    """The type that all entries of a list have, which is the widest one of integers."""
    kinds = {"STRING" if isinstance(v, str | bytes) else _scalar(key, v, ("INT32",)) for v in entries}
    wide = next((kind for kind in ("INT64", "UINT64") if kind in kinds), None)
    if wide and kinds <= {"INT32", wide}:
        kinds = {wide}
    if len(kinds) != 1:
        raise TypeError(f"`metadata` must have lists of one kind, got {sorted(kinds)} under {key!r}. {VALUES}")
    return kinds.pop()


LIMITS = {
    "UINT32": (0, 2**32 - 1),
    "INT32": (-(2**31), 2**31 - 1),
    "UINT64": (0, 2**64 - 1),
    "INT64": (-(2**63), 2**63 - 1),
}


def _scalar(key: str, value: Any, usual: tuple[str, ...]) -> str:
    """The type of one number; Python's integers take the first of the usual ones that has them, or one of 64 bits."""
    if isinstance(value, bool):
        return "BOOL"
    if isinstance(value, float) and not isinstance(value, np.floating):
        return "FLOAT32" if not np.isfinite(value) or abs(value) <= float(np.finfo(np.float32).max) else "FLOAT64"
    if isinstance(value, int):
        fits = (kind for kind in (*usual, "INT64", "UINT64") if LIMITS[kind][0] <= value <= LIMITS[kind][1])
        found = next(fits, None)
        arguments.require(found, "metadata", "have integers of at most 64 bits", value, f"It is under {key!r}.")
        assert found is not None
        return found
    name = value.dtype.name if isinstance(value, np.ndarray | np.generic) and np.ndim(value) <= 1 else ""
    if name not in ("bool", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)), "float32", "float64"):
        raise TypeError(f"`metadata` must have values that GGUF knows, got {value!r} under {key!r}. {VALUES}")
    return name.upper()
