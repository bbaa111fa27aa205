"""Formats: blocks of codes with scales, as files store them and runtimes read them, for `fake_quantize`."""

from __future__ import annotations

from typing import Literal

from clipjax._arrays import arguments
from clipjax._maths import float_blocks, float_codes, integer_blocks, known_formats
from clipjax._maths.block_bytes import gguf_8, gguf_ternary_1, gguf_ternary_2
from clipjax._maths.free_formats import fp8_e4m3, fp8_e5m2, int4, int8, nbits, nf4
from clipjax.typing import Format

__all__ = [
    "Format",
    "fp8_e4m3",
    "fp8_e5m2",
    "int4",
    "int8",
    "mxfp4",
    "mxfp8",
    "nbits",
    "nf4",
    "nvfp4",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "register",
    "tq1_0",
    "tq2_0",
]


def __dir__() -> list[str]:
    return __all__


def q4_0() -> Format:
    r"""GGUF's Q4_0: blocks of 32, an f16 scale, 4-bit codes; 4.5 bits a weight.

    .. math:: d = -m / 8,\quad q = \min(\lfloor x / d + 8.5 \rfloor, 15),\quad x \approx d_{16} (q - 8)

    m is the entry of largest magnitude with its sign, the first of equal ones; d as it is divides, and rounded to f16
    it multiplies.

    Returns:
      A `Format`.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scales = q4_0().quantize(jnp.array([[-8.0, 3.4, 0.0, 7.0] * 8]), jnp.inf, None)
      >>> codes[0, :4].tolist(), q4_0().decode(codes, scales)[0, :4].tolist()
      ([0, 11, 8, 15], [-8.0, 3.0, 0.0, 7.0])
      >>> q4_0().bits
      4.5

    References:
      gguf-py, `quants.Q4_0`, https://github.com/ggml-org/llama.cpp/tree/master/gguf-py.
    """
    return known_formats.made("q4_0", lambda name: integer_blocks.signed_extremum(name, 8))


def q5_0() -> Format:
    """GGUF's Q5_0: as `q4_0`, with 5-bit codes; 5.5 bits a weight.

    Returns:
      A `Format`.

    Example:
      >>> q5_0().bits
      5.5
    """
    return known_formats.made("q5_0", lambda name: integer_blocks.signed_extremum(name, 16))


def q4_1() -> Format:
    r"""GGUF's Q4_1: blocks of 32, an f16 scale and an f16 minimum, 4-bit codes; 5 bits a weight.

    .. math:: d = (\max x - \min x) / 15,\quad q = \lfloor (x - \min x) / d + 0.5 \rfloor,\quad
       x \approx d_{16} q + \mathrm{min}_{16}

    0 is no level in general, so that pruned weights do not stay zeros.

    A level has more digits than f32, so that params + updates may not be it: a weight that `fake_quantize` holds may be
    a unit or two in the last place beside the decode of its bytes, until an update lands on it. `quantized` and the
    writers give it the code of that level, and who reads the file has the level itself.

    Returns:
      A `Format`.

    Example:
      >>> q4_1().bits, q4_1().zero
      (5.0, False)
    """
    return known_formats.made("q4_1", lambda name: integer_blocks.affine(name, 15))


def q5_1() -> Format:
    """GGUF's Q5_1: as `q4_1`, with 5-bit codes; 6 bits a weight. Held weights are as close to their levels.

    Returns:
      A `Format`.

    Example:
      >>> q5_1().bits
      6.0
    """
    return known_formats.made("q5_1", lambda name: integer_blocks.affine(name, 31))


def q8_0() -> Format:
    r"""GGUF's Q8_0: blocks of 32, an f16 scale, codes -127 to 127; 8.5 bits a weight.

    .. math:: d = \max|x| / 127,\quad q = \mathrm{round}(x / d),\quad x \approx d_{16} q

    halves away from zero; d as it is divides.

    Returns:
      A `Format`.

    Example:
      >>> import jax.numpy as jnp
      >>> q8_0().quantize(jnp.array([[127.0, 2.5, -2.5, 0.0] * 8]), jnp.inf, None)[0][0, :4].tolist()
      [127, 3, -3, 0]
    """
    return known_formats.made("q8_0", lambda name: integer_blocks.absmax(name, 127, 32, 8, gguf_8))


def tq1_0() -> Format:
    r"""GGUF's TQ1_0: blocks of 256, an f16 scale, codes -1, 0, 1, five a byte; 1.6875 bits a weight.

    .. math:: d = \max|x|,\quad q = \mathrm{round}(x / d),\quad x \approx d_{16} q

    halves away from zero.

    Returns:
      A `Format`.

    Example:
      >>> tq1_0().bits
      1.6875
    """
    return known_formats.made("tq1_0", lambda name: integer_blocks.absmax(name, 1, 256, 1.625, gguf_ternary_1))


def tq2_0() -> Format:
    """GGUF's TQ2_0: the values of `tq1_0` at four codes a byte, which is faster to read; 2.0625 bits a weight.

    Returns:
      A `Format`.

    Example:
      >>> tq2_0().bits
      2.0625
    """
    return known_formats.made("tq2_0", lambda name: integer_blocks.absmax(name, 1, 256, 2, gguf_ternary_2))


def mxfp4(scale: Literal["gguf", "ocp", "qwix", "compressed-tensors"] = "gguf") -> Format:
    r"""MXFP4: blocks of 32, a power of two as scale (E8M0), codes of E2M1; 4.25 bits a weight.

    .. math:: x \approx 2^{e - 127} c,\quad c \in \{0, \pm.5, \pm 1, \pm 1.5, \pm 2, \pm 3, \pm 4, \pm 6\}

    Every reader decodes alike; writers choose e by rules that differ. Name the one whose quantizer may see the weights
    again, so that it keeps them:

    - "gguf": :math:`\lfloor \log_2 \max|x| \rfloor - 2`, the logarithm rounded to f32 as llama.cpp does; halves to the
      lower code, no -0;
    - "ocp": the same with the exact logarithm, as the specification has it; halves to even;
    - "qwix": :math:`\lceil \log_2 (\max|x| / 6) \rceil`, so that nothing saturates; halves to even;
    - "compressed-tensors": as "ocp", one more from :math:`1.75 \cdot 2^k` on; halves to even.

    Args:
      scale: the rule. Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for another rule.

    Example:
      >>> import jax.numpy as jnp
      >>> x, rules = jnp.full((1, 32), 7.5), ("gguf", "ocp", "qwix", "compressed-tensors")
      >>> [int(mxfp4(rule).fit(x, jnp.inf, None)[0][0, 0]) - 127 for rule in rules]
      [0, 0, 1, 1]

    References:
      OCP Microscaling Formats (MX) Specification 1.0, 2023. gguf-py, `quants.MXFP4`; qwix, `qarray`;
      compressed-tensors, `mxfp_utils`.
    """
    arguments.choice(scale, "scale", ("gguf", "ocp", "qwix", "compressed-tensors"))
    return known_formats.made(f"mxfp4(scale={scale!r})", lambda name: float_blocks.mx(name, float_codes.E2M1, scale))


def mxfp8(
    element: Literal["e4m3", "e5m2"] = "e4m3",
    scale: Literal["ocp", "qwix", "compressed-tensors"] = "compressed-tensors",
) -> Format:
    r"""MXFP8: blocks of 32, a power of two as scale (E8M0), codes of E4M3 or E5M2; 8.25 bits a weight.

    The rules for e are those of `mxfp4` with the largest element, 448 or 57344, in the place of 6 and its exponent, 8
    or 15, in that of 2. Halves go to the even code. Qwix and compressed-tensors have E4M3 alone.

    Args:
      element: the code, "e4m3" or "e5m2". Static.
      scale: the rule, "ocp", "qwix" or "compressed-tensors". Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for another element or rule.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scales = mxfp8().quantize(jnp.full((1, 32), 0.3), jnp.inf, None)
      >>> float(mxfp8().decode(codes, scales)[0, 0])
      0.3125
    """
    arguments.choice(element, "element", ("e4m3", "e5m2"))
    arguments.choice(scale, "scale", ("ocp", "qwix", "compressed-tensors"))
    layout = float_codes.E4M3 if element == "e4m3" else float_codes.E5M2
    return known_formats.made(
        f"mxfp8(element={element!r}, scale={scale!r})",
        lambda name: float_blocks.mx(name, layout, scale),
    )


def nvfp4(scale: Literal["compressed-tensors", "modelopt"] = "compressed-tensors") -> Format:
    r"""NVFP4: blocks of 16, an E4M3 scale, codes of E2M1, and one f32 for the array; 4.5 bits a weight.

    .. math:: g = 448 \cdot 6 / \max|x|,\quad s = \mathrm{E4M3}(g\, m / 6),\quad x \approx c\, s / g

    with m the largest magnitude of the block. That is compressed-tensors, where g divides; ModelOpt stores the inverse,
    :math:`f = \max|x| / 2688`, :math:`s = \mathrm{E4M3}(m / 6f)` and :math:`x \approx c\, s f`. Halves go to the even
    code, and small negative entries to -0. With a precision g and f are powers of two, so that values are exact.

    Args:
      scale: whose f32 it is, "compressed-tensors" or "modelopt". Static.

    Returns:
      A `Format`.

    Raises:
      ValueError: for another one.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scales = nvfp4().quantize(jnp.array([[6.0, -3.0, 0.5, 0.2] * 4]), jnp.inf, None)
      >>> nvfp4().decode(codes, scales)[0, :4].tolist(), float(scales[1])
      ([6.0, -3.0, 0.5, 0.0], 448.0)

    References:
      compressed-tensors, `generate_gparam`; NVIDIA ModelOpt, `NVFP4QTensor`.
    """
    arguments.choice(scale, "scale", ("compressed-tensors", "modelopt"))
    return known_formats.made(
        f"nvfp4(scale={scale!r})", lambda name: float_blocks.nvfp4(name, divisor=scale == "compressed-tensors")
    )


def register(format: Format) -> Format:
    """Make a format of your own known, so that a state or a file that names its id finds it.

    `quantize`, where it is None, becomes `fit` followed by `encode`.

    Args:
      format: a `Format`, with a name of its own.

    Returns:
      The format, to be passed where the others are.

    Raises:
      TypeError: for something else.
      ValueError: for a name, or an id, that another format has.

    Example:
      >>> import jax.numpy as jnp
      >>> def fit(x, limit, precision, axes=(-1,)):
      ...     return (jnp.max(jnp.abs(x), axis=axes, keepdims=True),)
      >>> def encode(x, scales, limit):
      ...     return jnp.sign(x).astype(jnp.int8)
      >>> def decode(codes, scales):
      ...     return codes * scales[0]
      >>> signs = register(Format("signs", fit, encode, decode, code_bits=2, scale_bits=32, block=4))
      >>> codes, scales = signs.quantize(jnp.array([[0.5, -2.0, 0.0, 1.0]]), jnp.inf, None)
      >>> signs.decode(codes, scales).tolist(), signs.bits
      ([[2.0, -2.0, 0.0, 2.0]], 10.0)
    """
    arguments.instance(format, Format, "format", "Build it as `Format(name, fit, encode, decode, …)`.")
    return known_formats.register(format)


def _usual() -> None:
    """Make formats of usual parameters known, so that a state is read where their factories were not called."""
    for make in (q4_0, q4_1, q5_0, q5_1, q8_0, tq1_0, tq2_0):
        make()
    forms = [mxfp4("gguf"), mxfp4("ocp"), mxfp4("qwix"), mxfp4("compressed-tensors")]
    forms += [mxfp8("e4m3", "ocp"), mxfp8("e4m3", "qwix"), mxfp8("e4m3", "compressed-tensors")]
    forms += [mxfp8("e5m2", "ocp"), mxfp8("e5m2", "qwix"), mxfp8("e5m2", "compressed-tensors")]
    forms += [nvfp4("compressed-tensors"), nvfp4("modelopt")]
    for scale in ("bfloat16", "float16", "float32"):
        for group in (None, 16, 32, 64, 128, 256, 512, 1024):
            int4(group, scale)
            int8(group, scale)
    for size in (16, 32, 64, 128, 256):
        nf4(size)
        for bits in (2, 4, 8):
            nbits(bits, size)
    for block in ("array", "channel", (128, 128)):
        fp8_e4m3(block)
        fp8_e5m2(block)


_usual()
