"""What each primitive of JAX does to axes: which axes of its results are those of its operands, and what it pins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from clipjax._programs import axes as axes_
from clipjax._programs.axes import Axis
from clipjax._programs.equations import REDUCTIONS, Value, fresh, opaque, pin

Rule = Callable[[Any, list[Value], str], list[Sequence[Axis]]]
"""`rule(equation, operands, where) -> axes of each result`; `where` names the equation in reasons."""

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


@rule(*REDUCTIONS)
def _reduce(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    gone = equation.params["axes"]
    if equation.primitive.name in ("argmax", "argmin"):
        pin(operands[0], f"{where} gives a position in it", gone)
    return [[axis for i, axis in enumerate(operands[0].axes) if i not in gone]]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    pin(operands[0], f"{where} adds up along it", [equation.params["axis"]])
    return [list(operands[0].axes)]


@rule("sort")
def _sort(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    for value in operands:
        pin(value, f"{where} orders its entries", [equation.params["dimension"]])
        for a, b in zip(operands[0].axes, value.axes, strict=True):
            axes_.unite(a, b, where)
    return [list(operands[0].axes) for _ in operands]


@rule("top_k")
def _top_k(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    pin(operands[0], f"{where} orders its entries", [len(operands[0].axes) - 1])
    return [[*operands[0].axes[:-1], Axis(v.aval.shape[-1], [f"{where} orders its entries"])] for v in equation.outvars]


@rule("rev")
def _rev(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    pin(operands[0], f"{where} reverses it", equation.params["dimensions"])
    return [list(operands[0].axes)]


@rule("psum", "psum2", "psum_invariant", "pmax", "pmin")
def _across_devices(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    return [list(value.axes) for value in operands]


@rule("transpose")
def _transpose(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    return [[operands[0].axes[i] for i in equation.params["permutation"]]]


@rule("reshape")
def _reshape(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    if equation.params.get("dimensions") is not None:
        return opaque(equation, operands, where)
    return [axes_.regroup(operands[0].axes, equation.outvars[0].aval.shape, where)]


@rule("squeeze", "expand_dims")
def _squeeze(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    return [axes_.regroup(operands[0].axes, equation.outvars[0].aval.shape, where)]


@rule("broadcast_in_dim")
def _broadcast(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    made = fresh(equation.outvars[0].aval)
    for axis, to in zip(operands[0].axes, equation.params["broadcast_dimensions"], strict=True):
        if axis.size == made[to].size:
            made[to] = axis
    return [made]


@rule("concatenate")
def _concatenate(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    along = equation.params["dimension"]
    for value in operands[1:]:
        for i, (a, b) in enumerate(zip(operands[0].axes, value.axes, strict=True)):
            if i != along:
                axes_.unite(a, b, where)
    made = list(operands[0].axes)
    made[along] = axes_.total([value.axes[along] for value in operands])
    return [made]


@rule("stack")
def _stack(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    for value in operands[1:]:
        for a, b in zip(operands[0].axes, value.axes, strict=True):
            axes_.unite(a, b, where)
    made = list(operands[0].axes)
    made.insert(equation.params["axis"], Axis(len(operands), [f"{where} puts as many arrays side by side"]))
    return [made]


@rule("unstack")
def _unstack(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    along = equation.params["axis"]
    pin(operands[0], f"{where} takes each of its entries", [along])
    return [[axis for i, axis in enumerate(operands[0].axes) if i != along]] * len(equation.outvars)


@rule("fft")
def _fft(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    rank = len(operands[0].axes)
    along = range(rank - len(equation.params["fft_lengths"]), rank)
    pin(operands[0], f"{where} runs along it", along)
    made = fresh(equation.outvars[0].aval, f"{where} runs along it")
    return [[made[i] if i in along else axis for i, axis in enumerate(operands[0].axes)]]


@rule("tile")
def _tile(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    def tiled(axis: Axis, times: int) -> Axis:
        return axis if times == 1 else axes_.product([Axis(times, [f"{where} repeats it as often"]), axis])

    return [[tiled(axis, n) for axis, n in zip(operands[0].axes, equation.params["reps"], strict=True)]]


@rule("pad")
def _pad(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    made = []
    for axis, (low, high, interior), size in zip(
        operands[0].axes, equation.params["padding_config"], equation.outvars[0].aval.shape, strict=True
    ):
        if interior or low < 0 or high < 0:
            axes_.pin(axis, f"{where} puts entries between its own, or cuts some")
            made.append(Axis(size, [f"{where} puts entries between others"]))
        elif low or high:
            made.append(axes_.total([Axis(low), axis, Axis(high)]))
        else:
            made.append(axis)
    return [made]


@rule("slice")
def _slice(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    ranges = zip(operands[0].axes, starts, limits, strides, strict=True)
    return [[_range(axis, start, limit, stride, where) for axis, start, limit, stride in ranges]]


def _range(axis: Axis, start: int, limit: int, stride: int, where: str) -> Axis:
    """The entries from start to limit of an axis, every one or one of `stride`."""
    size = -(-(limit - start) // stride)
    if stride == 1:
        return axis if size == axis.size else axes_.cut(axis, [start, size, axis.size - limit], where)[1]
    if axis.size % stride == 0 and start < stride and size == axis.size // stride:
        return axes_.split(axis, [size, stride], where)[0]
    axes_.pin(axis, f"{where} takes one entry of {stride}")
    return Axis(size, [f"{where} takes one entry of {stride}"])


@rule("split")
def _split(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    along = equation.params["axis"]
    parts = axes_.cut(operands[0].axes[along], list(equation.params["sizes"]), where)
    return [[part if i == along else axis for i, axis in enumerate(operands[0].axes)] for part in parts]


@rule("dynamic_slice")
def _dynamic_slice(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    made = []
    starts = [_literal(v) for v in equation.invars[1:]]
    for axis, start, size in zip(operands[0].axes, starts, equation.params["slice_sizes"], strict=True):
        if size == axis.size:
            made.append(axis)
        elif start is not None:
            start = min(max(int(start), 0), axis.size - size)
            made.append(_range(axis, start, start + size, 1, where))
        else:
            axes_.pin(axis, f"{where} takes entries that the data decide")
            made.append(Axis(size, [f"{where} takes entries that the data decide"]))
    return [made]


@rule("dynamic_update_slice")
def _dynamic_update_slice(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    for axis, new in zip(operands[0].axes, operands[1].axes, strict=True):
        if axis.size == new.size:
            axes_.unite(axis, new, where)
        else:
            axes_.pin(axis, f"{where} writes to a part of it")
            axes_.pin(new, f"{where} writes it to a part of an axis")
    return [list(operands[0].axes)]


def _literal(v: Any) -> Any:
    return v.val if isinstance(v, core.Literal) else None


@rule("iota")
def _iota(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    made = fresh(equation.outvars[0].aval)
    axes_.pin(made[equation.params["dimension"]], f"{where} counts along it: a table of fixed width")
    return [made]


@rule("random_bits", "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_clone")
def _random(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    return [fresh(v.aval, f"{where} draws numbers for each of its entries") for v in equation.outvars]


@rule("dot_general")
def _dot_general(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    a, b = (value.axes for value in operands[:2])
    for i, j in (*zip(left, right, strict=True), *zip(left_batch, right_batch, strict=True)):
        axes_.unite(a[i], b[j], where)
    kept = [axis for i, axis in enumerate(a) if i not in (*left, *left_batch)]
    return [[*(a[i] for i in left_batch), *kept, *(x for j, x in enumerate(b) if j not in (*right, *right_batch))]]


@rule("conv_general_dilated")
def _convolution(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    params, (inputs, kernel) = equation.params, operands
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return opaque(equation, operands, where, f"{where} has groups of batches")
    (batch, features, *spatial), (out, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    pin(inputs, f"{where} slides a window along it", spatial)
    pin(kernel, f"the window of {where}", window)
    outputs = kernel.axes[out]
    if groups == 1:
        axes_.unite(inputs.axes[features], kernel.axes[into], where)
    else:
        of_group, within = axes_.split(inputs.axes[features], [groups, inputs.shape[features] // groups], where)
        axes_.unite(within, kernel.axes[into], where)
        axes_.unite(of_group, axes_.split(outputs, [groups, outputs.size // groups], where)[0], where)
    made = fresh(equation.outvars[0].aval, f"{where} slides a window along it")
    made[numbers.out_spec[0]], made[numbers.out_spec[1]] = inputs.axes[batch], outputs
    return [made]


@rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min", "cumred_reduce_window_impl")
def _reduce_window(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    params, made = equation.params, fresh(equation.outvars[0].aval, f"{where} slides a window along it")
    dilations = [
        params.get(name) or (1,) * len(made) for name in ("window_strides", "base_dilation", "window_dilation")
    ]
    for i, axis in enumerate(operands[0].axes):
        if params["window_dimensions"][i] == 1 and all(d[i] == 1 for d in dilations) and made[i].size == axis.size:
            made[i] = axis
        else:
            axes_.pin(axis, f"{where} slides a window along it")
    return [made for _ in equation.outvars]


@rule("gather")
def _gather(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    params, (table, indices) = equation.params, operands
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    made = fresh(equation.outvars[0].aval)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(table.axes)) if i not in gone]
    for to, i in zip(numbers.offset_dims, kept, strict=True):
        if sizes[i] == table.shape[i]:
            made[to] = table.axes[i]
        else:
            pin(table, f"{where} takes entries that the data decide", [i])
            axes_.pin(made[to], f"{where} takes entries that the data decide")
    pin(table, f"{where} looks it up by index", numbers.collapsed_slice_dims)
    rest = [i for i in range(len(made)) if i not in numbers.offset_dims]
    for to, axis in zip(rest, indices.axes[:-1], strict=True):
        made[to] = axis
    for i, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        axes_.unite(table.axes[i], indices.axes[j], where)
    return [made]


@rule("scatter", "scatter-add")
def _scatter(equation: Any, operands: list[Value], where: str) -> list[Sequence[Axis]]:
    """Whole axes are written, or parts at an index; what is written at several indices is pinned along these."""
    numbers, (array, indices, updates) = equation.params["dimension_numbers"], operands
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(array.axes)) if i not in gone]
    pin(array, f"{where} writes at an index of it", numbers.scatter_dims_to_operand_dims)
    for i, j in zip(kept, numbers.update_window_dims, strict=True):
        if array.shape[i] == updates.shape[j]:
            axes_.unite(array.axes[i], updates.axes[j], where)
        else:
            pin(array, f"{where} writes to a part of it", [i])
            pin(updates, f"{where} writes it to a part of an axis", [j])
    rest = [j for j in range(len(updates.axes)) if j not in numbers.update_window_dims]
    for place, (j, axis) in enumerate(zip(rest, indices.axes[:-1], strict=True)):
        axes_.unite(updates.axes[j], axis, where)
        if place not in numbers.scatter_indices_batching_dims:
            pin(updates, f"{where} writes its entries where the data decide", [j])
    for i, j in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        axes_.unite(array.axes[i], indices.axes[j], where)
    return [list(array.axes)]
