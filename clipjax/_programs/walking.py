"""A walk through a traced program: every axis of every array, united along the equations, and a list of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from clipjax._programs import axes as axes_
from clipjax._programs import equations, origins, rules
from clipjax._programs.axes import Axis
from clipjax._programs.equations import Value

CALLS = {  # primitives that call one program on their operands, and the parameter that holds it
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_lin": "call_jaxpr",
    "shard_map": "jaxpr",
}
ENTERED = {*CALLS, "scan", "while", "cond"}
TURNS = "the turns of"


def is_turn(atom: Axis) -> bool:
    """True for the axis of stacked layers, or of steps in time, that a loop runs over and nothing else pins."""
    return bool(atom.pins) and all(why.startswith(TURNS) for why in atom.pins)


def inner(equation: Any) -> list[Any]:
    """The programs inside of an equation that a walk enters, in its order."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        return [params[CALLS[name]]] if CALLS[name] in params else []
    if name == "scan":
        return [params["jaxpr"]]
    if name == "while":
        return [params["cond_jaxpr"], params["body_jaxpr"]]
    return list(params["branches"]) if name == "cond" else []


class Step(NamedTuple):
    """One equation of the walk, of whatever program inside of the traced one; loops are walked once.

    Attributes:
      equation: of the program; None where values meet, in a branch or a turn of a loop.
      operands: what it reads.
      results: what it writes.
      where: its name and source line.
    """

    equation: Any
    operands: list[Value]
    results: list[Value]
    where: str


class Walk:
    """The steps of a program, in order.

    Attributes:
      steps: one for each equation but those that hold others, and where values meet.
      order: one for each equation, those that hold others behind these.
      constants: what the programs hold as constants, in the order in which they are entered.
      bodies: for each scan the axis of its turns and the identities of the values inside of one turn.
    """

    def __init__(self) -> None:
        """An empty one."""
        self.steps: list[Step] = []
        self.order: list[Step] = []
        self.constants: list[Value] = []
        self.bodies: list[tuple[Axis, set[int]]] = []
        self._line = ""  # the line of the equation that is walked, or of the one that called its program

    def program(self, closed: Any, operands: Sequence[Value]) -> list[Value]:
        """Walk a closed program; returns its results."""
        jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
        known: dict[Any, Value] = {}
        for variable, constant in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
            known[variable] = _constant(constant, self._reader(jaxpr, variable))
            self.constants.append(known[variable])
        known |= dict(zip(jaxpr.invars, operands, strict=True))

        def read(v: Any) -> Value:
            return _constant(v.val) if isinstance(v, core.Literal) else known[v]

        called_at = self._line
        for equation in jaxpr.eqns:
            self._line = _line(equation) or called_at
            operands = [read(v) for v in equation.invars]
            where = self._source(equation)
            results = self.equation(equation, operands)
            ends = bool(self.steps) and self.steps[-1].equation is equation
            self.order.append(self.steps[-1] if ends else Step(equation, operands, results, where))
            known |= dict(zip(equation.outvars, results, strict=True))
        self._line = called_at
        return [read(v) for v in jaxpr.outvars]

    def _reader(self, jaxpr: Any, variable: Any) -> str:
        """The name and the line of the first equation that reads a variable; "" where none does."""
        for equation in jaxpr.eqns:
            if any(v is variable for v in equation.invars):
                return f"{equation.primitive.name} ({_line(equation) or self._line}) reads "
        return ""

    def _source(self, equation: Any) -> str:
        """The name of an equation, and the line of the user's program that it comes from."""
        return equation.primitive.name + (f" ({self._line})" if self._line else "")

    def equation(self, equation: Any, operands: list[Value]) -> list[Value]:
        """Walk one equation."""
        name = equation.primitive.name
        enter = {"scan": self.scan, "while": self.loop, "cond": self.branches, "shard_map": self.shards}.get(name)
        if enter is not None:
            return enter(equation, operands)
        if name in CALLS and CALLS[name] in equation.params:
            return self.program(equation.params[CALLS[name]], operands)
        where = self._source(equation)
        if name in equations.ELEMENTWISE:
            found = equations.elementwise(equation, operands, where)
        else:
            found = rules.RULES.get(name, equations.opaque)(equation, operands, where)
        leaves = (
            None if any(v.leaves is None for v in operands) else frozenset().union(*(v.leaves or () for v in operands))
        )
        constant = folded(equation, [value.constant for value in operands])
        results = [Value(axes, leaves, constant) for axes in found]
        if leaves is not None:
            own = origins.of_results(equation, [(value.shape, value.origins) for value in operands])
            for value, from_leaves in zip(results, own, strict=True):
                value.origins = from_leaves
        self.steps.append(Step(equation, operands, results, where))
        return results

    def meet(self, values: Sequence[Value], where: str) -> Value:
        """The value that is one of several: their axes are one."""
        first = values[0]
        for other in values[1:]:
            for a, b in zip(first.axes, other.axes, strict=True):
                axes_.unite(a, b, where)
        made = Value(first.axes, None if any(v.leaves is None for v in values) else first.leaves)
        made.origins = first.origins
        self.steps.append(Step(None, list(values), [made], where))
        return made

    def scan(self, equation: Any, operands: list[Value]) -> list[Value]:
        """One turn, with the slices of what is scanned; a carry is what it was before."""
        params, where = equation.params, self._source(equation)
        consts, carries = counts(params)
        before, stacked = operands[consts : consts + carries], operands[consts + carries :]
        turns = [value.axes[0] for value in stacked]
        for a, b in axes_.pairs(turns):
            axes_.unite(a, b, where)
        turn = turns[0] if turns else Axis(params["length"])
        axes_.pin(turn, f"{TURNS} {where}")
        first = len(self.steps)
        slices = [self._passed(value, value.axes[1:], where) for value in stacked]
        carried, after, ys = self._turn(
            lambda inside: self.program(params["jaxpr"], [*operands[:consts], *inside, *slices]), before, where
        )
        made = {id(value) for step in self.steps[first:] for value in step.results}
        self.bodies.append((turn, made - {id(value) for value in carried}))
        return [self.meet([b, a], where) for b, a in zip(carried, after, strict=True)] + [
            self._passed(y, (turn, *y.axes), where) for y in ys
        ]

    def _turn(self, body: Any, before: Sequence[Value], where: str) -> tuple[list[Value], list[Value], list[Value]]:
        """Walk the body of a loop; what it is given each turn is what came before, or what it gave."""
        first = len(self.steps)
        inside = [self.meet([value], where) for value in before]
        results = body(inside)
        after = results[: len(inside)]
        for step, one, other in zip(self.steps[first : first + len(inside)], inside, after, strict=True):
            for a, b in zip(one.axes, other.axes, strict=True):
                axes_.unite(a, b, where)
            one.leaves = None if other.leaves is None else one.leaves
            step.operands.append(other)
        return inside, after, results[len(inside) :]

    def loop(self, equation: Any, operands: list[Value]) -> list[Value]:
        """A while loop: its condition and one turn of its body."""
        params, where = equation.params, self._source(equation)
        test, body = params["cond_nconsts"], params["body_nconsts"]
        before = operands[test + body :]

        def turn(inside: list[Value]) -> list[Value]:
            self.program(params["cond_jaxpr"], [*operands[:test], *inside])
            return self.program(params["body_jaxpr"], [*operands[test : test + body], *inside])

        carried, after, _ = self._turn(turn, before, where)
        return [self.meet([b, a], where) for b, a in zip(carried, after, strict=True)]

    def branches(self, equation: Any, operands: list[Value]) -> list[Value]:
        """All branches; each result is that of one of them."""
        where = self._source(equation)
        found = [self.program(branch, operands[1:]) for branch in equation.params["branches"]]
        return [self.meet(values, where) for values in zip(*found, strict=True)]

    def shards(self, equation: Any, operands: list[Value]) -> list[Value]:
        """The program of one device: it has whole axes, and parts, which are pinned, of those laid over devices."""
        params, where = equation.params, f"{self._source(equation)} lays it over devices"

        def local(value: Value, spec: Any, shape: Sequence[int]) -> Value:
            names = (*spec, *[None] * (len(shape) - len(spec)))
            for axis, name in zip(value.axes, names, strict=True):
                if name is not None:
                    axes_.pin(axis, where)
            sizes = zip(value.axes, names, shape, strict=True)
            axes = [axis if name is None else Axis(size, [where]) for axis, name, size in sizes]
            return self._passed(value, axes, where)

        shapes = [v.aval.shape for v in params["jaxpr"].invars]
        inside = [local(*row) for row in zip(operands, params["in_specs"], shapes, strict=True)]
        results = self.program(params["jaxpr"], inside)
        shapes = [v.aval.shape for v in equation.outvars]
        return [local(*row) for row in zip(results, params["out_specs"], shapes, strict=True)]

    def _passed(self, value: Value, axes: Sequence[Axis], where: str) -> Value:
        made = Value(axes, value.leaves, value.constant)
        made.origins = ((origins.NONE,) * len(axes) + value.origins)[len(value.origins) :]
        self.steps.append(Step(None, [value], [made], where))
        return made


def counts(params: Any) -> tuple[int, int]:
    """How many constants and how many carries a scan has, which JAX 0.10 and 0.12 write differently."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carries))


def _constant(x: Any, reader: str = "") -> Value:
    """A constant of the program, pinned along the axes where its entries differ: a table of fixed width."""
    if jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.extended):
        return Value([Axis(size, [f"{reader}a constant of fixed width"]) for size in x.shape], frozenset())
    x = np.asarray(x)
    made = [Axis(size) for size in x.shape]
    for i, axis in enumerate(made):
        if x.size and x.shape[i] > 1 and not (x == np.take(x, [0], i)).all():
            axes_.pin(axis, f"{reader}a constant that differs along it: a table of fixed width")
    uniform = x.size > 0 and bool((x == x.flat[0]).all())
    return Value(made, frozenset(), x.flat[0] if uniform else None)


_KEEP_NUMBERS = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy"}


def folded(equation: Any, numbers: Sequence[Any]) -> Any:
    """The number that all entries of a result are, where all entries of each operand are one; None otherwise."""
    if not numbers or any(number is None for number in numbers) or len(equation.outvars) > 1:
        return None
    if equation.primitive.name in _KEEP_NUMBERS:
        return numbers[0]
    return equations.evaluated(equation, numbers) if equation.primitive.name in equations.ELEMENTWISE else None


def _line(equation: Any) -> str:
    """The line of the user's program that an equation comes from; "" for what JAX traced inside of its functions.

    Behind a layer of an installed library stands the line that calls it, where there is one.
    """
    from jax._src import source_info_util  # the public API shows no source lines

    frames = list(source_info_util.user_frames(equation.source_info.traceback))
    own = [frame for frame in frames if "-packages" not in frame.file_name]
    if not frames:
        return ""
    frame = (own or frames)[0]
    return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.start_line}"
