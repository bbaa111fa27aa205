"""QK-clip: the largest logit of every head comes down to the threshold, and nothing else changes."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
import clipjax.flax
from clipjax import projections

RNG = np.random.default_rng(0)
PAIRS = {"query/kernel": "key/kernel"}


def drawn(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def attention_params(heads=4, keys=4, features=8, inputs=6, layers=(), dtype=jnp.float32):
    def dense(n):
        kernel, bias = drawn(*layers, inputs, n, features, dtype=dtype), drawn(*layers, n, features, dtype=dtype)
        return {"kernel": kernel, "bias": bias}

    return {"query": dense(heads), "key": dense(keys), "value": dense(keys)}


def logits_of(params, x):
    """f64[heads, positions, positions] of NumPy."""
    q, k = (
        np.einsum("pi,ihf->phf", x, np.asarray(params[name]["kernel"], np.float64)) + np.asarray(params[name]["bias"])
        for name in ("query", "key")
    )
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("phf,rhf->hpr", q, k) / np.sqrt(q.shape[-1])


def clipped(params, logits, threshold, pairs=PAIRS, **options):
    tx = clipjax.clip_logits(threshold, pairs, **options)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(tx.update)(zeros, tx.init(params), params, max_logits=logits)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("keys", [4, 2, 1])
def test_every_logit_changes_by_the_factor_of_its_head(keys):
    """Heads that share a key too: those below the threshold keep their logits, and no weight grows."""
    params, x = attention_params(keys=keys), RNG.normal(size=(5, 6))
    before = logits_of(params, x)
    largest = before.max((1, 2))
    threshold = float(np.sort(largest)[1] + np.sort(largest)[2]) / 2  # two heads of four are beyond it
    new, state = clipped(params, {"query/kernel": jnp.asarray(largest, jnp.float32)}, threshold)
    gamma = np.minimum(1, threshold / largest)
    np.testing.assert_allclose(logits_of(new, x), before * gamma[:, None, None], rtol=1e-4, atol=1e-5)
    for name in ("query", "key"):
        for leaf in ("kernel", "bias"):
            assert np.all(np.abs(new[name][leaf]) <= np.abs(params[name][leaf]))
    chex.assert_trees_all_equal(new["value"], params["value"])
    if keys == 4:
        np.testing.assert_allclose(
            new["query"]["kernel"], params["query"]["kernel"] * np.sqrt(gamma)[None, :, None], rtol=1e-6
        )
    assert int(state.clipped) == 1 and float(state.max_logit) == np.float32(largest.max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_within_the_threshold_updates_pass_as_they_are(dtype):
    params = attention_params(dtype=dtype)
    tx = clipjax.clip_logits(10.0, PAIRS)
    given = jax.tree.map(lambda p: 0.25 * jnp.ones_like(p), params)
    updates, state = tx.update(given, tx.init(params), params, max_logits={"query/kernel": jnp.full(4, 10.0)})
    chex.assert_trees_all_equal(jax.tree.map(lambda u: u.astype(dtype), updates), given)
    assert int(state.clipped) == 0


def test_the_next_weights_are_rescaled_and_not_the_last_ones():
    params, given = attention_params(), jax.tree.map(lambda p: 0.5 * p, attention_params())
    tx = clipjax.clip_logits(1.0, PAIRS)
    updates, _ = tx.update(given, tx.init(params), params, max_logits={"query/kernel": jnp.full(4, 4.0)})
    new = optax.apply_updates(params, updates)
    for name, factor in (("query", 0.5), ("key", 0.5), ("value", 1.0)):
        wanted = jax.tree.map(lambda p, u, f=factor: f * (p + u), params[name], given[name])
        chex.assert_trees_all_close(new[name], wanted, rtol=1e-6, atol=1e-7)


def test_layers_in_front_have_logits_of_their_own():
    params = attention_params(layers=(3,), keys=2)
    logits = jnp.asarray(RNG.uniform(0.5, 8, size=(3, 4)), jnp.float32)
    new, _ = clipped(params, {"query/kernel": logits}, 2.0)
    for layer in range(3):
        part = jax.tree.map(lambda x, i=layer: x[i], params)
        one, _ = clipped(part, {"query/kernel": logits[layer]}, 2.0)
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=layer: x[i], new), one)


def test_heads_and_features_may_be_one_axis_and_any():
    params = attention_params(keys=2)
    logits = jnp.array([1.0, 4.0, 16.0, 2.0])
    new, _ = clipped(params, {"query/kernel": logits}, 2.0)
    flat = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), params)
    got, _ = clipped(flat, {"query/kernel": logits}, 2.0)
    chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), new))
    turned = jax.tree.map(lambda x: x.T, flat)  # [outputs, inputs], as in PyTorch and Equinox
    got, _ = clipped(turned, {"query/kernel": logits}, 2.0, axis=0)
    chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1).T, new))


def test_scan_vmap_and_devices_give_the_same():
    params = attention_params()
    tx = clipjax.clip_logits(2.0, PAIRS)
    logits = {"query/kernel": jnp.array([1.0, 4.0, 16.0, 2.0])}
    zeros = jax.tree.map(jnp.zeros_like, params)
    wanted, state = tx.update(zeros, tx.init(params), params, max_logits=logits)

    def step(carry, _):
        return carry, tx.update(zeros, carry, params, max_logits=logits)[0]

    scanned = jax.lax.scan(step, state, length=2)[1]
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], scanned), wanted)
    swept = jax.vmap(lambda tau: clipjax.clip_logits(tau, PAIRS).update(zeros, state, params, max_logits=logits)[0])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], swept(jnp.array([2.0, 3.0]))), wanted, rtol=1e-6)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    over = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*[None] * (x.ndim - 1), "x")))
    sharded = jax.tree.map(over, params)
    got, _ = jax.jit(tx.update)(jax.tree.map(over, zeros), tx.init(sharded), sharded, max_logits=logits)
    chex.assert_trees_all_equal(got, wanted)


@pytest.mark.parametrize("spec", [("x", "y", None), (None, "y", "x"), ("x", None, "y")])
def test_explicit_mesh_axes(spec):
    params = attention_params(heads=4, features=8, inputs=8)
    tx, logits = clipjax.clip_logits(2.0, PAIRS), {"query/kernel": jnp.array([1.0, 4.0, 16.0, 2.0])}
    wanted, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, max_logits=logits)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        over = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec[3 - x.ndim :])))
        sharded = jax.tree.map(over, params)
        zeros = jax.tree.map(jnp.zeros_like, sharded)
        got, _ = jax.jit(tx.update)(zeros, tx.init(sharded), sharded, max_logits=logits)
    chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(wanted))


def test_latent_weights_behind_it_keep_small_steps_and_factors_near_1():
    """In bf16 a step of 1e-4, and a factor of 1 - 1e-3, round to nothing: latent weights take both."""
    kernel = jnp.ones((2, 2, 4), jnp.bfloat16)
    params = {"query": {"kernel": kernel}, "key": {"kernel": kernel}}
    latent = clipjax.project(projections.identity(), carry=True)
    tx = optax.chain(optax.sgd(1e-4), clipjax.clip_logits(100.0, PAIRS), latent)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(100):
        logits = {"query/kernel": jnp.array([100.1, 1.0])}
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params, max_logits=logits)
        params = optax.apply_updates(params, updates)
    found = state[2].carry["query"]["kernel"][0, :, 0]
    assert found[1] == pytest.approx(0.99, rel=1e-3) and found[0] < found[1]


def test_two_queries_share_a_key():
    params = attention_params()
    params["other"] = attention_params()["query"]
    pairs = {"query/kernel": "key/kernel", "other/kernel": "key/kernel"}
    logits = {"query/kernel": jnp.array([16.0, 1.0, 4.0, 1.0]), "other/kernel": jnp.array([1.0, 1.0, 16.0, 16.0])}
    new, _ = clipped(params, logits, 1.0, pairs)
    for name in ("query", "other"):
        change = np.asarray(new[name]["kernel"] / params[name]["kernel"]) * np.asarray(
            new["key"]["kernel"] / params["key"]["kernel"]
        )
        np.testing.assert_allclose(change[0, :, 0], 1 / logits[f"{name}/kernel"], rtol=1e-5)
        assert np.all(np.abs(new[name]["kernel"]) <= np.abs(params[name]["kernel"]))


def test_a_bias_that_is_not_that_of_the_kernel_stays():
    flat = {name: drawn(6, 8) for name in ("wq", "wk", "wo")} | {"bias": drawn(8)}
    params = {"attn": flat}
    new, _ = clipped(params, {"attn/wq": jnp.array([16.0, 1.0])}, 1.0, {"attn/wq": "attn/wk"})
    for name in ("wo", "bias"):
        np.testing.assert_array_equal(new["attn"][name], flat[name])


@pytest.mark.parametrize("axis", [1, -2])
def test_an_axis_of_the_kernel_is_the_same_from_the_end_in_its_bias(axis):
    params, logits = attention_params(features=4), {"query/kernel": jnp.array([16.0, 1.0, 1.0, 1.0])}
    got, _ = clipped(params, logits, 1.0, axis=axis)
    chex.assert_trees_all_equal(got, clipped(params, logits, 1.0)[0])


def test_map_params_finds_its_state():
    tx = optax.chain(optax.adam(0.1), clipjax.clip_logits(1.0, PAIRS))
    params = attention_params()
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, tx.init(params)), tx.init(params))


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_schedule_that_is_not_positive_clips_nothing(limit):
    params = attention_params()
    new, _ = clipped(params, {"query/kernel": jnp.full(4, 9.0)}, lambda count: jnp.float32(limit))
    chex.assert_trees_all_equal(new, params)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_logits_that_are_not_finite_change_nothing_and_are_counted(bad):
    params = attention_params()
    new, state = clipped(params, {"query/kernel": jnp.array([bad, 1.0, 8.0, 1.0])}, 2.0)  # traced
    np.testing.assert_array_equal(new["query"]["kernel"][:, 0], params["query"]["kernel"][:, 0])
    assert np.all(np.abs(new["query"]["kernel"][:, 2]) < np.abs(params["query"]["kernel"][:, 2]))
    assert clipjax.report(state)["clip_logits/nonfinite"] == 1


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens, sow_weights=False):
        x = nn.Embed(16, 32)(tokens)
        for _ in range(2):
            attend = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=clipjax.flax.attention)
            x = x + attend(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens), sow_weights=sow_weights)
            x = x + nn.Dense(32)(nn.relu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(16)(x)


def test_a_transformer_is_back_within_the_threshold_two_steps_after_a_blow_up():
    model, tau = Transformer(), 5.0
    tokens = jnp.asarray(RNG.integers(0, 16, (8, 12)))
    params = model.init(jax.random.key(0), tokens)["params"]
    blocks = [f"MultiHeadDotProductAttention_{i}" for i in range(2)]
    pairs = {f"{block}/query/kernel": f"{block}/key/kernel" for block in blocks}
    tx = optax.chain(optax.adam(1e-3), clipjax.clip_logits(tau, pairs))

    @jax.jit
    def step(params, state):
        def loss(params):
            logits, sown = model.apply({"params": params}, tokens, sow_weights=True, mutable=["intermediates"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return losses.mean(), clipjax.flax.max_logits(sown["intermediates"])

        grads, logits = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=logits)
        return optax.apply_updates(params, updates), state, logits

    for name in ("query", "key"):
        params[blocks[0]][name]["kernel"] *= 10
    state, seen = tx.init(params), []
    for _ in range(4):
        params, state, logits = step(params, state)
        seen.append(max(float(jnp.max(x)) for x in logits.values()))
    assert seen[0] > 10 * tau and max(seen[2:]) <= 1.05 * tau
    assert not clipjax.check(params, state, tx)


@pytest.mark.parametrize("keys", [None, 2])
def test_nnx_sows_the_same(keys):
    kind = {} if keys is None else {"num_kv_heads": keys}
    make = lambda: nnx.MultiHeadAttention(
        4, 8, decode=False, rngs=nnx.Rngs(0), attention_fn=clipjax.flax.attention, **kind
    )
    model, x = make(), drawn(2, 5, 8)
    plain = nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0), **kind)
    out, sown = nnx.capture(model, nnx.Intermediate)(x, sow_weights=True)
    np.testing.assert_array_equal(out, plain(x))
    logits = clipjax.flax.max_logits(sown)
    found = np.max([logits_of({n: _numbers(getattr(model, n)) for n in ("query", "key")}, row) for row in x], (0, 2, 3))
    np.testing.assert_allclose(logits["query/kernel"], found, rtol=1e-5)
    tx = nnx.Optimizer(model, optax.chain(optax.sgd(0.0), clipjax.clip_logits(0.01, PAIRS)), wrt=nnx.Param)
    before = np.asarray(model.query.kernel[...])
    tx.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)), max_logits=logits)
    assert np.all(np.abs(model.query.kernel[...]) <= np.abs(before)) and np.any(model.query.kernel[...] != before)


@pytest.mark.parametrize("sow", [True, False])
@pytest.mark.parametrize("keys", [None, 1])
def test_nnx_is_as_causal_as_without(sow, keys):
    kind = {} if keys is None else {"num_kv_heads": keys}
    make = lambda **options: nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0), **kind, **options)
    x = drawn(1, 5, 8)
    ours = nnx.capture(make(attention_fn=clipjax.flax.attention), nnx.Intermediate)
    np.testing.assert_array_equal(ours(x, is_causal=True, sow_weights=sow)[0], make()(x, is_causal=True))


def _numbers(layer):
    return {"kernel": np.asarray(layer.kernel[...]), "bias": np.asarray(layer.bias[...])}


def test_masks_hide_logits():
    q = drawn(2, 5, 3, 4)
    full, causal = clipjax.flax.largest_logits(q, q), clipjax.flax.largest_logits(q, q, is_causal=True)
    mask = nn.make_causal_mask(jnp.ones((2, 5)))
    np.testing.assert_array_equal(causal, clipjax.flax.largest_logits(q, q, mask))
    logits = np.einsum("bqhd,bkhd->hbqk", q, q, dtype=np.float64) / 2
    np.testing.assert_allclose(full, logits.max((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(causal, np.where(np.tril(np.ones((5, 5))), logits, -np.inf).max((1, 2, 3)), rtol=1e-6)


def test_the_largest_of_several_calls_counts():
    sown = {"block": {"max_logits": (jnp.array([1.0, 5.0]), jnp.array([2.0, 3.0]))}, "other": (jnp.ones(2),)}
    got = clipjax.flax.max_logits(sown, "q/w")
    assert {path: x.tolist() for path, x in got.items()} == {"block/q/w": [2.0, 5.0]}


LOGITS = {"query/kernel": jnp.ones(4)}


def with_bias(bias):
    params = attention_params()
    return params | {"query": params["query"] | {"bias": bias}}


def update(logits, params=None, **options):
    params = attention_params() if params is None else params
    tx = clipjax.clip_logits(1.0, PAIRS, **options)
    return tx.update(params, tx.init(params), params, max_logits=logits)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: clipjax.clip_logits(0.0, PAIRS), "`threshold` must be positive"),
        (lambda: clipjax.clip_logits(1.0, {}), "`pairs` must be a dict"),
        (lambda: clipjax.clip_logits(1.0, [("a", "b")]), "`pairs` must be a dict"),
        (lambda: clipjax.clip_logits(1.0, {"q": "k"}).init(attention_params()), "`pairs` must name leaves"),
        (lambda: update(None), "`max_logits` must be a dict"),
        (lambda: update({"q": jnp.ones(4)}), r"`max_logits` must have the logits of \['query/kernel'\]"),
        (lambda: update({"query/kernel": jnp.ones(())}), "`max_logits` must have an axis"),
        (lambda: update({"query/kernel": jnp.ones(3)}), "`max_logits` must have as many heads"),
        (lambda: update({"query/kernel": jnp.ones(0)}), "`max_logits` must have as many heads"),
        (lambda: clipjax.flax.largest_logits(jnp.ones((2, 3, 4)), jnp.ones((2, 2, 4))), "`key` must have heads"),
        (lambda: update({"query/kernel": jnp.array([1.0, jnp.nan, 1.0, 1.0])}), "`max_logits` must not be NaN"),
        (lambda: update(LOGITS, axis=(0, 1)), "`axis` must be one axis"),
        (lambda: update(LOGITS, with_bias(jnp.ones(7))), "`query/bias` must have the axis of heads"),
        (lambda: clipjax.flax.max_logits({"a": jnp.ones(2)}), "`sown` must have a value named"),
    ],
)
def test_wrong_calls_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_params_are_needed():
    tx, params = clipjax.clip_logits(1.0, PAIRS), attention_params()
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params), max_logits=LOGITS)
