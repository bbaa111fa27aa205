"""Formats whose scale is a float as any other: integers, FP8 and NF4. `clipjax.formats` is where users find them."""

from __future__ import annotations

from typing import Literal

from clipjax._arrays import arguments
from clipjax._maths import float_blocks, float_codes, integer_blocks, known_formats
from clipjax.typing import Format

Scale = Literal["bfloat16", "float16", "float32"]


def int4(group: int | None = 128, scale: Scale = "bfloat16") -> Format:
    r"""Compressed-tensors' pack-quantized INT4: groups along the inputs, codes -8 to 7.

    .. math:: s = \max|x| / 7.5,\quad q = \mathrm{clip}(\mathrm{round}(x / s), -8, 7),\quad x \approx q s

    halves to even, s rounded to the dtype of the scale before it divides. Everything is computed in f32, as
    compressed-tensors computes with weights in f32. A group that is fitted again gets another scale, .933 or 1.067
    times this one: bytes are compared under the scales of a file.

    Args:
      group: entries along the inputs that share a scale, 128 by default, which must divide the inputs of every picked
        kernel; None for one scale an output. Static.
      scale: its dtype, "bfloat16", "float16" or "float32". Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for a group that is no multiple of 8, what a word of a file holds, or another dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scales = int4(group=8).quantize(jnp.array([[-15.0, 15.0, 3.0, 1.0] * 2]), jnp.inf, None)
      >>> codes[0, :4].tolist(), int4().bits
      ([-8, 7, 2, 0], 4.125)

    References:
      compressed-tensors, `calculate_qparams` and `pack_to_int32`.
    """
    return _integer("int4", 4, group, scale)


def int8(group: int | None = None, scale: Scale = "bfloat16") -> Format:
    """Compressed-tensors' INT8: as `int4` with max|x| / 127.5 and codes -128 to 127.

    Args:
      group: entries along the inputs that share a scale; None for one scale an output. Static.
      scale: its dtype, "bfloat16", "float16" or "float32". Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for a group that is no multiple of 4, what a word of a file holds, or another dtype.

    Example:
      >>> int8(group=32).bits
      8.5
    """
    return _integer("int8", 8, group, scale)


def _integer(kind: str, bits: int, group: int | None, scale: Scale) -> Format:
    arguments.choice(scale, "scale", ("bfloat16", "float16", "float32"))
    if group is not None:
        _check_size(
            group, "group", 32 // bits, "A word of a file has codes of one group alone; None is one scale an output."
        )
    return known_formats.made(
        f"{kind}(group={group}, scale={scale!r})",
        lambda name: integer_blocks.symmetric(name, bits, scale, group, across=1),
    )


def _check_size(size: object, name: str, unit: int, remedy: str) -> None:
    arguments.static(size, name)
    ok = isinstance(size, int) and not isinstance(size, bool) and size > 0 and size % unit == 0
    arguments.require(ok, name, f"be a multiple of {unit}", size, remedy)


def nbits(bits: Literal[2, 4, 8] = 4, block: int = 32) -> Format:
    r"""The weights of ONNX's MatMulNBits without zero points: blocks along the inputs, an f32 scale.

    .. math:: d = -m / 2^{b-1},\quad q = \mathrm{round}(x / d + 2^{b-1}),\quad x \approx d (q - 2^{b-1})

    limited to 0 … 2^b - 1, halves away from zero. m is the entry of largest magnitude with its sign, the negative one
    of equal ones, as onnxruntime's quantizer has it.

    Args:
      bits: b, 2, 4 or 8. Static.
      block: a power of two, at least 16. Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for other bits or blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> nbits(4, 16).quantize(jnp.array([[-8.0, 3.4, 0.0, 8.0] * 4]), jnp.inf, None)[0][0, :4].tolist()
      [0, 11, 8, 15]

    References:
      onnxruntime, contrib operators, com.microsoft.MatMulNBits; `BlockwiseQuantizer` of mlas.
    """
    arguments.choice(bits, "bits", (2, 4, 8))
    remedy = "The operator takes powers of two from 16 on, e.g. 32."
    _check_size(block, "block", 16, remedy)
    arguments.require(block & (block - 1) == 0, "block", "be a power of two", block, remedy)
    return known_formats.made(
        f"nbits(bits={bits}, block={block})", lambda name: integer_blocks.zero_pointed(name, bits, block)
    )


Tile = Literal["array", "channel"] | tuple[int, int]


def fp8_e4m3(block: Tile = "channel") -> Format:
    r"""FP8 with an f32 scale: s = max|x| / 448, codes the nearest E4M3 of x / s, halves to even.

    Args:
      block: what shares a scale: "array", "channel" for one scale an output, or a pair of sizes along the outputs and
        the inputs, as (128, 128). Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for another block.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scales = fp8_e4m3().quantize(jnp.array([[448.0, 9.9, -0.1]]), jnp.inf, None)
      >>> fp8_e4m3().decode(codes, scales).tolist()
      [[448.0, 10.0, -0.1015625]]

    References:
      compressed-tensors, float-quantized.
    """
    return _fp8("fp8_e4m3", float_codes.E4M3, block)


def fp8_e5m2(block: Tile = "channel") -> Format:
    """FP8 with an f32 scale: s = max|x| / 57344, codes the nearest E5M2 of x / s, halves to even.

    Args:
      block: as of `fp8_e4m3`. Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for another block.

    Example:
      >>> fp8_e5m2("array").across is None
      True
    """
    return _fp8("fp8_e5m2", float_codes.E5M2, block)


def _fp8(kind: str, layout: float_codes.Layout, block: Tile) -> Format:
    pair = isinstance(block, tuple) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    remedy = "Give a pair of sizes along the outputs and the inputs, e.g. (128, 128)."
    arguments.require(pair or block in ("array", "channel"), "block", 'be "array", "channel" or a pair', block, remedy)
    across, along = block if isinstance(block, tuple) else (1 if block == "channel" else None, None)
    return known_formats.made(f"{kind}(block={block!r})", lambda name: float_blocks.scaled(name, layout, along, across))


def nf4(block: int = 64) -> Format:
    r"""NF4: blocks of 64, an f32 scale, codes of the 16 quantiles of a normal distribution; 4.5 bits a weight.

    .. math:: s = \max|x|,\quad q = \arg\min_i |x / s - v_i|,\quad x \approx s v_q

    the lower of two levels that are as near. The levels are products that f32 rounds: a weight that `fake_quantize`
    holds may be a unit or two in the last place beside the decode of its codes, as with `q4_1`.

    Args:
      block: how many entries share a scale. Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for a block that is no whole number above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> nf4(4).quantize(jnp.array([[-2.0, 0.0, 0.1, 2.0]]), jnp.inf, None)[0].tolist()
      [[0, 7, 8, 15]]

    References:
      Dettmers et al., "QLoRA", 2023, https://arxiv.org/abs/2305.14314, appendix E.
    """
    _check_size(block, "block", 1, "bitsandbytes uses 64.")
    return known_formats.made(f"nf4(block={block})", lambda name: float_blocks.normal(name, block))
