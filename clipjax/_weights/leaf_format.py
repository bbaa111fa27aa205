"""One leaf on a deployment format: its scales, and the value that bytes of the format have nearest to a weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from clipjax import steps
from clipjax._arrays import arguments, dtypes, elementwise, sharding, trees
from clipjax._maths import format_blocks, grids, known_formats
from clipjax._maths.format_blocks import FormatBlocks
from clipjax._weights import allowed_values
from clipjax._weights.quantize_state import LeafScales
from clipjax.typing import Axis, Format, Leaf, Number, PerLeaf, Scales, Sides, Step, StepSize

Limits: TypeAlias = tuple[Number, Number]
"""How far levels may extend below zero, and above."""


class FormatPlan(NamedTuple):
    """The arguments of `fake_quantize` for one leaf on a format; all of it is static.

    Attributes:
      form: the format.
      placed: its blocks on the leaf.
      dtype: of the leaf.
      searched: True where scales are those of least squared error, False where they are those of the reference.
    """

    form: Format
    placed: FormatBlocks
    dtype: DTypeLike
    searched: bool

    @property
    def precision(self) -> int | None:
        """The significant bits that a scale keeps, so that a level is exact in the dtype of the leaf."""
        return self.form.precision(self.dtype)

    @property
    def rounded(self) -> bool:
        """True where a level may have more significant bits than the dtype: the leaf is decode(bytes), rounded once."""
        return jnp.dtype(self.dtype).itemsize < 4 and (self.form.code_bits > 5 or not self.form.zero)


def plan(form: Format, axis: Axis | PerLeaf, step: StepSize | None, path: str, leaf: Leaf) -> FormatPlan:
    """Read `axis` and `step` for a leaf on a format."""
    searched = isinstance(step, Step) and step == steps.mse()
    remedy = f"Leaf {path!r} is on {form.name!r}, whose scales are those of its reference, or of least squared error."
    arguments.require(step is None or searched, "step", "be None or `steps.mse()` with a format", step, remedy)
    return FormatPlan(form, format_blocks.resolve(form, axis, path, leaf), jnp.dtype(leaf.dtype), searched)


def begin(plan: FormatPlan, leaf: Leaf) -> LeafScales:
    """The scales before the first refresh: zeros."""
    largest = jnp.finfo(jnp.float32).max
    return _kept(plan, tuple(jnp.zeros(s.shape, s.dtype) for s in _layout(plan)), (largest, largest))


@functools.cache
def _layout(plan: FormatPlan) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape and dtype of the scales that a leaf has in the state."""
    like, none = jax.ShapeDtypeStruct(plan.placed.shape, jnp.float32), (jnp.zeros(()),) * 2
    return jax.eval_shape(lambda x: _fitted(plan, format_blocks.view(x, plan.placed), none), like)


def bits(plan: FormatPlan) -> float:
    """Bits a weight, with its share of all scales."""
    stored = sum(8 * s.dtype.itemsize * s.size for s in _layout(plan))
    return plan.form.code_bits + stored / max(math.prod(plan.placed.shape), 1)


def check_fits(plan: FormatPlan, path: str, own: LeafScales, exact: bool) -> None:
    """Raise for scales that are laid as another format or other blocks have them.

    With `exact` also for those of another format, or of other axes, that are laid alike; known outside of jit alone.
    """
    want, known = _layout(plan), not arguments.traced(own.id)
    fits = _shown(own.scales) == _shown(want)
    if fits and exact and known:
        fits = int(own.id) == plan.form.id and outputs_of(own) == plan.placed.outputs
    if not fits:
        kind = f"{form_of(own).name!r} with outputs {outputs_of(own)}" if known else "a format"
        asked = f"{plan.form.name!r} with outputs {plan.placed.outputs} has {_shown(want)}"
        trees.check_state(False, f"scales of shape {_shown(own.scales)} of {kind} at {path!r}, where {asked}")


def _shown(scales: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> str:
    return ", ".join(f"{s.dtype}{list(s.shape)}" for s in scales)


def measure(plan: FormatPlan, x: jax.Array, known: allowed_values.Facts) -> jax.Array:
    """The weights to which scales are fitted, f32, in the view of blocks; 0 where one is not to be counted.

    Bounds are the limit of `fit`.
    """
    own = tuple(fact for fact in known if fact.bound is None)
    leaves, treedef = jax.tree.flatten(own)  # functions are among the leaves
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    arrays = [leaves[i] for i in places]

    def counted(x: jax.Array, arrays: list[jax.Array]) -> jax.Array:
        given = dict(zip(places, arrays, strict=True))
        settled = allowed_values.settled(
            x, jax.tree.unflatten(treedef, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
        )
        return _finite(settled.astype(jnp.float32))

    if all(array.shape in ((), x.shape) for array in arrays):
        return format_blocks.viewed(counted, x, arrays, plan.placed)
    return format_blocks.view(counted(x, arrays), plan.placed)


def fit(plan: FormatPlan, values: jax.Array, max_level: Sides) -> LeafScales:
    """The scales of a leaf.

    Args:
      plan: of the leaf.
      values: as `measure` gives them.
      max_level: the largest magnitude of a level below zero, and above.
    """
    limits = _limits(plan, max_level)
    scales = _fitted(plan, _clipped(plan, values, limits), limits)
    return _kept(plan, scales, limits)


def once(plan: FormatPlan, values: jax.Array) -> jax.Array:
    """The levels of values that nothing bounds, to which the scales were just fitted, as the reference has them.

    A reference divides by a scale before it is rounded. An update cannot, as the state has it rounded.
    """
    largest = dtypes.largest(plan.dtype)
    view = format_blocks.view(_clipped(plan, _finite(values), (largest, largest)), plan.placed)
    assert plan.form.quantize is not None
    limit = min(largest, float(jnp.finfo(jnp.float32).max))  # finite: no scale is infinite, where bytes would be NaN
    codes, scales = plan.form.quantize(view, limit, plan.precision, plan.placed.within)
    return format_blocks.joined(plan.form.decode(codes, scales), plan.placed, values).astype(values.dtype)


def empty(plan: FormatPlan, own: LeafScales) -> jax.Array:
    """True where all scales are those of zeros."""
    none = _of_zeros(plan.form, plan.precision)
    return functools.reduce(jnp.logical_and, [jnp.all(s == z) for s, z in zip(own.scales, none, strict=True)])


@functools.cache
def _of_zeros(form: Format, precision: int | None) -> tuple[int | float, ...]:
    """The scales of a block of zeros."""
    with jax.ensure_compile_time_eval():
        return tuple(np.asarray(s).item() for s in form.fit(jnp.zeros(1), jnp.inf, precision, (0,)))


def _limits(plan: FormatPlan, max_level: Sides) -> Sides:
    """How far levels may extend before they are rounded to the dtype of the leaf."""
    below, above = (grids.reach(jnp.asarray(end, jnp.float32), plan.dtype) for end in max_level)
    return below, above


def _fitted(plan: FormatPlan, values: jax.Array, limits: Sides) -> Scales:
    """The scales of values in the view of blocks."""
    limit = cast(jax.Array, limits) if plan.form.sides else jnp.maximum(*limits)  # see `Format.sides`
    found = _least_squares(plan, values, limit) if plan.searched else _fit(plan, values, limit)
    return format_blocks.stored(found, plan.placed)


def _fit(plan: FormatPlan, values: jax.Array, limit: jax.Array) -> Scales:
    return plan.form.fit(values, limit, plan.precision, plan.placed.within)


def _least_squares(plan: FormatPlan, values: jax.Array, limit: jax.Array) -> Scales:
    """Of the scales that the format fits to a block whose largest weights are cut, those of least squared error.

    A weight that is cut is on the outermost level, which sets the scale of the reference: it finds the same again.
    """
    within, first = plan.placed.within, _fit(plan, values, limit)
    remedy = "Its scales depend on each other: leave `step` out."
    alone = all(s.ndim for s in first)
    arguments.require(
        alone, "step", "be None with a format that has a scale for all of an array", plan.form.name, remedy
    )
    largest = jnp.max(jnp.abs(values), axis=within, keepdims=True)

    def tried(i: jax.Array | int, best: tuple[jax.Array, Scales]) -> tuple[jax.Array, Scales]:
        cap = largest * _RATIO ** jnp.asarray(i, jnp.float32)
        scales = _fit(plan, jnp.minimum(jnp.maximum(values, -cap), cap), limit)
        level = plan.form.decode(plan.form.encode(values, scales, limit), scales)
        error = jnp.sum(jnp.square(level - values), axis=within, keepdims=True)
        better = error < best[0]
        return jnp.minimum(error, best[0]), tuple(
            elementwise.where(better, new, old) for new, old in zip(scales, best[1], strict=True)
        )

    worst = (jnp.full_like(largest, jnp.inf), first)
    return jax.lax.fori_loop(0, _TRIED, tried, worst)[1]


_RATIO, _TRIED = 0.96, 32  # of the largest weight: from 1 down to .28, where ternary codes of 256 Gaussians have .44


def _finite(x: jax.Array) -> jax.Array:
    """The entries that are finite, 0 in the place of others."""
    return elementwise.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _clipped(plan: FormatPlan, x: jax.Array, limits: Limits) -> jax.Array:
    """What a format reads: f32 within the limits, in the dtype of the leaf where levels are rounded to that."""
    x = jnp.minimum(jnp.maximum(x.astype(jnp.float32), -limits[0]), limits[1])
    return dtypes.narrowed(x, plan.dtype) if plan.rounded else x


def _kept(plan: FormatPlan, scales: Scales, limits: Limits) -> LeafScales:
    low, high = (jnp.asarray(end, jnp.float32) for end in (-limits[0], limits[1]))
    outputs = sum(1 << axis for axis in plan.placed.outputs)
    number, kept = (jnp.asarray(value, jnp.uint32) for value in (plan.form.id, outputs))
    return LeafScales(number, kept, scales, low, high)


def level(plan: FormatPlan, x: jax.Array, own: LeafScales) -> jax.Array:
    """The level of every weight: decode(encode(w)) under the scales of the state."""
    limits = (-own.low, own.high)
    # Where a format reads both limits, it cuts what lies beyond them itself.
    wide = x.astype(jnp.float32) if plan.form.sides and not plan.rounded else _clipped(plan, x, limits)

    def level(wide: jax.Array, scales: Scales, limits: Limits) -> jax.Array:
        if plan.form.sides:
            limit = cast(jax.Array, limits)
        else:
            limit = elementwise.where(wide < 0, *(sharding.filled(end, wide) for end in limits))
        return plan.form.decode(plan.form.encode(wide, scales, limit), scales)

    def entries(wide: jax.Array, scales: Scales, limits: Limits) -> jax.Array:
        return level(wide, format_blocks.spread(scales, wide), limits)

    def views(wide: jax.Array, scales: Scales, limits: Limits) -> jax.Array:
        found = level(format_blocks.view(wide, plan.placed), format_blocks.in_view(scales, plan.placed), limits)
        return format_blocks.joined(found, plan.placed, wide)

    # In a view what follows from a scale is computed once for its block. A TPU would store the view; and XLA makes a
    # quotient by a scale there a product, against which the formats of this library alone are guarded.
    on_cpu = views if plan.form.sides else entries
    found = jax.lax.platform_dependent(wide, own.scales, limits, cpu=on_cpu, default=entries)
    return sharding.laid_as(found.astype(x.dtype), x)


def surely_zero(plan: FormatPlan, x: jax.Array, own: LeafScales) -> jax.Array:
    """True only where the level is surely 0."""
    if plan.form.gap is None or not plan.form.zero:
        return level(plan, x, own) == 0
    gap = plan.form.gap(format_blocks.spread(own.scales, x))
    return jnp.abs(x.astype(jnp.float32)) * 2.004 <= gap  # half of it, less the error of a quotient


def form_of(own: LeafScales) -> Format:
    """The format of a leaf, from the state alone; outside of jit.

    Raises:
      ValueError: for one that is not known.
    """
    return known_formats.find(int(own.id))


def outputs_of(own: LeafScales) -> tuple[int, ...]:
    """The axes that keep scales of their own; outside of jit."""
    return tuple(axis for axis in range(32) if int(own.outputs) >> axis & 1)


def nearest(path: str, own: LeafScales, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The code, and the level rounded to the dtype of the leaf, that are nearest to every weight; outside of jit.

    Raises:
      ValueError: for a leaf of another shape than that whose scales these are.
    """
    form, wide = form_of(own), dtypes.widened(leaf)
    try:
        placed = format_blocks.resolve(form, outputs_of(own), path, leaf)
    except ValueError:
        placed = None
    fits = placed is not None and _shown(own.scales) == _shown(_layout(FormatPlan(form, placed, leaf.dtype, False)))
    got = f"scales of shape {_shown(own.scales)} of {form.name!r} at {path!r}, which has shape {leaf.shape}"
    trees.check_state(fits, got)
    scales = format_blocks.spread(own.scales, wide)
    codes = form.encode(_finite(wide.astype(jnp.float32)), scales, jnp.inf)
    return codes, dtypes.narrowed(form.decode(codes, scales).astype(wide.dtype), leaf.dtype)
