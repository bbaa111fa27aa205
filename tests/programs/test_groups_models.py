"""unit(groups=), then shrink with the same groups: train, prune, and a smaller network with the same outputs."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import clipjax
from clipjax.structures import unit

RNG = np.random.default_rng(0)


class Cnn(nn.Module):
    widths: tuple[int, int] = (8, 4)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.widths[0], (3, 3), strides=2, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8, name="bn1")(x))
        x = nn.relu(nn.Conv(self.widths[1], (3, 3), strides=2, name="conv2")(x))
        return nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1))


CNN = [
    {
        "conv1/kernel": -1,
        "conv1/bias": 0,
        "bn1/scale": 0,
        "bn1/bias": 0,
        "bn1/mean": 0,
        "bn1/var": 0,
        "conv2/kernel": 2,
    },
    {"conv2/kernel": -1, "conv2/bias": 0, "dense/kernel": {0: 4}},
]


class Residual(nn.Module):
    widths: tuple[int, int] = (8, 6)

    @nn.compact
    def __call__(self, x, train=False):
        stream, inside = self.widths
        x = nn.Conv(stream, (3, 3), name="stem")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(nn.Conv(inside, (3, 3), name="in")(x)))
        x = nn.relu(x + nn.Conv(stream, (3, 3), name="back")(y))
        return nn.Dense(3, name="dense")(x.mean(axis=(1, 2)))


RESIDUAL = [
    {"stem/kernel": -1, "back/kernel": -1, "stem/bias": 0, "back/bias": 0, "in/kernel": 2, "dense/kernel": 0},
    {"in/kernel": -1, "in/bias": 0, "back/kernel": 2} | {f"bn/{x}": 0 for x in ("scale", "bias", "mean", "var")},
]


@pytest.mark.parametrize(("model", "groups"), [(Cnn, CNN), (Residual, RESIDUAL)], ids=["cnn", "residual"])
def test_train_prune_shrink_gives_the_same_outputs(model, groups):
    """30 steps of a Linen train step; nothing is set to zero by hand, and the optimizer state follows."""
    x = jnp.asarray(RNG.normal(size=(16, 8, 8, 3)), jnp.float32)
    y = jax.nn.one_hot(jnp.asarray(RNG.integers(0, 3, 16)), 3)
    variables = model().init(jax.random.key(0), x)
    ramp = optax.polynomial_schedule(0.0, 0.5, 3, 20)
    tx = optax.chain(optax.adamw(1e-2), clipjax.prune_mask(ramp, every=5, stop=20, structure=unit(groups=groups)))
    train = TrainState.create(apply_fn=model().apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(train, stats):
        def loss_fn(params):
            seen = {"params": params, "batch_stats": stats}
            logits, new = train.apply_fn(seen, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy(logits, y).mean(), new["batch_stats"]

        grads, stats = jax.grad(loss_fn, has_aux=True)(train.params)
        return train.apply_gradients(grads=grads), stats

    stats = variables["batch_stats"]
    for _ in range(30):
        train, stats = step(train, stats)
    whole = {"params": train.params, "batch_stats": stats}
    small, state, widths = clipjax.shrink(whole, groups, train.opt_state)
    firsts = [next(iter(group)) for group in groups]
    assert sum(widths[name] for name in firsts) == sum(model().widths) // 2
    less = model(tuple(widths[name] for name in firsts))
    wanted = model().apply(whole, x)
    assert np.std(wanted) > 0.1
    chex.assert_trees_all_close(less.apply(small, x), wanted, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(small["params"]))


def test_nnx_and_whole_variables_and_boxes():
    """Paths with boxes and collections: an `nnx.Optimizer`, Linen variables as params, partitioned kernels."""
    model = nnx.Sequential(nnx.Linear(3, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
    group = [{"layers/0/kernel": -1, "layers/0/bias": 0, "layers/2/kernel": 0}]
    optimizer = nnx.Optimizer(model, clipjax.prune_mask(0.5, structure=unit(groups=group)), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 3)))))(model))
    small, _, widths = clipjax.shrink(nnx.state(model, nnx.Param), group, nnx.state(optimizer))
    assert widths == {"layers/0/kernel": 3}

    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    net = nn.Sequential([nn.Dense(6, kernel_init=kernel), nn.relu, nn.Dense(2)])
    variables = net.init(jax.random.key(0), jnp.ones((2, 3)))
    for names in ("layers_{}/{}", "params/layers_{}/{}"):
        group = [{names.format(0, "kernel"): -1, names.format(0, "bias"): 0, names.format(2, "kernel"): 0}]
        tx = optax.chain(optax.sgd(0.1), clipjax.prune_mask(0.5, structure=unit(groups=group)))
        updates, state = tx.update(jax.tree.map(jnp.ones_like, variables), tx.init(variables), variables)
        pruned = optax.apply_updates(variables, updates)
        assert list(clipjax.shrink(pruned, group, state).widths.values()) == [3]
