"""The leaves of a tree of the contract."""

import jax
import jax.numpy as jnp
import numpy as np

from clipjax._arrays import trees
from clipjax._weights import checking


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


def on_spheres(params, state):
    """Every leaf has the norms in the state, as near as its dtype allows; a leaf that begins at 0 is on no sphere."""
    radii = dict(trees.governed(checking.states(state)[0].projection))
    for path, x in trees.governed(params):
        if path in radii and np.any(radii[path]):
            r = np.float64(radii[path])
            axes = tuple(i for i, n in enumerate(r.shape) if n == 1)
            norm = np.sqrt(np.square(np.asarray(x, np.float64)).sum(axes, keepdims=True))
            np.testing.assert_allclose(norm, r, rtol=2.0**-8 if x.dtype == jnp.bfloat16 else 1e-6)


def capped(bound):
    """No singular value of a matrix [contracted, outputs] is above the bound, up to rounding."""

    def holds(params, state):
        for _, x in named(params):
            if x.ndim >= 2 and x.size and np.isfinite(x).all():
                largest = np.linalg.norm(x.reshape(-1, x.shape[-1]), 2)
                assert largest <= bound * 1.01, f"a singular value of {largest}, {bound} promised"

    return holds
