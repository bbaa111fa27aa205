"""Quantization in the forward pass, for those who keep float params and quantize in the loss."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, dtypes, elementwise
from clipjax._maths import format_blocks, grids, integers, intervals, known_formats, split_axes
from clipjax.typing import Axis, Format, Number

GRADIENTS = ("straight_through", "clipped", "lsq")


def fake_quant(
    x: jax.Array,
    step: Number | Format,
    bits: int | None = None,
    *,
    zero_point: Number = 0,
    rounding: str = "nearest",
    key: jax.Array | None = None,
    gradient: Literal["straight_through", "clipped", "lsq"] = "straight_through",
    axis: Axis = None,
) -> jax.Array:
    r"""Values on a grid, with a gradient as if rounding were the identity.

    .. math:: Q(x) = s \left(\mathrm{clip}(\mathrm{round}(x/s) + z, -n, n) - z\right),\quad n = 2^{b-1} - 1

    It is what `fake_quantize(inner=optimizer)` does to params, in the form of a function: of weights inside a loss, or
    of activations (D0's other reading of a node). The gradient with respect to x is that of the output,

    - "straight_through": everywhere;
    - "clipped": where x rounds to a level, 0 where it is clipped to the outermost (torch's rule); for one bit where
      \|x\| <= s;
    - "lsq": where x is between the outermost levels, and the step is a parameter too, with the gradient
      :math:`\frac{1}{\sqrt{N n}} \sum g\,d`, :math:`d = \mathrm{round}(x/s) - x/s` inside, the outermost level in
      units of s outside, N being the number of values that share the step. Start from
      :math:`s = 2\,\mathrm{mean}|x| / \sqrt n`.

    Args:
      x: float array of any shape.
      step: s > 0, a scalar or an array that broadcasts to `x`, also block by block; may be traced. Or a format of
        `clipjax.formats`: values are then decode(encode(x)) with the scales that its reference fits to x, and the
        arguments below but `axis` are left out.
      bits: b, 1 to 16; None for unbounded codes (D4's formula). One bit is {-s, s}. Static.
      zero_point: z, an integer or an array like `step`.
      rounding: "nearest" (halves to even), "half_away" or "stochastic".
      key: a PRNG key, for "stochastic" only.
      gradient: "straight_through", "clipped" or "lsq". Static.
      axis: with a format, the axis or axes that keep scales of their own: its blocks run along the others, flattened in
        order. The last one by default. Static.

    Returns:
      An array like `x`; entries that are not finite pass.

    Raises:
      ValueError: for bits outside 1 to 16, a step that is not positive and finite, an unknown rounding or gradient, or
        "lsq" without bits; for what a format says itself, and inputs that its blocks do not divide.
      TypeError: for complex numbers, for whole ones on a format, and for a step that is neither number nor format.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> fake_quant(jnp.array([0.6, 9.0]), 0.5, bits=2).tolist()
      [0.5, 0.5]
      >>> jax.grad(lambda x: fake_quant(x, 0.5, bits=2, gradient="clipped").sum())(jnp.array([0.6, 9.0])).tolist()
      [1.0, 0.0]
      >>> jax.grad(lambda x: fake_quant(x, 0.5, bits=2).sum())(jnp.array([0.6, 9.0])).tolist()
      [1.0, 1.0]
      >>> from clipjax import formats
      >>> fake_quant(jnp.array([-8.0, 3.4, 0.0, 7.0] * 8), formats.q4_0(), axis=())[:4].tolist()
      [-8.0, 3.0, 0.0, 7.0]

    References:
      D4, section 2.2; D0, section 2.2, step 3. Bengio et al., 2013, https://arxiv.org/abs/1308.3432. Esser et al.,
      "Learned Step Size Quantization", 2020, https://arxiv.org/abs/1902.08153.
    """
    if isinstance(step, Format):
        own = bits is None and arguments.known(zero_point) and rounding == "nearest" and gradient == "straight_through"
        remedy = "A format says bits, zero point and rounding itself, and its gradient is straight through."
        arguments.require(own, "step", "be given without more than `axis` where it is a format", step.name, remedy)
        return _formed(arguments.real(x, "x"), known_formats.register(step), axis)
    arguments.require(axis is None, "axis", "be given with a format alone", axis, "A step broadcasts to `x`.")
    if callable(step) or isinstance(step, str):
        arguments.called(step, "step", "a number or a format")
        raise TypeError(f"`step` must be a number or a format, got {step!r}. Call a factory: `formats.q4_0()`.")
    arguments.check_step(step)
    grids.check_rounding(rounding, key)
    arguments.choice(gradient, "gradient", GRADIENTS)
    if bits is not None:
        arguments.bits(bits)
    remedy = "A step is learned for a grid that has ends: give the width."
    arguments.require(bits is not None or gradient != "lsq", "bits", "be given for a learned step", bits, remedy)
    x = arguments.real(x, "x")
    wide = dtypes.widened(x)
    step = jnp.asarray(step, wide.dtype)
    fixed, by = jax.lax.stop_gradient((wide, step))
    s, zero = integers.spread({"step": by, "zero_point": zero_point}, x.shape, wide.dtype)
    code = grids.codes(fixed, s, True if bits == 1 else None, rounding=rounding, key=key)
    most = math.inf if bits is None else float(grids.top(bits))
    limited = intervals.limit(code, -most - zero, most - zero)
    level = jnp.where(jnp.isfinite(fixed), limited * s, fixed)
    at = grids.ratio(fixed, s) if gradient == "lsq" or bits == 1 else code
    outside = at != intervals.limit(at, -most - zero, most - zero)
    slope = jnp.where(outside & (gradient != "straight_through"), 0, jnp.ones_like(fixed))
    if gradient == "lsq":
        pull = jnp.where(outside, limited, limited - grids.ratio(fixed, s)) / math.sqrt(
            x.size / max(step.size, 1) * most
        )
        return _surrogate(level, wide, split_axes.spread(step, x.shape), slope, pull).astype(x.dtype)
    return _surrogate(level, wide, s, slope, jnp.zeros_like(s)).astype(x.dtype)


def _formed(x: jax.Array, form: Format, axis: Axis) -> jax.Array:
    """The values of a format as its reference makes them, with the derivative of the identity."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be a float array for a format, got {x.dtype}. Convert it: `x.astype(jnp.float32)`.")
    wide = x.astype(jnp.float32)
    fixed = jax.lax.stop_gradient(wide)
    placed = format_blocks.resolve(form, axis, "x", x)
    view = format_blocks.view(elementwise.where(jnp.isfinite(fixed), fixed, jnp.zeros_like(fixed)), placed)
    assert form.quantize is not None
    codes, scales = form.quantize(view, jnp.inf, form.precision(x.dtype), placed.within)
    level = format_blocks.joined(form.decode(codes, scales), placed, fixed)
    level = elementwise.where(jnp.isfinite(fixed), level, fixed)
    one = jnp.ones_like(fixed)
    return _surrogate(level, wide, one, one, 0 * one).astype(x.dtype)


@jax.custom_jvp
def _surrogate(level: jax.Array, x: jax.Array, step: jax.Array, slope: jax.Array, pull: jax.Array) -> jax.Array:
    """The level, with the given derivatives after x and the step."""
    return level


@_surrogate.defjvp
def _surrogate_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    level, _, _, slope, pull = primals
    _, dx, ds, _, _ = tangents
    return level, slope * dx + jnp.broadcast_to(pull * ds, level.shape)
