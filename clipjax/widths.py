"""Bit widths that follow from the distribution of each array (D4)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax import _arguments as arguments
from clipjax import _grids as grids
from clipjax import _trees as trees
from clipjax import steps as stepping
from clipjax._typing import Tree, Where


def choose_bits(
    params: Tree,
    *,
    target_db: float | None = None,
    budget: float | None = None,
    allowed: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8),
    step: Any = None,
    axis: Any = None,
    where: Where | None = None,
) -> Tree:
    r"""Choose each array's bit width from its distribution, before a run (D4's "analyse, then choose the bits").

    With a target, the smallest allowed width whose signal to quantization noise reaches it,

    .. math:: \mathrm{SQNR}(b) = 10 \log_{10} \frac{\sum w^2}{\sum (Q_b(w) - w)^2} \ge \text{target},

    or the largest allowed. With a budget, widths whose mean over all picked weights is at most the budget, each bit
    given where it removes most squared error per bit stored.

    Args:
      params: a tree of concrete arrays.
      target_db: the SQNR to reach, in decibels.
      budget: mean bits per picked weight.
      allowed: the widths to choose from, each 1 to 16.
      step: a rule of `clipjax.steps`, `mse()` by default, or a number.
      axis: as in `fake_quantize`; may be `per_leaf`.
      where: `where(path, leaf) -> bool`; by default arrays of rank >= 2 not named bias, b, scale or offset.

    Returns:
      A tree like `params` of Python ints, None for leaves not picked: pass it as `bits=`.

    Raises:
      ValueError: for neither or both of target and budget, an empty `allowed`, widths outside 1 to 16, or a budget
        below the smallest allowed width.

    Example:
      >>> import jax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jax.numpy.zeros(64)}
      >>> choose_bits(params, target_db=20.0)
      {'bias': None, 'kernel': 5}

    References:
      D4, section 2.2, steps 1 and 2.
    """
    one = (target_db is None) != (budget is None)
    arguments.require(one, "target_db", "be given, or else `budget`, not both", target_db, "Try 20.")
    for name, value in (("target_db", target_db), ("budget", budget)):
        remedy = "Give decibels, e.g. 20, or mean bits, e.g. 4."
        arguments.require(value is None or arguments.is_number(value), name, "be a number", value, remedy)
    arguments.require(len(allowed) > 0, "allowed", "hold widths", allowed, "Try (2, 4, 8).")
    for width in allowed:
        arguments.bits(width, "allowed")
    allowed = tuple(sorted(allowed))
    picks = trees.pick(trees.weights if where is None else where, params)
    picked = trees.restrict(params, picks)
    rule = stepping.mse() if step is None else stepping.as_step(step)
    sizes = {path: leaf.size for path, leaf in trees.governed(picked)}
    energy, noise = {}, {}
    for path, leaf in trees.governed(picked):
        along = trees.resolve(axis, path, leaf)
        energy[path] = float(jnp.sum(jnp.square(leaf.astype(jnp.float32))))
        noise[path] = [float(_noise(leaf, b, rule, along)) for b in allowed]
    if target_db is not None:
        chosen = {path: _reach(energy[path], noise[path], allowed, target_db) for path in sizes}
    else:
        chosen = _spend(sizes, noise, allowed, float(budget or 0))
    return trees.map_with_path(lambda path, leaf: chosen.get(path), params)


def _noise(x: jax.Array, bits: int, rule: stepping.Step, axis: Any) -> jax.Array:
    """The squared error of an array on its grid of this width."""
    s = stepping.choose_step(x, bits, step=rule, axis=axis)
    x = x.astype(jnp.float32)
    levels = grids.dequantize(grids.quantize(x, s, bits), s)
    return jnp.sum(jnp.square(levels - x))


def _reach(energy: float, noise: list[float], allowed: tuple[int, ...], target: float) -> int:
    for bits, error in zip(allowed, noise, strict=True):
        if error == 0 or 10 * np.log10(energy / error) >= target:
            return bits
    return allowed[-1]


def _spend(
    sizes: dict[str, int], noise: dict[str, list[float]], allowed: tuple[int, ...], budget: float
) -> dict[str, int]:
    """Give bits one width at a time where they remove most error per bit, within the budget."""
    least = allowed[0]
    remedy = f"The smallest allowed width is {least}."
    arguments.require(budget >= least, "budget", "be at least the smallest width", budget, remedy)
    level = dict.fromkeys(sizes, 0)
    left = (budget - least) * sum(sizes.values())

    def gain(path: str) -> float:
        i = level[path]
        cost = (allowed[i + 1] - allowed[i]) * sizes[path]
        return (noise[path][i] - noise[path][i + 1]) / cost

    while True:
        open_ = [p for p, i in level.items() if i + 1 < len(allowed)]
        cost = {p: (allowed[level[p] + 1] - allowed[level[p]]) * sizes[p] for p in open_}
        affordable = [p for p in open_ if cost[p] <= left]
        if not affordable:
            return {p: allowed[i] for p, i in level.items()}
        best = max(affordable, key=gain)
        left -= cost[best]
        level[best] += 1
