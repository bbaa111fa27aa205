"""What spikes.py compares: optimizers with their rates, and chains that limit gradients, updates, weights or logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import clipjax
from clipjax import projections, selections, thresholds


class Optimizer(NamedTuple):
    """A direction (the update at a rate of 1), its learning rates, those at which the arms are tuned, and its arms."""

    direction: Callable[[], optax.GradientTransformation]
    rates: tuple[float, ...]
    tuning: tuple[float, ...]
    arms: tuple[str, ...]


def muon() -> optax.GradientTransformation:
    """Muon for all kernels, the readout's too, with the size of Adam's updates and no decay; Adam for all else."""

    def matrices(params: Any) -> Any:
        def numbers(path: Any, leaf: jax.Array) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if not name.endswith("kernel"):
                return None
            # The kernels of queries, keys and values are [in, heads, size], the one behind them [heads, size, out].
            outputs = (1, 2) if leaf.ndim == 3 and "/out/" not in name else (leaf.ndim - 1,)
            inputs = tuple(i for i in range(leaf.ndim) if i not in outputs)
            return optax.contrib.MuonDimensionNumbers(inputs, outputs)

        return jax.tree_util.tree_map_with_path(numbers, params)

    return optax.contrib.muon(1.0, muon_weight_dimension_numbers=matrices, consistent_rms=0.2)


class Course(NamedTuple):
    """What a chain is built of.

    Attributes:
      direction: the optimizer at a learning rate of 1.
      rate: its learning rates, a schedule.
      analysis: what is known of the model's kernels.
      pairs: the key kernel of each query kernel, by path.
    """

    direction: optax.GradientTransformation
    rate: optax.Schedule
    analysis: clipjax.Analysis
    pairs: dict[str, str]

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The whole optimizer."""
        return optax.chain(self.direction, optax.scale_by_schedule(self.rate))


class Arm(NamedTuple):
    """A chain with one setting c, and the candidates for it, multiples of a median norm if `relative`."""

    chain: Callable[[Any, Course], optax.GradientTransformation]
    candidates: tuple[float, ...]
    relative: bool = False


def norms(rule: Callable[[Any], Any], candidates: tuple[float, ...], **options: Any) -> Arm:
    """The norm of gradients is held below a rule of one setting; without a rule of clipjax below the setting itself."""
    relative = not isinstance(rule(1.0), clipjax.Rule)

    def chain(c: Any, course: Course) -> optax.GradientTransformation:
        return optax.chain(clipjax.clip_norm(rule(c), **options), course.optimizer)

    return Arm(chain, candidates, relative)


def sizes(c: Any, course: Course) -> optax.GradientTransformation:
    """The root mean square of each leaf's update, before the learning rate, as Adafactor's d."""
    limit = clipjax.clip_norm(c, ord="rms", per="leaf")
    return optax.chain(course.direction, limit, optax.scale_by_schedule(course.rate))


def weights(make: Callable[[Any, clipjax.Analysis], Any]) -> Callable[[Any, Course], optax.GradientTransformation]:
    """Kernels are held in a set behind the optimizer."""

    def chain(c: Any, course: Course) -> optax.GradientTransformation:
        held = clipjax.project(make(c, course.analysis), where=course.analysis.kernels)
        return optax.chain(course.optimizer, held)

    return chain


def cap(c: Any, analysis: clipjax.Analysis) -> Any:
    """A bound of the largest singular value."""
    return projections.spectral_cap(c, axis=analysis.outputs, layers=analysis.layers)


FIXED = (0.25, 1.0, 4.0)
ARMS = {  # runs are kept under these names: an arm whose chain changes needs a new one
    "no clip": Arm(lambda c, course: course.optimizer, (math.inf,)),
    "constant": norms(lambda c: c, FIXED),
    "constant per leaf": norms(lambda c: c, FIXED, per="leaf"),
    "zscore": norms(lambda c: thresholds.zscore(c, warmup=10), (1.0, 2.5, 4.0)),
    "ema_ratio per leaf": norms(lambda c: thresholds.ema_ratio(c, warmup=10), (1.05, 1.5, 3.0), per="leaf"),
    "percentile": norms(thresholds.percentile, (10.0, 50.0, 90.0)),
    "spam per entry": Arm(
        lambda c, x: optax.chain(clipjax.clip(thresholds.spam(c, decay=0.99)), x.optimizer), (10, 100, 5000)
    ),
    "random half": norms(lambda c: c, FIXED, select=selections.bernoulli(0.5)),
    "largest tenth": norms(lambda c: c, FIXED, select=selections.largest(0.1)),
    "constant with carry": norms(lambda c: c, FIXED, carry=True),
    "skip mean_sigma": Arm(
        lambda c, x: clipjax.skip_spikes(x.optimizer, thresholds.mean_sigma(c, window=10)), (2, 4, 8)
    ),
    "update RMS": Arm(sizes, FIXED, relative=True),
    "clamp": Arm(
        lambda c, x: optax.chain(x.optimizer, clipjax.clamp_weights(c, where=x.analysis.kernels)), (0.1, 0.25, 0.5)
    ),
    "sphere": Arm(weights(lambda c, analysis: projections.sphere()), (1.0,)),
    "spectral cap": Arm(weights(cap), (1.0, 2.0, 4.0)),
    "logits": Arm(lambda c, x: optax.chain(x.optimizer, clipjax.clip_logits(c, x.pairs)), (5.0, 15.0, 50.0)),
}
# A run with Muon takes twice as long: it has one threshold for each thing that is limited, not every rule for it.
LIMITS = (
    *("no clip", "constant", "constant per leaf", "largest tenth"),
    *("update RMS", "clamp", "sphere", "spectral cap", "logits"),
)
OPTIMIZERS = {
    "SGD": Optimizer(
        lambda: optax.sgd(1.0, momentum=0.9), tuple(0.00625 * 2**i for i in range(10)), (0.05, 0.4), tuple(ARMS)
    ),
    "AdamW": Optimizer(lambda: optax.adamw(1.0), tuple(0.00025 * 2**i for i in range(9)), (0.008, 0.032), tuple(ARMS)),
    "Muon": Optimizer(muon, tuple(0.0005 * 2**i for i in range(9)), (0.016, 0.064), LIMITS),
}
