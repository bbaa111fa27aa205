"""When masks and grids are computed anew: start, every, stop, and the `refresh` argument."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, elementwise, sharding
from clipjax.typing import Context, Count, Leaf, Schedule, State, Tree

Inputs: TypeAlias = tuple[Tree, ...]
"""What a refresh computes with besides the weights: trees of arrays."""


class Cycle(NamedTuple):
    """The counts at which a state is refreshed.

    Attributes:
      start: the first one; may be traced, as may the others.
      every: updates between two of them; None for one refresh, at `start`.
      stop: the last one; None for no end.
    """

    start: Count
    every: Count | None
    stop: Count | None


def cycle(start: Count, every: Count | None, stop: Count | None) -> Cycle:
    """The cycle of these arguments, checked where they are known."""
    arguments.times(start, every, stop)
    # A known array becomes a number of Python: compared inside of jit it would be a traced one.
    return Cycle(_number(start), None if every is None else _number(every), None if stop is None else _number(stop))


def _number(count: Count) -> Count:
    return int(count) if isinstance(count, jax.Array) and not arguments.traced(count) else count


def repeated(cycle: Cycle) -> bool:
    """True unless it is known that there is one refresh at most."""
    if cycle.stop is None:
        return cycle.every is not None
    known = arguments.known(cycle.start) and arguments.known(cycle.stop)
    return not known or int(cycle.stop) > int(cycle.start)


def always(cycle: Cycle) -> bool:
    """True for a refresh at every update, without a branch."""
    return cycle.stop is None and arguments.known(cycle.every) and bool(cycle.every == 1)


Refresh: TypeAlias = Callable[[Tree, Tree, Inputs], State]
"""`refresh(weights, known, inputs) -> state`: masks or grids from the weights, and what is known of them."""


def compiled(refresh: Refresh) -> Refresh:
    """A refresh that is a function of arrays alone, compiled once for their shapes where it is called outside of jit.

    A refresh counts and searches in loops, which JAX would compile anew at every call. Inside of jit the function is as
    it was. A transformation makes one of these, for all its updates.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def program(treedef: jax.tree_util.PyTreeDef, static: tuple[object, ...], arrays: list[jax.Array]) -> State:
        rest = iter(arrays)
        return refresh(*treedef.unflatten([next(rest) if x is _ARRAY else x for x in static]))

    def call(weights: Tree, known: Tree, inputs: Inputs) -> State:
        leaves, treedef = jax.tree.flatten((weights, known, inputs))
        if any(map(arguments.traced, leaves)):
            return refresh(weights, known, inputs)
        static = tuple(_ARRAY if isinstance(x, _ARRAYS) else x for x in leaves)
        return program(treedef, static, [x for x in leaves if isinstance(x, _ARRAYS)])

    return call


_ARRAYS = (jax.Array, np.ndarray, np.generic)
_ARRAY = "an array"  # in the place of one


def refreshed(
    cycle: Cycle,
    context: Context,
    refresh: Refresh,
    inputs: Inputs,
    old: State,
    target: Tree,
    changed: jax.Array | bool = False,
) -> State:
    """`refresh(weights, known, inputs)` where a refresh is due, else `old`.

    A refresh is due at counts c >= start with (c - start) divisible by `every` up to `stop`, and at `stop` itself;
    without `every` once, at `start`. A static `context.refresh` decides at trace time instead.

    A refresh in a branch is given the weights as they lie in memory before the update: were the updates an operand of
    the branch, the program would have to store them at every step of the run. A cycle without a branch, static
    `every=1` without an end, is given the target of this update. Outside of jit the count is known and there is no
    branch either: JAX would compile both sides of it at every update.

    Args:
      cycle: when it is due.
      context: of this update.
      refresh: from `compiled`.
      inputs: what it is given besides the weights of the refresh, and what the context knows of them.
      old: the state so far.
      target: what is projected at this update.
      changed: True where the state was made for other arguments, so that a refresh is due at any count from `start` on.
    """
    memory = context.memory
    assert memory is not None  # `project` always gives it

    def fresh(weights: Tree) -> State:
        given, known = _constant((weights, context.known))
        return jax.tree.map(sharding.laid_as, refresh(given, known, inputs), old)

    if context.refresh is not None:
        return fresh(memory()) if context.refresh else old
    since = context.count - cycle.start
    if always(cycle):
        begun = None if arguments.known(cycle.start) and cycle.start == 0 else since >= 0
        return jax.tree.map(functools.partial(elementwise.keep, begun), fresh(target), old)
    due = _due(cycle, context.count, changed)
    if not arguments.traced(due):
        return fresh(memory()) if due else old
    return jax.lax.cond(due, lambda: fresh(memory()), lambda: old)


def doubling(cycle: Cycle, count: jax.Array) -> jax.Array:
    """True 1, 2, 4, 8, … updates after `start`, before `stop`: scales that are fitted then follow weights that grow."""
    since = (count - cycle.start).astype(jnp.int32)  # a traced `start` may be a float
    power = (since > 0) & (since & (since - 1) == 0)
    return power if cycle.stop is None else power & (count < cycle.stop)


def _constant(tree: Tree) -> Tree:
    """The same with arrays that are constants in derivatives; leaves that are one array stay one.

    Rules search and count, and reverse mode cannot pass through their loops.
    """
    found: dict[int, jax.Array] = {}

    def constant(x: Leaf) -> Leaf:
        if not isinstance(x, jax.Array):
            return x
        if id(x) not in found:
            found[id(x)] = jax.lax.stop_gradient(x)
        return found[id(x)]

    return jax.tree.map(constant, tree)


def _due(cycle: Cycle, count: Count, changed: jax.Array | bool) -> jax.Array | bool:
    """True at the counts of the cycle, and from its start on where `changed`."""
    start, every, stop = cycle
    if not any(map(arguments.traced, (count, changed, *cycle))):
        # numbers of Python: outside of jit a single operation on arrays takes longer than all of this
        count, changed, start = int(count), bool(changed), int(start)
        every, stop = (None if x is None else int(x) for x in (every, stop))
    since = count - start
    due = since == 0 if every is None else (since >= 0) & (since % every == 0)
    if stop is not None:
        due = (due & (count <= stop)) | (count == stop)
    return due | (changed & (since >= 0))


def at_stop(schedule: Schedule, cycle: Cycle) -> float | None:
    """The value at `stop` of a schedule that counts from `start`, None where it is not known."""
    ends = _ends(schedule, cycle)
    return None if ends is None else ends[0]


def _ends(schedule: Schedule, cycle: Cycle) -> list[float] | None:
    """A schedule's values at stop - start, at stop and at twice that, None where they are not known."""
    if not (arguments.known(cycle.start) and arguments.known(cycle.stop)):
        return None
    start, stop = int(cycle.start), int(cycle.stop)  # type: ignore[arg-type]
    with jax.ensure_compile_time_eval():
        ends = [schedule(jnp.asarray(count)) for count in (stop - start, stop, 2 * stop)]
    if any(arguments.traced(end) or np.shape(end) for end in ends):
        return None
    return [float(np.asarray(end)) for end in ends]


def check_ramp(name: str, schedule: Schedule, cycle: Cycle) -> None:
    """Warn about a schedule that `stop` cuts off before its end, where that is known.

    Schedules count from `start`. One that would still move between the last refresh and the count of `stop`, where it
    has come to rest, was written for counts from 0. One that comes to rest at 0, as AC/DC's do, is no ramp.
    """
    ends = _ends(schedule, cycle)
    if ends is None or not cycle.start:
        return
    last, rest, later = ends
    if rest and rest == later != last:
        start, stop = int(cycle.start), int(cycle.stop)  # type: ignore[arg-type]
        warnings.warn(
            f"The schedule of `{name}` is evaluated at count - start and reaches {last:.4g} at `stop`"
            f" ({stop} - {start}), not the {rest:.4g} at which it ends. Shorten it to {stop - start} updates,"
            " or move `stop`.",
            stacklevel=3,
        )
