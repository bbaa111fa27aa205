"""`quantized`: the codes behind params that are on a grid or a format."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, trees
from clipjax._maths import grids, integers, landing, split_axes, step_groups
from clipjax._weights import leaf_format, leaf_grid, quantize_state
from clipjax._weights.quantize_state import LeafScales, QuantizeState
from clipjax.typing import State, Tree


def quantized(params: Tree, opt_state: State) -> Tree:
    """The integers behind quantized params: a `Quantized` at every leaf on a grid, other leaves untouched.

    A weight that jumped to less than half of itself may be a little beside its level until the next update; it has the
    code of that level, as does every weight that is nearer to it than 1/256 of a step.

    Args:
      params: the parameters that the optimizer state belongs to, outside of jit.
      opt_state: any optimizer state with a `fake_quantize` in it.

    Returns:
      A tree like `params`; `dequantize(q, dtype=leaf.dtype)` gives the leaf back bit for bit, with a format up to the
      sign of zeros. On symmetric grids the zero point is 0. The levels of `formats.q4_1`, `q5_1` and `nf4` have more
      digits than f32: a weight may be a unit or two in the last place beside its level, and a file holds the level.

    Raises:
      ValueError: where the state holds no `fake_quantize` or belongs to other params, and where a finite weight is
        farther from its level, naming leaf and distance: the params are an average, of another checkpoint, or changed
        behind the quantizer. Also for weights that are NaN or
        infinite, and for codes of 2**31 and more, which `bits=None` allows.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> tx = clipjax.fake_quantize(bits=4, step=0.5)
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
    trees.check_named([path for state in found for path in quantize_state.paths(state)], params)

    def codes(path: str, leaf: jax.Array) -> jax.Array | integers.Quantized:
        for state in found:
            if path in quantize_state.paths(state) and quantize_state.fitted(state):
                own = quantize_state.leaf_scales(state, path)
                return _integers(path, leaf, leaf_grid.at(state, path)) if own is None else formed(path, leaf, own)
        return leaf

    return trees.map_with_path(codes, params)


def _require_on_levels(path: str, leaf: jax.Array, level: jax.Array, late: jax.Array) -> None:
    """Raise where a leaf has weights between its levels."""
    lost = int(jnp.sum(~jnp.isfinite(leaf)))
    remedy = f"{lost} weights of {path!r} are NaN or infinite, which no code stands for: take an earlier checkpoint."
    arguments.require(not lost, "params", "be finite", path, remedy)
    entries, distance = landing.missed(leaf, level, late)
    remedy = (
        f"{int(entries)} weights of {path!r} are between its levels, by up to {float(distance):.3g}: an average (EMA),"
        " another checkpoint, or something chained behind the quantizer. Hold them with `clipjax.hold_once` first."
    )
    arguments.require(not int(entries), "params", "be on the grid of the state", path, remedy)


def formed(path: str, leaf: jax.Array, own: LeafScales) -> integers.Quantized:
    """The codes of a leaf on a format, which is refused where a weight is between its levels."""
    form = leaf_format.form_of(own)
    codes, level = leaf_format.nearest(path, own, leaf)
    _require_on_levels(path, leaf, level, landing.late(leaf, level.dtype))
    return integers.formed(form, codes, own.scales, leaf_format.outputs_of(own))


def _integers(path: str, leaf: jax.Array, grid: leaf_grid.LeafGrid) -> integers.Quantized:
    bits = int(grid.bits) or None
    code, level = leaf_grid.nearest(grid, leaf)
    # One landing late, a weight from far outside is beside its level by units in the last place of where it was.
    step, zero = (step_groups.per_block(x, leaf.shape) for x in (grid.step, grid.zero_point))
    _require_on_levels(path, leaf, level, split_axes.spread(step, leaf.shape).astype(level.dtype) / 256)
    remedy = f"Weights of {path!r} are too many steps from 0: take a larger step."
    largest = float(jnp.max(jnp.abs(code), initial=0))
    arguments.require(largest < 2**31, "params", "have codes that i32 holds", largest, remedy)
    kept, group = tuple(i for i, n in enumerate(step.shape) if n > 1), None
    at = step_groups.cut_axis(grid.step.shape, leaf.shape)
    if at is not None:
        # In front of the cut axis each index has groups of its own, whether `axis` names it or groups run along it.
        group, own = leaf.size // step.size, [i for i in kept if i != at]
        kept = tuple([i for i in own if i > at] or own or [at])
    axis = None if not kept and not step.ndim else kept[0] if len(kept) == 1 else kept
    zero = zero if bool(jnp.any(zero != 0)) else jnp.zeros((), jnp.int32)
    code = code + split_axes.spread(zero, leaf.shape).astype(code.dtype)
    return integers.Quantized(code.astype(grids.code_dtype(bits)), step, zero, bits, axis, group)
