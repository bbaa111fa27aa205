"""Weights on formats in ensembles, in stacks of layers, behind accumulated gradients: they are as they are alone."""

import functools

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
from clipjax import formats

RNG = np.random.default_rng(0)
SHAPE = (64, 8)
GRADS = jnp.asarray(RNG.normal(size=(4, 3, *SHAPE)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(3, *SHAPE)), jnp.float32)


def chain(form, every, **options):
    return optax.chain(optax.sgd(0.1), clipjax.clamp_weights(1.5), clipjax.fake_quantize(form, every=every, **options))


def trained(tx, w, grads):
    """Params and state after an update for each gradient."""
    params = {"kernel": w}

    def step(loop, grad):
        params, state = loop
        updates, state = tx.update({"kernel": grad}, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]


@pytest.mark.parametrize("form, every", [(formats.q4_0(), 1), (formats.nvfp4(), 3), (formats.nf4(), 3)])
def test_a_member_of_an_ensemble_is_what_it_is_alone(form, every):
    tx = chain(form, every)
    together = jax.jit(jax.vmap(functools.partial(trained, tx), in_axes=(0, 1)))(WEIGHTS, GRADS)
    for i in range(3):
        params, state = jax.tree.map(lambda x, i=i: x[i], together)
        alone = jax.jit(functools.partial(trained, tx))(WEIGHTS[i], GRADS[:, i])
        chex.assert_trees_all_equal((params, state), alone)
        assert not clipjax.check(params, state, tx)
        q = clipjax.quantized(params, state)["kernel"]
        assert q.format == form.name
        np.testing.assert_allclose(clipjax.dequantize(q), params["kernel"], rtol=0 if form.exact else 2.0**-22)


@pytest.mark.parametrize("form, every", [(formats.q4_0(), 1), (formats.int4(None, "float32"), 3)])
def test_a_layer_of_a_stack_is_what_it_is_alone(form, every):
    stack, state = jax.jit(functools.partial(trained, chain(form, every, axis=(0, -1))))(WEIGHTS, GRADS)
    codes = clipjax.quantized(stack, state)["kernel"]
    assert codes.axis == (0, 2)
    for i in range(3):
        params, alone = jax.jit(functools.partial(trained, chain(form, every)))(WEIGHTS[i], GRADS[:, i])
        np.testing.assert_array_equal(stack["kernel"][i], params["kernel"])
        q = clipjax.quantized(params, alone)["kernel"]
        np.testing.assert_array_equal(codes.codes[i], q.codes)
        np.testing.assert_array_equal(codes.scales[0][i], q.scales[0])


def test_accumulated_gradients_move_the_bytes_where_they_are_emitted():
    """Two equal gradients are an update by their mean; what lies between is the weights and the bytes as they were."""
    inner = chain(formats.q4_0(), 1)
    tx = optax.MultiSteps(inner, 2).gradient_transformation()
    params = {"kernel": WEIGHTS[0]}
    state, step = tx.init(params), jax.jit(tx.update)
    for i, grad in enumerate(jnp.repeat(GRADS[:3, 0], 2, axis=0)):
        updates, state = step({"kernel": grad}, state, params)
        before, params = params, optax.apply_updates(params, updates)
        if i % 2 == 0:
            chex.assert_trees_all_equal(params, before)
        if i < 3:  # weights that start between levels are on them from the second update on
            continue
        q = clipjax.quantized(params, state)["kernel"]
        np.testing.assert_array_equal(clipjax.dequantize(q), params["kernel"])
        again = gguf.quants.quantize(np.asarray(params["kernel"]).T.copy(), gguf.GGMLQuantizationType.Q4_0)
        values = gguf.quants.dequantize(again, gguf.GGMLQuantizationType.Q4_0).T
        np.testing.assert_array_equal(values, params["kernel"])
        assert not clipjax.check(params, state)
    chex.assert_trees_all_equal(params, jax.jit(functools.partial(trained, inner))(WEIGHTS[0], GRADS[:3, 0])[0])
    assert float(clipjax.report(state)["fake_quantize/format_bits"]) == 4.5
    held, _ = clipjax.hold_once(inner, params, state.inner_opt_state)
    chex.assert_trees_all_equal(held, params)


def test_an_nnx_optimizer_ends_on_bytes_that_a_file_has(tmp_path):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    tx = chain(formats.q8_0(), 1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))

    for i in range(3):
        step(model, optimizer, GRADS[i, 0].T)
    params, state = nnx.state(model, nnx.Param), optimizer.opt_state
    assert not clipjax.check(params, state, tx) and not clipjax.check(params, state)
    clipjax.export_gguf(tmp_path / "net.gguf", params, state, architecture="net")
    read = gguf.GGUFReader(tmp_path / "net.gguf")
    (tensor,) = (t for t in read.tensors if t.tensor_type == gguf.GGMLQuantizationType.Q8_0)
    kernel = np.asarray(model.kernel.get_value())
    np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(kernel.T.copy(), tensor.tensor_type))
    np.testing.assert_array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type).T, kernel)
