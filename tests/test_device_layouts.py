"""Eight host devices in the layouts of real training: what one device computes, every layout computes.

Fully sharded data parallel, tensor parallel and replicated params, on explicit and auto mesh axes, inside `shard_map`,
in boxed Linen params and in NNX: bit for bit where nothing is summed up, within 1e-6 for norms, and at least 99.99 % of
the codes where a step follows from a sum.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import clipjax
from clipjax import steps, thresholds

STEPS = 4
MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", " sort(", " gather(", " scatter(")
SHAPES = {
    "up": {"kernel": (64, 256), "bias": (256,)},
    "down": {"kernel": (256, 64), "bias": (64,)},
    "norm": {"scale": (48,)},
}
LAYOUTS = {
    "fsdp": {
        "up": {"kernel": P(("data", "model")), "bias": P(("data", "model"))},
        "down": {"kernel": P(("data", "model")), "bias": P(("data", "model"))},
        "norm": {"scale": P(("data", "model"))},
    },
    "tensor": {  # Megatron's: the first product by columns, the second by rows
        "up": {"kernel": P(None, "model"), "bias": P("model")},
        "down": {"kernel": P("model", None), "bias": P()},
        "norm": {"scale": P()},
    },
    "both": {
        "up": {"kernel": P("data", "model"), "bias": P("model")},
        "down": {"kernel": P("model", "data"), "bias": P("data")},
        "norm": {"scale": P()},
    },
    "replicated": jax.tree.map(lambda shape: P(), SHAPES, is_leaf=lambda x: isinstance(x, tuple)),
}
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
AXES = ("data", "model")


def tree(seed, scale):
    rng = np.random.default_rng(seed)
    fill = lambda shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
    return jax.tree.map(fill, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@functools.cache
def mesh(kind="explicit"):
    return jax.make_mesh((4, 2), AXES, axis_types=(KINDS[kind],) * 2)


def shardings(layout, kind="explicit"):
    is_spec = lambda x: isinstance(x, P)
    return jax.tree.map(lambda spec: NamedSharding(mesh(kind), spec), LAYOUTS[layout], is_leaf=is_spec)


def held_mask():
    rng = np.random.default_rng(7)
    return {name: {"kernel": jnp.asarray(rng.random(SHAPES[name]["kernel"]) < 0.4)} for name in ("up", "down")}


def exact():
    """Nothing is summed up: the largest magnitude is the same in any order."""
    return optax.chain(
        clipjax.clip(0.05),
        optax.adam(1e-2),
        clipjax.clamp_weights(0.25),
        clipjax.prune_mask(mask=held_mask()),
        clipjax.fake_quantize(4, step=steps.absmax(), every=2),
    )


def normed():
    return optax.chain(clipjax.clip_norm(thresholds.zscore(0.5, warmup=2)), optax.sgd(0.1, momentum=0.9))


def summed():
    """Masks by exact selection, steps from squared errors."""
    return optax.chain(
        clipjax.clip(0.05),
        optax.adam(1e-2),
        clipjax.clamp_weights(0.25),
        clipjax.prune_mask(optax.polynomial_schedule(0.0, 0.5, 3, 3), every=1, stop=3),
        clipjax.fake_quantize(4, every=2),
    )


CHAINS = {"exact": exact, "normed": normed, "summed": summed}


def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(tx, params, state, place=lambda x: x):
    """Params and state after `STEPS` updates, and the program of one: it takes back what it returns."""
    compiled = jax.jit(functools.partial(step, tx)).lower(params, state, place(tree(1, 0.1))).compile()
    for i in range(STEPS):
        params, state = compiled(params, state, place(tree(1 + i, 0.1 * (1 + i))))
    return params, state, compiled.as_text()


@functools.cache
def on_one_device(name):
    tx, params = CHAINS[name](), tree(0, 0.2)
    params, state, _ = run(tx, params, tx.init(params))
    return params, state


def codes(params, state):
    found = clipjax.quantized(jax.device_get(params), jax.device_get(state))
    return np.concatenate([np.ravel(found[name]["kernel"].codes) for name in ("up", "down")])


def assert_agrees(name, params, state):
    expected, expected_state = on_one_device(name)
    if name == "exact":
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    elif name == "normed":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, expected)
        np.testing.assert_allclose(state[0].norm_pre, expected_state[0].norm_pre, rtol=1e-6)
        assert int(state[0].clipped) > 0
    else:
        equal = codes(params, state) == codes(expected, expected_state)
        assert equal.mean() >= 0.9999
        assert np.mean(np.asarray(params["up"]["kernel"]) == 0) > 0.4


def assert_sharded_like(params, tree):
    """Every array with the shape of a param has the sharding of one; each shape here has one sharding."""
    by_shape = {p.shape: p.sharding for p in jax.tree.leaves(params)}
    matched = 0
    for x in jax.tree.leaves(tree):
        if x.shape in by_shape:
            assert x.sharding.is_equivalent_to(by_shape[x.shape], x.ndim), (x.shape, x.sharding)
            matched += 1
        elif isinstance(x.sharding, NamedSharding):
            assert x.sharding.is_fully_replicated, (x.shape, x.sharding)
    return matched


# Every layout on one kind of axes, one of them on both; `make slow` runs the others.
USUAL = (("fsdp", "explicit"), ("tensor", "auto"), ("both", "explicit"), ("both", "auto"), ("replicated", "explicit"))
PLACES = [
    pytest.param(layout, kind, marks=[] if (layout, kind) in USUAL else pytest.mark.slow)
    for layout in LAYOUTS
    for kind in KINDS
]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("layout", "kind"), PLACES)
def test_every_layout_computes_what_one_device_computes(layout, kind, name):
    at = shardings(layout, kind)
    place = lambda x: jax.device_put(x, at)
    tx, params = CHAINS[name](), place(tree(0, 0.2))
    with jax.set_mesh(mesh(kind)):
        state = tx.init(params)
        assert assert_sharded_like(params, state) >= 5
        whole = NamedSharding(mesh(kind), P())
        state = jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole), state)
        params, state, text = run(tx, params, state, place)
    assert not [line for line in text.splitlines() if any(word in line for word in MOVES)]
    assert_sharded_like(place(tree(0, 0.2)), (params, state))
    assert_agrees(name, params, state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_init_under_jit_takes_the_shardings_it_is_given(layout):
    """Under jit the caller names `out_shardings`: those of the params for arrays of their shape, else replicated."""
    at = shardings(layout)
    tx, params = summed(), jax.device_put(tree(0, 0.2), at)
    by_shape = {p.shape: p.sharding for p in jax.tree.leaves(params)}
    whole = NamedSharding(mesh(), P())
    out = jax.tree.map(lambda x: by_shape.get(x.shape, whole), jax.eval_shape(tx.init, params))
    state = jax.jit(tx.init, out_shardings=out)(params)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))
    assert_sharded_like(params, state)


@pytest.mark.parametrize("name", ["exact", "normed"])
@pytest.mark.parametrize("layout", ["fsdp", "both"])
def test_inside_shard_map(layout, name):
    """Elementwise transformations need no axis, a norm is given its axes; steps come from a refresh outside."""
    tx, params = CHAINS[name](), tree(0, 0.2)
    if name == "normed":
        rule = clipjax.clip_norm(thresholds.zscore(0.5, warmup=2), axis_name=AXES)
        inside = optax.chain(rule, optax.sgd(0.1, momentum=0.9))
        refresh = None
    else:
        inside, refresh = tx, False
    state = tx.init(params)
    if name == "exact":  # steps and largest levels from one update outside
        params, state = jax.jit(functools.partial(step, tx))(params, state, tree(1, 0.1))

    def local(params, state, grads):
        updates, state = inside.update(grads, state, params, **({} if refresh is None else {"refresh": refresh}))
        return optax.apply_updates(params, updates), state

    by_shape = {p.shape: spec for p, spec in zip(jax.tree.leaves(params), specs(layout), strict=True)}
    state_specs = jax.tree.map(lambda x: by_shape.get(x.shape, P()), state)
    at = (LAYOUTS[layout], state_specs, LAYOUTS[layout])
    mapped = jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=at, out_specs=at[:2]))
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh(), spec))
    got = jax.tree.map(place, params, LAYOUTS[layout]), jax.tree.map(place, state, state_specs)
    alone = jax.jit(functools.partial(tx.update, **({} if refresh is None else {"refresh": refresh})))
    expected = params, state
    for i in range(STEPS):
        grads = tree(2 + i, 0.1 * (1 + i))
        got = mapped(*got, jax.device_put(grads, shardings(layout)))
        updates, new = alone(grads, expected[1], expected[0])
        expected = optax.apply_updates(expected[0], updates), new
    if name == "exact":
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    else:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got[0], expected[0])


def specs(layout):
    return jax.tree.leaves(LAYOUTS[layout], is_leaf=lambda x: isinstance(x, P))


class Boxed(nn.Module):
    """Two dense layers with logical axes."""

    @nn.compact
    def __call__(self, x):
        up = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        down = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("mlp", "embed"))
        return nn.Dense(64, kernel_init=down)(nn.relu(nn.Dense(256, kernel_init=up)(x)))


RULES = (("embed", "data"), ("mlp", "model"), ("batch", "data"))


def test_boxed_linen_params_shard_by_their_partition_spec():
    """`get_partition_spec` of params and optimizer state gives the shardings of a whole jitted train step."""
    model, tx = Boxed(), exact_without_mask()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(8, 64)), jnp.float32)

    def init(key):
        params = model.init(key, x)["params"]
        return params, tx.init(params)

    def train(params, state):
        grads = jax.grad(lambda p: jnp.mean(jnp.square(model.apply({"params": p}, x) - 1)))(params)
        return step(tx, params, state, jax.tree.map(jnp.sign, grads))

    logical = nn.get_partition_spec(jax.eval_shape(init, jax.random.key(0)))
    at = nn.logical_to_mesh_sharding(logical, mesh("auto"), RULES)
    with jax.set_mesh(mesh("auto")):
        params, state = jax.jit(init, out_shardings=at)(jax.random.key(0))
        train_sharded = jax.jit(train, in_shardings=at, out_shardings=at)
        for _ in range(STEPS):
            params, state = train_sharded(params, state)
    for name, spec in (("Dense_1", P("data", "model")), ("Dense_0", P("model", "data"))):  # named from the outside in
        kernel = params[name]["kernel"].value
        assert kernel.sharding.is_equivalent_to(NamedSharding(mesh("auto"), spec), 2)
    assert_sharded_like(nn.unbox(params), nn.unbox(state))

    alone, alone_state = jax.jit(init)(jax.random.key(0))
    for _ in range(STEPS):
        alone, alone_state = jax.jit(train)(alone, alone_state)
    same = [
        np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (params, alone)), strict=True)
    ]
    assert min(same) >= 0.9999, same  # the gradients are sums in another order; their signs hardly ever differ


def exact_without_mask():
    return optax.chain(
        optax.adam(1e-2), clipjax.clamp_weights(0.25), clipjax.fake_quantize(4, step=steps.absmax(), every=2)
    )


class Wired(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 256, rngs=rngs)
        self.down = nnx.Linear(256, 64, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_sharded_nnx_trains_as_on_one_device():
    """`nnx.Optimizer` on a sharded model: its state is sharded like the model right after init, and stays so."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(8, 64)), jnp.float32)
    specs = {(64, 256): P("data", "model"), (256, 64): P("model", "data"), (256,): P("model"), (64,): P("data")}

    def trained(place):
        model = Wired(nnx.Rngs(0))
        nnx.update(model, jax.tree.map(place, nnx.state(model)))
        optimizer = nnx.Optimizer(model, exact_without_mask(), wrt=nnx.Param)
        begin = jax.tree.map(lambda x: x, nnx.state(optimizer))  # the arrays of now: boxes are updated in place

        @nnx.jit
        def train(model, optimizer):
            grads = nnx.grad(lambda model: jnp.mean(jnp.square(model(x) - 1)))(model)
            optimizer.update(model, jax.tree.map(jnp.sign, grads))

        for _ in range(STEPS):
            train(model, optimizer)
        return nnx.state(model, nnx.Param), begin, nnx.state(optimizer)

    with jax.set_mesh(mesh("auto")):
        place = lambda p: jax.device_put(p, NamedSharding(mesh("auto"), specs[p.shape]))
        params, begin, end = trained(place)
    assert assert_sharded_like(params, begin) >= 8 and assert_sharded_like(params, end) >= 8
    alone, _, _ = trained(lambda p: p)
    same = [
        np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (params, alone)), strict=True)
    ]
    assert min(same) >= 0.9999, same
