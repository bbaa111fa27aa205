"""shrink: smaller arrays, the same outputs, an optimizer state that fits, and errors where outputs would change."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import clipjax
from clipjax import structures
from clipjax._programs.shrinking import Shrunk, shrink

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(16, 12, 12, 3)), jnp.float32)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def random(module, x):
    """Variables of the module's shapes with every array random, so that none is 0 by its initializer."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda s: jnp.asarray(RNG.normal(size=s.shape) * 0.3 + 0.1, s.dtype), shapes)


def apply(module, variables, x):
    return jax.jit(module.apply)(variables, x)


def reference_take(x, units, kept, axis):
    """Entry by entry: those whose unit (index modulo the number of units) is kept."""
    rows = np.moveaxis(np.asarray(x), axis, 0)
    return np.moveaxis(np.stack([row for i, row in enumerate(rows) if i % units in kept]), 0, axis)


def zeroed(tree, dead, axes):
    """The tree with the dead units of these leaves (dict path -> axis) at 0."""

    def zero(path, x):
        where = "/".join(str(key.key) for key in path)
        axis = axes.get(where, axes.get(where.partition("/")[2]))
        return x if axis is None else jnp.moveaxis(jnp.moveaxis(x, axis, 0).at[np.array(dead)].set(0.0), 0, axis)

    return jax.tree_util.tree_map_with_path(zero, tree)


class Cnn(nn.Module):
    first: int = 16
    second: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(nn.Conv(self.first, (3, 3), name="conv1")(x)))
        x = nn.relu(nn.Conv(self.second, (3, 3), strides=2, name="conv2")(x))
        return nn.Dense(4, name="dense")(x.reshape(x.shape[0], -1))


OWNED = {"conv1/kernel": -1, "conv1/bias": 0, "bn1/scale": 0, "bn1/bias": 0}
FIRST = OWNED | {"bn1/mean": 0, "bn1/var": 0, "conv2/kernel": 2}
SECOND = {"conv2/kernel": -1, "conv2/bias": 0, "dense/kernel": {0: 36}}
DEAD1, DEAD2 = [0, 2, 3, 5, 8, 9, 13, 15], [1, 4, 5, 7]


def pruned_cnn():
    variables = random(Cnn(), IMAGES)
    variables["batch_stats"]["bn1"]["var"] = jnp.square(variables["batch_stats"]["bn1"]["var"]) + 0.5
    return zeroed(zeroed(variables, DEAD1, OWNED), DEAD2, {"conv2/kernel": 3, "conv2/bias": 0})


def test_cnn_with_batch_norm_and_flattened_dense_same_outputs_fewer_flops():
    variables = pruned_cnn()
    small, state, widths = shrink(variables, [FIRST, SECOND])
    assert state is None and widths == {"conv1/kernel": 8, "conv2/kernel": 4}
    module = Cnn(widths["conv1/kernel"], widths["conv2/kernel"])
    whole, less = (jax.jit(m.apply).lower(v, IMAGES).compile() for m, v in ((Cnn(), variables), (module, small)))
    wanted = whole(variables, IMAGES)
    assert np.std(wanted) > 0.1
    chex.assert_trees_all_close(less(small, IMAGES), wanted, atol=1e-5)
    assert less.cost_analysis()["flops"] < 0.5 * whole.cost_analysis()["flops"]
    before, after = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (variables, small))
    assert after < 0.5 * before


class Residual(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        stream = nn.Conv(self.width, (1, 1), name="a")(x)
        stream = nn.relu(stream + nn.Conv(self.width, (3, 3), name="b")(nn.relu(stream)))
        return nn.Dense(3, name="head")(stream.mean(axis=(1, 2)))


STREAM = {"a/kernel": -1, "b/kernel": (3, 2), "a/bias": 0, "b/bias": 0, "head/kernel": 0}


def test_residual_units_die_only_where_every_owner_is_zero():
    params = random(Residual(), IMAGES)["params"]
    params = zeroed(params, [1, 4, 5], {"a/kernel": 3, "a/bias": 0})
    params = zeroed(params, [0, 4, 5], {"b/kernel": 3, "b/bias": 0})
    small, _, widths = shrink(params, [STREAM])
    assert widths == {"a/kernel": 4, "b/kernel": 4}
    wanted = apply(Residual(), {"params": params}, IMAGES)
    chex.assert_trees_all_close(apply(Residual(4), {"params": small}, IMAGES), wanted, atol=1e-5)


def attention(heads):
    return nn.MultiHeadDotProductAttention(heads, qkv_features=heads * 5, out_features=6)


OWNERS = {f"{name}/kernel": -2 for name in ("query", "key", "value")}
INSIDE = OWNERS | {f"{name}/bias": 0 for name in ("query", "key", "value")}


def test_attention_heads_of_dense_general_kernels():
    x = normal(2, 7, 6)
    params = zeroed(random(attention(4), x)["params"], [0, 2], INSIDE)
    small, _, widths = shrink(params, [INSIDE | {"out/kernel": 0}])
    assert widths == dict.fromkeys(OWNERS, 2)
    assert small["out"]["kernel"].shape == (2, 5, 6) and small["query"]["bias"].shape == (2, 5)
    wanted = apply(attention(4), {"params": params}, x)
    chex.assert_trees_all_close(apply(attention(2), {"params": small}, x), wanted, atol=1e-5)


MLP_DEAD, MLP_KEPT = [1, 2, 6], [0, 3, 4, 5, 7]
MLP = {"a/kernel": -1, "a/bias": 0, "b/kernel": 0}
AXES = {"a": {"kernel": 1, "bias": 0}, "b": {"kernel": 0, "bias": None}}


def mlp_params(dead=()):
    params = {"a": {"kernel": normal(5, 8), "bias": normal(8)}, "b": {"kernel": normal(8, 3), "bias": normal(3)}}
    return zeroed(params, list(dead), {"a/kernel": 1, "a/bias": 0}) if dead else params


def kept_entries(tree, kept=MLP_KEPT):
    take = lambda x, axis: x if axis is None else jnp.asarray(reference_take(x, 8, kept, axis))
    return {m: {k: take(x, AXES[m][k]) for k, x in leaves.items()} for m, leaves in tree.items()}


def test_adam_goes_on_exactly_as_unshrunken_on_the_kept_entries():
    params, tx = mlp_params(MLP_DEAD), optax.chain(optax.clip_by_global_norm(1e6), optax.adam(1e-2))
    _, state = tx.update(mlp_params(), tx.init(params), params)
    small, small_state, _ = shrink(params, [MLP], state)
    chex.assert_trees_all_equal(small, kept_entries(params))
    grads = mlp_params()
    wanted, _ = tx.update(grads, state, params)
    got, small_state = tx.update(kept_entries(grads), small_state, small)
    chex.assert_trees_all_equal(got, kept_entries(wanted))
    chex.assert_trees_all_equal_shapes_and_dtypes(small_state, tx.init(small))


def test_clipjax_chain_state_follows_its_params():
    """Bounded weights, 3 of 8 units gone, averages of a score, a grid with a step per unit and latent weights."""
    units = clipjax.prune_mask(0.375, structure=structures.unit(), where=lambda path, leaf: path == "a/kernel")
    later = clipjax.prune_mask(0.25, score=clipjax.scores.fisher(), start=50)
    grid = clipjax.fake_quantize(4, axis=-1)
    tx = clipjax.with_gradient(optax.chain(optax.adam(1e-2), clipjax.clamp_weights(1.0), units, later, grid))
    params, update = mlp_params(range(8)), jax.jit(tx.update)
    params["a"]["kernel"] = normal(5, 8)
    state, still = tx.init(params), {"bias": jnp.zeros(8)}
    for _ in range(3):
        grads = mlp_params()
        updates, state = update(grads | {"a": grads["a"] | still}, state, params)
        params = optax.apply_updates(params, updates)
    kept = np.flatnonzero(np.any(np.asarray(params["a"]["kernel"]) != 0, axis=0))
    small, small_state, widths = shrink(params, [MLP], state)
    assert widths == {"a/kernel": 5}
    chex.assert_trees_all_equal_shapes_and_dtypes(small_state, tx.init(small))
    grads = mlp_params()
    grads["a"] |= still
    wanted, _ = update(grads, state, params)
    got, _ = update(kept_entries(grads, kept), small_state, small)
    chex.assert_trees_all_close(got, kept_entries(wanted, kept), atol=1e-6)
    codes = clipjax.quantized(small, small_state)["a"]["kernel"]
    assert codes.step.shape == (1, 5)
    chex.assert_trees_all_equal(clipjax.dequantize(codes.codes, codes.step), small["a"]["kernel"])


def test_inner_multi_steps_and_stacked_states_are_cut():
    params = mlp_params(MLP_DEAD)
    inner = clipjax.fake_quantize(4, inner=optax.adam(1e-2))
    masked = optax.masked(inner, {"a": True, "b": False})
    for tx in (inner, masked, optax.MultiSteps(inner, 2), optax.lbfgs(memory_size=2)):
        small, state, _ = shrink(params, [MLP], tx.init(params))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(small))


def test_longest_path_decides_where_paths_end_alike():
    params = {"kernel": normal(5, 8), "deep": {"kernel": normal(5, 8)}, "mu": {"kernel": normal(8, 5)}}
    params["kernel"] = params["kernel"].at[:, 2].set(0.0)
    tx = optax.adam(1e-2)
    small, state, _ = shrink(params, [{"kernel": -1}], tx.init(params))
    assert small["deep"]["kernel"].shape == (5, 8) and small["kernel"].shape == (5, 7)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(small))


def test_factored_moments_are_refused_with_a_remedy():
    params = {"a": {"kernel": jnp.ones((128, 128)).at[:, 3].set(0.0)}, "b": {"kernel": jnp.ones((128, 2))}}
    tx = optax.adafactor(1e-3)
    with pytest.raises(ValueError, match=r"v_row/a/kernel` must have the shape of its leaf.*start anew"):
        shrink(params, [{"a/kernel": -1, "b/kernel": 0}], tx.init(params))


def test_flattened_followers_take_every_nth_nan_is_alive_minus_zero_is_dead():
    params = {"in": jnp.array([[jnp.nan, -0.0, 2.0]]), "out": jnp.arange(12.0).reshape(6, 2), "mean": jnp.arange(6.0)}
    small = shrink(params, [{"in": -1, "out": {0: 2}, "mean": {-1: 2}}]).variables
    assert small["out"][:, 0].tolist() == [0.0, 4.0, 6.0, 10.0] and small["mean"].tolist() == [0, 2, 3, 5]


def test_nothing_dead_nothing_changes():
    params = mlp_params()
    shrunk = shrink(params, [MLP], optax.adam(1e-2).init(params))
    assert isinstance(shrunk, Shrunk) and shrunk.widths == {"a/kernel": 8}
    chex.assert_trees_all_equal(shrunk.variables, params)
    chex.assert_trees_all_equal(shrink(params, []).variables, params)


@pytest.mark.parametrize("kind", ["numpy", "bf16", "int32"])
def test_kinds_of_arrays_stay_what_they_are(kind):
    cast = {"numpy": np.asarray, "bf16": lambda x: x.astype(jnp.bfloat16), "int32": lambda x: (9 * x).astype(jnp.int32)}
    params = mlp_params(MLP_DEAD)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        small = shrink(jax.tree.map(cast[kind], params), [MLP]).variables
    wanted = jax.tree.map(cast[kind], kept_entries(params))
    chex.assert_trees_all_equal(small, wanted, strict=True)
    assert isinstance(small["a"]["kernel"], type(wanted["a"]["kernel"]))


def test_sharded_arrays_stay_sharded_where_the_new_size_divides():
    for types in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(types, types))
        for dead, spec in (([0, 1, 2, 3], jax.P("x", "y")), ([1, 2, 6], jax.P("x", None))):
            params = zeroed(mlp_params(), dead, {"a/kernel": 1, "a/bias": 0})
            wide = jnp.concatenate([params["a"]["kernel"]] * 2)
            params["a"]["kernel"] = jax.device_put(wide, jax.NamedSharding(mesh, jax.P("x", "y")))
            kernel = shrink(params, [MLP]).variables["a"]["kernel"]
            chex.assert_trees_all_equal(kernel, np.delete(np.asarray(wide), dead, axis=1))
            assert kernel.sharding == jax.NamedSharding(mesh, spec)


def test_frozen_dict_and_linen_boxes_keep_their_kind():
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    boxed = lambda width: nn.Sequential([nn.Dense(width, kernel_init=kernel), nn.relu, nn.Dense(3)])
    x, dead, tx = normal(4, 5), np.array(MLP_DEAD), optax.adam(1e-2)
    variables = random(boxed(8), x)
    first = variables["params"]["layers_0"]
    variables["params"]["layers_0"] = jax.tree.map(lambda w: w.at[..., dead].set(0.0), first)
    variables = freeze(variables)
    group = {"layers_0/kernel": -1, "layers_0/bias": 0, "layers_2/kernel": 0}
    small, state, _ = shrink(variables, [group], tx.init(variables["params"]))
    assert jax.tree.structure(small) == jax.tree.structure(variables)
    assert small["params"]["layers_0"]["kernel"].names == ("embed", "mlp")
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(small["params"]))
    chex.assert_trees_all_close(apply(boxed(5), small, x), apply(boxed(8), variables, x), atol=1e-5)


def wired(width):
    rngs = nnx.Rngs(width)
    norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
    return nnx.Sequential(nnx.Linear(5, width, rngs=rngs), norm, nnx.relu, nnx.Linear(width, 3, rngs=rngs))


def test_nnx_state_and_optimizer():
    x, model, dead = normal(4, 5), wired(8), np.array(MLP_DEAD)
    model.layers[0].kernel[...] = model.layers[0].kernel[...].at[:, dead].set(0.0)
    model.layers[1].scale[...] = model.layers[1].scale[...].at[dead].set(0.0)
    group = {"layers/0/kernel": -1, "layers/0/bias": 0, "layers/3/kernel": 0}
    group |= {f"layers/1/{name}": 0 for name in ("scale", "bias", "mean", "var")}
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    small, state, widths = shrink(nnx.state(model), [group], nnx.state(optimizer))
    other = wired(widths["layers/0/kernel"])
    nnx.update(other, small)
    chex.assert_trees_all_close(other(x), model(x), atol=1e-5)
    fresh = nnx.Optimizer(other, optax.adam(1e-2), wrt=nnx.Param)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, nnx.state(fresh))
    nnx.update(fresh, state)
    fresh.update(other, nnx.grad(lambda m: jnp.sum(m(x)))(other))


def test_paths_with_and_without_the_collection():
    variables = pruned_cnn()
    whole = {f"batch_stats/{k}" if "mean" in k or "var" in k else f"params/{k}": a for k, a in FIRST.items()}
    small, _, widths = shrink(variables, [whole])
    assert widths == {"params/conv1/kernel": 8}
    chex.assert_trees_all_equal(small, shrink(variables, [FIRST]).variables)
    tx = optax.adam(1e-2)
    for given, left in ((variables, small), (variables["params"], small["params"])):  # of all, of the params
        chex.assert_trees_all_equal_shapes(shrink(variables, [FIRST], tx.init(given)).opt_state, tx.init(left))


@pytest.mark.parametrize("leaf", ["bn1/bias", "bn1/scale", "conv1/bias"])
def test_refuses_a_cut_unit_with_a_bias_scale_or_offset(leaf):
    variables, (module, name) = pruned_cnn(), leaf.split("/")
    value = variables["params"][module][name]
    variables["params"][module][name] = value.at[np.array([2, 9])].set(1e-30)
    message = rf"`params/{leaf}` must be 0 in the units that are cut, got \[2, 9\].*would change the outputs: set them"
    with pytest.raises(ValueError, match=message):
        shrink(variables, [FIRST])


MIXED = {"params": {"a": {"kernel": jnp.eye(3)}}, "ema": {"a": {"kernel": jnp.eye(3)}}}
BAD = {
    "unknown": (MLP | {"b/kernal": 0}, {}, r"name one array by each path, got 'b/kernal'. Did you mean.*'b/kernel'"),
    "no collection": ({"a/kernel": -1}, {"net": {"a": {"kernel": jnp.eye(3)}}}, "got 'a/kernel'. Did you mean"),
    "collection of plain params": ({"params/a/kernel": -1}, {}, "got 'params/a/kernel'"),
    "ambiguous": ({"a/kernel": -1}, MIXED, r"got 'a/kernel'. Write the whole path.*ema/a/kernel.*params/a/kernel"),
    "unknown in collections": ({"a/kernl": -1}, MIXED, r"Did you mean one of \[.*params/a/kernel"),
    "none": ({"a": 0}, {"a": None}, "name one array"),
    "axis": ({"a/kernel": 2}, {}, r"name an axis that exists, got 2. Leaf 'a/kernel' has shape \(5, 8\)"),
    "negative axis": ({"a/kernel": -3}, {}, "name an axis that exists, got -3"),
    "size": (MLP | {"b/bias": 0}, {}, "`b/bias` must have 8 entries along the axis of its units, got 3. Its"),
    "heads flattened": ({"a": -2, "w": 0}, {"a": jnp.ones((2, 3, 4)), "w": jnp.ones(12)}, "`w` must have 3 .*got 12"),
    "owner's size": (MLP | {"b/kernel": -1}, {}, "`b/kernel` must have the units of its group, got 3"),
    "all dead": (MLP, {"a": {"kernel": jnp.zeros((2, 3)), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones((3, 1))}},
                 "`a/kernel` must have a unit alive, got '3 dead units'. Prune with"),
    # named bias and of rank 2: no owner, though cut along the owners' axis
    "bias of heads": ({"a": -2, "bias": -2}, {"a": jnp.ones((2, 3, 4)).at[:, 1].set(0.0), "bias": jnp.ones((3, 4))},
                      r"`bias` must be 0 in the units that are cut, got \[1\]"),
    "offset of a flattened map": ({"a": -1, "offset": {0: 2}}, {"a": jnp.array([[0.0, 1]]), "offset": jnp.arange(4.0)},
                                  r"`offset` must be 0 in the units that are cut, got \[0\]"),
    "axis twice": ({"a/kernel": (1, -1)}, {}, "`a/kernel` must be cut once along each axis, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_groups_are_refused(case):
    group, params, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        shrink(params or mlp_params(MLP_DEAD), [group])


@pytest.mark.parametrize("groups", [MLP, [{}], None, ["a/kernel"]])
def test_groups_that_are_no_dicts_are_refused(groups):
    with pytest.raises(TypeError, match="must be a list of dicts path -> axis"):
        shrink(mlp_params(), groups)


def test_traced_arrays_are_refused():
    params = mlp_params()
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda p: shrink(p, [MLP]).variables)(params)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda s: shrink(params, [MLP], s).variables)(optax.adam(1e-2).init(params))
