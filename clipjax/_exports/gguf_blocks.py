"""The types of GGUF's tensors: which format is which, and their bytes as codes and scales, the inverse of `pack`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from clipjax import formats
from clipjax._arrays import arguments
from clipjax.typing import Format

Arrays = tuple[np.ndarray, ...]
Unpack = Callable[[np.ndarray], tuple[np.ndarray, Arrays]]


def package() -> ModuleType:
    """The package `gguf`, of llama.cpp."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need `gguf`: pip install 'clipjax[export]'.") from error
    return gguf


def type_of(form: Format, path: str) -> str:
    """The name of the type of a leaf on a format; ValueError for a format that GGUF does not have."""
    name = "mxfp4" if form.name.startswith("mxfp4(") else form.name
    remedy = (
        f"GGUF has {', '.join(TYPES)}: train leaf {path!r} on one of these, or export its values, `dequantize(q)`, as"
        " floats."
    )
    arguments.require(name in TYPES, "format", "be one of GGUF", form.name, remedy)
    return name.upper()


def packed(name: str, codes: np.ndarray, scales: Arrays) -> np.ndarray:
    """The bytes of rows of a type: codes [..., inputs], scales [..., blocks]."""
    form, _ = TYPES[name.lower()]  # of the rules for MXFP4, the one whose files these are
    assert form.pack is not None and form.block is not None
    blocks = codes.reshape(*codes.shape[:-1], codes.shape[-1] // form.block, form.block)
    (found,) = form.pack(blocks, tuple(scale[..., None] for scale in scales))
    return np.asarray(found)


def unpacked(name: str, rows: np.ndarray, size: int) -> tuple[Format, np.ndarray, Arrays]:
    """Format, codes [..., inputs] and scales [..., blocks] of rows of bytes, `size` a block."""
    form, unpack = TYPES[name.lower()]
    blocks = rows.reshape(*rows.shape[:-1], rows.shape[-1] // size, size)
    codes, scales = unpack(blocks)
    return form, codes.reshape(*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]), scales


def _half(raw: np.ndarray, at: int) -> np.ndarray:
    """The bits of the f16 at a place of each block."""
    return (raw[..., at].astype(np.uint16)) | (raw[..., at + 1].astype(np.uint16) << 8)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Byte i has the codes i, below, and i + half a block, above."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _four(raw: np.ndarray) -> tuple[np.ndarray, Arrays]:
    return _nibbles(raw[..., 2:]), (_half(raw, 0),)


def _four_with_minimum(raw: np.ndarray) -> tuple[np.ndarray, Arrays]:
    return _nibbles(raw[..., 4:]), (_half(raw, 0), _half(raw, 2))


def _fives(raw: np.ndarray) -> np.ndarray:
    """The fifth bits, and the nibbles behind them."""
    return _nibbles(raw[..., 4:]) | (np.unpackbits(raw[..., :4], axis=-1, bitorder="little") << 4)


def _five(raw: np.ndarray) -> tuple[np.ndarray, Arrays]:
    return _fives(raw[..., 2:]), (_half(raw, 0),)


def _five_with_minimum(raw: np.ndarray) -> tuple[np.ndarray, Arrays]:
    return _fives(raw[..., 4:]), (_half(raw, 0), _half(raw, 2))


def _eight(raw: np.ndarray) -> tuple[np.ndarray, Arrays]:
    return np.ascontiguousarray(raw[..., 2:]).view(np.int8), (_half(raw, 0),)


def _ternary_1(raw: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """Bytes as fractions of 256: each factor of 3 brings the next digit in front of the point."""
    parts = []
    for begin, end, number in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        for i in range(number):
            fraction = raw[..., begin:end] * np.uint8(3**i)  # modulo 256: digits before the i-th are gone
            parts.append(fraction.astype(np.uint16) * np.uint16(3) >> 8)
    return np.concatenate(parts, axis=-1).astype(np.int8) - np.int8(1), (_half(raw, 52),)


def _ternary_2(raw: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """Four codes a byte, each 32 entries apart."""
    parts = raw[..., :64].reshape(*raw.shape[:-1], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (parts & 3).astype(np.int8).reshape(*raw.shape[:-1], 256) - np.int8(1), (_half(raw, 64),)


def _mx(raw: np.ndarray) -> tuple[np.ndarray, Arrays]:
    return _nibbles(raw[..., 1:]), (raw[..., 0],)


TYPES: dict[str, tuple[Format, Unpack]] = {
    "q4_0": (formats.q4_0(), _four),
    "q4_1": (formats.q4_1(), _four_with_minimum),
    "q5_0": (formats.q5_0(), _five),
    "q5_1": (formats.q5_1(), _five_with_minimum),
    "q8_0": (formats.q8_0(), _eight),
    "tq1_0": (formats.tq1_0(), _ternary_1),
    "tq2_0": (formats.tq2_0(), _ternary_2),
    "mxfp4": (formats.mxfp4("gguf"), _mx),
}
"""The types of GGUF that clipjax trains on, with the inverse of `Format.pack`: u8[..., block] to codes and scales."""
