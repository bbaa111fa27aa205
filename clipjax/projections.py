"""Projections: sets that parameters are held in, for `clipjax.project`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, dtypes, elementwise, leaf_axes, picking, trees
from clipjax._maths import intervals, norms, square_sums
from clipjax.typing import Axis, Context, Leaf, Number, PerLeaf, Projection, State, Tree

__all__ = ["Projection", "clamp", "identity", "max_norm", "sphere", "stateless", "unit_norm"]


def __dir__() -> list[str]:
    return __all__


def stateless(fn: Callable[[Tree], Tree]) -> Projection:
    """The projection that a plain function of the parameters is.

    Args:
      fn: params -> params.

    Returns:
      A `Projection` without a state.

    Example:
      >>> import jax.numpy as jnp
      >>> stateless(jnp.abs).apply(jnp.array([-1.0, 2.0]), (), None)[0].tolist()
      [1.0, 2.0]
    """
    return Projection(lambda params: (), lambda target, state, context: (fn(target), state))


def identity() -> Projection:
    """All parameters: nothing moves.

    With `carry=True` this gives f32 master weights for bf16 params: the latent weights take every update in f32, and
    the params are the latent weights rounded to bf16.

    Returns:
      A `Projection`.

    Example:
      >>> import clipjax, jax.numpy as jnp, optax
      >>> params = jnp.ones((), jnp.bfloat16)
      >>> tx = clipjax.project(identity(), carry=True, inner=optax.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params)  # plain bf16 stays at 1.0
      0.9921875
    """
    return stateless(lambda target: target)


def clamp(bound: Number | tuple[Number, Number]) -> Projection:
    """Entries in [-T, T], or in [lo, hi].

    Args:
      bound: T >= 0 or a pair (lo, hi).

    Returns:
      A `Projection`.

    Raises:
      ValueError: for a negative or NaN bound or lo > hi.

    Example:
      >>> import jax.numpy as jnp
      >>> clamp(1.0).apply(jnp.array([2.0]), (), None)[0].tolist()
      [1.0]
    """
    intervals.interval(bound)

    def check(params: Tree) -> State:
        jax.tree.map(lambda p: intervals.inside(bound, p.dtype), params)
        return ()

    def apply(target: Tree, state: State, context: Context | None) -> tuple[Tree, State]:
        limit = lambda x, p: intervals.limit(x, *_ends(bound, x, p))  # noqa: E731
        return jax.tree.map(limit, target, _like(target, context)), state

    def outward(new: Tree, context: Context) -> Tree:
        return jax.tree.map(lambda x, p: intervals.outward(x, *_ends(bound, x, p)), new, context.params)

    return Projection(check, apply, outward=None if intervals.encloses_zero(bound) else outward)


def _ends(bound: intervals.Interval, x: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The interval, rounded into the dtype of the param."""
    low, high = intervals.inside(bound, p.dtype)
    return low.astype(x.dtype), high.astype(x.dtype)


def _like(target: Tree, context: Context | None) -> Tree:
    """Arrays of the dtypes that the projected values are rounded to: the params, or the target on its own."""
    return target if context is None else context.params


def max_norm(bound: float, *, axis: int | tuple[int, ...] | None = None) -> Projection:
    r"""Norms of at most the bound: :math:`w \leftarrow w \min(1, C / \lVert w \rVert_2)`.

    The weights that result, in their dtype, have norms of at most C exactly. For that the factor is short of
    :math:`C / \lVert w \rVert` by :math:`10^{-6}` (:math:`2 \cdot 10^{-15}` for f64 weights), whatever the number of
    weights: squares are summed as whole numbers, without an error. Narrower dtypes are rounded toward zero. Weights of
    a norm that is so close to C count as too long.

    Args:
      bound: C > 0.
      axis: the axes that one norm is taken over, e.g. 0 for the incoming weights of each unit of a Dense kernel;
        None for the whole array. Leaves of too small a rank are refused by the reduction.

    Returns:
      A `Projection`.

    Raises:
      ValueError: for a negative or NaN bound.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(x, 4) for x in max_norm(1.0).apply(jnp.array([3.0, 4.0]), (), None)[0].tolist()]
      [0.6, 0.8]

    References:
      Srivastava et al., "Dropout", 2014, section 5.1.
    """
    arguments.scalar(bound, "bound", "All norms have the same bound.")
    arguments.non_negative(bound, "bound", "A norm is at least 0.")

    def scale(x: jax.Array, p: jax.Array) -> jax.Array:
        shown = dtypes.narrowed(x, p.dtype)  # what the params would be
        axes = _axes(x, axis)
        scaled, power, norm = _norm(jnp.where(jnp.isfinite(shown), shown, x), axes)
        # In units of u, half an ulp of 1, the norm is off by e at most: half the error of the sum, and the root. So it
        # is surely within C where it is found to be at most C (1 - margin), one rounding more. What is scaled is off by
        # e and four roundings, and must be found to be so by the next update, which may be off by e the other way.
        unit = float(jnp.finfo(x.dtype).eps) / 2
        e = square_sums.error(x.shape, axes) / 2 + 1
        margin = math.ceil(e + 1)
        short = math.ceil(margin + 2 * e + 4)
        limit = jnp.asarray(bound, x.dtype)
        limit = jnp.where(limit < 0, jnp.zeros_like(limit), limit)
        beyond = 2 * norm * power > limit * (1 - margin * unit)
        # a factor that is not used has a derivative all the same
        reached = jnp.where(beyond, limit, jnp.ones_like(norm))
        within = dtypes.truncated(scaled * (reached * (1 - short * unit) / norm), p.dtype)
        return jnp.where(beyond & jnp.isfinite(x), within, x)

    def apply(target: Tree, state: State, context: Context | None) -> tuple[Tree, State]:
        return jax.tree.map(scale, target, _like(target, context)), state

    return Projection(lambda params: (), apply)


def unit_norm(*, axis: int | tuple[int, ...] | None = None) -> Projection:
    r"""Norms of exactly 1, up to rounding: :math:`w \leftarrow w / \lVert w \rVert_2`; zero stays zero.

    Args:
      axis: the axes that one norm is taken over; None for the whole array.

    Returns:
      A `Projection`.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(x, 4) for x in unit_norm().apply(jnp.array([3.0, 4.0]), (), None)[0].tolist()]
      [0.6, 0.8]
    """

    def scale(x: jax.Array) -> jax.Array:
        scaled, _, norm = _norm(x, _axes(x, axis))
        return jnp.where(jnp.isfinite(x), scaled / norm, x)

    return stateless(lambda tree: jax.tree.map(scale, tree))


def sphere(radius: Number | PerLeaf | None = None, *, axis: Axis | PerLeaf = None) -> Projection:
    r"""Norms that stay what they are at the start, or a radius: :math:`w \leftarrow w\, r / \lVert w \rVert_2`.

    Behind a layer of normalization the length of a kernel changes nothing but the size of its steps: held on a sphere,
    a weight decay is not needed, and the learning rate alone says by which angle an update turns the weights. The norm
    is taken anew at every update, so that nothing drifts: it is within :math:`10^{-6}` of r for f32 weights, and for
    narrower ones as near as the rounding of the entries allows. Weights whose radius is 0, as those of a layer that
    starts at zero, are not held, and weights that are all 0 stay 0. Across devices go the sums of squares alone.

    Args:
      radius: r > 0, which may be traced, or ``per_leaf`` numbers; None for the norms of the params at `init`, which the
        state keeps.
      axis: the axis or axes along which each index has a sphere of its own: -1 for the incoming weights of each unit of
        a Flax kernel, (0, -1) for those of stacked layers, 0 for each layer of a stack; None for one of the array. Or
        ``per_leaf``, as ``analysis.outputs``. (`max_norm` and `unit_norm` name the other axes, those under the norm.)

    Returns:
      A `Projection`.

    Raises:
      ValueError: for a radius that is not positive and finite; at init for an axis that a leaf does not have.

    Example:
      >>> import clipjax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]])}
      >>> tx = optax.chain(optax.sgd(0.5), clipjax.project(sphere(axis=-1)))
      >>> updates, _ = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
      >>> [round(x, 4) for x in jnp.linalg.norm(optax.apply_updates(params, updates)["kernel"], axis=0).tolist()]
      [5.0, 2.0]

    References:
      Wen et al., "Hyperball optimization", 2026, https://arxiv.org/abs/2606.16899. Salimans and Kingma, "Weight
      Normalization", 2016, https://arxiv.org/abs/1602.07868. D3: which values to limit.
    """
    leaf_axes.check(axis)
    if radius is not None and not isinstance(radius, PerLeaf):
        arguments.scalar(radius, "radius", "Give one number, or `per_leaf` numbers.")
        arguments.check_positive(radius, "radius", "None takes the norms that the params have.")

    def over(path: str, leaf: Leaf) -> tuple[int, ...]:
        own = leaf_axes.resolve(axis, path, leaf) or ()
        return tuple(i for i in range(leaf.ndim) if i not in own)

    def begin(path: str, p: Leaf) -> jax.Array:
        axes, dtype = over(path, p), dtypes.wide(p.dtype)
        shape = tuple(1 if i in axes else n for i, n in enumerate(p.shape))
        given = picking.for_leaf(radius, path, p)
        if given is not None:
            arguments.check_positive(given, "radius", f"Leaf {path!r} has it.")
            return jnp.full(shape, given, dtype)
        if isinstance(p, jax.ShapeDtypeStruct):
            return jnp.zeros(shape, dtype)
        _, power, norm = _norm(p.astype(dtype), axes)
        return jnp.where(power > 0, 2 * norm * power, jnp.zeros_like(power))

    def held(path: str, x: jax.Array, r: jax.Array) -> jax.Array:
        scaled, power, norm = _norm(x, over(path, x))
        r = r.astype(x.dtype)
        return jnp.where(jnp.isfinite(x) & (r > 0) & (power > 0), scaled * (r / norm), x)

    def apply(target: Tree, state: State, context: Context | None) -> tuple[Tree, State]:
        return trees.map_with_path(lambda path, x: held(path, x, trees.look_up(state, path)), target), state

    def init(params: Tree) -> State:
        return trees.by_path({path: begin(path, p) for path, p in trees.governed(params)})

    return Projection(init, apply)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _norm(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The finite entries over twice a power of two, so that the largest is at least 1/2, that power, and their norm."""
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(finite), axis=axes, keepdims=True, initial=0))
    power = _power_of_two(largest)
    unit, part = norms.divisor(power)
    scaled = finite * part / unit * 0.5
    norm = elementwise.root(square_sums.squares(scaled, axes))
    return scaled, power, jnp.where(norm > 0, norm, jnp.ones_like(norm))


def _power_of_two(largest: jax.Array) -> jax.Array:
    """The power of two that is not above a number; 0 for 0."""
    kind = jnp.dtype(f"int{8 * largest.dtype.itemsize}")
    exponent = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, largest.dtype), kind)  # its bits, all set
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(largest, kind) & exponent, largest.dtype)
    return jnp.where(largest > 0, jnp.maximum(power, jnp.finfo(largest.dtype).tiny), power)


def _axes(x: jax.Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes that one norm is taken over."""
    return tuple(range(x.ndim)) if axis is None else tuple(int(a) % x.ndim for a in np.ravel(axis))
