"""The type of deployment formats, for `clipjax.typing`: what `clipjax.formats` returns, and users may implement."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import TypeAlias

import jax

Scales: TypeAlias = tuple[jax.Array, ...]
"""What a format stores of blocks beside their codes, in its dtypes: the bits of f16 as u16, of E4M3 and E8M0 as u8, or
f32. All have size 1 along the axes of a block, but for one of the whole array, which is a scalar."""

Quantize: TypeAlias = Callable[[jax.Array, jax.typing.ArrayLike, int | None, tuple[int, ...]], tuple[jax.Array, Scales]]
"""`quantize(x, limit, precision, axes) -> (codes, scales)`, of blocks along some axes."""

Pack: TypeAlias = Callable[[jax.typing.ArrayLike, tuple[jax.typing.ArrayLike, ...]], tuple[jax.typing.ArrayLike, ...]]
"""`pack(codes, scales) -> arrays` of a file, in NumPy, from [..., blocks, block] and [..., blocks, 1]."""


Factors: TypeAlias = Callable[[jax.Array, Scales], tuple[jax.Array, jax.Array, jax.Array | None]]
"""`factors(codes, scales) -> (levels, scale, minimum)`: a value is level * scale + minimum; None stands for 0."""


@dataclasses.dataclass(frozen=True, repr=False)
class Format:
    """A deployment format: blocks of codes with scales, and the rule by which its reference makes them.

    A block lies along some axes of an array, and its scales have size 1 there. All functions work in f32, on finite
    numbers; `encode` and `decode` work entry by entry, and take scales that broadcast to the array. A format of your
    own needs the first six fields; `formats.register` makes it known by its id. JAX takes a format as one leaf of a
    tree.

    Attributes:
      name: with the static parameters, as `"int4(group=128, scale='bfloat16')"`; two formats have two names.
      fit: `fit(x, limit, precision, axes) -> scales` of the blocks along `axes`, a tuple; those of `clipjax.formats`
        take the last axis by default. Pruned entries of `x` are 0. No level exceeds `limit`, which broadcasts to the
        scales and is at least 0; it is infinite for the reference to the bit. `precision` is how many significant bits
        a scale keeps, None for all.
      encode: `encode(x, scales, limit) -> codes` under given scales, u8 or i8; `limit` broadcasts to x.
      decode: `decode(codes, scales) -> f32`.
      code_bits: bits of a code.
      scale_bits: bits of the scales of a block.
      block: how many entries along the inputs share scales; None for all of them.
      across: how many outputs do; None for all of them. A block of several is flattened into the last axis.
      zero: True where 0 is a level of every block.
      exact: True where levels, with the precision that is asked for, and their differences are exact in f32.
      quantize: both at once, for a rule that divides by the scale before it is rounded; None for `fit`, then `encode`.
      precision: `precision(dtype) -> int | None`: the argument of `fit` with which code * scale is exact in a param's
        dtype, and an update lands on it.
      gap: `gap(scales) -> f32`, the distance of 0 to the nearest other level, for a cheap answer to what is surely 0;
        None to have it encoded.
      sides: True where `limit` may be a pair too, of how far levels may extend below zero, and above. Otherwise `fit`
        is given the larger one.
      pack: the bytes of a file, None for a format without one.
      factors: what `decode` multiplies, for `clipjax.dot`: levels of the shape of the codes, in i8 or an fp8 dtype
        where they fit, and a scale and a minimum of the shape of the scales. None to have `dot` decode the weights.
    """

    name: str
    fit: Callable[[jax.Array, jax.typing.ArrayLike, int | None, tuple[int, ...]], Scales]
    encode: Callable[[jax.Array, Scales, jax.typing.ArrayLike], jax.Array]
    decode: Callable[[jax.Array, Scales], jax.Array]
    code_bits: float
    scale_bits: int
    block: int | None = None
    across: int | None = 1
    zero: bool = True
    exact: bool = False
    quantize: Quantize | None = None
    precision: Callable[[jax.typing.DTypeLike], int | None] = lambda dtype: None
    gap: Callable[[Scales], jax.Array] | None = None
    sides: bool = False
    pack: Pack | None = None
    factors: Factors | None = None

    def __repr__(self) -> str:
        return f"Format({self.name!r})"

    @property
    def id(self) -> int:
        """The CRC-32 of the name, by which a state and a file name the format."""
        return zlib.crc32(self.name.encode())

    @property
    def bits(self) -> float:
        """Bits a weight, with its share of the scales where the size of a block is fixed."""
        size = (self.block or 0) * (self.across or 0)
        return self.code_bits + (self.scale_bits / size if size else 0)
