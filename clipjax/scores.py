"""Scores: how much each weight matters; the lowest are pruned first, as in `prune_mask(0.5, score=scores.taylor())`.

A score is computed from the target, the weights before the mask is applied, and some need the gradient too. Exponential
averages over updates are kept in the state, 4 bytes a weight; a score without an average stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from clipjax._arrays import arguments, elementwise, sharding, trees
from clipjax.typing import Context, Leaf, Number, Score, State, Tree

__all__ = [
    "Score",
    "external",
    "fisher",
    "gradient",
    "magnitude",
    "movement",
    "random",
    "relative_magnitude",
    "snip",
    "synflow",
    "taylor",
]


def __dir__() -> list[str]:
    return __all__


def magnitude(normalize: Literal["rms", "l2"] | None = None) -> Score:
    r""":math:`|w|`, the usual score.

    Args:
      normalize: None for :math:`|w|` itself; "rms" or "l2" to divide it by the root mean square or by the norm of its
        array, so that `scope="global"` does not remove whole arrays whose weights are all small.

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
    arguments.choice(normalize, "normalize", (None, "rms", "l2"))

    def score(x: jax.Array) -> jax.Array:
        size = jnp.abs(x)
        if normalize is None:
            return size
        # Squares of ratios to the largest weight neither overflow nor vanish, whatever the scale of the array.
        largest = _or_one(_finite(size).max())
        total = jnp.sum(jnp.square(_finite(size) / largest))
        return size / (largest * _or_one(jnp.sqrt(total / x.size if normalize == "rms" else total)))

    # The other two sum up: batched in another order, so that masks would depend on which arrays are alike.
    return _of_weights(score, batched=normalize is None)


def relative_magnitude() -> Score:
    r""":math:`|w| / \max|w|`, relative to the largest weight of the array: D1's "largest relative value".

    Returns:
      A `Score`.

    Example:
      >>> import jax.numpy as jnp
      >>> relative_magnitude().score(jnp.array([-2.0, 1.0]), (), None).tolist()
      [1.0, 0.5]

    References:
      D1, section 6, question 1.
    """
    return _of_weights(lambda x: jnp.abs(x) / _or_one(_finite(jnp.abs(x)).max()))


def random() -> Score:
    """Uniform in [0, 1), drawn anew at every refresh from the key of the transformation: the baseline to beat.

    Returns:
      A `Score`.
    """

    def score(target: Tree, state: State, context: Context) -> Tree:
        arrays, treedef = trees.arrays(target)
        keys = jax.random.split(context.key, max(len(arrays), 1))
        draws = [sharding.laid_as(jax.random.uniform(k, x.shape), x) for k, x in zip(keys, arrays, strict=False)]
        return treedef.unflatten(draws)

    return Score(lambda params: (), lambda target, state, context: state, score)


def gradient(decay: Number = 0.9) -> Score:
    r""":math:`|g|`, averaged over updates: D2's order by gradient.

    .. math:: m \leftarrow \beta m + (1 - \beta) |g|

    The gradient of one batch alone is a weak score; the average costs 4 bytes a weight.

    Args:
      decay: β in [0, 1); with 0 the score is that of the last gradient alone, and nothing is stored.

    Returns:
      A `Score`.

    Raises:
      ValueError: for a decay outside [0, 1), and at update without a gradient, see `with_gradient`.

    References:
      D2, section 2.2.
    """
    return _averaged(lambda weight, grad: jnp.abs(grad), decay)


def taylor(decay: Number = 0.9) -> Score:
    r""":math:`|w g|`, averaged over updates: how much the loss changes if the weight is removed, to first order.

    Args:
      decay: β in [0, 1) of the average; with 0 the score is that of the last update alone, and nothing is stored.

    Returns:
      A `Score`.

    Raises:
      ValueError: for a decay outside [0, 1), and at update without a gradient, see `with_gradient`.

    References:
      Molchanov et al., 2017, https://arxiv.org/abs/1611.06440. D2.
    """
    return _averaged(lambda weight, grad: jnp.abs(weight * grad), decay)


def movement(decay: Number = 0.9) -> Score:
    r""":math:`-w g`, averaged over updates: weights that move toward zero are removed first, whatever their size.

    Sanh et al. sum over all updates; a decay of 0.9999 comes near that, and averages over few updates choose worse.

    Args:
      decay: β in [0, 1) of the average; with 0 the score is that of the last update alone, and nothing is stored.

    Returns:
      A `Score`.

    Raises:
      ValueError: for a decay outside [0, 1), and at update without a gradient, see `with_gradient`.

    References:
      Sanh et al., "Movement Pruning", 2020, https://arxiv.org/abs/2005.07683. D2.
    """
    return _averaged(lambda weight, grad: -weight * grad, decay)


def fisher(decay: Number = 0.9) -> Score:
    r""":math:`w^2 \, \overline{g^2} / 2`, with the gradient's square averaged over updates: the Fisher diagonal.

    It estimates how much the loss increases if the weight is removed, to second order.

    Args:
      decay: β in [0, 1) of the average of g²; with 0 the score is that of the last g² alone, and nothing is stored.

    Returns:
      A `Score`.

    Raises:
      ValueError: for a decay outside [0, 1), and at update without a gradient, see `with_gradient`.

    References:
      Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
      https://arxiv.org/abs/1801.05787. D2.
    """
    squares = _averaged(lambda weight, grad: jnp.square(grad), decay)

    def score(target: Tree, state: Tree, context: Context) -> Tree:
        squared = squares.score(target, state, context)
        return jax.tree.map(lambda w, f: jnp.square(w) * f.astype(w.dtype) / 2, target, squared)

    return Score(squares.init, squares.observe, score)


def external(scores: Tree) -> Score:
    """Scores that you have computed: with `snip`, `synflow`, or anything else that ranks weights. They do not change.

    Args:
      scores: a tree of arrays with the paths and shapes of the weights; may have other paths too, and may be traced.

    Returns:
      A `Score`.

    Raises:
      ValueError: at init, for a picked leaf without scores of its shape.

    Example:
      >>> import clipjax, jax.numpy as jnp
      >>> tx = clipjax.prune_mask(0.5, score=external({"kernel": jnp.array([[1.0, 9.0]])}))
      >>> params = {"kernel": jnp.array([[5.0, 0.25]])}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> (params["kernel"] + updates["kernel"]).tolist()
      [[0.0, 0.5]]
    """

    def given(target: Tree) -> Tree:
        found = trees.match(scores, target)

        def check(path: str, leaf: Leaf, score: jax.Array | None) -> jax.Array | None:
            shape = None if score is None else jnp.shape(score)
            remedy = f"Leaf {path!r} has shape {leaf.shape}; leave it out with `where`, or give it scores."
            arguments.require(shape == leaf.shape, "scores", "have the shape of every picked leaf", shape, remedy)
            return score

        leaves, treedef = trees.flatten(target)
        at = zip(trees.paths(target), leaves, trees.flatten(found)[0], strict=True)
        return treedef.unflatten([None if x is None else check(path, x, score) for path, x, score in at])

    def init(params: Tree) -> tuple[()]:
        given(params)
        return ()

    def score(target: Tree, state: State, context: Context) -> Tree:
        return jax.tree.map(lambda w, x: jnp.asarray(x).astype(w.dtype), target, given(target))

    return Score(init, lambda target, state, context: state, score)


def snip(loss_fn: Callable[[Tree], jax.Array], params: Tree) -> Tree:
    r"""SNIP's connection sensitivity, to prune before training: :math:`|w \, \partial L / \partial w|` at these params.

    Args:
      loss_fn: `loss_fn(params) -> loss`, a scalar, on a batch of your choice.
      params: a tree of arrays.

    Returns:
      A tree of scores for `external` or `make_mask`.

    Example:
      >>> import jax.numpy as jnp
      >>> snip(lambda w: jnp.sum(w**2), jnp.array([1.0, -3.0])).tolist()
      [2.0, 18.0]

    References:
      Lee et al., "SNIP: Single-shot Network Pruning", 2019, https://arxiv.org/abs/1810.02340.
    """
    return jax.tree.map(lambda w, g: jnp.abs(w * g), params, jax.grad(loss_fn)(params))


def synflow(apply_fn: Callable[[Tree, Tree], Tree], params: Tree, inputs: Tree) -> Tree:
    r"""SynFlow: :math:`|w| \, \partial R / \partial |w|`, R the sum of outputs with weights :math:`|w|`, inputs 1.

    It needs no data. Prune in many small rounds, in each of which the scores are computed anew and the kept fraction
    shrinks by the same factor; in one round whole layers would be removed.

    Args:
      apply_fn: `apply_fn(params, inputs) -> outputs`.
      params: a tree of arrays.
      inputs: arrays whose shapes and dtypes the network takes; their values do not matter.

    Returns:
      A tree of scores for `external` or `make_mask`.

    Example:
      >>> import jax.numpy as jnp
      >>> synflow(lambda w, x: x @ w, jnp.array([[1.0], [-3.0]]), jnp.zeros((1, 2))).tolist()
      [[1.0], [3.0]]

    References:
      Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", 2020,
      https://arxiv.org/abs/2006.05467.
    """
    ones = jax.tree.map(jnp.ones_like, inputs)
    sizes = jax.tree.map(jnp.abs, params)

    def flow(sizes: Tree) -> jax.Array:
        outputs = jax.tree.leaves(apply_fn(sizes, ones))
        return jnp.stack([jnp.sum(x) for x in outputs]).sum()

    return jax.tree.map(jnp.multiply, sizes, jax.grad(flow)(sizes))


def _averaged(value: Callable[[jax.Array, jax.Array], jax.Array], decay: Number) -> Score:
    """The exponential average of `value(weight, gradient)` over updates."""
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
            # One gradient that is not finite must not spoil the average of all later updates.
            return elementwise.where(jnp.isfinite(new), new, average)

        return jax.tree.map(mix, state, now(target, context))

    def score(target: Tree, state: Tree, context: Context) -> Tree:
        return state if smooth else now(target, context)

    return Score(init, observe, score)


def _of_weights(fn: Callable[[jax.Array], jax.Array], *, batched: bool = True) -> Score:
    """The score that follows from each array of weights alone."""
    return Score(
        lambda params: (),
        lambda target, state, context: state,
        lambda target, state, context: jax.tree.map(fn, target),
        fn if batched else None,
    )


def _gradients(target: Tree, context: Context) -> Tree:
    """The gradient that a caller or `with_gradient` passes, which must have a leaf for each weight."""
    missing = context.grad is None or len(jax.tree.leaves(context.grad)) != len(jax.tree.leaves(target))
    if missing:
        raise ValueError(
            "This score needs `grad`, and got none for some weights. Wrap the whole chain in"
            " `clipjax.with_gradient(...)`, or pass it: `tx.update(updates, state, params, grad=grads)`."
        )
    return context.grad


def _finite(x: jax.Array) -> jax.Array:
    """0 instead of NaN and infinity."""
    return elementwise.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _or_one(x: jax.Array) -> jax.Array:
    """A divisor: 1 instead of 0."""
    return jnp.where(x > 0, x, jnp.ones_like(x))
