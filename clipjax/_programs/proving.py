"""Proof by a second trace: a program whose variables have other widths differs in its shapes alone, as predicted."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.extend import core

from clipjax._programs import axes as axes_
from clipjax._programs import equations, rules, walking
from clipjax._programs.axes import Axis
from clipjax._programs.equations import Value
from clipjax._programs.means import Mean
from clipjax._programs.walking import Step

# Parameters that hold shapes, which the results show, or what is compared by itself.
_SHAPES = {"shape", "new_sizes", "slice_sizes", "sizes", "limit_indices", "start_indices", "feature_group_count"}
# Names, derivatives, of which the values are no part, and where a program runs.
_IGNORED = set(
    "name sharding out_sharding jvp_jaxpr_fun jvp_jaxpr_thunk fwd_jaxpr_thunk bwd out_trees policy ctx_mesh"
    " prevent_cse mesh manual_axes newly_manual_axes keep_unused donated_invars inline linear".split()
)
_ALONE = 8  # kinds of units that a model refuses one by one, after which it is taken to refuse all


class Traced(Protocol):
    """A model that can be traced again.

    Attributes:
      leaves: the shapes of its variables.
      values: their axes.
      closed: its program.
      order: the walk through it.
      constants: those of its programs.
      means: the divisions by a number of units, and the sums of these with an epsilon.
    """

    leaves: list[Any]
    values: list[Value]
    closed: Any
    order: list[Step]
    constants: list[Value]
    means: dict[int, Mean]

    def again(self, new: Mapping[Axis, int]) -> Any:
        """The program with other widths."""


def widths(units: Sequence[Axis]) -> dict[Axis, int]:
    """Another width for every atom, no two in the same ratio to the old one."""
    rng = np.random.default_rng(0)
    taken: set[int] = set()
    found = {}
    for atom in units:
        while (new := int(rng.integers(2, 5 + 2 * len(units)))) in taken or new == atom.size:
            pass
        taken.add(new)
        found[atom] = new
    return found


def size(axis: Axis, new: Mapping[Axis, int]) -> int:
    """The size of an axis with other widths of some atoms."""
    axis = axes_.found(axis)
    kids = axes_.kids(axis)
    if not kids:
        return new.get(axis, axis.size)
    sizes = [size(kid, new) for kid in kids]
    return sum(sizes) if axes_.is_sum(axis) else math.prod(sizes)


def prove(model: Traced, kinds: Sequence[Sequence[Axis]]) -> tuple[set[Axis], dict[Axis, str]]:
    """The atoms that may have another width: traced again with it, the program is the same but for its shapes.

    All are tried at once; where they fail, both halves are, each with those that passed. Of a kind for which the
    program is another one each atom is tried, and pinned where it fails. A kind of which the model refuses other widths
    is just left out, and so are all where the first kinds that are tried alone are refused.

    Args:
      model: the model.
      kinds: the atoms, those of equal layers together.

    Returns:
      Those that may, and for those of which the model refuses another width what it raised.
    """
    new, proved = widths([atom for kind in kinds for atom in kind]), set[Axis]()
    refusals: dict[Axis, str] = {}
    refused, raised = 0, ""

    def difference_of(some: Sequence[Axis]) -> str | None:
        """Where the program with other widths of some is another one; None where there is none."""
        nonlocal raised
        try:
            return difference(model, {atom: new[atom] for atom in some})
        except Exception as error:  # the model refuses other widths, each library in its own way
            raised = f"{type(error).__name__}: {textwrap.shorten(str(error), 120)}"
            return None

    # A model that is another program at each trace cannot be compared with itself.
    repeats = functools.cache(lambda: difference_of(()) == "")

    def tried(some: Sequence[Sequence[Axis]]) -> None:
        nonlocal refused
        if not some or (refused >= _ALONE and not proved):
            return
        atoms = [atom for kind in some for atom in kind]
        found = difference_of((*proved, *atoms))
        if found == "":
            proved.update(atoms)
        elif len(some) > 1:
            tried(some[: len(some) // 2])
            tried(some[len(some) // 2 :])
        elif found is None or not repeats():
            refusals.update(dict.fromkeys(atoms, raised if found is None else "it is another program at each trace"))
            refused += 1
        elif len(atoms) > 1:
            tried([[atom] for atom in atoms])
        else:
            atoms[0].pins[found] = None

    tried(kinds)
    return proved, refusals


class _Line(NamedTuple):
    """An equation of a program, those inside of it before it.

    Attributes:
      equation: None at the end of a program.
      reads: for each operand the place in its program where it is made, -1 for literals.
      numbers: for each operand the number that all of its entries are, where that is known.
      passes: True where what becomes of these numbers is seen behind it.
    """

    equation: Any
    reads: tuple[int, ...]
    numbers: tuple[Any, ...]
    passes: bool


def _lines(
    closed: Any, constants: list[Any], given: Sequence[Any] | None = None
) -> Generator[_Line, None, tuple[Any, ...]]:
    """The equations of a program in the order of a walk; returns the numbers that its results are.

    Args:
      closed: the program.
      constants: its constants are appended.
      given: the numbers that its operands are; None for a program whose results are seen by themselves.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    constants += getattr(closed, "consts", ())
    places = {v: i for i, v in enumerate((*jaxpr.constvars, *jaxpr.invars))}
    known = dict(zip(jaxpr.invars, given or (), strict=given is not None))

    def reads(operands: Sequence[Any]) -> tuple[int, ...]:
        return tuple(-1 if isinstance(v, core.Literal) else places[v] for v in operands)

    def numbers(operands: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(v.val if isinstance(v, core.Literal) else known.get(v) for v in operands)

    for equation in jaxpr.eqns:
        own, called = numbers(equation.invars), equation.primitive.name in walking.CALLS
        results: tuple[Any, ...] = (None,) * len(equation.outvars)
        for program in walking.inner(equation):
            found = yield from _lines(program, constants, own if called else None)
            results = found if called else results
        if not called and len(results) == 1:
            results = (walking.folded(equation, own),)
        yield _Line(equation, reads(equation.invars), own, called or any(x is not None for x in results))
        for v, number in zip(equation.outvars, results, strict=True):
            places[v], known[v] = len(places), number
    yield _Line(None, reads(jaxpr.outvars), numbers(jaxpr.outvars), given is not None)
    return numbers(jaxpr.outvars)


def difference(model: Traced, new: Mapping[Axis, int]) -> str:
    """Where a program with other widths is another program; "" for nowhere.

    Raises:
      Exception: of any kind, where the model refuses these widths.
    """
    again = model.again(new)
    old_constants: list[Any] = []
    new_constants: list[Any] = []
    before, after = list(_lines(model.closed, old_constants)), list(_lines(again, new_constants))
    other = "with another number of units the program has other equations"
    if len(before) != len(after) or len(old_constants) != len(new_constants):
        return other
    for old, fresh, value in zip(old_constants, new_constants, model.constants, strict=True):
        if not _same_constant(old, fresh, value, new):
            return "a constant depends on the number of units"
    steps = iter(model.order)
    for one, two in zip(before, after, strict=True):
        if one.reads != two.reads or (one.equation is None) != (two.equation is None):
            return other
        if one.equation is None:
            if not one.passes and not all(map(_same_value, one.numbers, two.numbers)):
                return "a result depends on the number of units"
        else:
            step = next(steps)
            what = _differs(step, one, two, new, model.means)
            if what:
                return f"{what} in {step.where} depends on the number of units"
    return ""


def _differs(step: Step, one: _Line, two: _Line, new: Mapping[Axis, int], means: Mapping[int, Mean]) -> str:
    """What differs between an equation and the one of the second trace; "" for nothing."""
    equation, other = step.equation, two.equation
    if equation.primitive.name != other.primitive.name:
        return "the operation"
    for v, w, value in zip(equation.outvars, other.outvars, step.results, strict=True):
        shape = tuple(size(axis, new) for axis in value.axes)
        if getattr(w.aval, "shape", ()) != shape or getattr(v.aval, "dtype", None) != getattr(w.aval, "dtype", None):
            return "the shape"
    for i, (old, now) in enumerate(zip(one.numbers, two.numbers, strict=True)):
        if not one.passes and not _same_number(step, i, old, now, new, means.get(id(step))):
            return "a number"
    known = rules.RULES.keys() | equations.ELEMENTWISE | walking.ENTERED
    for name, value in equation.params.items() if equation.primitive.name in known else ():
        if not _same_param(name, value, other.params.get(name)):
            return f"`{name}`"
    return _differs_in_places(step, other, new)


def _same_number(step: Step, i: int, old: Any, now: Any, new: Mapping[Axis, int], mean: Mean | None) -> bool:
    if old is None or now is None:
        return old is now
    if mean is not None and mean.adds is step:
        ratio = mean.terms / math.prod(size(axis, new) for axis in mean.axes)
        if ratio != 1:
            mean.follows = abs(float(now) - float(old) * ratio) <= 1e-6 * abs(float(old)) * ratio
        return mean.follows or _same_value(old, now)
    if mean is not None:
        terms = math.prod(size(axis, new) for axis in mean.axes)
        expected = terms if step.equation.primitive.name == "div" else 1 / terms
        return bool(abs(float(now) - expected) <= 1e-6 * abs(expected))
    if step.equation.primitive.name == "dynamic_slice" and i > 0:
        axis, result = step.operands[0].axes[i - 1], step.results[0].axes[i - 1]
        last, new_last = axis.size - result.size, size(axis, new) - size(result, new)  # JAX clamps to these
        return min(int(now), new_last) == _start(axis, min(int(old), last), result.size, new)
    return _same_value(old, now)


def _differs_in_places(step: Step, other: Any, new: Mapping[Axis, int]) -> str:
    """Where a slice begins, and how many groups a convolution has."""
    equation = step.equation
    if equation.primitive.name == "slice":
        starts, strides = equation.params["start_indices"], equation.params["strides"]
        for i, (axis, result) in enumerate(zip(step.operands[0].axes, step.results[0].axes, strict=True)):
            by_one = strides is None or strides[i] == 1
            expected = _start(axis, starts[i], result.size, new) if by_one else starts[i]
            if other.params["start_indices"][i] != expected:
                return "where it begins"
    if equation.primitive.name == "conv_general_dilated":
        groups = equation.params["feature_group_count"]
        features = step.operands[0].axes[equation.params["dimension_numbers"].lhs_spec[1]]
        if groups > 1:
            groups = size(axes_.split(features, [groups, features.size // groups], "")[0], new)
        if other.params["feature_group_count"] != groups:
            return "the number of groups"
    return ""


def _start(axis: Axis, start: int, length: int, new: Mapping[Axis, int]) -> int:
    """Where a slice of an axis begins with other widths."""
    if length == axis.size or not start:
        return start
    return size(axes_.cut(axis, [start, axis.size - start], "")[0], new)


def _same_constant(old: Any, now: Any, value: Value, new: Mapping[Axis, int]) -> bool:
    if np.shape(now) != tuple(size(axis, new) for axis in value.axes):
        return False
    if np.shape(old) == np.shape(now):
        return _same_value(old, now)
    return value.constant is not None and bool((np.asarray(now) == value.constant).all())


def _same_value(a: Any, b: Any) -> bool:
    try:
        return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind in "fc"))
    except TypeError:  # PRNG keys
        return True


def _same_param(name: str, a: Any, b: Any) -> bool:
    if name in _SHAPES | _IGNORED or callable(a) or _holds_program(a):
        return True
    try:
        return bool(a == b or (a != a and b != b))  # NaN, which gathers fill with, is what it was
    except ValueError:  # arrays
        return _same_value(a, b)


def _holds_program(a: Any) -> bool:
    return hasattr(a, "eqns") or hasattr(a, "jaxpr") or (isinstance(a, tuple | list) and any(map(_holds_program, a)))
