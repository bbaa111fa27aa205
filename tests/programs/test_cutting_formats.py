"""Scales of formats in a state that `shrink` cuts: by outputs, by whole blocks of inputs, or refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
from clipjax import formats

RNG = np.random.default_rng(0)
GROUP = [{"a/kernel": -1, "a/bias": 0, "b/kernel": -2}]
BLOCKS, SCATTERED = list(range(32, 64)), [1, 7, 40, 95]


def layers(units, dtype=jnp.float32):
    """Two layers of 96 hidden units, of which some are dead."""
    shapes = {"a": (64, 96), "b": (96, 32)}
    kernels = {name: RNG.normal(size=shape) / 8 for name, shape in shapes.items()}
    kernels["a"][:, units] = kernels["b"][units] = 0
    return {
        name: {"kernel": jnp.asarray(kernels[name], dtype), "bias": jnp.zeros(shapes[name][1], dtype)}
        for name in kernels
    }


def apply(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"] + params["b"]["bias"]


def chain(form):
    return optax.chain(
        clipjax.prune_mask(0.0, every=100), clipjax.fake_quantize(form, every=100, inner=optax.sgd(1e-2, momentum=0.9))
    )


def trained(form, units, steps=2, dtype=jnp.float32):
    """Params and state after some updates; gradients of dead units are 0."""
    params, tx = layers(units, dtype), chain(form)
    step = jax.jit(lambda params, state: _step(tx, params, state))
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state, tx


def _step(tx, params, state):
    grads = jax.tree.map(lambda p: jnp.where(p == 0, jnp.zeros_like(p), jnp.sin(9 * p)), params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


KEPT = {
    "q8_0": (formats.q8_0(), BLOCKS),
    "mxfp4": (formats.mxfp4(), BLOCKS),
    "nvfp4": (formats.nvfp4(), list(range(16, 48))),
    "all_inputs": (formats.int4(None), SCATTERED),
    "array": (formats.fp8_e4m3("array"), SCATTERED),
    "tiles": (formats.fp8_e4m3((32, 32)), BLOCKS),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scales_are_cut_with_their_blocks_and_training_goes_on(name, dtype):
    form, units = KEPT[name]
    params, state, tx = trained(form, units, dtype=dtype)
    small, small_state, widths = clipjax.shrink(params, GROUP, state)
    left = np.delete(np.arange(96), units)
    assert widths == {"a/kernel": len(left)}
    chex.assert_trees_all_equal_shapes_and_dtypes(small_state, tx.init(small))
    before, after = (clipjax.quantized(*of) for of in ((params, state), (small, small_state)))
    np.testing.assert_array_equal(after["a"]["kernel"].codes, before["a"]["kernel"].codes[:, left])
    np.testing.assert_array_equal(after["b"]["kernel"].codes, before["b"]["kernel"].codes[left])
    assert not clipjax.check(small, small_state, tx)
    bits = clipjax.report(small_state, per_leaf=True)
    for leaf in ("a", "b"):
        q = after[leaf]["kernel"]
        true = np.float32(form.code_bits + 8 * sum(scale.nbytes for scale in q.scales) / q.codes.size)
        assert bits[f"fake_quantize/format_bits/{leaf}/kernel"] == true
    params, state = _step(tx, params, state)
    small, small_state = _step(tx, small, small_state)
    chex.assert_trees_all_equal(small["a"]["kernel"], params["a"]["kernel"][:, left])
    chex.assert_trees_all_equal(small["b"]["kernel"], params["b"]["kernel"][left])
    x = jnp.asarray(RNG.normal(size=(5, 64)), dtype)
    np.testing.assert_allclose(*(np.asarray(apply(p, x), np.float32) for p in (params, small)), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["q8_0", "nvfp4", "tiles"])
def test_what_splits_a_block_is_refused(name):
    """Scattered units leave blocks of other neighbours; 4 of them would leave 92 inputs, and 32 a round number."""
    params, state, _ = trained(KEPT[name][0], SCATTERED)
    with pytest.raises(ValueError, match=r"`./kernel` must keep the blocks .*got \((92, 32|64, 92)\).*Cut the model"):
        clipjax.shrink(params, GROUP, state)
    params, state, _ = trained(KEPT[name][0], list(range(8, 40)))
    with pytest.raises(ValueError, match=r"whole, got \((64, 32|64, 64)\).*or shrink before quantizing"):
        clipjax.shrink(params, GROUP, state)
    assert clipjax.shrink(params, GROUP)[2] == {"a/kernel": 64}


def test_one_block_of_a_fixed_size_is_not_cut():
    params = {"a": {"kernel": jnp.ones((4, 32)).at[:, 3].set(0)}, "b": {"kernel": jnp.ones((32, 5)).at[3].set(0)}}
    tx = clipjax.fake_quantize(formats.q4_0(), where=lambda path, leaf: path == "b/kernel")
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    with pytest.raises(ValueError, match=r"`b/kernel` must keep .*got \(31, 5\).*q4_0, with scales for 32 inputs"):
        clipjax.shrink(params, [{"a/kernel": -1, "b/kernel": -2}], state)


def test_blocks_over_several_axes_are_not_made_others():
    """32 inputs are 2 of 16; with 8 left they would be 4 of 8, which other scales belong to."""
    params = {"a": {"kernel": jnp.ones((4, 16)).at[:, 8:].set(0)}, "b": {"kernel": jnp.ones((2, 2, 16, 5))}}
    params["b"]["kernel"] = params["b"]["kernel"].at[:, :, 8:].set(0)
    tx = clipjax.fake_quantize(formats.q4_0(), where=lambda path, leaf: path == "b/kernel")
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    with pytest.raises(ValueError, match=r"`b/kernel` must keep .*got \(2, 2, 8, 5\)"):
        clipjax.shrink(params, [{"a/kernel": -1, "b/kernel": -2}], state)


def test_round_to_leaves_whole_blocks():
    """Of 40 dead units 8 stay, those of the block that is not dead as a whole."""
    params, state, tx = trained(formats.q8_0(), [*range(8), *BLOCKS])
    small, small_state, widths = clipjax.shrink(params, GROUP, state, round_to=64)
    assert widths == {"a/kernel": 64} and small["b"]["kernel"].shape == (64, 32)
    chex.assert_trees_all_equal_shapes_and_dtypes(small_state, tx.init(small))


def test_each_layer_of_a_stack_loses_blocks_of_its_own():
    units = [list(range(32)), list(range(64, 96))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(layers(dead) for dead in units))
    del stacked["a"]["bias"], stacked["b"]["bias"]
    params = {"a": stacked["a"], "b": stacked["b"]}
    tx = clipjax.fake_quantize(formats.q8_0(), axis=(0, -1))
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    params = optax.apply_updates(params, updates)

    def apply(params, x):
        layer = lambda h, p: (jax.nn.relu(h @ p["a"]["kernel"]) @ p["b"]["kernel"] @ jnp.ones((32, 64)), None)
        return jax.lax.scan(layer, x, params)[0]

    analysis = clipjax.analyze(apply, params, jnp.ones((2, 64)))
    small, small_state, _ = clipjax.shrink(params, analysis, state)
    before, after = (clipjax.quantized(*of)["b"]["kernel"] for of in ((params, state), (small, small_state)))
    for i, dead in enumerate(units):
        left = np.delete(np.arange(96), dead)
        np.testing.assert_array_equal(after.codes[i], before.codes[i][left])
        np.testing.assert_array_equal(after.scales[0][i], before.scales[0][i][left[::32] // 32])


def test_an_nnx_optimizer_is_cut():
    class Model(nnx.Module):
        def __init__(self):
            made = layers(BLOCKS)
            self.a, self.b = nnx.Linear(64, 96, rngs=nnx.Rngs(0)), nnx.Linear(96, 32, rngs=nnx.Rngs(0))
            for name, layer in (("a", self.a), ("b", self.b)):
                layer.kernel, layer.bias = (nnx.Param(made[name][field]) for field in ("kernel", "bias"))

        def __call__(self, x):
            return self.b(jax.nn.relu(self.a(x)))

    model = Model()
    tx = clipjax.fake_quantize(formats.q8_0(), inner=optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = lambda: optimizer.update(
        model, jax.tree.map(lambda p: jnp.where(p == 0, 0.0, p), nnx.state(model, nnx.Param))
    )
    step()
    codes = lambda: clipjax.quantized(nnx.state(model, nnx.Param), optimizer.opt_state)["b"]["kernel"].get_value()
    before = codes()
    clipjax.shrink(model, GROUP, optimizer)
    left = np.delete(np.arange(96), BLOCKS)
    np.testing.assert_array_equal(codes().codes, before.codes[left])
    np.testing.assert_array_equal(codes().scales[0], before.scales[0][np.array([0, 2])])
    step()
    assert codes().codes.shape == model.b.kernel.shape == (64, 32)
