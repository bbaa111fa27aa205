"""A program that is run equation by equation, and the squared inputs of its contractions, summed as it runs.

Each kernel has a *ghost*: zeros of its shape, in f32, that go through the same reshapes, slices and loops as it does.
Where a contraction multiplies the kernel, the sum of ghost * squares is added to a total. The total is linear in the
ghosts, and its derivative by them is the sum of squares that each entry of a kernel meets, whatever was done to it on
the way. Layers that a loop takes from a stack have their own entries in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from clipjax._programs import equations, walking

MOVES = set(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev copy copy_p concatenate pad dynamic_slice gather"
    " split select_n".split()
)
"""Primitives that move entries and are linear in them: a ghost goes through as the kernel does."""


class Seen(NamedTuple):
    """An array of the program.

    Attributes:
      value: the array.
      ghost: of the kernels that it is made of, None where there are none.
      kernels: which they are.
      data: True where it may depend on the batch.
    """

    value: Any
    ghost: jax.Array | None = None
    kernels: frozenset[int] = frozenset()
    data: bool = False


class Taps:
    """A run of a program.

    Attributes:
      tapped: the kernels that a contraction multiplies with something that depends on the batch.
      differing: those of them that meet other inputs at other outputs.
    """

    def __init__(self) -> None:
        """One that has seen nothing."""
        self.tapped: set[int] = set()
        self.differing: set[int] = set()

    def run(
        self, fn: Callable[..., Any], leaves: Sequence[Any], batch: tuple[Any, ...], ghosts: dict[int, jax.Array]
    ) -> jax.Array:
        """Run `fn(leaves, batch)`; f32[2], the sums over all contractions of ghost * squares, and of ghost * positions.

        Args:
          fn: the model.
          leaves: its variables; may have None.
          batch: what it takes besides.
          ghosts: one for each kernel, by its place in `leaves`, of its shape.
        """
        closed = jax.make_jaxpr(fn)(list(leaves), batch)
        operands = [
            Seen(x, ghosts.get(i), frozenset([i]) if i in ghosts else frozenset())
            for i, x in enumerate(leaves)
            if x is not None
        ]
        _, total = self.program(closed, [*operands, *(Seen(x, data=True) for x in jax.tree.leaves(batch))])
        return total

    def program(self, closed: Any, operands: Sequence[Seen]) -> tuple[list[Seen], jax.Array]:
        """Run a program; its results, and its total."""
        jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
        known = {v: Seen(x) for v, x in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True)}
        known |= dict(zip(jaxpr.invars, operands, strict=True))

        def read(v: Any) -> Seen:
            return Seen(v.val) if isinstance(v, core.Literal) else known[v]

        total = jnp.zeros(2, jnp.float32)
        for equation in jaxpr.eqns:
            results, part = self.equation(equation, [read(v) for v in equation.invars])
            total = total if part is None else total + part
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars], total

    def equation(self, equation: Any, operands: list[Seen]) -> tuple[list[Seen], jax.Array | None]:
        """Run one equation."""
        name = equation.primitive.name
        if name == "scan":
            return self.scan(equation, operands)
        if name == "cond":
            return self.branches(equation, operands)
        if name in walking.CALLS and name != "shard_map" and walking.CALLS[name] in equation.params:
            return self.program(equation.params[walking.CALLS[name]], operands)
        # Of a primitive that calls functions some versions of JAX return these beside the params.
        given = equation.primitive.get_bind_params(equation.params)
        inner, params = given if isinstance(given, tuple) else ((), given)
        run = lambda values: equation.primitive.bind(*inner, *values, **params)  # noqa: E731
        found = run([seen.value for seen in operands])
        values = list(found) if equation.primitive.multiple_results else [found]
        data = any(seen.data for seen in operands)
        part = None
        if name in ("dot_general", "conv_general_dilated"):
            part = self.contraction(equation, operands)
        ghosts = None if data else _ghosts(equation, operands, run)
        if ghosts is None:
            return [Seen(value, data=data) for value in values], part
        kernels = frozenset().union(*(seen.kernels for seen in operands))
        return [Seen(value, ghost, kernels) for value, ghost in zip(values, ghosts, strict=True)], part

    def contraction(self, equation: Any, operands: list[Seen]) -> jax.Array | None:
        """The part of a contraction or a convolution whose one operand is a kernel."""
        total = None
        for side in (0, 1):
            kernel, x = operands[side], operands[1 - side]
            if kernel.ghost is None or not x.data:
                continue
            if equation.primitive.name == "dot_general":
                squares, positions, differing = _of_dot(equation, x.value, kernel.ghost.ndim, side)
            elif side:
                squares, positions, differing = _of_convolution(equation, x.value, kernel.ghost.shape)
            else:
                continue
            self.tapped |= kernel.kernels
            self.differing |= kernel.kernels if differing else set()
            ones = jnp.ones_like(squares)
            part = jnp.stack([jnp.sum(kernel.ghost * squares), jnp.sum(kernel.ghost * (positions * ones))])
            total = part if total is None else total + part
        return total

    def scan(self, equation: Any, operands: list[Seen]) -> tuple[list[Seen], jax.Array]:
        """A loop; the slices of a stack of kernels are kernels, what is carried is data."""
        params = equation.params
        consts, carries = walking.counts(params)
        stacked = operands[consts + carries :]

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            slices = [Seen(x, ghost, seen.kernels, seen.data) for (x, ghost), seen in zip(xs, stacked, strict=True)]
            inside = [*operands[:consts], *(Seen(x, data=True) for x in carry), *slices]
            results, total = self.program(params["jaxpr"], inside)
            values = [seen.value for seen in results]
            return values[:carries], (values[carries:], total)

        before = [seen.value for seen in operands[consts : consts + carries]]
        xs = [(seen.value, seen.ghost) for seen in stacked]
        after, (ys, totals) = jax.lax.scan(
            body, before, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        return [Seen(x, data=True) for x in (*after, *ys)], jnp.sum(totals, axis=0)

    def branches(self, equation: Any, operands: list[Seen]) -> tuple[list[Seen], jax.Array]:
        """The branch that runs."""

        def run(branch: Any) -> Callable[[], tuple[list[Any], jax.Array]]:
            def fn() -> tuple[list[Any], jax.Array]:
                results, total = self.program(branch, operands[1:])
                return [seen.value for seen in results], total

            return fn

        values, total = jax.lax.switch(operands[0].value, [run(branch) for branch in equation.params["branches"]])
        return [Seen(x, data=True) for x in values], total


def _ghosts(equation: Any, operands: list[Seen], run: Callable[[list[Any]], Any]) -> list[jax.Array] | None:
    """The ghosts of the results of an equation without data; None where there are none."""
    own = [seen.ghost for seen in operands if seen.ghost is not None]
    if not own:
        return None
    name, shapes = equation.primitive.name, [v.aval.shape for v in equation.outvars]
    if name in MOVES:
        moved = [
            seen.value
            if not jnp.issubdtype(jnp.result_type(seen.value), jnp.floating)
            else jnp.zeros(jnp.shape(seen.value), jnp.float32)
            if seen.ghost is None
            else seen.ghost
            for seen in operands
        ]
        found = run(moved)
        return list(found) if equation.primitive.multiple_results else [found]
    if name in equations.ELEMENTWISE and len(shapes) == 1:  # whatever is computed of a weight stands for it
        alike = [ghost for ghost in own if ghost.shape == shapes[0]]
        return [sum(alike[1:], alike[0])] if alike else None
    return None


def _of_dot(equation: Any, x: jax.Array, rank: int, side: int) -> tuple[jax.Array, int, bool]:
    """The sums of squares that broadcast to a kernel of this rank, the positions, and whether outputs differ."""
    over, batch = equation.params["dimension_numbers"]
    kernel, other = (*batch[side], *over[side]), (*batch[1 - side], *over[1 - side])
    free = [i for i in range(x.ndim) if i not in other]
    laid = jnp.transpose(x.astype(jnp.float32), (*other, *free))
    squares = jnp.sum(jnp.square(laid), axis=tuple(range(len(other), x.ndim)))
    squares = jnp.transpose(squares, sorted(range(len(kernel)), key=kernel.__getitem__))
    squares = jnp.expand_dims(squares, [i for i in range(rank) if i not in kernel])
    return squares, math.prod(x.shape[i] for i in free), bool(batch[side])


def _of_convolution(equation: Any, x: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, int, bool]:
    """The same of a convolution: the mean over all places of a channel counts for all of the window."""
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    feature = numbers.lhs_spec[1]
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(i for i in range(x.ndim) if i != feature))
    out, into = numbers.rhs_spec[:2]
    by_group = jnp.repeat(jnp.reshape(squares, (groups, -1)), shape[out] // groups, axis=0)  # [out, in]
    laid = by_group if out < into else by_group.T
    squares = jnp.expand_dims(laid, [i for i in range(len(shape)) if i not in (out, into)])
    squares = squares if groups > 1 else jax.lax.slice_in_dim(squares, 0, 1, axis=out)
    return squares, x.size // max(x.shape[feature], 1), groups > 1
