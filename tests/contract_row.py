"""A row of the contract's table: how it is built, what of it may be traced, what holds after every step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import pytest

import clipjax


class Row(NamedTuple):
    name: str
    side: str  # "gradient": before the optimizer; "around" it; "weight": after it; "inner": after and around it
    build: Callable[..., Any]  # build(optimizer, **numbers)
    numbers: dict[str, tuple[Any, Any]] = {}
    holds: Callable[[Any, Any], None] | None = None  # holds(params, state) asserts
    gradient: bool = False  # stands inside `with_gradient`

    def tx(self, optimizer=None, wrap=None, **numbers):
        """The transformation beside or around its optimizer, `wrap` around the transformation alone."""
        numbers = {name: values[0] for name, values in self.numbers.items()} | numbers
        wrap = wrap or (lambda tx: tx)
        if self.side in ("inner", "around"):
            tx = wrap(self.build(optimizer or optax.adam(0.05), **numbers))
        else:
            pair = [optimizer or optax.sgd(0.25), wrap(self.build(None, **numbers))]
            tx = optax.chain(*(pair if self.side == "weight" else reversed(pair)))
        return clipjax.with_gradient(tx) if self.gradient else tx


def row(name, side, build, holds=None, gradient=False, **numbers):
    return Row(name, side, build, numbers, holds, gradient)


KEY = (jax.random.key(1), jax.random.key(7))
TIMES = {"start": (0, 1), "every": (2, 1), "stop": (3, 2)}

# One row stands for each code path: these rows take the path of the row named, with another number, schedule, norm or
# rule for a number in it. They run in `make slow`.
ALIKE = {
    "clip_schedule": "clip",
    "clip_largest": "clip_random",
    "clip_carry": "clip_spam_carry",
    "clip_spam": "clip_spam_carry",
    "clip_norm_schedule": "clip_norm",
    "clip_norm_zscore_mean": "clip_norm_zscore",
    "clip_norm_zscore_fixed": "clip_norm_zscore",
    "clip_norm_percentile": "clip_norm_zscore",
    "clip_norm_random": "clip_norm_largest",
    "skip_spikes": "skip_spikes_zscore",
    "clamp_pair": "clamp",
    "clamp_schedule": "clamp",
    "clamp_per_leaf": "clamp",
    "prune_once": "prune",
    "prune_schedule": "prune",
    "prune_gradient": "prune_taylor",
    "quantize_axis": "quantize_groups",
    "quantize_formats_every": "quantize_formats",
    "project": "project_norm",
}


# What stands around a transformation, a wrapper or a loop or a container, meets its arguments and its state, whatever
# the numbers are computed by. Where every row is traced, values are compared for one row of each kind of state.
KINDS = {
    "clip": "a count",
    "clip_spam_carry": "second moments and error feedback",
    "clip_norm_zscore": "moments of a norm",
    "clip_norm_percentile_leaf": "a ring buffer for each leaf",
    "skip_spikes_zscore": "an optimizer inside",
    "clamp": "a bound",
    "prune": "a mask",
    "prune_taylor": "averaged scores of gradients",
    "prune_random": "a key",
    "prune_rigl": "an optimizer inside, whose moments are cleared",
    "prune_carry": "a mask and latent weights",
    "prune_groups": "units of several leaves",
    "quantize": "steps and latent weights",
    "quantize_sqnr": "steps and widths",
    "quantize_groups": "steps along an axis",
    "quantize_formats": "scales of formats",
    "quantize_inner": "steps, and an optimizer inside",
    "project_master": "master weights, and an optimizer inside",
    "project_function": "a plain function",
}


def paths(rows):
    """The rows as cases, those that are ALIKE another one marked as slow."""
    rows = list(rows)
    return cases(rows, [m.name for m in rows if m.name not in ALIKE])


def kinds(rows):
    """The rows as cases, all but one of each kind of state marked as slow."""
    return cases(rows, KINDS)


def cases(rows, names):
    """The rows as cases, those that are not named marked as slow."""
    return [pytest.param(m, id=m.name, marks=[] if m.name in names else [pytest.mark.slow]) for m in rows]
