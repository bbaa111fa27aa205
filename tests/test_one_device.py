"""A process with one device, as most users have, computes bit for bit what a process with eight computes.

Everywhere else in these tests eight devices are forced, and a selection that counts over one device takes another path.
"""

import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax

pytestmark = pytest.mark.optimized

STEPS = 16


def chain():
    """The chain of README.md on a shorter schedule."""
    return optax.chain(
        clipjax.clip_norm(1.0),
        optax.adam(1e-2),
        clipjax.clamp_weights(0.5),
        clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.8, 3, 8), every=2, stop=8),
        clipjax.fake_quantize(bits=4, start=10),
    )


def tied_scores():
    """Few distinct values in arrays of one to three axes, one of them a scalar: boundaries fall among equals."""
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.integers(0, 4, shape), jnp.float32) for shape in ((64, 32), (7,), (3, 5, 8), ())]


def everything():
    """Params and state after each step, masks of tied scores, and whether counts are one reduction of several."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(32, 16)) * 0.2, jnp.float32), "bias": jnp.zeros(16)}
    tx = chain()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.sin(17 * p) + 0.1, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    path = []
    for _ in range(STEPS):
        params, state = step(params, state)
        path.append((params, jax.tree.leaves(state)))
    mask = lambda scope: clipjax.make_mask(tied_scores(), 0.4, scope=scope)
    several = " reduce[" in str(jax.make_jaxpr(lambda: mask("global"))())
    return jax.tree.map(np.asarray, (path, mask("global"), mask("leaf"))), several


def test_one_device_computes_what_eight_compute(tmp_path):
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "").strip()
    command = [sys.executable, __file__, str(tmp_path / "one")]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    devices, (there, one_reduction) = pickle.loads((tmp_path / "one").read_bytes())
    here, many_reductions = everything()
    assert (devices, one_reduction) == (1, True) and (jax.device_count(), many_reductions) == (8, False)
    assert jax.tree.structure(there) == jax.tree.structure(here)
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    kernel = here[0][-1][0]["kernel"]
    assert (kernel == 0).mean() >= 0.8 and len(np.unique(kernel)) <= 15
    assert 0 < sum(m.sum() for m in here[1]) < sum(m.size for m in here[1])


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps((jax.device_count(), everything())))
