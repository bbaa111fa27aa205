"""`sensitivity` against inputs that the models note themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax._arrays import trees


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def square(x, axis=None):
    return np.mean(np.square(np.asarray(x, np.float64)), axis=axis)


def found(model, variables, batches):
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    return clipjax.sensitivity(model, variables, batches, clipjax.analyze(model, variables, *first))


def close(value, wanted):
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.asarray(wanted), rtol=1e-5)


def test_hidden_inputs_over_batches_of_several_sizes():
    params = {"in": {"kernel": normal(5, 7), "bias": normal(7)}, "out": {"kernel": normal(7, 3)}, "none": None}

    def model(params, x, scale):
        return jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) * scale @ params["out"]["kernel"]

    batches = [(normal(4, 6, 5), 2.0), (normal(2, 6, 5, seed=1), 3.0)]
    h = found(model, params, batches)
    assert h["in"]["bias"] is None and h["none"] is None
    x = jnp.concatenate([x.reshape(-1, 5) for x, _ in batches])
    close(h["in"]["kernel"], square(x, 0)[:, None])
    hidden = [jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]).reshape(-1, 7) * s for x, s in batches]
    close(h["out"]["kernel"], square(jnp.concatenate(hidden), 0)[:, None])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_that_are_reshaped_cast_masked_and_quantized_on_the_way(dtype):
    """f32[heads, size, out] by f32[heads · size, out] in bf16, through a mask and a straight-through grid."""
    params = {"kernel": normal(2, 4, 6).astype(dtype), "tied": normal(6, 2, 4).astype(dtype)}
    mask = normal(2, 4, 6, seed=3) > 0

    def model(params, x):
        kernel = clipjax.fake_quant(jnp.where(mask, params["kernel"], 0), 0.1, 4).reshape(8, 6)
        y = jax.checkpoint(lambda x: x @ kernel.astype(x.dtype))(x)
        return y @ params["tied"].transpose(1, 2, 0).reshape(8, 6).T.astype(x.dtype)

    x = normal(50, 8)
    h = found(model, params, [x])
    close(h["kernel"], square(x, 0).reshape(2, 4, 1))
    assert h["tied"].shape == (6, 1, 1)


def test_stacked_layers_have_a_mean_each():
    params = {"kernel": normal(3, 4, 4), "scale": normal(3, 4)}

    def model(params, x):
        def layer(x, own):
            return jnp.tanh(x * own["scale"] @ own["kernel"]), None

        return jax.lax.scan(layer, x, params)[0]

    x = normal(20, 4)
    h = found(model, params, [x])["kernel"]
    inputs = []
    for kernel, scale in zip(params["kernel"], params["scale"], strict=True):
        inputs.append(square(x * scale, 0)[:, None])
        x = jnp.tanh(x * scale @ kernel)
    close(h, np.stack(inputs))


def test_a_kernel_that_is_multiplied_twice_and_ranges_of_a_fused_one():
    params = {"kernel": normal(4, 4), "fused": normal(4, 6)}

    def model(params, x):
        y = x @ params["kernel"] @ params["kernel"]
        gate, up = jnp.split(params["fused"], 2, axis=1)
        return jax.nn.silu(y @ gate) * (y @ up)

    x = normal(10, 4)
    h, y = found(model, params, [x]), x @ params["kernel"]
    close(h["kernel"], (square(x, 0) + square(y, 0))[:, None] / 2)
    close(h["fused"], square(y @ params["kernel"], 0)[:, None])


def test_experts_and_groups_of_a_convolution_keep_inputs_of_their_own():
    params = {
        "experts": normal(3, 4, 5),
        "last": normal(4, 3, 5),
        "depthwise": normal(3, 1, 2),
        "conv": normal(3, 4, 6),
    }
    numbers = ("NWC", "WIO", "NWC")

    def model(params, x, image):
        y = jax.lax.conv_general_dilated(image, params["conv"], (1,), "SAME", dimension_numbers=numbers)
        y = (
            jax.lax.conv_general_dilated(
                image[..., :2], params["depthwise"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=2
            ).sum()
            + y
        )
        last = jax.lax.dot_general(x, params["last"], (((2,), (0,)), ((0,), (1,))))
        return jnp.einsum("ebi,eio->ebo", x, params["experts"]) + last, y

    x, image = normal(3, 8, 4), normal(2, 9, 4, seed=1)
    h = found(model, params, [(x, image)])
    close(h["experts"], square(x, 1)[:, :, None])
    close(h["last"], square(x, 1).T[:, :, None])
    close(h["conv"], np.broadcast_to(square(image, (0, 1))[:, None], (3, 4, 1)))
    close(h["depthwise"], np.broadcast_to(square(image[..., :2], (0, 1)), (3, 1, 2)))


def test_a_branch_counts_where_it_runs():
    params = {"kernel": normal(4, 4)}

    def model(params, x, flag):
        return jax.lax.cond(flag, lambda x: x @ params["kernel"], lambda x: 2 * x @ params["kernel"], x)

    x = normal(5, 4)
    h = found(model, params, [(x, True), (x, False), (x, False)])
    close(h["kernel"], 3 * square(x, 0)[:, None])


def test_linen_and_nnx():
    linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
    x = normal(6, 3)
    model = linen.Sequential([linen.Dense(4), linen.relu, linen.Dense(2)])
    variables = model.init(jax.random.key(0), x)
    h = found(model.apply, variables, [x])
    close(h["layers_0"]["kernel"], square(x, 0)[:, None])
    assert h["layers_2"]["kernel"].shape == (4, 1) and h["layers_0"]["bias"] is None
    weigh = lambda h, w: None if h is None else jnp.abs(w) * jnp.sqrt(h)
    scores = jax.tree.map(weigh, h, variables["params"], is_leaf=lambda h: h is None)
    tx = clipjax.prune_mask(0.5, score=clipjax.scores.external(scores))
    pruned, _ = clipjax.hold_once(tx, variables["params"])
    assert sum(int((layer["kernel"] == 0).sum()) for layer in pruned.values()) == 10
    bits = clipjax.choose_bits(variables["params"], budget=4, sensitivity=h)
    assert bits["layers_0"]["kernel"] >= 2 and bits["layers_0"]["bias"] is None
    attention = nnx.MultiHeadAttention(num_heads=2, in_features=4, qkv_features=6, decode=False, rngs=nnx.Rngs(0))
    x = normal(2, 5, 4)
    h = found(lambda model, x: model(x), attention, [x])
    paths = dict(trees.governed(h))
    close(paths["query/kernel"], square(x, (0, 1))[:, None, None])
    assert set(paths) == {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    assert paths["out/kernel"].shape == (2, 3, 1)


def test_bad_input_is_told():
    params, x = {"kernel": normal(4, 4)}, normal(3, 4)
    model = lambda params, x: x @ params["kernel"]
    analysis = clipjax.analyze(model, params, x)
    with pytest.raises(TypeError, match="`apply_fn` must be a function"):
        clipjax.sensitivity(None, params, [x], analysis)
    with pytest.raises(TypeError, match="`analysis` must be a Analysis"):
        clipjax.sensitivity(model, params, [x], model)
    with pytest.raises(ValueError, match="`batches` must have a batch"):
        clipjax.sensitivity(model, params, iter([]), analysis)
    with pytest.raises(ValueError, match="`path` must be one that was analyzed, got 'other'"):
        clipjax.sensitivity(model, params | {"other": x}, [x], analysis)
    loop = lambda params, x: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ params["kernel"], x)
    with pytest.raises(ValueError, match=r"must multiply every kernel where it can be read, got \['kernel'\]"):
        clipjax.sensitivity(loop, params, [x], analysis)
