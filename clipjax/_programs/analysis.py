"""`analyze`: what a program says about a model's params: which axes are inputs, and which entries belong together."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from clipjax._arrays import arguments
from clipjax._programs import axes as axes_
from clipjax._programs import models
from clipjax._programs.groups import Group
from clipjax._programs.program import Program, Rebuild
from clipjax._programs.roles import param
from clipjax.typing import Leaf, PerLeaf, Tree


class Row(NamedTuple):
    """What the program says about one leaf.

    Attributes:
      path: of the leaf, as an optimizer sees the params.
      shape: of the leaf.
      role: "kernel", "embedding", "scale or offset", "statistic" or "unused".
      inputs: the axes, counted from the end, that a contraction or a convolution sums over.
      outputs: the other axes of a kernel, but for those that a loop runs over.
      groups: for each axis the places of its groups in `Analysis.groups`, those of `Analysis.inexact` behind them.
      pins: for each axis why some of its entries cannot be cut.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    pins: tuple[tuple[str, ...], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The axes of a kernel that a loop runs over."""
        found = {*self.inputs, *self.outputs}
        return tuple(a for a in range(-len(self.shape), 0) if a not in found) if self.role == "kernel" else ()


class Analysis:
    """What `analyze` found.

    Attributes:
      rows: for each leaf what the program says about it, in the order of the tree.
      groups: the units that can be cut without another output, for `structures.unit(groups=)` and `shrink`.
      inexact: the units that only a statistic over them keeps from being cut: `shrink(exact=False)` cuts them too.
      apply_fn: the model's function that was read.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        groups: Sequence[Group],
        inexact: Sequence[Group] = (),
        apply_fn: Callable[..., Any] | None = None,
    ) -> None:
        """Made by `analyze`."""
        self.rows, self.groups, self.inexact, self.apply_fn = tuple(rows), tuple(groups), tuple(inexact), apply_fn
        self._by_path = {row.path: row for row in rows}

    def kernels(self, path: str, leaf: Leaf) -> bool:
        """For `where=`: True for leaves that a contraction or a convolution multiplies."""
        return self._row(path).role == "kernel"

    @property
    def inputs(self) -> PerLeaf:
        """For `axis=` of `structures.n_of_m`: the axes that a kernel is contracted along."""
        return PerLeaf(lambda path, leaf: self._row(path).inputs)

    @property
    def outputs(self) -> PerLeaf:
        """For `axis=` of `structures.unit` and `fake_quantize`: the axes of a kernel that keep steps of their own."""
        return PerLeaf(lambda path, leaf: self._row(path).outputs)

    @property
    def layers(self) -> PerLeaf:
        """For `layers=` of `projections.spectral_cap`: the axes of a kernel that a loop runs over."""
        return PerLeaf(lambda path, leaf: self._row(path).layers)

    def _row(self, path: str) -> Row:
        found = self._by_path.get(param(path))
        arguments.require(found is not None, "path", "be one that was analyzed", path, "Analyze the model that has it.")
        assert found is not None
        return found

    def _table(self) -> list[tuple[str, ...]]:
        """The cells of the table that is printed, the names of its columns first."""
        table: list[tuple[str, ...]] = [("leaf", "shape", "role", "inputs", "outputs", "groups", "pinned by")]
        for row in self.rows:
            own = " ".join(",".join(map(str, found)) or "-" for found in row.groups)
            pins = "; ".join(f"{i - len(row.shape)}: {', '.join(why)}" for i, why in enumerate(row.pins) if why)
            shown = (str(list(axes)) if axes else "-" for axes in (row.inputs, row.outputs))
            table.append((row.path, "x".join(map(str, row.shape)), row.role, *shown, own, pins))
        return table

    def _notes(self) -> list[str]:
        """A line for each group."""
        notes = []
        for i, group in enumerate((*self.groups, *self.inexact)):
            evidence = (
                "proved by another trace"
                if group.proved
                else "read from one trace" + f" ({group.refusal})" * bool(group.refusal)
            )
            repaired = "".join(f"; {repair.path} makes up for the mean over it" for repair in group.repairs)
            changes = f"; cut by `exact=False` alone: {', '.join(group.statistics)}" if group.statistics else ""
            notes.append(f"group {i}: {group.units} units of {next(iter(group))}, {evidence}{repaired}{changes}")
        return notes

    def __str__(self) -> str:
        """A table: leaf, shape, role, inputs, outputs, groups, and what pins it; and a line for each group."""
        table = self._table()
        widths = [max(len(line[i]) for line in table) for i in range(6)]
        lines = [
            "  ".join([*(c.ljust(n) for c, n in zip(line, widths, strict=False)), line[6]]).rstrip() for line in table
        ]
        return "\n".join(lines + self._notes())

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        head, *rows = ([html.escape(cell) for cell in line] for line in self._table())
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        notes = "<br>".join(html.escape(note) for note in self._notes())
        return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table><p>{notes}</p>"


def analyze(
    apply_fn: Callable[..., Any],
    variables: Tree,
    *args: object,
    rebuild: Rebuild | None = None,
    **kwargs: object,
) -> Analysis:
    r"""Read a model's program: which axes of its params are inputs, and which entries live and die together.

    The function is traced on shapes alone, so nothing runs and no memory is needed: a model of 7e9 params takes
    seconds. Every axis of every leaf is followed through the equations. What they add, multiply or concatenate belongs
    together; a unit is what can be cut from all of these axes at once. With :math:`X_u` the entries of unit u in all
    leaves of its group, and f the model,

    .. math:: X_u = 0 \;\Rightarrow\; f(X \text{ without } u) = f(X)

    Whatever may break this is refused and told, with the equation and its line: an operation that is not known, an
    output of the model, a table of fixed width, entries that data select. `print` the result to see why.

    - Two levels of evidence. The program is traced again with another number of units in every group. If it differs in
      its shapes alone, as predicted, the group is proved. A model that refuses other shapes, as Linen's declared
      features do, is read from one trace by stricter rules, and `shrink` then asks for `verify`. With `rebuild` its
      groups are proved too. Without it, what a function refuses that follows its variables elsewhere is pinned.
    - Statistics. Units that LayerNorm, softmax or a mean runs over stand in `inexact`: `shrink(exact=False)` cuts them.
      A root mean square with a scale behind it (RMSNorm) is exact again with the scale times :math:`\sqrt{d/d'}` and
      epsilon times :math:`d/d'`, where d' of d units are left: `shrink` does the one and returns the other.
    - Running statistics ("batch_stats", "cache", leaves named mean or var) are cut with their units but do not say
      which are dead. A leaf that no output depends on has no units.

    Args:
      apply_fn: `apply_fn(variables, *args, **kwargs) -> outputs`, such as `model.apply`; for a module of NNX or Equinox
        `lambda model, x: model(x)`.
      variables: params, or a tree that contains them, or a module of NNX or Equinox; arrays or
        `jax.ShapeDtypeStruct`s.
      *args: what the function takes besides: arrays, shapes, or any other values.
      rebuild: `rebuild(widths) -> apply_fn` of the model with other widths, where `widths` has the form that `shrink`
        returns; None if `apply_fn` follows the shapes of the variables.
      **kwargs: as `args`.

    Returns:
      An `Analysis`.

    Raises:
      TypeError: for something that is not a function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["in"] + params["bias"]) @ params["out"]
      >>> shapes = {"in": (3, 8), "bias": (8,), "out": (8, 2)}
      >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
      >>> analysis = analyze(model, params, jnp.ones((1, 3)))
      >>> analysis.groups
      (Group(8 units; in: -1, out: -2, bias: -1),)
      >>> print(analysis)
      leaf  shape  role             inputs  outputs  groups  pinned by
      bias  8      scale or offset  -       -        0
      in    3x8    kernel           [-2]    [-1]     - 0     -2: an input of the model
      out   8x2    kernel           [-2]    [-1]     0 -     -1: an output of the model
      group 0: 8 units of in, proved by another trace

    References:
      D0, section 2.2, steps 1 and 2: a "node" is a unit. Fang et al., "DepGraph: Towards Any Structural Pruning", 2023,
      https://arxiv.org/abs/2301.12900; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019,
      https://arxiv.org/abs/1910.07467.
    """
    for name, given in {"apply_fn": apply_fn, "rebuild": rebuild}.items():
        if not callable(given) and (name == "apply_fn" or given is not None):
            raise TypeError(f"`{name}` must be a function, got {given!r}. Give `model.apply`, or a function of widths.")
    if models.is_module(apply_fn):
        kind = type(apply_fn).__name__
        raise TypeError(
            f"`apply_fn` must be a function of the model, got a {kind} itself. Give both:"
            " `analyze(lambda model, x: model(x), model, x)`."
        )
    # A module of NNX or Equinox is opened for the trace, and made again inside of it: its layers note their sizes.
    whole = lambda fn: lambda tree, *args, **kwargs: fn(models.merged(variables, tree), *args, **kwargs)  # noqa: E731
    again = None if rebuild is None else lambda widths: whole(rebuild(widths))
    shapes = jax.tree.map(_shape, (models.opened(variables), args, kwargs))
    program = Program(whole(apply_fn), again, *shapes)
    exact, inexact = program.groups()
    places = {atom: i for i, atom in enumerate((*exact, *inexact))}
    rows = []
    for path, value, role in zip(program.paths, program.values, program.roles, strict=True):
        atoms = [axes_.atoms(axis) for axis in value.axes]
        own = tuple(tuple(dict.fromkeys(places[a] for a in found if a in places)) for found in atoms)
        pins = tuple(tuple(dict.fromkeys(why for a in found for why in a.pins)) for found in atoms)
        rows.append(Row(param(path), value.shape, role.name, role.inputs, role.outputs, own, pins))
    return Analysis(rows, list(exact.values()), list(inexact.values()), apply_fn)


def _shape(x: Any) -> Any:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return x
    # NumPy's integers have 64 bits, of which JAX takes 32 unless a user turns more on.
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True))
