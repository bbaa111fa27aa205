"""The leaves of a tree of the contract."""

import jax
import jax.numpy as jnp
import numpy as np


def named(tree):
    """The float arrays of a tree with the last key of each, boxes removed, as exact NumPy f64."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree)
    out = []
    for path, leaf in keyed:
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        keys = [k for k in keys if k not in ("value", "raw_value")] or [""]
        if jnp.issubdtype(getattr(leaf, "dtype", jnp.int32), jnp.floating):
            out.append((keys[-1], np.asarray(leaf, np.float64)))
    return out


def kernels(tree):
    """What is pruned and quantized by default."""
    return [x for name, x in named(tree) if x.ndim >= 2 and name not in ("bias", "b", "scale", "offset")]
