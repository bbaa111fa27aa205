"""Arguments of `fake_quantize` that need no params: `rounding`, and which of them go together."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from clipjax._arrays import arguments
from clipjax._maths import grids
from clipjax._weights import leaf_grid, refreshing
from clipjax.typing import Format, PerLeaf, Rounding, RoundingMode, Step


def warn_if_it_shrinks(rule: Step, cycle: refreshing.Cycle, carry: bool) -> None:
    """Warn of a rule that cuts its weights at every refresh, where these are all that is left of them."""
    if rule.covers or carry or not refreshing.repeated(cycle):
        return
    warnings.warn(
        "`step` cuts the largest weights, and without latent weights every refresh cuts them again: the weights shrink."
        " Use `carry=True`, `every=None`, or `steps.mse()`.",
        stacklevel=3,
    )


def warn_if_it_searches(searched: bool, cycle: refreshing.Cycle) -> None:
    """Warn of scales that are searched for at every update."""
    if searched and refreshing.repeated(cycle) and arguments.known(cycle.every) and cycle.every == 1:
        warnings.warn(
            "`step=steps.mse()` searches for the scales of a format at every refresh, in 32 passes over the weights,"
            " and `every=1` refreshes at every update. Use `every=100`, or leave `step` out.",
            stacklevel=3,
        )


class Mode(NamedTuple):
    """A `rounding=` argument, read: the name of a hard rounding, and what else a rule of `clipjax.roundings` says."""

    mode: str
    soften: leaf_grid.Soften | None = None
    rated: Rounding | None = None


def read_rounding(rounding: RoundingMode) -> Mode:
    """Read `rounding`: the name of one that is hard, or a rule."""
    if isinstance(rounding, Rounding):
        costs = rounding.rate is not None or rounding.budget is not None
        return Mode("nearest", rounding.soften, rounding if costs else None)
    if not isinstance(rounding, str):
        remedy = "Give 'nearest', or call a factory: `roundings.parq(100)`."
        arguments.instance(rounding, Rounding, "rounding", remedy)
    arguments.choice(rounding, "rounding", grids.ROUNDINGS)
    return Mode(rounding)


def check_rate(rounding: Rounding | None, carry: bool) -> None:
    """Refuse codes by their cost without latent weights: what is 0 once would stay there."""
    remedy = "Leave it out: codes that cost less attract weights, and without latent weights none comes back."
    ok = rounding is None or carry is not False
    arguments.require(ok, "carry", "be True with `roundings.rate`", carry, remedy)


def check_alone(form: Format | None, group: int | PerLeaf | None, rounding: RoundingMode) -> None:
    """Refuse what a format says itself."""
    if form is None:
        return
    remedy = f"The format {form.name!r} has its own: leave it out."
    arguments.require(group is None, "group", "be None with a format", group, remedy)
    arguments.require(rounding == "nearest", "rounding", 'be "nearest" with a format', rounding, remedy)
