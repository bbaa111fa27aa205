"""`dot`: arrays times a `Quantized`, whose codes go into the contraction as they are stored."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes
from clipjax._maths import format_blocks, grids, known_formats, split_axes
from clipjax._maths.format_blocks import FormatBlocks
from clipjax._maths.integers import Quantized, dequantize


class _Kernel(NamedTuple):
    """A kernel as levels * scale + minimum.

    Attributes:
      levels: of the shape of the kernel, i8, i16, i32, fp8 or f32.
      scale: f32 of the rank of the kernel, an entry for each block along the inputs; along the outputs of size 1, or
        one for each entry.
      minimum: like `scale`, or None for 0.
    """

    levels: jax.Array
    scale: jax.Array
    minimum: jax.Array | None


def dot(
    x: jax.Array, quantized: Quantized, *, axis: int | tuple[int, ...] | None = None, integers: bool = False
) -> jax.Array:
    r"""An array times a quantized kernel, without a float kernel: for serving in JAX itself.

    .. math:: y_o = \sum_b s_{bo} \sum_{i \in b} x_i\, k_{io} + \sum_b m_{bo} \sum_{i \in b} x_i

    k are the codes of block b and output o, s their scale and m their minimum; without blocks along the inputs there is
    one b. On a grid k is the code, s the step and m = -z s. The codes are an operand of `jax.lax.dot_general` as i8, or
    as `float8_e4m3fn` and `float8_e5m2`, beside x in its own dtype; sums are f32. It equals `tensordot(x,
    dequantize(quantized))` but for the rounding of sums.

    The program has no float kernel: codes and x meet in the contraction, and a compiler that reads operands of two
    dtypes, or converts one on its way in, makes none either. A CPU's converts all codes to f32 before a large
    contraction. Levels of NF4 and codes of more than 8 bits are f32 operands in any case. Blocks along the inputs take
    rows * outputs * blocks f32 for partial sums; where these are more than the weights, as in a prefill, the kernel is
    decoded to f32 instead, or, with `integers`, rows take turns. A kernel on a
    format without `Format.factors` is always decoded.

    Args:
      x: f[..., inputs], the input axes of the kernel last, in its order: two axes for a kernel of f[heads, size, out].
      quantized: a leaf of `clipjax.quantized`, or any other `Quantized`; its arrays may be traced, and stacked where
        `jax.vmap` or `jax.lax.scan` takes a layer of them.
      axis: the output axes of the kernel; all others are inputs. By default those that `quantized` notes, or else the
        last one. Where a stacked leaf has lost leading axes to `vmap` or `scan`, those that it notes are counted on
        without them.
      integers: also quantize x, dynamically to i8 with a step max|x| / 127 for each row, so that both operands are
        integers and sums are i32, exact; for codes of at most 8 bits. The derivative is that without it. Static.

    Returns:
      f[..., outputs] in the dtype of x.

    Raises:
      TypeError: for a `quantized` that is no `Quantized`, and for an x that has no floats.
      ValueError: for shapes that do not fit, an axis that does not exist, a format that is not known, and `integers`
        with codes that are no integers of 8 bits, or so many that sums could exceed i32.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = Quantized(jnp.array([[2, -1], [3, 4]], jnp.int8), jnp.float32(0.5), jnp.int32(0), 4, None, None)
      >>> dot(jnp.array([1.0, 2.0]), kernel).tolist()
      [4.0, 3.5]
      >>> bool((jnp.array([1.0, 2.0]) @ dequantize(kernel) == dot(jnp.array([1.0, 2.0]), kernel)).all())
      True

    References:
      Frantar et al., "MARLIN", 2024, https://arxiv.org/abs/2408.11743, section 2: weights of few bits, floats
      accumulated; Dettmers et al., "LLM.int8()", 2022, https://arxiv.org/abs/2208.07339: rows quantized dynamically.
    """
    if not isinstance(quantized, Quantized):
        remedy = "Take a leaf of `clipjax.quantized(params, opt_state)`; plain kernels are multiplied by `@`."
        raise TypeError(f"`quantized` must be a Quantized, got {type(quantized).__name__}. {remedy}")
    arguments.static(integers, "integers")
    x = arguments.real(x, "x")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floats, got {x.dtype}. Convert it, e.g. by `x.astype(jnp.bfloat16)`.")
    outputs = _outputs(quantized, axis)
    inputs = tuple(i for i in range(quantized.codes.ndim) if i not in outputs)
    shape = tuple(quantized.codes.shape[i] for i in inputs)
    remedy = f"The kernel has shape {quantized.codes.shape} and output axes {outputs}: name others by `axis`."
    arguments.require(inputs, "axis", "leave an input axis", axis, remedy)
    fits = x.ndim >= len(inputs) and x.shape[x.ndim - len(inputs) :] == shape
    arguments.require(fits, "x", f"have last axes of shape {shape}", x.shape, remedy)
    kernel = _kernel(quantized, outputs)
    if integers:
        _check_integers(quantized, kernel, outputs)
        return _of_integers(x, kernel, outputs)
    return _of_floats(x, kernel, outputs)


def _outputs(q: Quantized, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The output axes, counted from 0 and in order."""
    given = (q.axis if q.axis is not None else -1) if axis is None else axis
    axes = given if isinstance(given, tuple) else (given,)
    lost = max([0, *(i - q.codes.ndim + 1 for i in axes)]) if axis is None else 0
    kept = [i if i < 0 else i - lost for i in axes if i < 0 or i >= lost]
    ok = all(-q.codes.ndim <= i < q.codes.ndim for i in kept)
    arguments.require(ok, "axis", f"name axes of an array of rank {q.codes.ndim}", given, "The last one is -1.")
    return tuple(sorted({i % q.codes.ndim for i in kept}))


def _kernel(q: Quantized, outputs: tuple[int, ...]) -> _Kernel:
    """The factors of a kernel, constants to a derivative."""
    minimum: jax.Array | None
    if q.format is None:
        assert q.step is not None and q.zero_point is not None
        levels, scale, minimum = q.codes, q.step, None
        if not (arguments.known(q.zero_point) and not q.zero_point.any()):
            minimum = -q.zero_point.astype(scale.dtype) * scale
    else:
        form = known_formats.named(q.format)
        if form.factors is None:
            levels, scale, minimum = dequantize(q), jnp.ones((), jnp.float32), None
        else:
            levels, scale, minimum = form.factors(q.codes, q.scales)
    laid = [None if a is None else _laid(a, q.codes.shape, outputs) for a in (scale, minimum)]
    sizes = jnp.broadcast_shapes(*(a.shape for a in laid if a is not None))
    found = [None if a is None else jax.lax.stop_gradient(jnp.broadcast_to(a, sizes)) for a in laid]
    assert found[0] is not None
    return _Kernel(jax.lax.stop_gradient(levels), found[0], found[1])


def _laid(scale: jax.Array, shape: tuple[int, ...], outputs: tuple[int, ...]) -> jax.Array:
    """Scales in the rank of the kernel, spread over the outputs of a block."""
    scale = jnp.reshape(scale, (1,) * (len(shape) - scale.ndim) + scale.shape)
    return split_axes.spread(scale, tuple(n if i in outputs else scale.shape[i] for i, n in enumerate(shape)))


def _of_floats(x: jax.Array, kernel: _Kernel, outputs: tuple[int, ...]) -> jax.Array:
    """The product with x as it is."""
    wide = dtypes.wide(x.dtype)
    of_x, of_kernel = _blocks(x, kernel, outputs)
    rows, blocked = math.prod(x.shape[i] for i in of_x.outputs), len(_counted(of_kernel)) > 0
    if blocked and rows > math.prod(of_kernel.box):  # there would be more partial sums than weights
        levels, scale = kernel.levels.astype(wide), split_axes.spread(kernel.scale, kernel.levels.shape).astype(wide)
        levels = levels * scale
        if kernel.minimum is not None:
            levels += split_axes.spread(kernel.minimum, levels.shape).astype(wide)
        ones = jnp.ones((1,) * levels.ndim, jnp.float32)
        kernel = _Kernel(levels, ones, None)
    own = x if kernel.levels.dtype.itemsize == 1 else x.astype(wide)
    levels = kernel.levels if kernel.levels.dtype.itemsize == 1 else kernel.levels.astype(wide)
    return _contracted(own, kernel._replace(levels=levels), outputs, wide, wide).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _of_integers(x: jax.Array, kernel: _Kernel, outputs: tuple[int, ...]) -> jax.Array:
    """The product with x as i8 times a step for each row."""
    wide = x.astype(dtypes.wide(x.dtype))
    axes = tuple(range(x.ndim - kernel.levels.ndim + len(outputs), x.ndim))
    step = grids.ratio(jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0.0), 127.0)
    step = jnp.where(step == 0, jnp.ones_like(step), step)
    codes = jax.lax.round(grids.ratio(wide, step), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    codes = jnp.clip(codes, -127.0, 127.0).astype(jnp.int8)
    of_x, of_kernel = _blocks(codes, kernel, outputs)
    rows, each = math.prod(x.shape[i] for i in of_x.outputs), math.prod(of_kernel.box)
    fn = lambda x: _contracted(x, kernel, outputs, jnp.dtype(jnp.int32), wide.dtype)  # noqa: E731
    if _counted(of_kernel) and rows > each:  # so many rows at once that there are no more partial sums than weights
        flat = jax.lax.map(fn, jnp.reshape(codes, (rows, *x.shape[axes[0] :])), batch_size=each)
        y = jnp.reshape(flat, (*x.shape[: axes[0]], *flat.shape[1:]))
    else:
        y = fn(codes)
    return (y * jnp.reshape(step, (*step.shape[: axes[0]], *(1,) * len(outputs)))).astype(x.dtype)


@_of_integers.defjvp
def _slope(
    outputs: tuple[int, ...], primals: tuple[jax.Array, _Kernel], tangents: tuple[jax.Array, _Kernel]
) -> tuple[jax.Array, jax.Array]:
    """The derivative is that of `_of_floats`: rounding has none."""
    (x, kernel), (tangent, _) = primals, tangents
    return _of_integers(x, kernel, outputs), _of_floats(tangent, kernel, outputs)


def _check_integers(q: Quantized, kernel: _Kernel, outputs: tuple[int, ...]) -> None:
    """Check that both operands can be i8 and their sums i32."""
    kind = kernel.levels.dtype
    remedy = "Leave `integers` out, or take a format of integers, e.g. `formats.int8()`."
    whole = kind == jnp.int8
    arguments.require(whole, "integers", "be False where codes are no integers of 8 bits", q.format or kind, remedy)
    rule = "be False where more than 2^17 inputs share a scale, so that their sum may exceed i32"
    inputs = [i for i in range(kernel.levels.ndim) if i not in outputs]
    each = math.prod(kernel.levels.shape[i] // max(kernel.scale.shape[i], 1) for i in inputs)
    arguments.require(each <= 1 << 17, "integers", rule, each, "Take a format with blocks.")


def _blocks(x: jax.Array, kernel: _Kernel, outputs: tuple[int, ...]) -> tuple[FormatBlocks, FormatBlocks]:
    """The blocks along the inputs of x and of the kernel; the other axes of x are its rows."""
    shape = kernel.levels.shape
    box = tuple(1 if i in outputs else n // max(kernel.scale.shape[i], 1) for i, n in enumerate(shape))
    along = tuple(b for i, b in enumerate(box) if i not in outputs)
    rows = x.ndim - len(along)
    of_x = FormatBlocks(tuple(range(rows)), (*(1,) * rows, *along), x.shape)
    return of_x, FormatBlocks(outputs, box, shape)


def _counted(placed: FormatBlocks) -> list[int]:
    """The axes along which there are several blocks."""
    return [
        i for i, (n, b) in enumerate(zip(placed.shape, placed.box, strict=True)) if i not in placed.outputs and b < n
    ]


def _contracted(x: jax.Array, kernel: _Kernel, outputs: tuple[int, ...], sums: DTypeLike, wide: DTypeLike) -> jax.Array:
    """A contraction for each block, its sums of one dtype; then times the scales and summed in another."""
    of_x, of_kernel = _blocks(x, kernel, outputs)
    view, levels = format_blocks.view(x, of_x), format_blocks.view(kernel.levels, of_kernel)
    seen = ((view, of_x), (levels, of_kernel))
    x_blocks, k_blocks = ([placed.first[i] for i in _counted(placed)] for _, placed in seen)
    x_inside, k_inside = ([i for i in range(a.ndim) if i not in _outside(placed)] for a, placed in seen)
    axes = ((x_inside, k_inside), (x_blocks, k_blocks))
    found = jax.lax.dot_general(view, levels, axes, preferred_element_type=sums)
    # [blocks…, rows…, outputs…]: scales have the blocks first, too.
    rows = len(of_x.outputs)
    scale = _by_block(kernel.scale, of_kernel, rows).astype(wide)
    over = tuple(range(len(x_blocks)))
    y = jnp.sum(found.astype(wide) * scale, axis=over)
    if kernel.minimum is None:
        return y
    each = jnp.sum(view.astype(sums), axis=tuple(x_inside)).astype(wide)  # [rows…, blocks…]
    each = jnp.moveaxis(each, tuple(range(rows, each.ndim)), over)
    each = jnp.reshape(each, (*each.shape, *(1,) * len(outputs)))
    return y + jnp.sum(each * _by_block(kernel.minimum, of_kernel, rows).astype(wide), axis=over)


def _outside(placed: FormatBlocks) -> list[int]:
    """The axes of a view that blocks follow along, that are outputs of the kernel, or rows of x."""
    return [placed.first[i] for i in (*placed.outputs, *_counted(placed))]


def _by_block(scale: jax.Array, placed: FormatBlocks, rows: int) -> jax.Array:
    """Scales as [blocks…, 1 for each axis of rows, outputs…]."""
    counted = _counted(placed)
    scale = jax.lax.squeeze(scale, [i for i in range(scale.ndim) if i not in (*counted, *placed.outputs)])
    left = sorted((*counted, *placed.outputs))
    order = [left.index(i) for i in (*counted, *placed.outputs)]
    return jnp.expand_dims(jnp.transpose(scale, order), range(len(counted), len(counted) + rows))
