"""Quantization after the optimizer: weights that stay on a grid (D4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax import roundings
from clipjax import steps as stepping
from clipjax import widths as widening
from clipjax._arrays import arguments, dtypes, picking, trees
from clipjax._maths import blocks, grids, integers
from clipjax._weights import leaf_grid, projecting, refreshing
from clipjax.typing import Context, PerLeaf, Projection, Rounding, Step, Tree, Where, Width


class QuantizeState(NamedTuple):
    """State of `fake_quantize` inside its `ProjectState`; dicts are keyed by leaf path.

    Attributes:
      step: f32 per step group, the distance of two levels.
      reach: f32 per step group, the largest |weight| that the members before have landed on at a refresh; no level
        exceeds it. Infinite before the first refresh, 0 for unbounded codes. For an affine grid two in front, one below
        zero and one above.
      zero_point: i32 per step group, the code of 0; 0 on symmetric grids.
      bits: i32 per leaf, the width; 0 for unbounded codes.
      low: f32 per step group, the smallest multiple of the step that is a level, by the width, the reach and the zero
        point; 0 for unbounded codes.
      high: the largest; likewise.
    """

    step: dict[str, jax.Array]
    reach: dict[str, jax.Array]
    zero_point: dict[str, jax.Array]
    bits: dict[str, jax.Array]
    low: dict[str, jax.Array]
    high: dict[str, jax.Array]


def fake_quantize(
    bits: Any = None,
    *,
    step: Any = None,
    axis: Any = None,
    group: Any = None,
    rounding: Any = "nearest",
    where: Where | None = None,
    start: Any = 0,
    every: Any = 100,
    stop: Any = None,
    carry: bool = True,
    inner: optax.GradientTransformation | None = None,
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Hold weights on a grid: :math:`w \leftarrow \mathrm{round}(w/s)\,s` (D4), while the float weights learn.

    Rounding in place and taking a small step would change nothing: no weight would reach its next level. What rounding
    removed is therefore carried to the next update. After `optax.apply_updates` a weight is exactly code * s, rounded
    once to its dtype.

    Codes run from -(2^(b-1) - 1) to 2^(b-1) - 1, for b = 1 over {-1, 1}. As a chain member the step follows the carried
    float weights, while no level exceeds the largest |weight| that the members before have landed on at a refresh: a
    bound set by `clamp_weights` survives, a weight set to 0 by `prune_mask` stays 0. A leaf that starts at zero grows
    slowly under that rule; quantize it later (`start`), or use `inner`, where the step and the levels follow the float
    weights alone. `bits=None` with a float step is D4's formula, unbounded.

    Args:
      bits: 1 to 16, `per_leaf`, a tree from `choose_bits` (None leaves pass), a rule of `clipjax.widths`, by which each
        leaf's width follows from its distribution at every refresh, or None for unbounded codes, which need a float
        step. Static.
      step: a rule of `clipjax.steps`, `mse()` by default, or a number (may be traced). A weight that jumps by several
        levels of a given number at once may be one ulp late; what it carried is then dropped.
      axis: the axis or axes that keep a step of their own, e.g. -1 for one per output unit; or `per_leaf`. Static.
      group: g, every g neighbours along axis -2, the input of Flax's Dense and Conv kernels, have a step of their own
        in each output unit (or each unit of `axis`); or `per_leaf`. Static.
      rounding: "nearest" (halves to even), "half_away" (D4's), "stochastic", or a rule of `clipjax.roundings` by which
        the grid hardens with time.
      where: `where(path, leaf) -> bool`; by default arrays of rank >= 2 not named bias, b, scale or offset.
      start: first update that quantizes; may be traced.
      every: updates between two refreshes of the steps; may be traced.
      stop: the last refresh; may be traced. None refreshes for ever.
      carry: keep the float weights, 4 bytes a weight. Without it small updates are lost.
      inner: a transformation that sees the float weights, see `project`.
      key: PRNG key for stochastic rounding; folded with the count. `jax.random.key(0)` by default: every run then
        draws alike, and so does every member without a key; give each run and each member its own to have them differ.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where parameters are narrower. The extra argument
      `refresh` is as in `project`.

    Raises:
      ValueError: for bits outside 1 to 16, bits=None without a float step, stop < start, every < 1, an unknown
        rounding; at init for an axis that does not exist, a group that does not divide its axis, a bits tree that
        matches no leaf, or more than 8 bits on params narrower than f32, whose codes could not be recovered; at update
        for missing `params`.
      TypeError: for traced bits, axis or group.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), fake_quantize(bits=2, step=0.5))
      >>> params = {"kernel": jnp.array([[0.4, -0.9], [0.1, 0.6]])}
      >>> grads = {"kernel": jnp.zeros((2, 2))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.5, -0.5], [0.0, 0.5]]

    References:
      D4, sections 2.2 and 3.3; D0, section 2.2, step 3. Courbariaux et al., 2015, https://arxiv.org/abs/1511.00363.
      Jin et al., PARQ, 2025, https://arxiv.org/abs/2503.15748.
    """
    rule = stepping.mse() if step is None else stepping.as_step(step)
    _check_bits(bits, rule, step)
    for name, value in (("axis", axis), ("group", group), ("carry", carry)):
        arguments.static(value, name)
    roundings.check(rounding)
    arguments.times(start, every, stop)
    where = picking.weights if where is None else where

    def plans(tree: Tree) -> dict[str, leaf_grid.Plan]:
        """The static part of every governed leaf's grid."""
        widths = _widths(bits, tree)

        def plan(path: str, leaf: Any) -> leaf_grid.Plan:
            own, size = (arguments.resolve(value, path, leaf) for value in (axis, group))
            return leaf_grid.Plan(widths[path], own, size, rule, rounding)

        return {path: plan(path, leaf) for path, leaf in trees.governed(tree)}

    def init_fn(params: Tree) -> QuantizeState:
        every_plan = plans(params)
        trees.map_with_path(lambda path, leaf: leaf_grid.check(every_plan[path], path, leaf), params)
        fresh = {path: leaf_grid.begin(every_plan[path], leaf) for path, leaf in trees.governed(params)}
        return _state(fresh)

    def apply_fn(target: Tree, state: QuantizeState, context: Context) -> tuple[Tree, QuantizeState]:
        every_plan = plans(target)
        if not every_plan:
            return target, state

        def refresh(target: Tree, landed: Tree) -> QuantizeState:
            at, shown = trees.by_path(landed), trees.by_path(context.params)
            seen = {
                path: leaf_grid.measure(every_plan[path], x, at[path], _grid(state, path), shown[path].dtype)
                for path, x in trees.governed(target)
            }
            if isinstance(bits, Width):
                return _state(_chosen(bits, every_plan, seen, dict(trees.governed(target))))
            return _state({path: leaf_grid.fit(plan, seen[path]) for path, plan in every_plan.items()})

        new = refreshing.refreshed(context, start, every, stop, refresh, state)
        return hold_fn(target, new, context), new

    def hold_fn(target: Tree, state: QuantizeState, context: Context) -> Tree:
        every_plan = plans(target)
        index = {path: i for i, path in enumerate(every_plan)}
        since = (context.count - start).astype(jnp.float32)

        def level(path: str, x: jax.Array) -> jax.Array:
            draw = jax.random.fold_in(context.key, index[path]) if rounding == "stochastic" else None
            return leaf_grid.level(every_plan[path], x, _grid(state, path), draw, since)

        return trees.map_with_path(level, target)

    def vanishes_fn(target: Tree, state: QuantizeState, context: Context) -> Tree:
        every_plan = plans(target)
        return trees.map_with_path(lambda path, x: leaf_grid.vanishes(every_plan[path], x, _grid(state, path)), target)

    soft = isinstance(rounding, Rounding)
    held = Projection(init_fn, apply_fn, hold_fn, vanishes=vanishes_fn, near=2.0**-16 if soft else 0.0)
    chosen = _picks(bits, where)
    tx = projecting.project(held, carry=carry, inner=inner, start=start, where=chosen, key=key)

    def checked_init(params: Tree) -> projecting.ProjectState:
        _check_tree(bits, params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(checked_init, tx.update)


def _chosen(
    width: Width, plans: dict[str, leaf_grid.Plan], seen: dict[str, leaf_grid.Measured], sizes: dict[str, Any]
) -> dict[str, leaf_grid.Grid]:
    """The grid of every leaf at the width that the rule chooses from all distributions."""
    spectra = [
        widening.spectrum(m.values, plan.rule, m.axes, width.allowed, leaf_grid.limit(plan, m))
        for plan, m in zip(plans.values(), seen.values(), strict=True)
    ]
    energy, noise = (jnp.stack([getattr(s, name) for s in spectra]) for name in ("energy", "noise"))
    index = width.choose([sizes[path].size for path in plans], energy, noise)
    return {
        path: leaf_grid.fitted(plan, seen[path], widening.entry(spectrum.steps, at), widening.width(width.allowed, at))
        for (path, plan), spectrum, at in zip(plans.items(), spectra, index, strict=True)
    }


def _state(found: dict[str, leaf_grid.Grid]) -> QuantizeState:
    fields: list[Any] = [{path: grid[i] for path, grid in found.items()} for i in range(len(leaf_grid.Grid._fields))]
    if not found:  # one array all the same, see `trees.by_path`
        fields = [jnp.zeros(()) for _ in fields]
    return QuantizeState(*fields)


def _grid(state: QuantizeState, path: str) -> leaf_grid.Grid:
    return leaf_grid.Grid(*(field[path] for field in state))


def quantized(params: Tree, opt_state: Any) -> Tree:
    """The integers behind quantized params: a `Quantized` at every leaf on a grid, other leaves untouched.

    A weight that jumps to less than half of itself onto a grid of a given step may be one ulp late by one update.

    Args:
      params: the parameters that the optimizer state belongs to, outside of jit.
      opt_state: any optimizer state with a `fake_quantize` member in it.

    Returns:
      A tree like `params`; `dequantize(q.codes, q.step, dtype, zero_point=q.zero_point)` gives the leaf back bit for
      bit; on symmetric grids the zero point is 0.

    Raises:
      ValueError: where the state holds no `fake_quantize`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = fake_quantize(bits=4, step=0.5)
      >>> params = {"kernel": jnp.array([[1.2, -0.4]])}
      >>> updates, state = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
      >>> params = {"kernel": params["kernel"] + updates["kernel"]}
      >>> quantized(params, state)["kernel"].codes.tolist()
      [[2, -1]]

    References:
      D4, section 2.2: floats become integers.
    """
    found = trees.find(opt_state, QuantizeState)
    remedy = "Pass the state of an optimizer with `clipjax.fake_quantize` in it."
    arguments.require(found, "opt_state", "hold a quantizer", type(opt_state).__name__, remedy)
    states = [state for state in found if isinstance(state.step, dict)]  # those that govern a leaf

    def codes(path: str, leaf: Any) -> Any:
        for state in states:
            if path in state.step and not jnp.any(jnp.isinf(state.reach[path])):  # infinite before the first refresh
                return _integers(leaf, _grid(state, path))
        return leaf

    return trees.map_with_path(codes, params)


def _integers(leaf: jax.Array, grid: leaf_grid.Grid) -> integers.Quantized:
    bits = int(grid.bits) or None
    grouped = grid.step.ndim > leaf.ndim
    group = leaf.shape[-2] // grid.step.shape[-3] if grouped else None
    step, zero = (jnp.squeeze(x, -2) if grouped else x for x in (grid.step, grid.zero_point))
    kept = tuple(i for i, n in enumerate(step.shape) if n > 1 and not (grouped and i == leaf.ndim - 2))
    axis = None if not kept and not step.ndim else kept[0] if len(kept) == 1 else kept
    zero = zero if bool(jnp.any(zero != 0)) else jnp.zeros((), jnp.int32)
    ratio = jnp.round(dtypes.widened(leaf) / blocks.spread(step, leaf.shape).astype(dtypes.wide(leaf.dtype)))
    code = jnp.where(jnp.isnan(ratio), 0, ratio) + blocks.spread(zero, leaf.shape).astype(ratio.dtype)
    return integers.Quantized(code.astype(grids.code_dtype(bits)), step, zero, bits, axis, group)


def _widths(bits: Any, tree: Tree) -> dict[str, Any]:
    """The width of every governed leaf."""
    named = trees.governed(tree)
    if isinstance(bits, Width):
        return dict.fromkeys((path for path, _ in named), bits)
    if bits is None or isinstance(bits, int | np.integer | PerLeaf):
        widths = {path: arguments.resolve(bits, path, leaf) for path, leaf in named}
    else:
        given = dict(trees.governed(bits))
        widths = {path: given.get(path) for path, _ in named}
    for width in widths.values():
        if width is not None:
            arguments.bits(width)
    return widths


def _picks(bits: Any, where: Where) -> Where:
    """Leaves that a tree of bits or `per_leaf` leaves out are not quantized."""
    if bits is None or isinstance(bits, int | np.integer | Width):
        return where
    if isinstance(bits, PerLeaf):
        return lambda path, leaf: where(path, leaf) and bits.fn(path, leaf) is not None
    given = dict(trees.governed(bits))
    return lambda path, leaf: given.get(path) is not None


def _check_tree(bits: Any, params: Tree) -> None:
    """Every width of a tree of bits must belong to a leaf, unless a wrapper has masked that leaf away."""
    if bits is None or isinstance(bits, int | np.integer | PerLeaf | Width):
        return
    found = {path for path, _ in trees.governed(params)}
    left = [path for path, _ in trees.governed(bits) if path not in found]
    remedy = "Take the tree from `choose_bits(params)`."
    masked = trees.find(params, optax.MaskedNode)
    arguments.require(not left or masked or not found, "bits", "match the params by path", left, remedy)


def _check_bits(bits: Any, rule: Step, step: Any) -> None:
    arguments.static(bits, "bits")
    if isinstance(bits, Width):
        return
    if bits is None:
        ok = not rule.follows and rule.limits is None
        remedy = "Unbounded codes need a number: `step=0.05`."
        arguments.require(ok, "step", "be a number when `bits` is None", step, remedy)
    elif isinstance(bits, bool | float | str) or isinstance(bits, int | np.integer):
        arguments.bits(bits)
    elif arguments.is_schedule(bits):
        raise TypeError(f"`bits` must be static, got a schedule {bits!r}. Mark a function of the leaf by `per_leaf`.")
