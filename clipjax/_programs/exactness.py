"""Which units can be cut: where entries of dead units are 0, and what reads them all the same."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._programs import axes as axes_
from clipjax._programs import equations, rules
from clipjax._programs.axes import Axis
from clipjax._programs.equations import Value
from clipjax._programs.means import Means
from clipjax._programs.walking import Step

# What a reduction over units that are 0 gives with and without them is the same for a sum alone.
_STATISTICS = (equations.REDUCTIONS - {"reduce_sum"}) | {"reduce_window_max", "reduce_window_min"}
# What a result is, its operand is too, each of several its own.
_PASS_ON = set(
    "copy copy_p convert_element_type stop_gradient name sharding_constraint optimization_barrier pvary pcast psum"
    " psum_invariant pmax pmin psum2 reduce_precision".split()
)
# Operations whose entries are those of several operands: of which, or of all.
_SEVERAL = {"concatenate": (), "stack": (), "dynamic_update_slice": (0, 1), "scatter": (0, 2), "scatter-add": (0, 2)}
_NOTHING = frozenset[Axis]()


def atoms_of(value: Value, dims: Iterable[int] | None = None) -> frozenset[Axis]:
    """The atoms of some dimensions of an array, of all by default."""
    chosen = range(len(value.axes)) if dims is None else dims
    return frozenset(atom for i in chosen for atom in axes_.atoms(value.axes[i]))


def mark(steps: Sequence[Step], known: Sequence[Value]) -> None:
    """Set `zero` of every value of a walk, and pin the atoms at whose dead units an operation is not finite.

    Values of `known`, the inputs, have theirs. A value that a loop carries is 0 where it is so before the loop and
    after each turn: it counts as 0 until a turn shows that it is not.

    Args:
      steps: of the walk.
      known: inputs whose `zero` is set.
    """
    given = {id(value) for value in known}
    changed = True
    while changed:
        changed = False
        for step in steps:
            for operand in step.operands:  # constants, which no step makes
                if operand.zero is None and id(operand) not in given and operand.constant is not None:
                    operand.zero = atoms_of(operand) if operand.constant == 0 else _NOTHING
            for value in step.results:
                found = _zero(step, value)
                if found is not None and value.zero is not None:
                    found &= value.zero  # what is not 0 in one turn does not count as 0 again, so this comes to an end
                if found is not None and found != value.zero:
                    value.zero, changed = found, True


def _zero(step: Step, value: Value) -> frozenset[Axis] | None:
    """The atoms whose dead units have entries of 0 in a result; None where nothing is known of the operands yet."""
    own = atoms_of(value)
    if step.equation is None:
        known = [operand.zero for operand in step.operands if operand.zero is not None]
        return own.intersection(*known) if known else None
    name, operands = step.equation.primitive.name, step.operands
    zeros = [_NOTHING if operand.zero is None else operand.zero for operand in operands]
    if value.constant is not None:
        return own if value.constant == 0 else _NOTHING
    if name in ("dot_general", "conv_general_dilated"):
        return own & _of_contraction(step.equation, operands, zeros)
    if name in _PASS_ON or name == "sort":
        return own & zeros[0 if len(step.results) == 1 else step.results.index(value)]
    if name in ("mul", "and"):
        return _of_product(value, operands, zeros)
    if name in equations.ELEMENTWISE or name == "broadcast_in_dim":
        # `h[:, None]` is 0 in `h[:, None] + h[:, :, None]` where one of two units is dead, not where the other is.
        often = _repeated(value)
        wide = [frozenset(a for a in often if _times(operand, a) < _times(value, a)) for operand in operands]
        zeros = [zero - others for zero, others in zip(zeros, wide, strict=True)]
    if name in equations.ELEMENTWISE:
        return frozenset(atom for atom in own if _maps_zero(step, zeros, atom))
    if name not in rules.RULES or _makes_others(step, value):
        return _NOTHING
    if name in _SEVERAL:  # all but the indices
        read = [operands[i] for i in _SEVERAL[name] or range(len(operands))]
        zeros = [zeros[i] for i in _SEVERAL[name] or range(len(operands))]
        return frozenset(a for a in own if all(a in z for v, z in zip(read, zeros, strict=False) if a in atoms_of(v)))
    return own & zeros[0] if operands else _NOTHING


def _makes_others(step: Step, value: Value) -> bool:
    """True for operations that may give other numbers than 0 for an array of 0: positions, fills, user functions."""
    name, params = step.equation.primitive.name, step.equation.params
    if name == "pad":
        return bool(step.operands[1].constant != 0)
    if name == "gather" and params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill, dtype = params["fill_value"], step.equation.outvars[0].aval.dtype
        return fill != 0 and fill == fill and (fill is not None or not jnp.issubdtype(dtype, jnp.inexact))
    if name == "scatter":
        return params.get("update_jaxpr") is not None  # `x.at[i].apply(f)`
    positions = name == "top_k" and value is step.results[1]
    return positions or name in ("argmax", "argmin", "iota", "cumlogsumexp", "reduce_window")


def _of_product(value: Value, operands: list[Value], zeros: list[frozenset[Axis]]) -> frozenset[Axis]:
    """The atoms along which one operand is 0; where a result has an atom along several axes, along all of them."""
    often = _repeated(value)

    def covers(atom: Axis) -> bool:
        known = [_times(operand, atom) for operand, zero in zip(operands, zeros, strict=True) if atom in zero]
        return bool(known) and (atom not in often or sum(known) >= _times(value, atom))

    return frozenset(atom for atom in atoms_of(value) if covers(atom))


def _of_contraction(equation: Any, operands: list[Value], zeros: list[frozenset[Axis]]) -> frozenset[Axis]:
    """The atoms along which a product of two arrays is 0: each array along its own axes, one of them along shared."""
    (_, contracted), (_, other) = equations.contracted(equation, operands)
    batch: Sequence[Sequence[int]] = ((), ())
    if equation.primitive.name == "dot_general":
        batch = equation.params["dimension_numbers"][1]
    shared = atoms_of(operands[0], batch[0])
    found, missing = shared & (zeros[0] | zeros[1]), shared - zeros[0] - zeros[1]
    for operand, zero, gone in zip(operands, zeros, ((*contracted, *batch[0]), (*other, *batch[1])), strict=False):
        kept = atoms_of(operand, [i for i in range(len(operand.axes)) if i not in gone])
        found, missing = found | (kept & zero), missing | (kept - zero)
    return found - missing


def _repeated(value: Value) -> frozenset[Axis]:
    """The atoms that an array has more than once."""
    counts = collections.Counter(atom for axis in value.axes for atom in axes_.atoms(axis))
    return frozenset(atom for atom, n in counts.items() if n > 1)


def _times(value: Value, atom: Axis) -> int:
    return sum(axes_.times(axis, atom) for axis in value.axes)


def _maps_zero(step: Step, zeros: list[frozenset[Axis]], atom: Axis) -> bool:
    """True where an operation gives 0 for operands of 0, and of their constants, whatever the others are."""
    equation, operands, where = step.equation, step.operands, step.where
    if equation.primitive.name == "select_n":
        return all(atom in zero for zero in zeros[1:])
    if equation.primitive.name == "div" and atom in zeros[0] and atom not in zeros[1]:
        return True
    values: list[Any] = []
    for operand, zero in zip(operands, zeros, strict=True):
        if atom not in zero and operand.constant is None:
            return False
        values.append(0 if atom in zero else operand.constant)
    result = equations.evaluated(equation, values)
    if result is not None and not bool(np.isfinite(np.asarray(result, np.complex128))):
        atom.pins[f"{where} is not finite where its units are 0"] = None
    return result is not None and bool(result == 0)


def judge(steps: Sequence[Step], proved: set[Axis], means: Means) -> dict[Axis, dict[str, None]]:
    """Say for which atoms a statistic that runs over their units keeps them from being cut, and pin what is in doubt.

    Args:
      steps: of a walk, marked.
      proved: atoms of which a second trace with other widths has shown that no number of the program depends on them,
        but those of means; for others every sum over units that is no mean may be divided by their number, and every
        product of activations by its root.
      means: of the same steps.

    Returns:
      For each such atom the reasons.
    """
    found: dict[Axis, dict[str, None]] = {}
    pinned = {atom for step in steps for value in step.operands for atom in atoms_of(value) if atom.pins}
    certain = proved | pinned

    def note(atoms: Iterable[Axis], reason: str) -> None:
        for atom in atoms:
            found.setdefault(atom, {})[reason] = None

    for step in steps:
        if step.equation is None:
            continue
        name = step.equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            (left, dims), (right, _) = equations.contracted(step.equation, step.operands)
            over, zero = atoms_of(left, dims), (left.zero or _NOTHING) | (right.zero or _NOTHING)
            note(over - zero, f"{step.where} sums over units that are not 0 where their parameters are")
            if not left.leaves and not right.leaves:
                for atom in (over & zero) - certain:
                    atom.pins[f"{step.where} multiplies activations over it, which a fixed number may scale"] = None
        elif name == "reduce_sum":
            over = atoms_of(step.operands[0], step.equation.params["axes"])
            zero = step.operands[0].zero or _NOTHING
            note(over - zero, f"{step.where} sums over units that are not 0 where their parameters are")
            if id(step) in means.sums:
                for atom in (over & zero) - certain:
                    atom.pins[f"{step.where} sums over it, and a fixed number may divide the sum"] = None
        elif name in _STATISTICS:
            note(atoms_of(step.operands[0], step.equation.params.get("axes", ())), f"{step.where} is taken over it")
    for mean in means.found:
        if mean.used:
            note(mean.atoms(), f"{mean.step.where} is a mean over it, which {mean.used} uses")
    return found
