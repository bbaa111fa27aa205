"""Quantization after the optimizer: weights that stay on a grid (D4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipjax import _arguments as arguments
from clipjax import _grids as grids
from clipjax import _projecting as projecting
from clipjax import _trees as trees
from clipjax import steps as stepping
from clipjax._typing import Tree, Where
from clipjax.projections import Context, Projection


class QuantizeState(NamedTuple):
    """State of `fake_quantize` inside its `ProjectState`; dicts are keyed by leaf path.

    Attributes:
      step: f32 per step group, the distance of two levels.
      reach: f32 per step group, the largest |weight| that the members before have landed on at a refresh; no level
        exceeds it. Infinite before the first refresh, 0 for unbounded codes.
      bits: i32 per leaf, the width; 0 for unbounded codes.
    """

    step: dict[str, jax.Array]
    reach: dict[str, jax.Array]
    bits: dict[str, jax.Array]


class Quantized(NamedTuple):
    """The integers of one leaf: weight = (code - zero_point) * step.

    Attributes:
      codes: i8 up to 8 bits, i16 up to 16, i32 for unbounded codes; the shape of the weight.
      step: f32, broadcasts to the weight.
      zero_point: i32, the code of 0; 0 on symmetric grids.
      bits: the width, None for unbounded codes.
      axis: the axis or axes with a step of their own, or None.
      group: the size of groups along the input axis, or None.
    """

    codes: jax.Array
    step: jax.Array
    zero_point: jax.Array
    bits: int | None
    axis: int | tuple[int, ...] | None
    group: int | None


class _Plan(NamedTuple):
    """What is static about one leaf's grid."""

    bits: int | None
    axis: Any
    rule: stepping.Step

    def axes(self, leaf: Any) -> tuple[int, ...]:
        return grids.reduced_axes(leaf.ndim, self.axis)


def fake_quantize(
    bits: Any = None,
    *,
    step: Any = None,
    axis: Any = None,
    rounding: str = "nearest",
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
      bits: 1 to 16, `per_leaf`, a tree from `choose_bits` (None leaves pass), or None for unbounded codes, which need
        a float step. Static.
      step: a rule of `clipjax.steps`, `mse()` by default, or a number (may be traced).
      axis: the axis or axes that keep a step of their own, e.g. -1 for one per output unit; or `per_leaf`. Static.
      rounding: "nearest" (halves to even), "half_away" (D4's) or "stochastic".
      where: `where(path, leaf) -> bool`; by default arrays of rank >= 2 not named bias, b, scale or offset.
      start: first update that quantizes; may be traced.
      every: updates between two refreshes of the steps; may be traced.
      stop: the last refresh; may be traced. None refreshes for ever.
      carry: keep the float weights, 4 bytes a weight. Without it small updates are lost.
      inner: a transformation that sees the float weights, see `project`.
      key: PRNG key for stochastic rounding; folded with the count.

    Returns:
      An `optax.GradientTransformationExtraArgs`; its updates are f32 where parameters are narrower. The extra argument
      `refresh` is as in `project`.

    Raises:
      ValueError: for bits outside 1 to 16, bits=None without a float step, stop < start, every < 1, an unknown
        rounding; at init for an axis that does not exist, a bits tree that matches no leaf, or more than 8 bits on
        params narrower than f32, whose codes could not be recovered; at update for missing `params`.
      TypeError: for traced bits or axis.

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
    _check_bits(bits, step)
    arguments.static(axis, "axis")
    arguments.static(carry, "carry")
    arguments.choice(rounding, "rounding", grids.ROUNDINGS)
    arguments.times(start, every, stop)
    where = trees.weights if where is None else where

    def plans(tree: Tree) -> dict[str, _Plan]:
        """The static part of every governed leaf's grid."""
        widths = _widths(bits, tree)
        return {path: _Plan(widths[path], trees.resolve(axis, path, leaf), rule) for path, leaf in trees.governed(tree)}

    def init_fn(params: Tree) -> QuantizeState:
        every_plan = plans(params)
        trees.map_with_path(lambda path, leaf: _check_leaf(path, every_plan[path], leaf), params)

        def groups(value: float) -> Any:
            return trees.by_path(trees.map_with_path(lambda path, p: _groups(every_plan[path], p, value), params))

        widths = trees.map_with_path(lambda path, p: jnp.asarray(every_plan[path].bits or 0, jnp.int32), params)
        return QuantizeState(groups(1.0), groups(jnp.inf), trees.by_path(widths))

    def apply_fn(target: Tree, state: QuantizeState, context: Context) -> tuple[Tree, QuantizeState]:
        every_plan = plans(target)
        if not every_plan:
            return target, state

        def refresh(target: Tree, landed: Tree) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            at, shown = trees.by_path(landed), trees.by_path(context.params)
            fitted = {
                path: _fit(every_plan[path], x, at[path], state.reach[path], shown[path].dtype)
                for path, x in trees.governed(target)
            }
            return {p: f[0] for p, f in fitted.items()}, {p: f[1] for p, f in fitted.items()}

        old = (state.step, state.reach)
        new_steps = projecting.refreshed(context, start, every, stop, refresh, old)
        new = QuantizeState(new_steps[0], new_steps[1], state.bits)
        return hold_fn(target, new, context), new

    def hold_fn(target: Tree, state: QuantizeState, context: Context) -> Tree:
        every_plan = plans(target)
        index = {path: i for i, path in enumerate(every_plan)}

        def level(path: str, x: jax.Array) -> jax.Array:
            draw = jax.random.fold_in(context.key, index[path]) if rounding == "stochastic" else None
            return _level(every_plan[path], x, state.step[path], state.reach[path], rounding, draw)

        return trees.map_with_path(level, target)

    def vanishes_fn(target: Tree, state: QuantizeState, context: Context) -> Tree:
        def vanishes(path: str, x: jax.Array) -> jax.Array:
            sure = rounding != "stochastic" and every_plan[path].bits != 1
            return jnp.abs(x) <= state.step[path].astype(x.dtype) * (0.499 if sure else 0.0)

        every_plan = plans(target)
        return trees.map_with_path(vanishes, target)

    held = Projection(init_fn, apply_fn, hold_fn, vanishes=vanishes_fn)
    chosen = _picks(bits, where)
    tx = projecting.project(held, carry=carry, inner=inner, start=start, where=chosen, key=key)

    def checked_init(params: Tree) -> projecting.ProjectState:
        _check_tree(bits, params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(checked_init, tx.update)


def quantized(params: Tree, opt_state: Any) -> Tree:
    """The integers behind quantized params: a `Quantized` at every leaf on a grid, other leaves untouched.

    A weight that jumps to less than half of itself onto a grid of a given step may be one ulp late by one update.

    Args:
      params: the parameters that the optimizer state belongs to, outside of jit.
      opt_state: any optimizer state with a `fake_quantize` member in it.

    Returns:
      A tree like `params`; `dequantize(q.codes, q.step, dtype)` gives the leaf back bit for bit.

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
    states = [state for state in trees.find(opt_state, QuantizeState) if isinstance(state.step, dict)]
    remedy = "Pass the state of an optimizer with `clipjax.fake_quantize` in it."
    arguments.require(states, "opt_state", "hold a quantizer", type(opt_state).__name__, remedy)

    def codes(path: str, leaf: Any) -> Any:
        for state in states:
            if path in state.step and not jnp.any(jnp.isinf(state.reach[path])):  # infinite before the first refresh
                return _integers(leaf, jnp.asarray(state.step[path]), int(state.bits[path]) or None)
        return leaf

    return trees.map_with_path(codes, params)


def _integers(leaf: jax.Array, step: jax.Array, bits: int | None) -> Quantized:
    wide = trees.widened(leaf)
    ratio = jnp.round(wide / step.astype(wide.dtype))
    kept = tuple(i for i, n in enumerate(step.shape) if n > 1)
    axis = None if not step.ndim else kept[0] if len(kept) == 1 else kept
    code = jnp.where(jnp.isnan(ratio), 0, ratio).astype(grids.code_dtype(bits))
    return Quantized(code, step, jnp.zeros((), jnp.int32), bits, axis, None)


def _fit(plan: _Plan, x: jax.Array, landed: jax.Array, reach: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The step and the reach of a leaf, from its nonzero finite weights; the reach is a value of the leaf's dtype."""
    if plan.bits is None:
        return plan.rule.fit(x, 0, plan.axes(x)), jnp.zeros_like(reach)
    alive = (landed != 0) & jnp.isfinite(x) & jnp.isfinite(landed)
    size = jnp.where(alive, jnp.abs(landed), jnp.zeros_like(landed)).astype(jnp.float32)
    axes = plan.axes(x)
    largest = jnp.max(size) if len(axes) == x.ndim else jnp.max(size, axis=axes, keepdims=True)
    reach = jnp.where(jnp.isinf(reach), largest, jnp.maximum(reach, largest))
    reach = grids.toward(reach, dtype, up=False).astype(jnp.float32)
    shown = grids.limit(jnp.where(alive, x, jnp.zeros_like(x)).astype(jnp.float32), -reach, reach)
    return stepping.fit(plan.rule, shown, plan.bits, axes, reach), reach


def _level(plan: _Plan, x: jax.Array, step: jax.Array, reach: jax.Array, rounding: str, key: Any) -> jax.Array:
    """The level of every weight: code * s, the codes limited by the width, the interval and the reach."""
    step = step.astype(x.dtype)
    code = grids.codes(x, step, plan.bits, rounding=rounding, key=key)
    if plan.bits is not None:
        low, high = _code_range(plan, step, reach.astype(x.dtype))
        code = grids.limit(code, low, high)
    if plan.bits == 1:
        code = jnp.where(x == 0, jnp.zeros_like(code), code)
    return code * step


def _code_range(plan: _Plan, step: jax.Array, reach: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes of the grid: 2^b - 1 of them, inside the interval, no level beyond the reach."""
    assert plan.bits is not None
    most = jnp.where(jnp.isinf(reach), jnp.inf, grids.multiples(reach, step))
    top = float(grids.top(plan.bits))
    if plan.rule.limits is None:
        return -jnp.minimum(most, top), jnp.minimum(most, top)
    low, high = (grids.multiples(jnp.asarray(abs(end), step.dtype), step) for end in plan.rule.limits)
    surplus = jnp.maximum(low + high - 2 * top, 0)
    if plan.bits == 1:
        return -jnp.minimum(most, top), jnp.minimum(most, top)
    low, high = low - jnp.floor(surplus / 2), high - jnp.ceil(surplus / 2)
    return -jnp.minimum(low, most), jnp.minimum(high, most)


def _groups(plan: _Plan, leaf: Any, value: float) -> jax.Array:
    axes = plan.axes(leaf)
    shape = () if len(axes) == leaf.ndim else tuple(1 if a in axes else n for a, n in enumerate(leaf.shape))
    return jnp.full(shape, value, jnp.float32)


def _widths(bits: Any, tree: Tree) -> dict[str, int | None]:
    """The width of every governed leaf."""
    named = trees.governed(tree)
    if bits is None or isinstance(bits, int | np.integer | trees.PerLeaf):
        widths = {path: trees.resolve(bits, path, leaf) for path, leaf in named}
    else:
        given = dict(trees.governed(bits))
        widths = {path: given.get(path) for path, _ in named}
    for width in widths.values():
        if width is not None:
            arguments.bits(width)
    return widths


def _picks(bits: Any, where: Where) -> Where:
    """Leaves that a tree of bits or `per_leaf` leaves out are not quantized."""
    if bits is None or isinstance(bits, int | np.integer):
        return where
    if isinstance(bits, trees.PerLeaf):
        return lambda path, leaf: where(path, leaf) and bits.fn(path, leaf) is not None
    given = dict(trees.governed(bits))
    return lambda path, leaf: given.get(path) is not None


def _check_tree(bits: Any, params: Tree) -> None:
    """Every width of a tree of bits must belong to a leaf, unless a wrapper has masked that leaf away."""
    if bits is None or isinstance(bits, int | np.integer | trees.PerLeaf):
        return
    found = {path for path, _ in trees.governed(params)}
    left = [path for path, _ in trees.governed(bits) if path not in found]
    remedy = "Take the tree from `choose_bits(params)`."
    masked = trees.find(params, optax.MaskedNode)
    arguments.require(not left or masked or not found, "bits", "match the params by path", left, remedy)


def _check_bits(bits: Any, step: Any) -> None:
    arguments.static(bits, "bits")
    if bits is None:
        rule = stepping.mse() if step is None else stepping.as_step(step)
        ok = not rule.follows and rule.limits is None
        remedy = "Unbounded codes need a number: `step=0.05`."
        arguments.require(ok, "step", "be a number when `bits` is None", step, remedy)
    elif isinstance(bits, bool | float | str) or isinstance(bits, int | np.integer):
        arguments.bits(bits)
    elif callable(bits):
        raise TypeError(f"`bits` must be static, got a schedule {bits!r}. Mark a function of the leaf by `per_leaf`.")


def _check_leaf(path: str, plan: _Plan, leaf: Any) -> None:
    plan.axes(leaf)
    narrow = jnp.dtype(leaf.dtype).itemsize < 4
    remedy = f"Leaf {path!r} is {leaf.dtype}: its codes could not be recovered. Use 8 bits, or f32 params."
    arguments.require(
        not (narrow and (plan.bits or 0) > 8), "bits", "be at most 8 for narrow params", plan.bits, remedy
    )
