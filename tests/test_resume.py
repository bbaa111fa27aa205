"""Stop in the middle of a schedule, restore with Orbax in a fresh process: the rest is bit for bit the same."""

import pathlib
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import clipjax
from clipjax import formats, scores, structures

pytestmark = pytest.mark.optimized

STEPS, HALF = 12, 5
RAMP = optax.polynomial_schedule(0.0, 0.8, 3, 9)
CHAINS = {
    "schedule": lambda: clipjax.with_gradient(
        optax.chain(
            clipjax.clip_norm(clipjax.thresholds.percentile(50, window=4)),
            optax.adam(1e-2),
            clipjax.clamp_weights(0.5),
            clipjax.prune_mask(RAMP, score=scores.taylor(), every=2, stop=9),
            clipjax.fake_quantize(4, start=3, every=3, stop=10),
        )
    ),
    "rigl": lambda: clipjax.prune_mask(
        0.8, every=2, stop=9, inner=optax.adamw(1e-2), regrow=0.3, key=jax.random.key(3)
    ),
    "format": lambda: optax.chain(
        optax.adam(1e-2),
        clipjax.clamp_weights(1.5),
        clipjax.prune_mask(RAMP, every=2, stop=9),
        clipjax.fake_quantize(formats.nvfp4(), start=3, every=3, stop=10),
    ),
}


def params():
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32), "bias": jnp.zeros(8)}


def run(name, params, state, first, last):
    tx = CHAINS[name]()

    @jax.jit
    def step(params, state, i):
        grads = jax.tree.map(lambda p: jnp.sin(17 * p + i.astype(p.dtype)), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(first, last):
        params, state = step(params, state, jnp.int32(i))
    return params, state


def resume(name, folder):
    """What the fresh process does: restore, go on, save."""
    template = {"params": params(), "state": CHAINS[name]().init(params())}
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(folder / "half", template)
        new, state = run(name, saved["params"], saved["state"], HALF, STEPS)
        checkpointer.save(folder / "end", {"params": new, "state": state})


@pytest.mark.parametrize("name", CHAINS)
def test_resume_in_a_fresh_process_is_bit_equal(name, tmp_path):
    start = params()
    half, state = run(name, start, CHAINS[name]().init(start), 0, HALF)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", {"params": half, "state": state})
        checkpointer.wait_until_finished()
        command = [sys.executable, "-W", "ignore", __file__, name, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        new, state = run(name, half, state, HALF, STEPS)
        expected = {"params": new, "state": state}
        restored = checkpointer.restore(tmp_path / "end", expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert int((half["kernel"] == 0).sum()) > 0 and int((new["kernel"] == 0).sum()) >= 102


def test_an_nnx_optimizer_with_a_format_resumes(tmp_path):
    def made():
        model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        tx = clipjax.fake_quantize(formats.q4_0(), every=2, inner=optax.adam(1e-2))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def train(model, optimizer):
        for _ in range(3):
            optimizer.update(model, jax.tree.map(lambda p: jnp.sin(17 * p), nnx.state(model, nnx.Param)))

    (model, optimizer), (again, restored) = made(), made()
    train(model, optimizer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", {"model": nnx.state(model), "optimizer": nnx.state(optimizer)})
        checkpointer.wait_until_finished()
        template = {"model": nnx.state(again), "optimizer": nnx.state(restored)}
        found = checkpointer.restore(tmp_path / "half", template)
    nnx.update(again, found["model"])
    nnx.update(restored, found["optimizer"])
    for pair in ((model, optimizer), (again, restored)):
        train(*pair)
    for one, other in ((model, again), (optimizer, restored)):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))
    q = clipjax.quantized(nnx.state(again, nnx.Param), restored.opt_state)["kernel"].get_value()
    assert q.format == "q4_0" and q.scales[0].shape == (2, 8)


def grid_of(kernel):
    return {"dense": {"kernel": kernel, "bias": jnp.zeros(4)}, "none": None}


TREES = {
    "nested": grid_of,
    "one_array": lambda kernel: kernel,
    "integers": lambda kernel: {0: grid_of(kernel), 1: [kernel + 1]},
}


@pytest.mark.parametrize("name", TREES)
def test_state_survives_flat_keys_joined_by_slashes(name):
    """Flax's way to a checkpoint of flat names: every array of ours comes back to its place."""
    tx = optax.chain(
        clipjax.clip_norm(clipjax.thresholds.zscore(), per="leaf"),
        clipjax.skip_spikes(optax.adam(1e-2), 10.0),
        clipjax.prune_mask(0.5, structure=structures.unit(), score=scores.movement(), every=2),
        clipjax.fake_quantize(4, axis=-1),
    )
    tree = TREES[name](jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32))
    _, state = jax.jit(tx.update)(tree, tx.init(tree), tree, grad=tree)
    flat = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state), keep_empty_nodes=True, sep="/")
    nested = flax.traverse_util.unflatten_dict(flat, sep="/")
    restored = flax.serialization.from_state_dict(tx.init(tree), nested)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


if __name__ == "__main__":
    resume(sys.argv[1], pathlib.Path(sys.argv[2]))
