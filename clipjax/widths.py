"""Bit widths that follow from the distribution of each array (D4)."""

from __future__ import annotations

import functools
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
    if budget is not None:
        remedy = f"The smallest allowed width is {allowed[0]}."
        arguments.require(budget >= allowed[0], "budget", "be at least the smallest width", budget, remedy)
    picks = trees.pick(trees.weights if where is None else where, params)
    picked = trees.restrict(params, picks)
    rule = stepping.mse() if step is None else stepping.as_step(step)
    sizes = {path: leaf.size for path, leaf in trees.governed(picked)}
    energy, noise = {}, {}
    for path, leaf in trees.governed(picked):
        axes = grids.reduced_axes(leaf.ndim, trees.resolve(axis, path, leaf))
        energy[path], noise[path] = _spectrum(leaf, rule, axes, allowed)
    if target_db is not None:
        chosen = {path: _reach(energy[path], noise[path], allowed, target_db) for path in sizes}
    else:
        chosen = _spend(sizes, noise, allowed, float(budget or 0))
    return trees.map_with_path(lambda path, leaf: chosen.get(path), params)


def _spectrum(
    leaf: jax.Array, rule: stepping.Step, axes: tuple[int, ...], allowed: tuple[int, ...]
) -> tuple[float, list[float]]:
    """The energy of an array, and its squared error on the grid of each allowed width."""
    x = leaf.astype(jnp.float32)
    wider = jnp.asarray([b for b in allowed if b > 1], jnp.int32)
    errors = _noises(x, wider, rule, axes).tolist() if wider.size else []
    first = [float(_noise(x, 1, rule, axes))] if allowed[0] == 1 else []
    return float(jnp.sum(jnp.square(x))), first + errors


@functools.partial(jax.jit, static_argnames=("rule", "axes"))
def _noises(x: jax.Array, widths: jax.Array, rule: stepping.Step, axes: tuple[int, ...]) -> jax.Array:
    """One program for all widths above 1."""
    return jax.lax.map(lambda bits: _noise(x, bits, rule, axes), widths)


def _noise(x: jax.Array, bits: Any, rule: stepping.Step, axes: tuple[int, ...]) -> jax.Array:
    """The squared error of an array on its grid of this width."""
    step = stepping.fit(rule, x, bits, axes)
    most = grids.top(bits)
    code = grids.limit(grids.codes(x, step, bits if isinstance(bits, int) else None), -most, most)
    return jnp.sum(jnp.square(code * step - x))


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
