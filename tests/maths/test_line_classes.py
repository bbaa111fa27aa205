"""The bytes of classes of rows and columns, computed in a compiled program, against the coder of the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipjax._files import zero_densities
from clipjax._maths import line_classes


def coded(alive):
    """What `save` finds for a matrix: its own estimate of the best classes, in bytes."""
    rows, columns = (np.count_nonzero(alive, axis=axis) for axis in (1, 0))
    classes = [zero_densities._classes(*pair) for pair in ((rows, alive.shape[1]), (columns, alive.shape[0]))]
    fine = np.stack([np.count_nonzero(alive[classes[0] == i], axis=0) for i in range(16)])
    fine = np.stack([fine[:, classes[1] == j].sum(1) for j in range(16)], axis=1)
    depths = [(a, b) for a in range(5) for b in range(5)]
    return min(zero_densities._Blocks.merged(tuple(classes), fine, depth).size for depth in depths)


@pytest.mark.parametrize("shape", [(300, 100), (60, 50), (25, 20), (2, 400), (400, 2)])
@pytest.mark.parametrize("spread", [(0.05, 1.0), (0.3, 0.5), (30.0, 30.0)])
def test_bytes_are_those_of_the_coder(shape, spread):
    rng = np.random.default_rng(0)
    rows, columns = (rng.beta(a, 1.0, size) for a, size in zip(spread, ((shape[0], 1), (1, shape[1])), strict=True))
    alive = rng.random(shape) < rows * columns
    got = jax.jit(line_classes.size)(jnp.asarray(alive, jnp.float32))
    assert float(got) == pytest.approx(coded(alive), rel=1e-3, abs=0.5)


@pytest.mark.parametrize("alive", [np.zeros((30, 20)), np.ones((30, 20)), np.eye(20)])
def test_matrices_without_classes(alive):
    assert float(line_classes.size(jnp.asarray(alive, jnp.float32))) == pytest.approx(coded(alive > 0), abs=0.5)
