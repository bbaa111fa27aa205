"""When masks and grids are computed anew: start, every, stop, and the `refresh` argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from clipjax._arrays import arguments, sharding
from clipjax.typing import Context, Count, State, Tree


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


def refreshed(cycle: Cycle, context: Context, refresh: Callable[[Tree, Tree], State], old: State) -> State:
    """`refresh(target, landed)` where a refresh is due, else `old`.

    A refresh is due at counts c >= start with (c - start) divisible by `every` up to `stop`, and at `stop` itself;
    without `every` once, at `start`. A static `context.refresh` decides at trace time instead.
    """
    again = context.again
    assert again is not None  # `project` always gives it

    def fresh() -> State:
        return jax.tree.map(sharding.laid_as, refresh(*again()), old)

    if context.refresh is not None:
        return fresh() if context.refresh else old
    since = context.count - cycle.start
    due = since == 0 if cycle.every is None else (since >= 0) & (since % cycle.every == 0)
    if cycle.stop is not None:
        due = (due & (context.count <= cycle.stop)) | (context.count == cycle.stop)
    return jax.lax.cond(due, fresh, lambda: old)
