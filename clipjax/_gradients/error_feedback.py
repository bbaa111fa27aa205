"""Error feedback (`carry=True`): the state keeps the part that a clip removed and adds it to the next gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, dtypes, elementwise, trees
from clipjax._maths import intervals
from clipjax.typing import State, Tree


class ErrorFeedback(NamedTuple):
    r"""U-Clip's Δ: :math:`t = g + \Delta,\ \tilde g = \mathrm{clip}(t),\ \Delta \leftarrow t - \tilde g`.

    Attributes:
      init: `init(params) -> state`: Δ = 0, f32 (f64 for f64 params).
      add: `add(updates, state) -> total`: t, in the computing dtype of the updates.
      emit: `emit(clipped, total, updates, state, finite) -> (emitted, state)`: g̃ in the dtypes of the updates, and the
        next Δ. `finite` holds for each leaf whether the norm that it was clipped by is finite.
    """

    init: Callable[[Tree], State]
    add: Callable[[Tree, State], Tree]
    emit: Callable[[Tree, Tree, Tree, State, Iterable[jax.Array | bool]], tuple[Tree, State]]


def resolve(carry: bool) -> ErrorFeedback:
    """The functions of a `carry=` argument; without error feedback the state is () and gradients pass unchanged."""
    arguments.static(carry, "carry")
    if carry:
        return ErrorFeedback(_init, _add, _emit)
    return ErrorFeedback(
        lambda params: (),
        _pass,
        lambda clipped, total, updates, state, finite: (clipped, ()),
    )


def _pass(updates: Tree, state: State) -> Tree:
    trees.check_state(isinstance(state, tuple) and not state, "error feedback although `carry` is False")
    return updates


def _init(params: Tree) -> State:
    def zeros(p: jax.Array) -> jax.Array:
        """An array like the param; one number for an empty param, since Orbax saves no empty arrays."""
        dtype = dtypes.wide(p.dtype)
        return jnp.zeros_like(p, dtype=dtype) if np.size(p) else jnp.zeros((), dtype)

    return jax.tree.map(zeros, params)


def _add(updates: Tree, state: State) -> Tree:
    leaves, treedef = trees.flatten(updates)
    feedback = trees.flatten(state)[0]
    trees.check_state(len(feedback) == len(leaves), f"error feedback for {len(feedback)} of {len(leaves)} gradients")
    pairs = zip(leaves, feedback, strict=True)
    return treedef.unflatten(
        [None if g is None else dtypes.widened(g) + left.astype(dtypes.wide(g.dtype)) for g, left in pairs]
    )


def _emit(
    clipped: Tree, total: Tree, updates: Tree, state: State, finite: Iterable[jax.Array | bool]
) -> tuple[Tree, State]:
    # rounded before the difference is taken, so that Δ keeps the rounding error of a narrow dtype too
    rounded = jax.tree.map(lambda x, g: _rounded(x, g.dtype), clipped, updates)
    old, treedef = trees.flatten(state)
    rows = zip(old, trees.flatten(total)[0], trees.flatten(rounded)[0], finite, strict=False)
    left = treedef.unflatten([_left(*row) for row in rows])
    return jax.tree.map(lambda x, g: x.astype(g.dtype), rounded, updates), left


def _rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The nearest value of the gradient's dtype; beyond its range the largest, so that a finite x stays finite."""
    largest = jnp.asarray(jnp.finfo(dtype).max).astype(x.dtype)
    return dtypes.narrowed(elementwise.where(jnp.isfinite(x), intervals.limit(x, -largest, largest), x), dtype)


def _left(old: jax.Array, total: jax.Array | None, emitted: jax.Array | None, finite: jax.Array | bool) -> jax.Array:
    """The next Δ of a leaf; the old one where the gradient is missing, empty or not finite."""
    if total is None or emitted is None or not total.size:
        return old
    return elementwise.where(finite & jnp.isfinite(total), (total - emitted).astype(old.dtype), old)
