"""Projections: sets that parameters are held in, for `clipjax.project`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, dtypes, leaf_axes, picked_leaves, trees
from clipjax._maths import intervals, singular_values, square_sums
from clipjax.typing import Axis, Context, Leaf, Number, PerLeaf, Projection, State, Tree

__all__ = [
    "Projection",
    "clamp",
    "identity",
    "max_norm",
    "orthonormal",
    "spectral_cap",
    "sphere",
    "stateless",
    "unit_norm",
]


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
        return square_sums.shortened(x, p.dtype, _axes(x, axis), bound)

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
        scaled, _, norm = square_sums.norm(x, _axes(x, axis))
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
        arguments.no_function(radius, "radius")
        arguments.scalar(radius, "radius", "Give one number, or `per_leaf` numbers.")
        arguments.check_positive(radius, "radius", "None takes the norms that the params have.")

    def over(path: str, leaf: Leaf) -> tuple[int, ...]:
        own = leaf_axes.resolve(axis, path, leaf) or ()
        return tuple(i for i in range(leaf.ndim) if i not in own)

    def begin(path: str, p: Leaf) -> jax.Array:
        axes, dtype = over(path, p), dtypes.wide(p.dtype)
        shape = tuple(1 if i in axes else n for i, n in enumerate(p.shape))
        given = picked_leaves.for_leaf(radius, path, p)
        if given is not None:
            arguments.check_positive(given, "radius", f"Leaf {path!r} has it.")
            return jnp.full(shape, given, dtype)
        if isinstance(p, jax.ShapeDtypeStruct):
            return jnp.zeros(shape, dtype)
        _, power, norm = square_sums.norm(p.astype(dtype), axes)
        return jnp.where(power > 0, 2 * norm * power, jnp.zeros_like(power))

    def held(path: str, x: jax.Array, r: jax.Array) -> jax.Array:
        scaled, power, norm = square_sums.norm(x, over(path, x))
        r = jnp.asarray(r if (own := picked_leaves.for_leaf(radius, path, x)) is None else own).astype(x.dtype)
        return jnp.where(jnp.isfinite(x) & (r > 0) & (power > 0), scaled * (r / norm), x)

    def apply(target: Tree, state: State, context: Context | None) -> tuple[Tree, State]:
        return trees.map_with_path(lambda path, x: held(path, x, trees.look_up(state, path)), target), state

    def init(params: Tree) -> State:
        return trees.by_path({path: begin(path, p) for path, p in trees.governed(params)})

    return Projection(init, apply)


def spectral_cap(
    bound: Number, iterations: int = 8, *, axis: Axis | PerLeaf = None, layers: Axis | PerLeaf = None
) -> Projection:
    r"""Matrices of a largest singular value of at most the bound: :math:`w \leftarrow w \min(1, C / s)`.

    The number s is an upper bound of the largest singular value :math:`\sigma_1`; an iteration of vectors would give a
    lower one. With the Gram matrix G of the shorter side, of n entries, and k iterations

    .. math:: s = \lVert G^{2^k} \rVert_F^{1 / 2^{k + 1}}, \qquad
        \sigma_1 \le s \le n^{1 / 2^{k + 2}} \sigma_1

    so that 8 iterations find it to 0.7 % from above for n = 1024, and to 0.9 % for n = 8192. Held weights have
    :math:`\sigma_1 \le C`, up to rounding: of f32 in the products, and of the entries of narrower params. All singular
    values shrink alike, as by `max_norm`; matrices with s <= C stay as they are. An update costs k + 1 products of the
    shorter side with itself and n² numbers in memory; these n² cross devices where the longer side is sharded, and the
    matrix does where the shorter one is.

    Args:
      bound: C > 0, may be traced.
      iterations: k >= 0, how often G is squared. Static.
      axis: the axis or axes of the outputs, or ``per_leaf``, as ``analysis.outputs``; None for the last one. All axes
        but these and `layers` are contracted, as in the kernel of a convolution.
      layers: axes along which each index is a matrix of its own, as 0 in a stack, or ``per_leaf``, as
        ``analysis.layers``; None for none.

    Returns:
      A `Projection`.

    Raises:
      ValueError: for a bound that is not positive; at init for a leaf without two sides: pick kernels by `where`.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> [round(x, 4) for x in jnp.diag(spectral_cap(1.5).apply(kernel, (), None)[0]).tolist()]
      [1.5, 0.5]

    References:
      Miyato et al., "Spectral Normalization", 2018, https://arxiv.org/abs/1802.05957. Newhouse et al., "Training
      Transformers with Enforced Lipschitz Constants", 2025, https://arxiv.org/abs/2507.13338. D3: what to limit.
    """
    arguments.scalar(bound, "bound", "All matrices have the same bound.")
    arguments.no_function(bound, "bound")
    arguments.check_positive(bound, "bound", "`projections.clamp(0.0)` holds weights at 0.")
    arguments.static(iterations, "iterations")
    arguments.whole(iterations, "iterations", low=0, remedy="8 are usual.")
    sides = leaf_axes.sides(axis, layers)

    def scale(path: str, x: jax.Array, p: jax.Array) -> jax.Array:
        return singular_values.capped(x, p.dtype, sides(path, x), bound, iterations)

    def apply(target: Tree, state: State, context: Context | None) -> tuple[Tree, State]:
        return trees.map_with_path(scale, target, _like(target, context)), state

    return Projection(lambda params: (trees.map_with_path(sides, params), ())[1], apply)


def orthonormal(iterations: int = 12, *, axis: Axis | PerLeaf = None, layers: Axis | PerLeaf = None) -> Projection:
    r"""Matrices whose singular values are all 1, the nearest ones: :math:`w \leftarrow U V^T` of :math:`w = U S V^T`.

    Columns are then orthonormal, or rows where there are fewer of these. The factor is found by matrix products:

    .. math:: X \leftarrow (15 X - 10\, X G + 3\, X G^2) / 8, \qquad G = X^T X

    from :math:`w / \lVert w^T w \rVert_F^{1/2}` on. Each iteration brings small singular values 15/8 times nearer to 1,
    and one that is d away to 2.5 d³ of it. What starts near 0 takes some updates, until then
    `clipjax.check` reports it; of a singular value of 0 rounding decides the direction, and an array of zeros stays so.
    An iteration costs three products with the shorter side, and moves across devices what `spectral_cap` moves.

    Args:
      iterations: how many, at least 1. Static.
      axis: the axis or axes of the outputs, as in `spectral_cap`, and `layers` as well.
      layers: axes along which each index is a matrix of its own.

    Returns:
      A `Projection`.

    Raises:
      ValueError: for less than one iteration; at init for a leaf without two sides: pick kernels by `where`.

    Example:
      >>> import jax.numpy as jnp
      >>> q, _ = orthonormal().apply(jnp.array([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), (), None)
      >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6))
      True

    References:
      Björck and Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix", 1971. Higham,
      "Functions of Matrices", 2008, chapter 8. D3: which values to limit.
    """
    arguments.static(iterations, "iterations")
    arguments.whole(iterations, "iterations", low=1, remedy="12 are usual.")
    sides = leaf_axes.sides(axis, layers)

    def apply(target: Tree, state: State, context: Context | None) -> tuple[Tree, State]:
        nearest = lambda path, x: singular_values.polar(x, sides(path, x), iterations)  # noqa: E731
        return trees.map_with_path(nearest, target), state

    return Projection(lambda params: (trees.map_with_path(sides, params), ())[1], apply)


def _axes(x: jax.Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes that one norm is taken over."""
    return tuple(range(x.ndim)) if axis is None else tuple(int(a) % x.ndim for a in np.ravel(axis))
