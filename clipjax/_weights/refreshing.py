"""When masks and grids are computed anew: start, every, stop, and the `refresh` argument."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, elementwise, sharding
from clipjax.typing import Context, Count, Schedule, State, Tree


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
    return Cycle(start, every, stop)


def repeated(cycle: Cycle) -> bool:
    """True unless it is known that there is one refresh at most."""
    if cycle.stop is None:
        return cycle.every is not None
    known = arguments.known(cycle.start) and arguments.known(cycle.stop)
    return not known or int(cycle.stop) > int(cycle.start)


def refreshed(
    cycle: Cycle,
    context: Context,
    refresh: Callable[[Tree], State],
    old: State,
    target: Tree,
    changed: jax.Array | bool = False,
) -> State:
    """`refresh(target)` where a refresh is due, else `old`.

    A refresh is due at counts c >= start with (c - start) divisible by `every` up to `stop`, and at `stop` itself;
    without `every` once, at `start`. A static `context.refresh` decides at trace time instead.

    A refresh in a branch is given the weights as they lie in memory before the update: were the updates an operand of
    the branch, the program would have to store them at every step of the run. A cycle without a branch, static
    `every=1` without an end, is given the target of this update.

    Args:
      cycle: when it is due.
      context: of this update.
      refresh: the state for these weights.
      old: the state so far.
      target: what is projected at this update.
      changed: True where the state was made for other arguments, so that a refresh is due at any count from `start` on.
    """
    memory = context.memory
    assert memory is not None  # `project` always gives it

    def fresh(weights: Tree) -> State:
        # a constant in derivatives: rules search and count, and reverse mode cannot pass through their loops
        return jax.tree.map(sharding.laid_as, refresh(jax.lax.stop_gradient(weights)), old)

    if context.refresh is not None:
        return fresh(memory()) if context.refresh else old
    since = context.count - cycle.start
    if cycle.stop is None and arguments.known(cycle.every) and cycle.every == 1:
        begun = None if arguments.known(cycle.start) and cycle.start == 0 else since >= 0
        return jax.tree.map(functools.partial(elementwise.keep, begun), fresh(target), old)
    due = since == 0 if cycle.every is None else (since >= 0) & (since % cycle.every == 0)
    if cycle.stop is not None:
        due = (due & (context.count <= cycle.stop)) | (context.count == cycle.stop)
    return jax.lax.cond(due | (changed & (since >= 0)), lambda: fresh(memory()), lambda: old)


def check_ramp(name: str, schedule: Schedule, cycle: Cycle) -> None:
    """Warn about a schedule that `stop` cuts off before its end, where that is known.

    Schedules count from `start`. One that would still move between the last refresh and the count of `stop`, where it
    has come to rest, was written for counts from 0. One that comes to rest at 0, as AC/DC's do, is no ramp.
    """
    if not (arguments.known(cycle.start) and arguments.known(cycle.stop)) or not cycle.start:
        return
    start, stop = int(cycle.start), int(cycle.stop)  # type: ignore[arg-type]
    with jax.ensure_compile_time_eval():
        ends = [schedule(jnp.asarray(count)) for count in (stop - start, stop, 2 * stop)]
    if any(arguments.traced(end) for end in ends):
        return
    last, rest, later = (float(np.asarray(end)) for end in ends)
    if rest and rest == later != last:
        warnings.warn(
            f"The schedule of `{name}` is evaluated at count - start and reaches {last:.4g} at `stop`"
            f" ({stop} - {start}), not the {rest:.4g} at which it ends. Shorten it to {stop - start} updates,"
            " or move `stop`.",
            stacklevel=3,
        )
