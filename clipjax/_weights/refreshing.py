"""When masks and grids are computed anew: start, every, stop, and the `refresh` argument."""

from __future__ import annotations

from typing import Any

import jax

from clipjax._arrays import sharding
from clipjax.typing import Context


def refreshed(context: Context, start: Any, every: Any, stop: Any, refresh: Any, old: Any) -> Any:
    """`refresh(target, landed)` where it is due, else `old`.

    Refreshes are due at counts c >= start with (c - start) divisible by `every` up to `stop`, and at `stop` itself;
    without `every` once, at `start`. A static `context.refresh` decides at trace time instead.
    """
    again = context.again
    assert again is not None  # `project` always gives it

    def fresh() -> Any:
        return jax.tree.map(sharding.laid_as, refresh(*again()), old)

    if context.refresh is not None:
        return fresh() if context.refresh else old
    since = context.count - start
    due = since == 0 if every is None else (since >= 0) & (since % every == 0)
    if stop is not None:
        due = (due & (context.count <= stop)) | (context.count == stop)
    return jax.lax.cond(due, fresh, lambda: old)
