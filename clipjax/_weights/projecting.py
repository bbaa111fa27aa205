"""The core of the weight side: params that stay in a set, landed on exactly, with or without latent weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax._arrays import arguments, dtypes, elementwise, picked_leaves, trees
from clipjax._maths import landing, random_draws
from clipjax._weights import allowed_values, latents, moments, surroundings, visiting
from clipjax._weights.constraints import Constraint, Update
from clipjax.projections import stateless
from clipjax.typing import Context, Count, Projection, State, Tree, Where


class ProjectState(NamedTuple):
    """State of `project` and of every transformation built on it.

    Attributes:
      count: i32, updates so far.
      carry: the latent weights in f32, None at leaves not governed; () without `carry=True`.
      projection: the state of the projection.
      inner: the state of the inner transformation.
    """

    count: jax.Array  # type: ignore[assignment]
    carry: Tree
    projection: State
    inner: State


def project(
    projection: Projection | Callable[[Tree], Tree],
    *,
    carry: bool = False,
    inner: optax.GradientTransformation | None = None,
    start: Count = 0,
    where: Where | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hold parameters in a set: after `optax.apply_updates` they are P(params + updates).

    .. math:: u' = P(p + u) - p

    corrected so that :math:`p + u'` in floating point is the projected value itself. With ``carry=True`` the state
    keeps the weights before projection, the latent weights z in f32: :math:`z \leftarrow z + u,\ u' = P(z) - p`. Small
    updates then add up in z although the params move in jumps. For each entry, z is used only if the projection of the
    last update (its state, its key) maps z to the current parameter. Otherwise the parameter was edited, or loaded from
    elsewhere, and replaces z. An entry that is exactly 0 keeps its z: a mask may have set it to 0, and may let it go
    again. To set weights to 0 by hand, make a new state by `init`.

    Transformations that hold weights (`project`, `clamp_weights`, `prune_mask`, `fake_quantize`) belong outside of
    `optax.apply_if_finite` and other wrappers that skip updates, as in ``optax.chain(optax.apply_if_finite(optimizer,
    5), project(...))``: the weights are then in the set behind a skipped update too. Inside, a skipped update leaves
    the weights as they are, and with gradients narrower than f32 `update` raises TypeError.

    A derivative of u' is that of P(p + u) - p, or of P(z) - p, in which masks, the steps and widths of a grid, and the
    level that a weight is rounded to count as constants: P of a rounded weight has the derivative 0.

    Args:
      projection: a plain function params -> params, which is given the tree with None where `where` picks no leaf, in
        f32 (f64 for f64 params). Or a `clipjax.Projection`, from `clipjax.projections` or your own, which may keep a
        state.
      carry: keep latent weights in the state, 4 bytes a parameter. Static.
      inner: a transformation, usually the optimizer. With ``carry=True`` it is given the latent weights as its params,
        and the gradients in f32; with ``carry=False`` it is given the params as they are. Transformations chained
        before `project` are always given the params.
      start: the first update that projects; may be traced.
      where: `where(path, leaf) -> bool` picks the float leaves that are projected; a path is a string such as
        "dense/kernel". Every float leaf by default.
      key: PRNG key for projections that draw; folded with the count. `jax.random.key(0)` by default.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where parameters are narrower. Its `update` takes
      two extra arguments, as those of `prune_mask` and `fake_quantize` do: `grad`, the gradient for scores that need
      one, see `with_gradient`; and `refresh`, a static bool for masks and steps: True computes them anew at this
      update, whatever its count; False compiles an update without the code for it; None (the default) does it at the
      counts that their `start`, `every` and `stop` give. Until the first refresh nothing is pruned or rounded, except
      by a rule of `clipjax.roundings` that moves weights onto the grid gradually.

    Raises:
      TypeError: for something that is no projection; at init for a complex leaf that `where` picks; at update inside of
        `optax.apply_if_finite` and its kind with gradients narrower than f32.
      ValueError: for a negative `start`; at init for an `inner` that is `optax.lookahead`; at update where `params` are
        missing.

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
    arguments.times(start, None, None)
    where = picked_leaves.resolve(where, picked_leaves.everything)
    return constrain(Constraint(_resolve(projection)), carry=carry, inner=inner, start=start, where=where, key=key)


def _resolve(projection: Projection | Callable[[Tree], Tree]) -> Projection:
    """Read `projection`; a plain function params -> params means `stateless`."""
    if isinstance(projection, Projection):
        return projection
    arguments.called(projection, "projection", "a Projection or a function params -> params")
    if callable(projection):
        arguments.takes(projection, "projection", ("params",), "A `Projection` may use more than the params.")
        return stateless(projection)
    raise TypeError(
        f"`projection` must be a Projection or a function params -> params, got {projection!r}."
        " Call the factory: `projections.identity()`."
    )


def constrain(
    constraint: Constraint,
    *,
    carry: bool,
    inner: optax.GradientTransformation | None,
    start: Count,
    where: Where,
    key: jax.Array | None,
    stop: Count | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`project` for a projection of which more is known; arguments are checked by the callers."""
    arguments.choice(carry, "carry", (True, False))
    arguments.transformation(inner, "inner")
    if key is not None and not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(f"`key` must be a PRNG key, got {key!r}. Make one: `jax.random.key(0)`.")
    projection, inside = constraint.projection, optax.with_extra_args_support(inner or optax.identity())
    always = arguments.known(start) and int(start) == 0

    def init_fn(params: Tree) -> ProjectState:
        picks = picked_leaves.pick(where, params)
        picked_leaves.warn_if_nothing(picks, params)
        governed = picked_leaves.restrict(params, picks)
        trees.check_differ([path for path, _ in trees.governed(governed)])
        floats = jax.tree.map(latents.begin, governed) if carry else ()
        inner_state = inside.init(picked_leaves.merge(params, floats, picks) if carry and inner else params)
        if inner:
            surroundings.check_inner(inside, inner_state, params, clears=constraint.kept is not None and not carry)
        return ProjectState(jnp.zeros((), jnp.int32), floats, projection.init(governed), inner_state)

    def update_fn(
        updates: Tree, state: ProjectState, params: Tree | None = None, **extra: object
    ) -> tuple[Tree, ProjectState]:
        if params is None:
            raise ValueError(arguments.NO_PARAMS)
        trees.check_kind(state, ProjectState)
        trees.check_kind(state.projection, constraint.state)
        latent_free = isinstance(state.carry, tuple) and not state.carry
        trees.check_state(carry or latent_free, "latent weights although `carry` is False")
        picks = picked_leaves.pick(where, params)
        narrow = picked_leaves.restrict(params, picks)
        visit = visiting.of(extra)
        constraint.check_fits(narrow, state.projection, visit is not None)
        weights = jax.tree.map(dtypes.widened, narrow)
        # What arrives at `inner` is the gradient, but in a visit nothing is.
        grad = extra.get("grad", updates if inner and visit is None else None)
        context = _context(state.count, narrow, grad, key, _refresh(extra))

        def current() -> Tree:
            """The latent weights that still belong to the params; without `carry` the params."""
            # widened here, as a branch that calls this would else have the wide copies of narrow params stored for it
            wide = jax.tree.map(dtypes.widened, narrow)
            if not carry:
                return wide
            then = context._replace(count=state.count - 1, key=random_draws.key_at(key, state.count - 1))
            begun = None if always else state.count > start
            return latents.current(constraint, state.carry, state.projection, wide, narrow, then, begun)

        floats, visible, arrived = current(), params, updates
        if carry and inner:
            visible, updates = picked_leaves.merge(params, floats, picks), _widened(updates, picks)
        if visit is not None:
            inner_state = inside.update(updates, state.inner, visible, **extra)[1]
            visited = visiting.Visited(constraint, state, context, floats if carry else (), start, stop, key)
            return updates, visit(visited)._replace(inner=inner_state)
        updates, inner_state = inside.update(updates, state.inner, visible, **extra)
        known = [allowed_values.of(u) for u in trees.flatten(updates)[0]]
        steps = _aligned(updates, params, picks)
        target = jax.tree.map(jnp.add, floats, steps)
        emptied: Tree = ()
        if carry and not inner:  # with the target in it, so that both are computed at once
            empties = lambda u, p, z: (u == -p) & ~jnp.isnan(z)  # noqa: E731
            emptied = jax.tree.map(empties, steps, weights, target)
        if constraint.refits:  # to the target: it is stored, where a program would compute all of it twice
            target, emptied = jax.lax.optimization_barrier((target, emptied))
        landed = target if inner or not carry else jax.tree.map(jnp.add, weights, steps)
        context = context._replace(landed=landed, memory=current, known=known)
        active = None if always else state.count >= start
        update = Update(narrow, weights, steps, floats, target, emptied, context, active)
        new, projected = projection.apply(target, state.projection, context)
        latent: Tree = ()
        if carry:
            emitted, latent = _latent(constraint, update, new, projected, chained=inner is None)
        elif constraint.kept is not None:
            kept = constraint.kept(target, state.projection, projected)
            emitted = _masked(update, kept)
            if inner:
                alive = picked_leaves.merge(jax.tree.map(lambda p: True, params), kept, picks)
                inner_state = moments.cleared(inside, inner_state, params, alive, active)
        else:
            emitted = _projected(constraint, update, new)
        if constraint.facts is not None:
            _note(constraint.facts(target, state.projection, projected, context), active, emitted, known)
        surroundings.check_outer(arrived, emitted)
        count = optax.safe_increment(state.count)
        return picked_leaves.merge(updates, emitted, picks), ProjectState(count, latent, projected, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _note(
    own: list[allowed_values.Fact], active: jax.Array | None, emitted: Tree, known: list[allowed_values.Facts]
) -> None:
    """Leave a note about the emitted updates for the transformations behind."""
    rest = iter(own)
    for update, before in zip(trees.flatten(emitted)[0], known, strict=True):
        if update is not None:
            allowed_values.note(update, (*before, allowed_values.from_start(active, next(rest))))


def _latent(constraint: Constraint, update: Update, new: Tree, projected: State, *, chained: bool) -> tuple[Tree, Tree]:
    """The latent weights take the step; the params land on their projection."""
    target = update.target
    if chained:
        # A transformation before may have set a weight to 0, which its latent weight must not undo. The projection is
        # then taken again, from the latent weights alone, so that a compiled update stores no third array.
        target = latents.drop(constraint, update, new, projected)
        new = constraint.frozen(target, projected, update.context)
    # A latent weight that is not finite shows in the params, where users look for it.
    new = jax.tree.map(lambda n, z: elementwise.where(jnp.isfinite(z), n, z), new, target)
    new = jax.tree.map(functools.partial(elementwise.keep, update.active), new, target)
    rounded = latents.rounded(new, update.params)
    return jax.tree.map(landing.land_or_stay, update.weights, rounded, *_outward(constraint, update, rounded)), target


def _masked(update: Update, kept: Tree) -> Tree:
    """Entries that are not kept land on 0: the update is -p, which is exact at once; all others pass unchanged."""
    emptied = functools.partial(landing.emptied, update.active)
    return jax.tree.map(emptied, update.steps, update.weights, update.context.landed, kept)


def _projected(constraint: Constraint, update: Update, new: Tree) -> Tree:
    """Weights that the projection moved land on their new value; the updates of all others pass unchanged."""
    new = jax.tree.map(functools.partial(elementwise.keep, update.active), new, update.target)
    rounded = latents.rounded(new, update.params)
    outward = _outward(constraint, update, rounded)
    return jax.tree.map(landing.changed, update.steps, update.weights, update.context.landed, new, rounded, *outward)


def _outward(constraint: Constraint, update: Update, new: Tree) -> tuple[Tree, ...]:
    """Where weights are rounded away from zero: a tree, or none where that is nowhere."""
    outward = constraint.projection.outward
    where = None if outward is None else outward(new, update.context)
    return () if where is None else (where,)


def _context(count: jax.Array, params: Tree, grad: Tree | None, key: jax.Array | None, refresh: bool | None) -> Context:
    grads = None if grad is None else trees.match(grad, params)
    return Context(count, params, params, grads, random_draws.key_at(key, count), refresh)


def _refresh(extra: dict[str, object]) -> bool | None:
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
    """The gradients of the governed leaves in computing dtype, in which an inner transformation gets them."""
    wide = jax.tree.map(dtypes.widened, picked_leaves.restrict(updates, picks))
    return picked_leaves.merge(updates, wide, picks)
