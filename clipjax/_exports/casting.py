"""What is lost where an array takes the dtype of a file, or of the leaf that it comes into."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def lost(x: np.ndarray, dtype: Any) -> int | float | None:
    """A number of an array that a dtype does not have, None where it has all.

    A finite number stays finite in floats, where it is rounded; in integers and bools it stays the same.
    """
    dtype = np.dtype(dtype)
    if not x.size or np.can_cast(x.dtype, dtype):
        return None
    if jnp.issubdtype(dtype, jnp.floating):
        finite = np.isfinite(x)
        ends = [f(x, where=finite, initial=0).item() for f in (np.min, np.max)]
        with np.errstate(over="ignore"):
            return next((end for end in ends if not np.isfinite(np.asarray(end).astype(dtype))), None)
    low, high = (0, 1) if dtype.kind == "b" else (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
    ends = [x.min().item(), x.max().item()]
    if jnp.issubdtype(x.dtype, jnp.floating):
        ends.append(x.flat[np.argmax(x != np.trunc(x))].item())  # the first that is no whole number
    return next((end for end in ends if not (low <= end <= high and end == int(end))), None)
