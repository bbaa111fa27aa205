"""Arrays of a traced program, and what is known of its equations one by one: kinds, numbers, what is summed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from clipjax._programs import axes as axes_
from clipjax._programs import origins
from clipjax._programs.axes import Axis


class Value:
    """An array of the program.

    Attributes:
      axes: its axes.
      leaves: the leaves of the variables that it is made of, None where activations enter.
      constant: the number that all its entries are, where that is known.
      zero: the atoms whose dead units have entries of 0; None before that is known.
      origins: for each dimension the axes of leaves that it comes from, where activations do not enter.
    """

    __slots__ = ("axes", "constant", "leaves", "origins", "zero")

    def __init__(
        self, axes: Sequence[Axis], leaves: frozenset[int] | None = None, constant: np.ndarray | None = None
    ) -> None:
        """A value of which nothing is known about dead units."""
        self.axes, self.leaves, self.constant = tuple(axes), leaves, constant
        self.zero: frozenset[Axis] | None = None
        self.origins: origins.Origins = (origins.NONE,) * len(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its axes."""
        return tuple(axis.size for axis in self.axes)


ELEMENTWISE = set(
    "abs acos acosh add and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp clz"
    " complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt"
    " igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or"
    " optimization_barrier pcast polygamma population_count pow pvary real reduce_precision"
    " regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign"
    " sin sinh sqrt square"
    " stop_gradient sub tan tanh xor name sharding_constraint add_any mul_no_nan ad_util_stop_gradient"
    " device_put reshard layout_constraint log2 one_minus_square mulhi zeta".split()
)
REDUCTIONS = set("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split())


def fresh(aval: Any, *pins: str) -> list[Axis]:
    """New axes of the shape of a result."""
    return [Axis(size, pins) for size in getattr(aval, "shape", ())]


def pin(value: Value, reason: str, dims: Sequence[int] | None = None) -> None:
    """Forbid to cut an operand, along some of its dimensions only where they are given."""
    for i, axis in enumerate(value.axes):
        if dims is None or i in dims:
            axes_.pin(axis, reason)


def opaque(equation: Any, operands: list[Value], where: str, reason: str = "") -> list[Sequence[Axis]]:
    """Nothing is known: all operands and results are pinned."""
    reason = reason or f"{where} is not known to clipjax"
    for value in operands:
        pin(value, reason)
    return [fresh(v.aval, reason) for v in equation.outvars]


def elementwise(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    """Operands of the result's rank have its axes, but for those of size 1; so has each result of several."""
    shape = equation.outvars[0].aval.shape
    if equation.primitive.name == "bitcast_convert_type" and shape != operands[0].shape:
        return opaque(equation, operands, where, f"{where} reads its bytes as others")
    if len(equation.outvars) > 1:
        return [list(value.axes) for value in operands]
    made = fresh(equation.outvars[0].aval)
    for value in operands:
        if len(value.axes) == len(shape):
            for axis, own in zip(made, value.axes, strict=True):
                if axis.size == own.size:
                    axes_.unite(axis, own, where)
    return [made]


def evaluated(equation: Any, numbers: Sequence[Any]) -> Any:
    """The result of an equation of one result for these numbers; None where it takes none."""
    try:
        with jax.ensure_compile_time_eval():
            operands = [np.asarray(number, v.aval.dtype) for number, v in zip(numbers, equation.invars, strict=True)]
            return np.asarray(equation.primitive.bind(*operands, **equation.params))
    except Exception:  # an operation that takes no scalars
        return None


def contracted(equation: Any, operands: list[Value]) -> list[tuple[Value, Sequence[int]]]:
    """For a contraction or a convolution each operand and its dimensions that are summed over."""
    if equation.primitive.name == "dot_general":
        return list(zip(operands[:2], equation.params["dimension_numbers"][0], strict=True))
    numbers = equation.params["dimension_numbers"]
    return [(operands[0], numbers.lhs_spec[1:2]), (operands[1], numbers.rhs_spec[1:])]
