"""The trainer of Tunix, unmodified, with a chain as its optimizer: examples/tunix_loop.py."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import clipjax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
pytest.importorskip("tunix", reason="Tunix is missing: pip install google-tunix")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Tunix and what it imports


@pytest.fixture(scope="module")
def tunix_loop():
    return pytest.importorskip("tunix_loop", reason="the examples are not here")


def held(trainer):
    """Zeros among the kernels, and whether every constraint that the state shows holds."""
    params, state = nnx.state(trainer.model, nnx.Param), trainer.optimizer.opt_state
    broken = [row for row in clipjax.check(params, state) if row.kind != "unchecked"]
    return float(clipjax.report(state)["prune_mask/sparsity"]), broken


def test_constraints_hold_behind_accumulated_gradients_and_out_of_a_checkpoint(tunix_loop, tmp_path):
    first = tunix_loop.trainer(20, tmp_path)
    first.train(tunix_loop.batches(2 * tunix_loop.ACCUMULATED * 20))
    assert first.train_steps == 20
    sparsity, broken = held(first)
    assert 0.3 < sparsity < 0.5 and not broken

    second = tunix_loop.trainer(40, tmp_path, seed=1)
    assert second.train_steps == 20
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, nnx.state(second.model, nnx.Param), nnx.state(first.model, nnx.Param))
    assert held(second) == (sparsity, [])
    second.train(tunix_loop.batches(2 * tunix_loop.ACCUMULATED * 40))
    assert second.train_steps == 40 and held(second) == (0.5, [])
