"""One traced model: the axes of its variables, what can be cut, and proof by traces with other widths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.interpreters import partial_eval

from clipjax._arrays import trees
from clipjax._programs import axes as axes_
from clipjax._programs import exactness, groups, layers, origins, proving, roles
from clipjax._programs.axes import Axis
from clipjax._programs.equations import Value
from clipjax._programs.groups import Group, Member, Repair
from clipjax._programs.means import Means
from clipjax._programs.walking import Walk
from clipjax.typing import Tree

Rebuild: TypeAlias = Callable[[dict[str | tuple[str, int], int]], Callable[..., Any]]
"""`rebuild(widths) -> apply_fn`, of the model with other widths, in the form of `Shrunk.widths`."""

OUTPUT, INPUT = "an output of the model", "an input of the model"


class Program:
    """A traced model with the axes of its variables.

    Attributes:
      leaves: the shapes of the variables.
      paths: theirs, one for each leaf.
      values: their axes.
      closed: the program.
      steps: of the walk: one for each equation but those that hold others, and where values meet.
      order: of the walk: one for each equation, those that hold others behind these.
      constants: what the program holds as constants.
      means: its divisions by a number of terms, and the sums of these with an epsilon, keyed by their step's identity.
      roles: what each leaf is.
    """

    def __init__(
        self, apply_fn: Callable[..., Any], rebuild: Rebuild | None, variables: Tree, args: Any, kwargs: Any
    ) -> None:
        """Trace a model and walk through its program.

        Args:
          apply_fn: `apply_fn(variables, *args, **kwargs) -> outputs`.
          rebuild: `rebuild(widths) -> apply_fn` of the model with other widths, or None if `apply_fn` takes any.
          variables: shapes in place of arrays, as in the others.
          args: what the function takes besides; what is no shape is not traced.
          kwargs: the same.
        """
        self._apply_fn, self._rebuild = apply_fn, rebuild
        rest, self._rest_treedef = trees.arrays((args, kwargs))
        self._inputs = {i: x for i, x in enumerate(rest) if isinstance(x, jax.ShapeDtypeStruct)}
        self._rest = rest
        self._all, self._treedef = trees.arrays(variables)
        named = [(path, x) for path, x in trees.governed(variables) if isinstance(x, jax.ShapeDtypeStruct)]
        self.paths, self.leaves = [path for path, _ in named], [x for _, x in named]
        self.closed, out = self._trace(apply_fn, self.leaves)
        self.values = [Value([Axis(n) for n in x.shape], frozenset([i])) for i, x in enumerate(self.leaves)]
        for i, value in enumerate(self.values):
            value.origins = origins.of_leaf(i, len(value.axes))
        inputs = [Value([Axis(n, [INPUT]) for n in x.shape]) for x in self._inputs.values()]
        walk = Walk()
        results = walk.program(self.closed, [*self.values, *inputs])
        self.order, self.constants, self._bodies = walk.order, walk.constants, walk.bodies
        self.steps = walk.steps
        self._tie_outputs(out, results)
        self.roles = roles.of_leaves(self.paths, self.values, self.steps)
        self._means = Means(self.steps, self.values, results)
        self.means = {id(step): mean for mean in self._means.found for step in (mean.step, mean.adds) if step}
        for path, value in zip(self.paths, self.values, strict=True):
            value.zero = frozenset() if groups.is_statistic(path) else exactness.atoms_of(value)
        for value in inputs:
            value.zero = frozenset()
        exactness.mark(self.steps, [*self.values, *inputs])

    def _trace(self, apply_fn: Callable[..., Any], leaves: Sequence[Any]) -> tuple[Any, Any]:
        """The program of a model with these variables, and the shapes that it returns."""

        def fn(leaves: list[jax.Array], inputs: dict[int, jax.Array]) -> Any:
            traced = iter(leaves)
            every = [next(traced) if isinstance(x, jax.ShapeDtypeStruct) else x for x in self._all]
            variables = self._treedef.unflatten(every)
            rest = [inputs.get(i, x) for i, x in enumerate(self._rest)]
            args, kwargs = self._rest_treedef.unflatten(rest)
            return apply_fn(variables, *args, **kwargs)

        closed, out = jax.make_jaxpr(fn, return_shape=True)(list(leaves), self._inputs)
        # What no output needs, such as h[..., 0] of which the model asks the shape alone, would pin what it touches.
        jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, True, instantiate=True)
        return closed.replace(jaxpr=jaxpr), out

    def again(self, new: Mapping[Axis, int]) -> Any:
        """The program of the model with other widths of some atoms."""
        shaped = [
            jax.ShapeDtypeStruct(tuple(proving.size(axis, new) for axis in value.axes), x.dtype)
            for x, value in zip(self.leaves, self.values, strict=True)
        ]
        apply_fn = self._apply_fn if self._rebuild is None else self._rebuild(self._widths(new))
        return self._trace(apply_fn, shaped)[0]

    def differs(self, new: Mapping[Axis, int]) -> str:
        """Where the program with other numbers of units is another program; "" for nowhere."""
        follows = [mean.follows for mean in self._means.found]
        try:
            found = proving.difference(self, new)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if not found and follows != [mean.follows for mean in self._means.found]:
            return "an epsilon depends on the number of units in another way"
        return found

    def _widths(self, new: Mapping[Axis, int]) -> dict[str | tuple[str, int], int]:
        """Other widths as `shrink` returns them: for each leaf with units the sizes of the axes that have them."""
        units = set(self.units())
        found: dict[str | tuple[str, int], int] = {}
        for path, value in zip(self.paths, self.values, strict=True):
            own = [i for i, axis in enumerate(value.axes) if not units.isdisjoint(axes_.atoms(axis))]
            for i in own if not groups.is_statistic(path) else ():
                name = roles.param(path)
                found[name if len(own) == 1 else (name, i - len(value.axes))] = proving.size(value.axes[i], new)
        return found

    def _tie_outputs(self, out: Tree, results: Sequence[Value]) -> None:
        """An output that is a new value of a statistic, a cache or a state has its axes; others are pinned."""
        known_by = list(zip(self.paths, self.values, strict=True))
        named = {groups.inside_collection(path): value for path, value in known_by} | dict(known_by)
        for path, value in zip((p for p, _ in trees.governed(out)), results, strict=True):
            ends = [path.split("/", i)[-1] for i in range(path.count("/") + 1)]
            known = (named[end] for end in ends if end in named and (groups.is_statistic(end) or "/" in end))
            of = next((value_ for value_ in known if value_.shape == value.shape), None)
            for i, axis in enumerate(value.axes):
                if of is None:
                    axes_.pin(axis, OUTPUT)
                else:
                    axes_.unite(axis, of.axes[i], "a variable and its new value")

    def units(self) -> list[Axis]:
        """The atoms of variables that have a part in an output and that nothing pins, in order."""
        used = [value for value, role in zip(self.values, self.roles, strict=True) if role.name != "unused"]
        found = dict.fromkeys(atom for value in used for axis in value.axes for atom in axes_.atoms(axis))
        return [atom for atom in found if not atom.pins and atom.size > 1]

    def groups(self) -> tuple[dict[Axis, Group], dict[Axis, Group]]:
        """The units that can be cut with the same outputs, and those that a statistic runs over.

        What cannot be cut is pinned; ask for pins after this.
        """
        self._pin_shared_entries()
        kinds: dict[tuple[str, int, int], list[Axis]] = {}
        for atom in self.units():
            kinds.setdefault(self._kind(atom), []).append(atom)
        proved, refusals = proving.prove(self, list(kinds.values()))
        if proved and self._rebuild is None:  # a function that follows its variables in all but these
            for atom, raised in refusals.items():
                atom.pins[f"the model refuses another number of units: {raised}"] = None
        statistics = exactness.judge(self.steps, proved, self._means)
        exact: dict[Axis, Group] = {}
        inexact: dict[Axis, Group] = {}
        firsts: set[str] = set()
        # Those of exact groups come first: a group is known by its first leaf, which another must not take.
        for atom in sorted(self.units(), key=lambda atom: bool(statistics.get(atom))):
            reasons = tuple(statistics.get(atom, ()))
            repairs = dict.fromkeys(
                Repair(roles.param(self.paths[leaf]), offset, 0.0 if mean.follows else mean.epsilon or 0.0)
                for mean in self._means.found
                if not mean.used and atom in mean.atoms()
                for leaf, offset in mean.scales
            )
            members = self._ordered(self._members(atom), atom.size, firsts)
            firsts.add(members[0].path)
            found = Group(
                atom.size, members, atom in proved, tuple(repairs), reasons, refusals.get(atom, ""), (self, atom)
            )
            (inexact if reasons else exact)[atom] = found
        return exact, inexact

    def _kind(self, atom: Axis) -> tuple[str, int, int]:
        """The first leaf with an atom, without numbers, its axis and the size: units of equal layers are of a kind."""
        for path, value in zip(self.paths, self.values, strict=True):
            for i, axis in enumerate(value.axes):
                if atom in axes_.atoms(axis):
                    return re.sub(r"\d+", "", path), i, atom.size
        raise AssertionError("an atom of no leaf")

    def _pin_shared_entries(self) -> None:
        for atom in self.units():
            if any(axes_.places(axis, atom) is None for value in self.values for axis in value.axes):
                atom.pins["an entry would belong to two of its units"] = None

    def _members(self, atom: Axis) -> list[Member]:
        """The leaves and axes with an atom."""
        found = []
        for path, value in zip(self.paths, self.values, strict=True):
            for i, axis in enumerate(value.axes):
                places = axes_.places(axis, atom)
                if places is not None and (places >= 0).any():
                    found.append((path, value, i - len(value.axes), places))
        leaves = [value for _, value, _, _ in found]
        own = layers.axes_of_layers(atom, leaves, self._bodies, self.order)
        return [
            Member(roles.param(path), axis, places, None if own is None else own[i])
            for i, (path, _, axis, places) in enumerate(found)
        ]

    def _ordered(self, members: list[Member], units: int, firsts: set[str]) -> list[Member]:
        """The members, first a kernel that makes the units: a group is known by its first leaf, no two by the same."""
        own = {roles.param(path): role for path, role in zip(self.paths, self.roles, strict=True)}

        def rank(member: Member) -> tuple[bool, bool, bool]:
            makes = member.axis in own[member.path].outputs
            taken = member.path in firsts or own[member.path].name != "kernel"
            return taken, not (makes and member.places.size == units), not makes

        return sorted(members, key=rank)
