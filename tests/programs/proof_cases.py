"""What the proof set knows of a model, and random values for all that is in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from clipjax._arrays import trees


class Case(NamedTuple):
    """A model, its variables and inputs, and the units that must be found in it.

    Attributes:
      apply: `apply(variables, *args) -> outputs`, or a tuple of which the outputs come first.
      variables: random ones; a dict with "params" where there are statistics beside these.
      args: its inputs.
      found: for each group a leaf, the axis of its units, and their number.
      rebuild: `rebuild(widths) -> apply` of the small model, for libraries whose layers declare their widths; None
        where the layers follow the shapes of their arrays.
      smaller: `apply` of the small model, where it adds another epsilon to a mean over fewer units.
    """

    apply: Callable[..., Any]
    variables: Any
    args: tuple[Any, ...]
    found: tuple[tuple[str, int, int], ...]
    rebuild: Callable[..., Any] | None = None
    smaller: Callable[..., Any] | None = None


def declared(build, given, apply):
    """The model with the given widths, and `rebuild` for others.

    Args:
      build: `build(width) -> model`, where `width(path, axis=-1)` is a width.
      given: the widths, by path or by (path, axis).
      apply: `apply(model) -> function of variables and inputs`.
    """

    def width(widths):
        def of(path, axis=-1):
            found = [known[key] for known in (widths, given) for key in (path, (path, axis)) if key in known]
            return found[0]

        return of

    return build(width({})), lambda widths: apply(build(width(widths)))


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def filled(tree, rng):
    """Random values, none of them 0, for every array of a tree: biases, scales and statistics too."""
    leaves, treedef = trees.flatten(tree)
    return treedef.unflatten([_drawn(path, x, rng) for path, x in zip(trees.paths(tree), leaves, strict=True)])


def _drawn(path, x, rng):
    if x is None or not np.issubdtype(x.dtype, np.floating):
        return None if x is None else np.ones(x.shape, x.dtype)
    name = path.rsplit("/", 1)[-1]
    if name == "var" or "var_ema" in path:
        return rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)
    values = rng.normal(size=x.shape) * (0.5 if len(x.shape) > 1 else 0.3)
    return np.asarray(values + (name == "scale"), x.dtype)


def arrays(tree):
    """The arrays of a tree by their paths, as an optimizer sees them."""
    found = zip(trees.paths(tree), trees.flatten(tree)[0], strict=True)
    return {path.removeprefix("params/"): x for path, x in found if x is not None}


def replaced(tree, by_path):
    """The tree with these arrays at their paths."""
    leaves, treedef = trees.flatten(tree)
    paths = [path.removeprefix("params/") for path in trees.paths(tree)]
    return treedef.unflatten([x if x is None else by_path[path] for path, x in zip(paths, leaves, strict=True)])


def has_params(variables):
    return isinstance(variables, dict) and "params" in variables


def params_of(variables):
    return variables["params"] if has_params(variables) else variables


def with_params(variables, params):
    return {**variables, "params": params} if has_params(variables) else params


def shapes(tree, rng):
    """Random arrays for a tree of shapes."""
    like = lambda shape: jax.ShapeDtypeStruct(shape, np.float32)
    return filled(jax.tree.map(like, tree, is_leaf=lambda x: isinstance(x, tuple)), rng)
