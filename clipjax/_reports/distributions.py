"""The distribution of the weights of one array: its scale, its tails, its error on the grid of each width."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from clipjax import steps as stepping
from clipjax._maths import grid_errors


class Distribution(NamedTuple):
    """Facts about the weights of an array that are finite and not 0. Moments are about 0, where grids are centred.

    Attributes:
      sigma: the root mean square, as in `steps.sigma`.
      max_sigma: the largest magnitude divided by sigma.
      kurtosis: mean(w^4) / sigma^4.
      sqnr_db: by width, the signal to quantization noise ratio on the grid of least squared error, in decibels.
    """

    sigma: float
    max_sigma: float
    kurtosis: float
    sqnr_db: dict[int, float]


def describe(x: np.ndarray, widths: tuple[int, ...]) -> Distribution | None:
    """The distribution of an array; None where no entry is finite and not 0.

    Args:
      x: real, of any shape.
      widths: bit widths for `sqnr_db`, rising, each 1 to 16.
    """
    w = x.astype(np.float64)
    w = w[np.isfinite(w) & (w != 0)]
    if not w.size:
        return None
    exponent = int(np.frexp(np.abs(w).max())[1])
    w = np.ldexp(w, -exponent)  # the largest |w| is in [1/2, 1): no power overflows, and no ratio changes
    power = np.mean(np.square(w))
    return Distribution(
        sigma=float(np.ldexp(np.sqrt(power), exponent)),
        max_sigma=float(np.abs(w).max() / np.sqrt(power)),
        kurtosis=float(np.mean(w**4) / power**2),
        sqnr_db=_decibels(w, widths) if widths else {},
    )


_spectrum = jax.jit(grid_errors.spectrum, static_argnames=("rule", "axes", "allowed"))


def _decibels(w: np.ndarray, widths: tuple[int, ...]) -> dict[int, float]:
    """The signal to quantization noise ratio by width.

    The array is filled up with zeros, which count for nothing, to a power of 2: so few sizes have to be compiled.
    """
    filled = np.zeros(1 << (w.size - 1).bit_length(), np.float32)
    filled[: w.size] = w
    found = _spectrum(filled, rule=stepping.mse(), axes=(0,), allowed=widths)
    noise = np.asarray(found.noise, np.float64)
    noise = np.minimum.accumulate(
        noise
    )  # a wider grid has every level of a narrower one, so its least error is no larger
    with np.errstate(divide="ignore"):
        ratios = 10 * np.log10(float(found.energy) / noise)
    return dict(zip(widths, ratios.tolist(), strict=True))
