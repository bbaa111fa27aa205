"""Rules for bit widths that follow from the distribution of each array (D4), for `bits=`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import arguments
from clipjax.typing import Format, Width

__all__ = ["Width", "budget", "sqnr"]


def __dir__() -> list[str]:
    return __all__


ALLOWED = (2, 3, 4, 5, 6, 7, 8)


def sqnr(target_db: float, allowed: Sequence[int | Format] = ALLOWED) -> Width:
    r"""The smallest width whose signal to quantization noise reaches a target, or the largest allowed.

    .. math:: \mathrm{SQNR}(b) = 10 \log_{10} \frac{\sum w^2}{\sum (Q_b(w) - w)^2} \ge \text{target}

    Args:
      target_db: the target in decibels; 6 dB are about one bit. Static.
      allowed: the widths to choose from, each 1 to 16; or formats of `clipjax.formats`, among which `choose_bits`
        chooses before a run. Static.

    Returns:
      A `Width`, for `fake_quantize(bits=)`: each leaf's width is chosen at `start` and at every refresh, and frozen at
      `stop`; nothing is compiled again.

    Raises:
      ValueError: for a target that is no number, an empty `allowed`, widths outside 1 to 16.

    Example:
      >>> import clipjax, jax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> tx = clipjax.fake_quantize(sqnr(20.0))
      >>> _, state = tx.update(jax.tree.map(jax.numpy.zeros_like, params), tx.init(params), params)
      >>> int(clipjax.report(state, per_leaf=True)["fake_quantize/bits/kernel"])
      5

    References:
      D4, section 2.2, steps 1 and 2.
    """
    arguments.static(target_db, "target_db")
    remedy = "Give decibels, e.g. 20."
    arguments.require(arguments.is_number(target_db), "target_db", "be a number", target_db, remedy)
    allowed = arguments.widths_or_formats(allowed, "allowed")
    ratio = 10.0 ** (min(float(target_db), 380.0) / 10)  # beyond that no f32 noise but 0 would do

    def reaching(energy: jax.Array, noise: jax.Array) -> jax.Array:
        return energy[:, None] >= ratio * noise

    def choose(sizes: list[int], energy: jax.Array, noise: jax.Array) -> jax.Array:
        reached = reaching(energy, noise)
        return jnp.where(reached.any(1), jnp.argmax(reached, 1), len(allowed) - 1)

    def choose_formats(sizes: list[int], energy: jax.Array, noise: jax.Array, costs: list[list[float]]) -> jax.Array:
        return _cheapest(reaching(energy, noise), costs)

    return Width(allowed, choose, choose_formats)


def budget(bits: float, allowed: Sequence[int | Format] = ALLOWED) -> Width:
    r"""Widths whose mean over all weights is at most a budget, each bit given where it removes most squared error.

    Reverse water-filling: from the smallest width on, the array that loses most error per bit stored gets its next
    width, as long as one can be paid for. Formats count with their scales, each array is on one whose blocks divide its
    inputs, and those that another one beats at fewer bits are passed over; widths beside formats count with their
    steps.

    Args:
      bits: mean bits per weight. Static.
      allowed: the widths to choose from, each 1 to 16; or formats of `clipjax.formats`, among which `choose_bits`
        chooses before a run. Static.

    Returns:
      A `Width`, see `sqnr`.

    Raises:
      ValueError: for a budget below the smallest allowed width, an empty `allowed`, widths outside 1 to 16.

    Example:
      >>> import clipjax, jax
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> clipjax.choose_bits({"small": w, "large": 2 * w}, budget=3.0, allowed=(2, 4))
      {'large': 4, 'small': 2}
      >>> allowed = (clipjax.formats.q4_0(), clipjax.formats.q8_0())
      >>> found = clipjax.choose_bits({"small": w, "large": 2 * w}, budget=6.5, allowed=allowed)
      >>> {path: form.name for path, form in found.items()}
      {'large': 'q8_0', 'small': 'q4_0'}

    References:
      D4, section 2.2, step 2. Cover and Thomas, "Elements of Information Theory", section 10.3.3.
    """
    arguments.static(bits, "budget")
    ok = arguments.is_number(bits) and arguments.finite(bits)
    arguments.require(ok, "budget", "be a finite number", bits, "Give mean bits, e.g. 4.")
    allowed = arguments.widths_or_formats(allowed, "allowed")
    least = arguments.nominal(allowed[0])
    remedy = f"The smallest allowed width is {least}."
    arguments.require(bits >= least, "budget", "be at least the smallest width", bits, remedy)
    numbers = tuple(width for width in allowed if not isinstance(width, Format))

    def choose(sizes: list[int], energy: jax.Array, noise: jax.Array) -> jax.Array:
        return _spend(sizes, noise, numbers, float(bits))

    def choose_formats(sizes: list[int], energy: jax.Array, noise: jax.Array, costs: list[list[float]]) -> jax.Array:
        return _spend_on_formats(sizes, noise, costs, float(bits))

    return Width(allowed, choose, choose_formats)


def _spend(sizes: list[int], noise: jax.Array, allowed: tuple[int, ...], budget: float) -> jax.Array:
    """Give bits one width at a time where they remove most error per bit, within the budget; in whole units."""
    unit = math.gcd(*sizes)
    unit *= -(-sum(sizes) * allowed[-1] // (unit * (2**31 - 1)))  # coarser where i32 would overflow, rounded up
    counts = np.asarray([-(-n // unit) for n in sizes])
    gaps = np.diff(np.asarray(allowed))
    left = math.floor((budget - allowed[0]) * (sum(sizes) / unit))
    cost = jnp.asarray(counts[:, None] * gaps[None], jnp.int32)
    gain = (noise[:, :-1] - noise[:, 1:]) / cost.astype(jnp.float32)
    places = jnp.arange(len(gaps), dtype=jnp.int32)[None]

    def offers(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Which step up is the next of its array and can be paid for."""
        level, left = state
        return (places == level[:, None]) & (cost <= left)

    def buy(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        level, left = state
        open_ = offers(state)
        best = jnp.argmax(jnp.where(open_, gain, -jnp.inf).max(1))
        chosen = jnp.arange(len(sizes)) == best
        price = jnp.sum(jnp.where(open_ & chosen[:, None], cost, 0), dtype=jnp.int32)
        return level + chosen.astype(jnp.int32), left - price

    start = (jnp.zeros(len(sizes), jnp.int32), jnp.asarray(min(left, 2**31 - 1), jnp.int32))
    return jax.lax.while_loop(lambda state: offers(state).any(), buy, start)[0]


def _cheapest(reached: jax.Array, costs: list[list[float]]) -> jax.Array:
    """The width or format of fewest bits that is reached, else the one of most; infinite bits are those of none."""
    good = np.where(np.asarray(reached), costs, np.inf)
    most = np.where(np.isfinite(costs), costs, -1.0).argmax(1)
    return jnp.asarray(np.where(np.isfinite(good).any(1), good.argmin(1), most))


def _spend_on_formats(sizes: list[int], noise: jax.Array, costs: list[list[float]], budget: float) -> jax.Array:
    """The same where a candidate has bits of its own for each array, and more of them may leave more error."""
    errors, stored = np.asarray(noise, np.float64), np.asarray(costs) * np.asarray(sizes)[:, None]
    rows, level = np.arange(len(sizes)), stored.argmin(1)
    least = stored[rows, level].sum() / sum(sizes)
    left = sum(sizes) * (budget * (1 + 1e-12) - least)
    remedy = f"The smallest ones that fit take {least:.6g} bits a weight."
    arguments.require(left >= 0, "budget", "be at least the smallest widths of all leaves", budget, remedy)
    while True:
        price = stored - stored[rows, level][:, None]
        lost = errors[rows, level][:, None] - errors
        offered = (price > 0) & (price <= left) & (lost > 0)
        if not offered.any():
            return jnp.asarray(level)
        gain = np.divide(lost, price, out=np.full_like(price, -np.inf), where=offered)
        row, column = np.unravel_index(gain.argmax(), gain.shape)
        left -= price[row, column]
        level[row] = column
