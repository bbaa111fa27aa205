"""shrink of models as they are: NNX modules change in place, of Equinox modules new ones are made."""

import copy

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
from clipjax._arrays import trees

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def call(model, x):
    return model(x)


def halved(model, analysis):
    """The arrays of a model with random values, and half of the units of every group at 0, statistics left."""
    tree = nnx.state(model) if isinstance(model, nnx.Module) else model
    leaves, treedef = trees.flatten(tree)
    paths = trees.paths(tree)
    float_ = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    values = {path: RNG.normal(size=x.shape) if float_(x) else x for path, x in zip(paths, leaves, strict=True)}
    values = {path: np.square(x) if path.endswith("var") else x for path, x in values.items()}
    for group in analysis.groups:
        gone = RNG.permutation(group.units) < group.units // 2
        for path, axis, places, _ in group.members:
            if not path.endswith(("mean", "var")):
                np.moveaxis(values[path], axis, 0)[gone[places] & (places >= 0)] = 0
    new = treedef.unflatten(
        [jnp.asarray(values[p], x.dtype) if float_(x) else x for p, x in zip(paths, leaves, strict=True)]
    )
    if not isinstance(model, nnx.Module):
        return new
    nnx.update(model, new)
    return model


class Nnx(nnx.Module):
    """BatchNorm, a depthwise convolution, a layer that is used twice, and one in a list."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.inside = nnx.Linear(8, 8, rngs=rngs)
        self.again = self.inside
        self.head = nnx.List([nnx.Linear(8, 2, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(x)))
        x = self.depthwise(x).mean((1, 2))
        return self.head[0](self.drop(self.again(jax.nn.relu(self.inside(x)))))


def test_an_nnx_model_and_its_optimizer_change_in_place():
    model, x = Nnx(), jnp.asarray(RNG.normal(size=(4, 6, 6, 3)), jnp.float32)
    analysis = clipjax.analyze(call, model, x)
    model = halved(model, analysis)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    wanted, before = model(x), model.conv.kernel
    with pytest.raises(ValueError, match="`verify/output` must change by at most"):
        clipjax.shrink(model, analysis, optimizer, verify=(lambda model, x: 2 * model(x), x))
    assert model.conv.kernel.shape == (3, 3, 3, 8)  # nothing has changed
    shrunk = clipjax.shrink(model, analysis, optimizer, verify=(call, x))
    assert shrunk.variables is model and shrunk.opt_state is optimizer and shrunk.change < 1e-5
    assert model.conv.kernel is before and before.shape == (3, 3, 3, 4) and model.again is model.inside
    chex.assert_trees_all_close(model(x), wanted, atol=1e-5 * float(jnp.ptp(wanted)))
    noted = model.conv.out_features, model.norm.num_features, model.head[0].in_features
    assert noted == (4, 4, model.head[0].kernel.shape[0])
    noted = model.depthwise.feature_group_count, model.depthwise.in_features, model.depthwise.out_features
    assert noted == (4, 4, 4) and model.depthwise.kernel_shape == (3, 3, 1, 4)
    fresh = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    chex.assert_trees_all_equal_shapes(nnx.state(optimizer), nnx.state(fresh))
    grads = nnx.grad(lambda model: jnp.square(model(x) - 1).mean())(model)
    optimizer.update(model, grads)
    assert np.isfinite(model(x)).all() and (model(x) != wanted).any()


class Attention(nnx.Module):
    """A stream around an attention, whose layers have several inputs and outputs."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.into = nnx.Linear(3, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        x = self.into(x)
        return self.head(x + self.attention(x))


def test_heads_and_stream_of_an_nnx_attention_are_proved_and_noted():
    model, x = Attention(), jnp.asarray(RNG.normal(size=(4, 6, 3)), jnp.float32)
    analysis = clipjax.analyze(call, model, x)
    analysis.groups = [group for group in analysis.groups if group.proved]
    assert sorted(group.units for group in analysis.groups) == [4, 8]
    model = halved(model, analysis)
    wanted = model(x)
    shrunk = clipjax.shrink(model, analysis)
    chex.assert_trees_all_close(model(x), wanted, atol=1e-5 * float(jnp.ptp(wanted)))
    attention, stream = model.attention, shrunk.widths["into/kernel"]
    heads = attention.query.kernel.shape[1]
    assert stream < 8 and heads < 4
    assert (attention.in_features, attention.out_features, attention.num_heads) == (stream, stream, heads)
    assert (attention.query.in_features, attention.query.out_features) == ((stream,), (heads, 2))
    assert (attention.out.in_features, attention.out.out_features) == ((heads, 2), (stream,))


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    layers: list
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self):
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=KEY)
        self.depthwise = eqx.nn.Conv2d(8, 8, 3, groups=8, key=KEY)
        self.layers = [eqx.nn.Linear(8, 12, key=KEY), eqx.nn.MLP(12, 12, 10, 1, key=KEY)]
        self.norm = eqx.nn.RMSNorm(12, eps=1e-2)
        self.head = eqx.nn.Linear(12, 2, key=KEY)

    def __call__(self, x):
        x = self.depthwise(jax.nn.relu(self.conv(x))).mean((1, 2))
        x = self.layers[0](x)
        return self.head(self.norm(x + self.layers[1](x)))


def test_an_equinox_model_is_made_anew():
    model, x = Equinox(), jnp.asarray(RNG.normal(size=(4, 3, 8, 8)), jnp.float32)
    apply = lambda model, x: jax.vmap(model)(x)
    analysis = clipjax.analyze(apply, model, x)
    model = halved(model, analysis)
    before = copy.copy(model)
    state = optax.adam(1e-2).init(eqx.filter(model, eqx.is_inexact_array))
    small, small_state, widths = clipjax.shrink(model, analysis, state, exact=False)  # the epsilon is told below
    assert isinstance(small, Equinox) and model.conv.weight.shape[0] == 8 == model.depthwise.groups
    assert before.norm.shape == (12,)
    sizes = small.depthwise.groups, small.depthwise.in_channels, small.depthwise.out_channels, small.conv.out_channels
    assert sizes == (4, 4, 4, 4) and small.depthwise.weight.shape[0] == 4
    assert small.norm.shape == (6,) and small.layers[0].out_features == 6 == small.head.in_features
    assert widths["norm/weight"] == 6
    epsilon = clipjax.shrink(model, analysis, exact=False).epsilons["norm/weight"]
    np.testing.assert_allclose(epsilon, 2e-2)

    def told(model, x):
        made = copy.deepcopy(model)
        object.__setattr__(made.norm, "eps", epsilon)
        return apply(made, x)

    assert clipjax.shrink(model, analysis, verify=(told, x)).change < 1e-5
    fresh = optax.adam(1e-2).init(eqx.filter(small, eqx.is_inexact_array))
    assert [y.shape for y in jax.tree.leaves(small_state)] == [y.shape for y in jax.tree.leaves(fresh)]
