"""Verifying: the outputs of a model before and after a cut, and by how much of their range they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments, trees
from clipjax.typing import Tree

TOLERANCES = {
    "float64": 1e-10,
    "complex128": 1e-10,
    "float32": 1e-5,
    "complex64": 1e-5,
    "float16": 4e-3,
    "bfloat16": 3e-2,
}
"""The largest change of an output over its range that rounding explains, by dtype; other dtypes may not change."""


class Test(NamedTuple):
    """What a model is run on.

    Attributes:
      apply_small: `apply_small(variables, *args)`, the smaller model.
      args: what it gets behind its variables.
    """

    apply_small: Callable[..., Any]
    args: tuple[Any, ...]

    def small(self, variables: Tree) -> Tree:
        """The outputs of the smaller model; that it does not take the smaller variables is told."""
        try:
            return self.apply_small(variables, *self.args)
        except Exception as error:
            raise ValueError(
                f"`verify` must run the smaller model, got {type(error).__name__}: {error}. Let `apply_small` build the"
                " model by the shapes of the variables that it gets."
            ) from error


def changes(wanted: Tree, got: Tree) -> dict[str, tuple[float, str]]:
    """For each output, by its path, the largest change over its range, and its dtype.

    Args:
      wanted: the outputs before the cut.
      got: the outputs after it.

    Raises:
      ValueError: where the outputs are others, or have other shapes or dtypes.
    """
    before, after = ({_name(path): x for path, x in trees.governed(tree)} for tree in (wanted, got))
    remedy = "`apply_small` must be the same model: it takes the smaller variables, and the same `args`."
    arguments.require(before.keys() == after.keys(), "verify", f"return {[*before]}", [*after], remedy)
    found = {}
    for name, x in before.items():
        old, new = _kind(x), _kind(after[name])
        arguments.require(old == new, f"verify/{name}", f"have shape and dtype {old}", new, remedy)
        found[name] = _change(x, after[name]), old[1]
    return found


def _name(path: str) -> str:
    return path or "output"


def _kind(x: Any) -> tuple[tuple[int, ...], str]:
    return np.shape(x), str(x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype)


def _change(wanted: Any, got: Any) -> float:
    """The largest |wanted - got| over max(wanted) - min(wanted), or over max |wanted| where all are equal.

    What is not finite must be so in both, and alike.
    """
    a, b = (_numbers(x) for x in (wanted, got))
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    a, b = a[finite], b[finite]
    apart = float(np.abs(a - b).max()) if a.size else 0.0
    if apart == 0:
        return 0.0
    scale = float(np.ptp(a)) or float(np.abs(a).max())
    return apart / scale if scale else float("inf")


def _numbers(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    if np.iscomplexobj(x):
        return np.stack([x.real, x.imag]).astype(np.float64)
    return x.astype(np.float64)


def check(found: dict[str, tuple[float, str]], repaired: Sequence[str], epsilons: dict[str, float]) -> None:
    """Refuse a change that rounding does not explain.

    Args:
      found: as `changes` returns them.
      repaired: the dtypes of scales that were multiplied by a number, and rounded.
      epsilons: what the smaller model adds to its mean squares, by the path of the scale.
    """
    floor = max((TOLERANCES.get(dtype, 0.0) for dtype in repaired), default=0.0)
    for name, (change, dtype) in found.items():
        allowed = max(floor, TOLERANCES[dtype]) if dtype in TOLERANCES else 0.0
        wanting = f" It must add these epsilons to its mean squares: {epsilons}." if epsilons else ""
        remedy = f"Leave out the group that changes it, or let `exact=False` measure the change.{wanting}"
        rule = f"change by at most {allowed} of its range"
        arguments.require(change <= allowed, f"verify/{name}", rule, change, remedy)


def pair(verify: object) -> Test:
    """The argument `verify=`, read."""
    if not isinstance(verify, tuple | list) or len(verify) != 2 or not callable(verify[0]):
        raise TypeError(
            f"`verify` must be a pair (apply_small, args), got {verify!r}. Write"
            " `verify=(lambda variables, x: model.apply(variables, x), x)`; several args are a tuple."
        )
    apply_small, args = verify
    return Test(apply_small, args if type(args) is tuple else (args,))
