"""Scores: how much each weight matters. Low scores are pruned first.

A score sees the target (the weights as they are about to be) and, where it needs it, the gradient. Averages are
exponential and live in the state; a score that needs no history stores none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipjax import _arguments as arguments
from clipjax import _trees as trees
from clipjax._typing import Tree
from clipjax.projections import Context


class Score(NamedTuple):
    """A saliency.

    Attributes:
      init: `init(params) -> state`.
      observe: `observe(target, state, context) -> state`, at every update.
      score: `score(target, state, context) -> tree` of arrays like the target, at a refresh.
    """

    init: Callable[[Tree], Any]
    observe: Callable[[Tree, Any, Context], Any]
    score: Callable[[Tree, Any, Context], Tree]


def magnitude(normalize: str | None = None) -> Score:
    r""":math:`|w|`, the usual score.

    Args:
      normalize: None for raw values, "rms" or "l2" to divide each array by its root mean square or its norm, so that
        a global comparison does not empty the arrays of small weights.

    Returns:
      A `Score`.

    Raises:
      ValueError: for another normalization.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude().score(jnp.array([-2.0, 1.0]), (), None).tolist()
      [2.0, 1.0]

    References:
      D2, section 2.3 ("order by weight magnitude"). Han et al., 2015, https://arxiv.org/abs/1506.02626.
    """
    arguments.choice(normalize, "normalize", (None, "rms", "l2"))  # type: ignore[arg-type]

    def score(x: jax.Array) -> jax.Array:
        size = jnp.abs(x)
        if normalize is None:
            return size
        unit = _unit(_finite(size).max())
        total = jnp.sum(jnp.square(_finite(size) / unit))
        return size / (unit * _unit(jnp.sqrt(total / x.size if normalize == "rms" else total)))

    return _of_weights(score)


def relative_magnitude() -> Score:
    r""":math:`|w| / \max|w|` of the array: D1's "largest relative value".

    Returns:
      A `Score`.

    Example:
      >>> import jax.numpy as jnp
      >>> relative_magnitude().score(jnp.array([-2.0, 1.0]), (), None).tolist()
      [1.0, 0.5]

    References:
      D1, section 6, question 1.
    """
    return _of_weights(lambda x: jnp.abs(x) / _unit(_finite(jnp.abs(x)).max()))


def random() -> Score:
    """Uniform in [0, 1), drawn anew at every refresh from the member's key: the baseline to beat.

    Returns:
      A `Score`.
    """

    def score(target: Tree, state: Any, context: Context) -> Tree:
        arrays, treedef = trees.arrays(target)
        keys = jax.random.split(context.key, max(len(arrays), 1))
        draws = [jax.random.uniform(k, x.shape) for k, x in zip(keys, arrays, strict=False)]
        return treedef.unflatten(draws)

    return Score(lambda params: (), lambda target, state, context: state, score)


def gradient(decay: float = 0.9) -> Score:
    r""":math:`|g|`, averaged over updates: D2's order by gradient.

    .. math:: m \leftarrow \beta m + (1 - \beta) |g|

    One batch alone is a weak score; smoothing costs 4 bytes a weight.

    Args:
      decay: β in [0, 1); 0 takes the last gradient alone and stores nothing.

    Returns:
      A `Score`.

    Raises:
      ValueError: for a decay outside [0, 1), and at update where no gradient is at hand.

    References:
      D2, section 2.2.
    """
    return _averaged(lambda weight, grad: jnp.abs(grad), decay)


def taylor(decay: float = 0.9) -> Score:
    r""":math:`|w g|`, averaged over updates: the change of the loss when a weight is removed, to first order.

    Args:
      decay: β in [0, 1) of the average; 0 takes the last value alone and stores nothing.

    Returns:
      A `Score`.

    Raises:
      ValueError: for a decay outside [0, 1), and at update where no gradient is at hand.

    References:
      Molchanov et al., 2017, https://arxiv.org/abs/1611.06440. D2.
    """
    return _averaged(lambda weight, grad: jnp.abs(weight * grad), decay)


def _averaged(value: Callable[[jax.Array, jax.Array], jax.Array], decay: float) -> Score:
    arguments.fraction(decay, "decay", "It is the weight of the past; 0 keeps no average.")
    smooth = not (arguments.known(decay) and float(decay) == 0)

    def now(target: Tree, context: Context) -> Tree:
        grads = _gradients(target, context)
        return jax.tree.map(lambda w, g: value(w, g.astype(w.dtype)), target, grads)

    def init(params: Tree) -> Tree:
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params) if smooth else ()

    def observe(target: Tree, state: Tree, context: Context) -> Tree:
        if not smooth:
            return state

        def mix(average: jax.Array, x: jax.Array) -> jax.Array:
            new = decay * average + (1 - decay) * x.astype(average.dtype)
            return jnp.where(jnp.isfinite(new), new, average)

        return jax.tree.map(mix, state, now(target, context))

    def score(target: Tree, state: Tree, context: Context) -> Tree:
        return state if smooth else now(target, context)

    return Score(init, observe, score)


def _of_weights(fn: Callable[[jax.Array], jax.Array]) -> Score:
    return Score(
        lambda params: (),
        lambda target, state, context: state,
        lambda target, state, context: jax.tree.map(fn, target),
    )


def _gradients(target: Tree, context: Context) -> Tree:
    missing = context.grad is None or len(jax.tree.leaves(context.grad)) != len(jax.tree.leaves(target))
    if missing:
        raise ValueError(
            "This score needs `grad`, and got none for some weights. Wrap the whole chain in"
            " `clipjax.with_gradient(...)`, or pass it: `tx.update(updates, state, params, grad=grads)`."
        )
    return context.grad


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _unit(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.ones_like(x))
