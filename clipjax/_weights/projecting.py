"""The core of the weight side: hold parameters in a set, land on it exactly, carry what was cut."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipjax import selections
from clipjax._arrays import arguments, dtypes, elementwise, picking, trees
from clipjax._maths import landing
from clipjax.projections import as_projection
from clipjax.typing import Context, Projection, Tree, Where


class ProjectState(NamedTuple):
    """State of `project` and of every member built on it.

    Attributes:
      count: i32, updates so far.
      carry: the float weights in f32, None at leaves not governed; () without carry.
      projection: the state of the projection.
      inner: the state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]
    carry: Any
    projection: Any
    inner: Any


def project(
    projection: Any,
    *,
    carry: bool = False,
    inner: optax.GradientTransformation | None = None,
    start: Any = 0,
    where: Where | None = None,
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hold parameters in a set: after `optax.apply_updates` they are P(params + updates).

    .. math:: u' = P(p + u) - p

    corrected so that :math:`p + u'` in floating point is the projected value itself. With ``carry=True`` what P
    removed is kept and comes back: :math:`z \leftarrow z + u,\ u' = P(z) - p`, where z is the f32 float weight. It is
    used only where P(z) still explains the parameter (or the parameter is 0); an edited or reloaded weight wins.

    Args:
      projection: a `Projection` or a plain function params -> params.
      carry: keep the float weights in the state, 4 bytes a parameter.
      inner: a transformation that sees the float weights and f32 gradients where there is a carry. Those chained
        before see the visible weights.
      start: the first update that projects; may be traced.
      where: `where(path, leaf) -> bool`, which float leaves are held; every one by default.
      key: PRNG key for projections that draw; folded with the count. `jax.random.key(0)` by default.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where parameters are narrower.
      Extra arguments: `grad`, see `with_gradient`; `refresh`, a static bool, forces a refresh of masks and steps
      (True) or compiles an update that has none (False).

    Raises:
      TypeError: for something that is no projection.
      ValueError: for a negative `start`, and at update where `params` are missing.

    Example:
      >>> import clipjax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), project(lambda params: jax.tree.map(jnp.abs, params)))
      >>> params = jnp.array([1.0, -1.0])
      >>> updates, _ = tx.update(jnp.array([0.5, 1.5]), tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [0.5, 2.5]

    References:
      D3, D4; Courbariaux et al., "BinaryConnect", https://arxiv.org/abs/1511.00363.
    """
    held = as_projection(projection)
    arguments.static(carry, "carry")
    arguments.times(start, None, None)
    where = picking.everything if where is None else where
    if not callable(where):
        raise TypeError(
            f"`where` must be a function (path, leaf) -> bool, got {where!r}. Try `lambda path, leaf: ...`."
        )
    inside = optax.with_extra_args_support(inner or optax.identity())

    def init_fn(params: Tree) -> ProjectState:
        picks = picking.pick(where, params)
        picking.warn_if_nothing(picks, params)
        weights = picking.restrict(params, picks)
        floats = jax.tree.map(_fresh, weights) if carry else ()
        seen = picking.merge(params, floats, picks) if carry and inner else params
        count, inner_state = jnp.zeros((), jnp.int32), inside.init(seen)
        if inner and held.survives is not None and not carry:
            _moments(inside, lambda moment: moment, inner_state)
        return ProjectState(count, floats, held.init(weights), inner_state)

    def update_fn(
        updates: Tree, state: ProjectState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ProjectState]:
        if params is None:
            raise ValueError(arguments.NO_PARAMS)
        picks = picking.pick(where, params)
        narrow = picking.restrict(params, picks)
        weights = jax.tree.map(dtypes.widened, narrow)
        grad = extra.get("grad", updates if inner else None)  # what arrives at `inner` is the gradient
        context = _context(state.count, narrow, grad, key, _refresh(extra))
        before = context._replace(count=state.count - 1, key=selections.key_at(key, state.count - 1))

        def floats() -> Tree:
            return _explained(held, state, weights, narrow, before, start)

        seen, now = params, floats()
        if carry and inner:
            seen, updates = picking.merge(params, now, picks), _widened(updates, picks)
        updates, inner_state = inside.update(updates, state.inner, seen, **extra)
        steps = _aligned(updates, params, picks)

        def moved_from(floats: Tree) -> tuple[Tree, Tree]:
            target = jax.tree.map(jnp.add, floats, steps)
            return target, target if inner or not carry else jax.tree.map(jnp.add, weights, steps)

        target, landed = moved_from(now)
        context = context._replace(landed=landed, again=lambda: moved_from(floats()))
        new, projected = held.apply(target, state.projection, context)
        active = None if _always(start) else state.count >= start
        if carry:
            if not inner:
                target = _drop(held, target, now, weights, steps, new, projected, context, active)
                new = _hold(held, target, projected, context)
            new = jax.tree.map(lambda n, t: _keep(active, elementwise.where(jnp.isfinite(t), n, t), t), new, target)
            moved = jax.tree.map(landing.land_or_stay, weights, _rounded(new, narrow))
        elif held.survives is not None:
            kept = held.survives(target, state.projection, projected)
            moved = jax.tree.map(functools.partial(landing.emptied, active), steps, weights, landed, kept)
            if inner:
                inner_state = _forget(inside, inner_state, params, picking.merge(params, kept, picks), picks, active)
        else:
            new = jax.tree.map(functools.partial(_keep, active), new, target)
            moved = jax.tree.map(landing.changed, steps, weights, landed, new, _rounded(new, narrow))
        count = optax.safe_increment(state.count)
        carried = target if carry else ()
        return picking.merge(updates, moved, picks), ProjectState(count, carried, projected, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _forget(inner: Any, state: Any, params: Tree, kept: Tree, picks: list[bool], active: Any) -> Any:
    """The inner state without moments of what P has set to 0; factored moments, of another shape, stay."""
    alive = picking.merge(jax.tree.map(lambda p: True, params), kept, picks)

    def clear(moment: Any, keep: Any, p: Any) -> Any:
        if isinstance(moment, optax.MaskedNode) or keep is True or jnp.shape(moment) != p.shape:
            return moment
        gone = ~keep if active is None else ~keep & active
        return jnp.where(gone, jnp.zeros_like(moment), moment)

    return _moments(inner, clear, state, alive, params)


def _moments(inner: Any, fn: Any, state: Any, *rest: Tree) -> Any:
    """Map over the arrays of an optimizer's state that belong to params."""
    try:
        return optax.tree.map_params(inner, fn, state, *rest, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    except Exception as error:
        raise ValueError(
            "`inner` must be an optimizer in whose state `optax.tree.map_params` finds the moments of each param,"
            f" got one where it fails: {error}. Chain `prune_mask` behind it instead."
        ) from error


def _drop(
    held: Projection,
    target: Tree,
    floats: Tree,
    weights: Tree,
    steps: Tree,
    new: Tree,
    projected: Any,
    context: Context,
    active: Any,
) -> Tree:
    """The targets to carry and to project.

    A weight that the members before land on exactly 0 stays 0: where P would not send it there, the carry is dropped.
    The projection is then taken from the carried value alone, so that a compiled update needs no third array.
    """
    if held.vanishes is None:
        gone = jax.tree.map(lambda n: n == 0, new)
    else:  # asked of the value that the target has where u = -p, which does not wait for u
        gone = held.vanishes(jax.tree.map(jnp.subtract, floats, weights), projected, context)

    return jax.tree.map(functools.partial(_drop_leaf, active), target, weights, steps, gone)


@elementwise.leafwise
def _drop_leaf(active: Any, t: jax.Array, p: jax.Array, u: jax.Array, gone: jax.Array) -> jax.Array:
    return _keep(active, jax.lax.select((u == -p) & ~gone, jnp.zeros_like(t), t), t)


def _explained(held: Projection, state: ProjectState, weights: Tree, narrow: Tree, before: Context, start: Any) -> Tree:
    """The carried float weights where the last projection of them is what the params show, else the params."""
    if isinstance(state.carry, tuple) and not state.carry:
        return weights
    carried = trees.place(state.carry, weights)
    shown = _hold(held, carried, state.projection, before._replace(landed=carried, refresh=False))
    active = None if _always(start) else state.count > start

    shown = jax.tree.map(functools.partial(_keep, active), shown, carried)
    return jax.tree.map(functools.partial(_choose, held.near or None), carried, _rounded(shown, narrow), weights)


def _hold(held: Projection, target: Tree, state: Any, context: Context) -> Tree:
    if held.hold is not None:
        return held.hold(target, state, context)
    return held.apply(target, state, context)[0]


def _context(count: jax.Array, params: Tree, grad: Any, key: Any, refresh: bool | None) -> Context:
    grads = None if grad is None else trees.match(grad, params)
    return Context(count, params, params, grads, selections.key_at(key, count), refresh)


def _refresh(extra: dict[str, Any]) -> bool | None:
    refresh = extra.get("refresh")
    if refresh is None or isinstance(refresh, bool):
        return refresh
    raise TypeError(
        f"`refresh` must be None or a static bool, got {refresh!r}. Pass it through jit as a static argument."
    )


def _aligned(updates: Tree, params: Tree, picks: list[bool]) -> Tree:
    """The updates of the governed leaves in computing dtype, in the structure of the params; None counts as 0."""
    leaves, _ = trees.flatten(updates)
    weights, treedef = trees.flatten(params)
    if len(leaves) != len(weights):
        raise ValueError(
            f"`updates` must have one leaf per leaf of `params`, got {len(leaves)} for {len(weights)}."
            " Pass the params that the updates belong to."
        )
    aligned = [
        None if not ok else jnp.zeros_like(p, dtypes.wide(p.dtype)) if u is None else _aligned_leaf(u, p)
        for u, p, ok in zip(leaves, weights, picks, strict=True)
    ]
    return treedef.unflatten(aligned)


def _aligned_leaf(u: jax.Array, p: jax.Array) -> jax.Array:
    u = u.astype(dtypes.wide(p.dtype))
    return u if u.shape == p.shape else jnp.broadcast_to(u, p.shape)  # as `optax.apply_updates` would


def _widened(updates: Tree, picks: list[bool]) -> Tree:
    """The gradients of the governed leaves in computing dtype, as an inner transformation sees them."""
    wide = jax.tree.map(dtypes.widened, picking.restrict(updates, picks))
    return picking.merge(updates, wide, picks)


def _fresh(p: jax.Array) -> jax.Array:
    """A copy in computing dtype, with the sharding of the leaf."""
    dtype = dtypes.wide(p.dtype)
    return jnp.zeros_like(p, dtype=dtype) + p.astype(dtype)


def _rounded(new: Tree, narrow: Tree) -> Tree:
    """The projected values as the parameter's dtype can hold them, in computing dtype."""
    return jax.tree.map(lambda n, p: dtypes.narrowed(n, p.dtype), new, narrow)


def _always(start: Any) -> bool:
    return arguments.known(start) and int(start) == 0


def _keep(active: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if active is None else elementwise.where(active, new, old)


@elementwise.leafwise
def _choose(near: Any, z: jax.Array, n: jax.Array, w: jax.Array) -> jax.Array:
    off = n != w if near is None else jnp.abs(n - w) > near * jnp.abs(w)
    edited = off & (w != 0)
    return jax.lax.select(edited | ~jnp.isfinite(z), w, z)
