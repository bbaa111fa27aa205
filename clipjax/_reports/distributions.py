"""Plain maths of one array's distribution: how wide it is, how far it reaches, what a grid of each width would lose."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from clipjax import steps as stepping
from clipjax._maths import spectra


class Distribution(NamedTuple):
    """What the nonzero finite weights of an array look like, from 0, where a grid is centred.

    Attributes:
      sigma: the root mean square, as in `steps.sigma`.
      max_sigma: the largest magnitude over sigma.
      kurtosis: mean(w^4) / sigma^4.
      sqnr_db: the signal to quantization noise per width, on the grid of least squared error.
    """

    sigma: float
    max_sigma: float
    kurtosis: float
    sqnr_db: dict[int, float]


def describe(x: np.ndarray, widths: tuple[int, ...]) -> Distribution | None:
    """The distribution of an array; None where no weight is left.

    Args:
      x: real, of any shape; zeros are no weights, and what is not finite is passed over.
      widths: those to try, rising, each 1 to 16.
    """
    w = x.astype(np.float64)
    w = w[np.isfinite(w) & (w != 0)]
    if not w.size:
        return None
    exponent = int(np.frexp(np.abs(w).max())[1])
    w = np.ldexp(w, -exponent)  # |w| in [1/2, 1] at most: no power overflows, and no ratio changes
    power = np.mean(np.square(w))
    return Distribution(
        sigma=float(np.ldexp(np.sqrt(power), exponent)),
        max_sigma=float(np.abs(w).max() / np.sqrt(power)),
        kurtosis=float(np.mean(w**4) / power**2),
        sqnr_db=_decibels(w, widths) if widths else {},
    )


_spectrum = jax.jit(spectra.spectrum, static_argnames=("rule", "axes", "allowed"))


def _decibels(w: np.ndarray, widths: tuple[int, ...]) -> dict[int, float]:
    """10 log10 of signal over noise; sizes are filled up with zeros so that few of them are compiled."""
    filled = np.zeros(1 << (w.size - 1).bit_length(), np.float32)
    filled[: w.size] = w
    found = _spectrum(filled, rule=stepping.mse(), axes=(0,), allowed=widths)
    noise = np.asarray(found.noise, np.float64)
    noise = np.minimum.accumulate(noise)  # a wider grid has every level of a narrower one
    with np.errstate(divide="ignore"):
        ratios = 10 * np.log10(float(found.energy) / noise)
    return dict(zip(widths, ratios.tolist(), strict=True))
