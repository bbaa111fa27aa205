"""Intervals [lo, hi]: how a bound is read, rounded inwards to a dtype, and applied to an array."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax.typing import Bound, Leaf, Number, PerLeaf, Tree


def clamp(x: jax.Array, bound: Interval) -> jax.Array:
    """Limit every entry to [-T, T], or to [lo, hi].

    D3's weight clipping: w -> T sign(w) if |w| > T, else w. The bound is rounded into the interval where the
    dtype of `x` cannot hold it.

    Args:
      x: float array of any shape.
      bound: T >= 0, or a pair (lo, hi); scalars or arrays that broadcast to `x`.

    Returns:
      An array like `x`; NaN stays NaN.

    Raises:
      ValueError: for a negative or NaN bound, lo > hi, or an interval without a value of the dtype of `x`.
      TypeError: for complex numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> clamp(jnp.array([-3.0, 0.5, 3.0]), 1.0).tolist()
      [-1.0, 0.5, 1.0]

    References:
      D3, section 3, step 4.
    """
    x = arguments.real(x, "x")
    low, high = inside(bound, x.dtype)
    return limit(x, low, high)


@elementwise.leafwise
def limit(x: jax.Array, low: Number, high: Number) -> jax.Array:
    """The entries limited to [low, high], NaN as it is."""
    low, high = (jnp.asarray(end, x.dtype) for end in (low, high))
    if low.ndim == high.ndim == 0:
        return _clamped(x, low, high)
    x = elementwise.where(x > high, high, x)
    return elementwise.where(x < low, low, x)


@jax.custom_jvp
def _clamped(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return jax.lax.clamp(low, x, high)  # one operation, which takes scalar ends as they are


@_clamped.defjvp
def _clamped_slope(
    primals: tuple[jax.Array, jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The derivative of the end that is taken, and 1 in between and at the ends: JAX has none for scalar ends."""
    (x, low, high), (dx, dlow, dhigh) = primals, tangents
    return _clamped(*primals), elementwise.where(x > high, dhigh, elementwise.where(x < low, dlow, dx))


Interval: TypeAlias = Number | Sequence[Number]
"""T for [-T, T], or a pair (lo, hi)."""


NOWHERE = (dtypes.largest(jnp.float32), -dtypes.largest(jnp.float32))
"""An interval without a number, in the place of one that is not known, or differs by leaf."""


class Bounds(NamedTuple):
    """A `bound=` argument, read.

    Attributes:
      scheduled: True where it changes with the count.
      of_leaves: `of_leaves(tree, count)`, by path the interval (low, high) of each leaf, rounded into its dtype, in
        computing dtype; one pair of arrays for leaves that share an interval.
      shared: `shared(count) -> (low, high)`, the interval of all leaves; NOWHERE where it differs by leaf.
      around_zero: `around_zero(path, leaf, count)`, True where it is known that 0 lies in the interval of a leaf.
    """

    scheduled: bool
    of_leaves: Callable[[Tree, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]
    shared: Callable[[jax.Array], tuple[Number, Number]]
    around_zero: Callable[[str, Leaf, jax.Array], bool]


def resolve(bound: Bound) -> Bounds:
    """Read a bound: a number, a pair, a schedule of either, or `per_leaf` of any of these."""

    def own(path: str, leaf: Leaf) -> Bound:
        return bound.fn(path, leaf) if isinstance(bound, PerLeaf) else bound  # type: ignore[return-value]

    def of_leaves(tree: Tree, count: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        found: dict[Hashable, tuple[jax.Array, jax.Array]] = {}
        by_path = {}
        for path, leaf in trees.governed(tree):
            kind = (path if isinstance(bound, PerLeaf) else "", jnp.dtype(leaf.dtype))
            if kind not in found:
                given = own(path, leaf)
                low, high = inside(_scalars(arguments.schedule(given)(count)), leaf.dtype, checked=not callable(given))
                found[kind] = low.astype(dtypes.wide(leaf.dtype)), high.astype(dtypes.wide(leaf.dtype))
            by_path[path] = found[kind]
        return by_path

    def around_zero(path: str, leaf: Leaf, count: jax.Array) -> bool:
        return encloses_zero(arguments.schedule(own(path, leaf))(count))

    if isinstance(bound, PerLeaf):
        return Bounds(False, of_leaves, lambda count: NOWHERE, around_zero)
    arguments.check_schedule(bound, "bound", "a number or a pair (lo, hi)")
    if not callable(bound):
        interval(_scalars(bound))
    at = arguments.schedule(bound)
    shared = lambda count: interval(at(count), checked=not callable(bound))  # noqa: E731
    return Bounds(callable(bound), of_leaves, shared, around_zero)


def encloses_zero(bound: Interval) -> bool:
    """True where it is known that 0 lies in an interval: in [-T, T] always, in a pair where its ends are known."""
    if not isinstance(bound, Sequence):
        return True
    low, high = bound
    return arguments.known(low) and arguments.known(high) and bool(low <= 0 <= high)


def _scalars(bound: Interval) -> Interval:
    """The bound of all entries of a leaf: one number for each end."""
    for end in bound if isinstance(bound, Sequence) else (bound,):
        arguments.scalar(end, "bound", "Give T or (lo, hi); bounds that differ by leaf go through `per_leaf`.")
    return bound


def interval(bound: Interval, *, checked: bool = True) -> tuple[Number, Number]:
    """The interval that a bound means: [-T, T] for a number T, a pair as it is.

    Known numbers are checked, but for those that a schedule returned. A T below 0 that nothing checks counts as 0.
    """
    if isinstance(bound, str):  # also a sequence
        arguments.numeric(bound, "bound", "Give T or (lo, hi).")
    if isinstance(bound, Sequence):
        arguments.require(len(bound) == 2, "bound", "be a number or a pair (lo, hi)", bound, "Give T or (lo, hi).")
        low, high = bound
        _check_pair(bound, low, high, checked=checked)
        return low, high
    if checked:
        arguments.non_negative(bound, "bound", "|w| <= bound needs a bound of at least 0.")
    if not arguments.known(bound) or not checked:
        bound = jnp.asarray(bound)
        bound = jnp.where(bound < 0, jnp.zeros_like(bound), bound)
    return -bound if not isinstance(bound, jax.Array | np.ndarray) else -jnp.asarray(bound), bound


def _check_pair(bound: Interval, low: Number, high: Number, *, checked: bool) -> None:
    for end in (low, high) if checked else ():
        if arguments.known(end):
            ok = not np.any(np.isnan(np.asarray(end, np.float64)))
            arguments.require(ok, "bound", "not hold NaN", bound, "Give numbers, lo <= hi.")
    if checked and arguments.known(low) and arguments.known(high):
        ordered = np.all(np.asarray(low, np.float64) <= np.asarray(high, np.float64))
        arguments.require(ordered, "bound", "have lo <= hi", bound, "Swap the two ends.")


def inside(bound: Interval, dtype: DTypeLike, *, checked: bool = True) -> tuple[jax.Array, jax.Array]:
    """The ends of the interval, rounded inwards where they fall between two values of `dtype`."""
    low, high = interval(bound, checked=checked)
    ends = toward(low, dtype, up=True), toward(high, dtype, up=False)
    if not (checked and arguments.known(low) and arguments.known(high)):
        ends = _ordered(*ends)
    if checked and arguments.known(low) and arguments.known(high):
        remedy = f"No value of {jnp.dtype(dtype).name} lies inside; widen the interval."
        arguments.require(np.all(ends[0] <= ends[1]), "bound", "hold a value of the leaf's dtype", bound, remedy)
    return ends


def _ordered(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ends that nothing has checked: NaN is no end, and the lower one wins where they are in wrong order."""
    low = jnp.where(jnp.isnan(low), -jnp.inf, low)
    high = jnp.where(jnp.isnan(high), jnp.inf, high)
    return low, jnp.maximum(low, high)


def outward(x: jax.Array, low: Number, high: Number) -> jax.Array:
    """True at the end of an interval that is nearer to 0, where 0 is outside: rounding toward it would leave."""
    low, high = (jnp.asarray(end, x.dtype) for end in (low, high))
    return ((low > 0) & (x == low)) | ((high < 0) & (x == high))


def toward(end: Number, dtype: DTypeLike, *, up: bool) -> jax.Array:
    """`end`, read as f32 (f64 for f64 leaves), rounded up or down to a value that `dtype` holds."""
    if arguments.known(end):
        return _toward(np, np.asarray(end), jnp.dtype(dtype), up)
    return _traced(jnp.asarray(end), jnp.dtype(dtype), up)


def _toward(xp: ModuleType, end: jax.typing.ArrayLike, dtype: DTypeLike, up: bool) -> jax.Array:
    wide = dtypes.wide(dtype)
    exact = xp.asarray(end).astype(wide)
    if wide == dtype:
        return exact
    near = exact.astype(dtype).astype(wide) if xp is np else dtypes.narrowed(exact, dtype)
    off = near < exact if up else near > exact
    other = xp.nextafter(near.astype(dtype), xp.asarray(np.inf if up else -np.inf).astype(dtype))
    return xp.where(off, other.astype(wide), near)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _traced(end: jax.Array, dtype: DTypeLike, up: bool) -> jax.Array:
    return _toward(jnp, end, dtype, up)


@_traced.defjvp
def _traced_slope(
    dtype: DTypeLike, up: bool, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The derivative of the end itself: JAX has none of `nextafter`."""
    return _traced(*primals, dtype, up), tangents[0].astype(dtypes.wide(dtype))
