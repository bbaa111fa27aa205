"""Arrays as integers: rounding to a step, codes, and the values that codes stand for."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes, elementwise
from clipjax._maths import format_blocks, grids, known_formats, split_axes
from clipjax.typing import Format, Number, Scales


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "step", "zero_point", "scales"),
    meta_fields=("bits", "axis", "group", "format"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """The integers of one leaf: weight = (code - zero_point) * step, unless a format says otherwise.

    A pytree: `codes`, `step`, `zero_point` and `scales` are arrays, the others are static, so that a function of it can
    ask `q.bits <= 4` inside jit. `dequantize(q)` gives the values.

    Attributes:
      codes: i8 up to 8 bits, i16 up to 16, i32 for unbounded codes; the shape of the weight. Of a format, as it encodes
        them.
      step: f32, broadcasts to the weight, block by block where there are groups; None with a format.
      zero_point: i32, the code of 0, a scalar 0 on symmetric grids, else of the shape of `step`; None with a format.
      bits: the width, None for unbounded codes.
      axis: the axis or axes with a step of their own, or None; with groups, those behind the axis that groups divide.
        With a format, the tuple of all output axes: its blocks run along the others.
      group: how many neighbours along all other axes, flattened in order, share a step; None without groups.
      format: the name of the format that decodes the codes, or None for the formula above.
      scales: of a format, in the dtypes that it stores, an entry for each block along the axes of the weight; one of
        the whole array is a scalar. () without a format.
    """

    codes: jax.Array
    step: jax.Array | None
    zero_point: jax.Array | None
    bits: int | None
    axis: int | tuple[int, ...] | None
    group: int | None
    format: str | None = None
    scales: Scales = ()


def formed(form: Format, codes: jax.Array, scales: Scales, outputs: tuple[int, ...]) -> Quantized:
    """The `Quantized` of a leaf that is on a format; its output axes are counted from 0."""
    return Quantized(codes, None, None, math.ceil(form.code_bits), outputs, form.block, form.name, scales)


def round_to_step(x: jax.Array, step: Number, *, rounding: str = "nearest", key: jax.Array | None = None) -> jax.Array:
    r"""Round every entry to a multiple of the step: :math:`Q(x) = \mathrm{round}(x/s)\,s` (D4).

    Args:
      x: float array of any shape.
      step: s > 0, a scalar or an array that broadcasts to `x`, also block by block.
      rounding: "nearest" (halves to even), "half_away" (D4's schoolbook rounding) or "stochastic".
      key: a PRNG key, for "stochastic" only.

    Returns:
      An array like `x`, unbounded; non-finite entries pass.

    Raises:
      ValueError: for a step that is not positive and finite, an unknown rounding, or a missing key.
      TypeError: for complex numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> round_to_step(jnp.array([0.5, 1.5, -1.5]), 1.0).tolist()
      [0.0, 2.0, -2.0]
      >>> round_to_step(jnp.array([0.5, 1.5, -1.5]), 1.0, rounding="half_away").tolist()
      [1.0, 2.0, -2.0]

    References:
      D4, section 3.2.
    """
    arguments.check_step(step)
    grids.check_rounding(rounding, key)
    x = arguments.real(x, "x")
    wide = dtypes.widened(x)
    (step,) = spread({"step": step}, x.shape, wide.dtype)
    level = grids.codes(wide, step, rounding=rounding, key=key) * step
    return jnp.where(jnp.isfinite(wide), level, wide).astype(x.dtype)


def spread(values: dict[str, Number], shape: tuple[int, ...], dtype: DTypeLike) -> list[jax.Array]:
    """Steps and zero points, by the names of their arguments, as they apply to every entry of an array."""
    for name, value in values.items():
        arguments.spreads(value, shape, name)
    return [split_axes.spread(jnp.asarray(value), shape).astype(dtype) for value in values.values()]


def quantize(
    x: jax.Array,
    step: Number,
    bits: int | None = None,
    *,
    zero_point: Number = 0,
    rounding: str = "nearest",
    key: jax.Array | None = None,
) -> jax.Array:
    r"""The integer codes of an array on a symmetric grid, or on an affine one, where 0 has the code z.

    .. math:: c = \mathrm{clip}(\mathrm{round}(x/s) + z,\ -(2^{b-1}-1),\ 2^{b-1}-1)

    One bit has the codes -1 and 1, with sign(0) = +1. NaN has the code 0. The quotient is correctly rounded on a CPU; a
    GPU's may be off by two units in the last place, so that one as close to the middle of two codes may take either.

    Args:
      x: float array of any shape.
      step: s > 0, a scalar or an array that broadcasts to `x`, also block by block: an axis of n steps then serves n
        equal groups.
      bits: b, 1 to 16, or None for unbounded codes.
      zero_point: z, an integer or an array like `step`.
      rounding: "nearest" (halves to even), "half_away" or "stochastic".
      key: a PRNG key, for "stochastic" only.

    Returns:
      i8 up to 8 bits, i16 up to 16, i32 for None; the shape of `x`.

    Raises:
      ValueError: for bits outside 1 to 16, a step that is not positive and finite, an unknown rounding.
      TypeError: for complex numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> quantize(jnp.array([-9.0, -0.3, 0.0, 0.9]), 0.5, 4).tolist()
      [-7, -1, 0, 2]

    References:
      D4, section 2.2.
    """
    arguments.check_step(step)
    grids.check_rounding(rounding, key)
    if bits is not None:
        arguments.bits(bits)
    x = dtypes.widened(arguments.real(x, "x"))
    step, zero = spread({"step": step, "zero_point": zero_point}, x.shape, x.dtype)
    whole = grids.codes(x, step, True if bits == 1 else None, rounding=rounding, key=key)
    whole = elementwise.where(jnp.isnan(x) | jnp.isnan(whole), jnp.zeros_like(x), whole) + zero
    limit = float(2**31 - 128) if bits is None else float(grids.top(bits))
    return jnp.clip(whole, -limit, limit).astype(grids.code_dtype(bits))


def dequantize(
    codes: jax.Array | Quantized, step: Number | None = None, dtype: DTypeLike = jnp.float32, *, zero_point: Number = 0
) -> jax.Array:
    """The values that codes stand for: (code - z) * s, computed in f32 and rounded once to `dtype`.

    Args:
      codes: integer array from `quantize`, or a `Quantized`, which has its own step and zero point.
      step: s, a scalar or an array that broadcasts to `codes`, also block by block; left out for a `Quantized`.
      dtype: the float dtype to return.
      zero_point: z, the code of 0 on an affine grid; an integer or an array like `step`.

    Returns:
      f[...] of the shape of `codes`.

    Raises:
      ValueError: for codes without a step, a `Quantized` with one, and a format that is not known: call its factory in
        `clipjax.formats`, or `formats.register` your own.

    Example:
      >>> import jax.numpy as jnp
      >>> dequantize(quantize(jnp.array([0.9, -0.2]), 0.5, 4), 0.5).tolist()
      [1.0, 0.0]
      >>> dequantize(Quantized(jnp.array([2, 3]), jnp.float32(0.5), jnp.int32(1), 3, None, None)).tolist()
      [0.5, 1.0]
    """
    given = isinstance(codes, Quantized)
    remedy = "Give the step of the codes; a `Quantized` has its own."
    arguments.require((step is None) == given, "step", "be given with codes alone", step, remedy)
    own = not given or (arguments.known(zero_point) and not np.any(np.asarray(zero_point)))
    arguments.require(own, "zero_point", "be given with codes alone", zero_point, "A `Quantized` has its own.")
    if isinstance(codes, Quantized):
        if codes.format is not None:
            form = known_formats.named(codes.format)
            remedy = "Make it by `quantized(params, opt_state)`."
            arguments.require(codes.scales, "codes", "have the scales of its format", codes.scales, remedy)
            whole, scales = jnp.asarray(codes.codes), tuple(map(jnp.asarray, codes.scales))
            return form.decode(whole, format_blocks.spread(scales, whole)).astype(dtype)
        assert codes.step is not None and codes.zero_point is not None
        return dequantize(codes.codes, codes.step, dtype, zero_point=codes.zero_point)
    codes = jnp.asarray(codes)
    assert step is not None  # of codes alone
    step, zero = spread({"step": step, "zero_point": zero_point}, codes.shape, dtypes.wide(dtype))
    return ((codes.astype(step.dtype) - zero) * step).astype(dtype)
