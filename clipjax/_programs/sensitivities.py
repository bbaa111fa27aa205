"""`sensitivity`: the mean squared inputs that meet the entries of each kernel, read while the model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, picked_leaves, trees
from clipjax._programs import models, squared_inputs
from clipjax._programs.analysis import Analysis
from clipjax.typing import Tree


def sensitivity(apply_fn: Callable[..., Any], variables: Tree, batches: Iterable[Any], analysis: Analysis) -> Tree:
    r"""How much a squared error of each weight matters to what it is multiplied for: the mean square of its input.

    .. math:: h_i = \mathrm{E}[x_i^2],\qquad
       \mathrm{E}\Big[\Big(\sum_i \Delta w_{io}\, x_i\Big)^2\Big] \approx \sum_i h_i\, \Delta w_{io}^2

    x_i is what a contraction multiplies with the weights of input i, and E the mean over all positions of all batches;
    the approximation leaves out products of two inputs. It is read from the program as it runs, through reshapes,
    slices, casts, masks and fake quantization of the kernel; loops give each stacked layer its own mean. A kernel that
    is multiplied at several places has the mean over all of them. For a convolution, x_i is the mean over the places of
    an input channel, the same for all of the window; padding does not count.

    - `choose_bits(params, sensitivity=...)` and its budget count errors by it.
    - Wanda's score is :math:`|w| \sqrt{h}`: `scores.external` takes it, as in the example.

    Args:
      apply_fn: the function that was analyzed, `apply_fn(variables, *batch) -> outputs`. What is no array, such as
        `train=False`, belongs inside of it: `lambda v, x: model.apply(v, x, train=False)`.
      variables: the params, or a tree that contains them, or a module of NNX or Equinox, with arrays.
      batches: each a tuple of arguments, or one argument that is no tuple. Of equal shapes they are compiled once.
      analysis: what `analyze` found for this model.

    Returns:
      A tree like the params (without the collection "params"), None but for the kernels of `analysis`: f32 that
      broadcasts to the kernel, of size 1 along its outputs, but along those that the inputs differ for: of experts, of
      groups of a convolution.

    Raises:
      TypeError: for an `apply_fn` that is no function and an `analysis` that is none.
      ValueError: without a batch, for a leaf that was not analyzed, and for a kernel whose inputs cannot be read, as in
        a while loop, naming it.

    Example:
      >>> import clipjax, jax, jax.numpy as jnp
      >>> model = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.array([[5.0, 4.0], [1.0, -1.0]])}
      >>> x = jnp.array([[0.1, 2.0], [0.3, 4.0]])
      >>> h = sensitivity(model, params, [x], clipjax.analyze(model, params, x))
      >>> h["kernel"].shape, [round(float(value), 3) for value in h["kernel"][:, 0]]
      ((2, 1), [0.05, 10.0])
      >>> weigh = lambda h, w: None if h is None else jnp.abs(w) * jnp.sqrt(h)
      >>> wanda = jax.tree.map(weigh, h, params, is_leaf=lambda h: h is None)
      >>> tx = clipjax.prune_mask(0.5, score=clipjax.scores.external(wanda))
      >>> clipjax.hold_once(tx, params)[0]["kernel"].tolist()
      [[0.0, 0.0], [1.0, -1.0]]

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023,
      https://arxiv.org/abs/2306.11695; Hassibi and Stork, "Optimal Brain Surgeon", 1993: the diagonal of its Hessian.
    """
    if not callable(apply_fn):
        raise TypeError(f"`apply_fn` must be a function, got {apply_fn!r}. Give the one that was analyzed.")
    arguments.instance(analysis, Analysis, "analysis", "Give what `clipjax.analyze` returned for this model.")
    tree = models.opened(variables)
    leaves, treedef = trees.flatten(tree)
    named = list(zip(trees.paths(tree), leaves, strict=True))
    kernels = {i: path for i, (path, x) in enumerate(named) if x is not None and analysis.kernels(path, x)}
    shapes = {i: _reduced(analysis, path, leaves[i]) for i, path in kernels.items()}
    found: set[int] = set()  # kernels that meet inputs of their own along outputs; filled by the trace

    @functools.partial(jax.jit, static_argnums=0)
    def squares(whole: frozenset[int], leaves: list[Any], batch: tuple[Any, ...]) -> dict[int, jax.Array]:
        """Sums of squares and numbers of positions, stacked, for each kernel."""

        def model(leaves: list[Any], batch: tuple[Any, ...]) -> Any:
            return apply_fn(models.merged(variables, treedef.unflatten(leaves)), *batch)

        ghosts = {i: jnp.zeros(leaves[i].shape if i in whole else shapes[i], jnp.float32) for i in kernels}
        tapped, differing = set(), set()

        def totals(ghosts: dict[int, jax.Array]) -> jax.Array:
            wide = {i: jnp.broadcast_to(ghost, leaves[i].shape) for i, ghost in ghosts.items()}
            taps = squared_inputs.Taps()
            total = taps.run(model, leaves, batch, wide)
            tapped.update(taps.tapped)
            differing.update(taps.differing)
            return total

        sums = jax.jacrev(totals)(ghosts)
        missing = [kernels[i] for i in kernels if i not in tapped]
        remedy = (
            "Its inputs cannot be read where it is multiplied in a `while` loop or `shard_map`, or is computed from."
            " Write a loop as `jax.lax.scan`, or analyze the model without it."
        )
        arguments.require(not missing, "apply_fn", "multiply every kernel where it can be read", missing, remedy)
        found.update(differing)
        return sums

    sums: dict[int, jax.Array] | None = None
    for batch in batches:
        given = batch if isinstance(batch, tuple) else (batch,)
        if sums is None:  # a trace alone, for what `found` says
            jax.eval_shape(functools.partial(squares, frozenset()), leaves, given)
            whole = frozenset(found)
        new = squares(whole, leaves, given)
        sums = new if sums is None else {i: sums[i] + new[i] for i in sums}
    remedy = "Give arguments of `apply_fn`, e.g. `[x]`; a generator that was read has none left."
    arguments.require(sums is not None, "batches", "have a batch", batches, remedy)
    assert sums is not None
    means = {i: _mean(total, shapes[i]) for i, total in sums.items()}
    made = treedef.unflatten([means.get(i) for i in range(len(leaves))])
    return made["params"] if isinstance(variables, Mapping) and "params" in variables else made


def _reduced(analysis: Analysis, path: str, leaf: jax.Array) -> tuple[int, ...]:
    """The shape of a kernel with size 1 along its outputs."""
    outputs = {i % leaf.ndim for i in picked_leaves.for_leaf(analysis.outputs, path, leaf)}
    return tuple(1 if i in outputs else n for i, n in enumerate(leaf.shape))


def _mean(total: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mean square; of size 1 along the outputs for which all inputs are the same."""
    squares, number = total
    mean = np.asarray(squares / jnp.maximum(number, 1))
    for i, n in enumerate(shape):
        if mean.shape[i] > n and (mean == np.take(mean, [0], i)).all():
            mean = np.take(mean, [0], i)
    return jnp.asarray(mean)
