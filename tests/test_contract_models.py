"""The contract in real models: every transformation lands in every container, the chain trains in each framework."""

import collections
import dataclasses
import functools

import chex
import contract_models as models
import contract_table as table
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import clipjax
import clipjax.flax
from clipjax._arrays import trees

every_model = pytest.mark.parametrize("model", models.MODELS)
CHECKS = (table.bounded(-0.25, 0.25), table.sparse(0.5), table.on_grid(4))
STEPS = 3


def chain():
    """Gradients clipped, gradient scores, all three weight constraints."""
    return clipjax.with_gradient(
        optax.chain(
            clipjax.clip(0.5),
            clipjax.clip_norm(1.0),
            optax.adam(0.02),
            clipjax.clamp_weights(0.25),
            clipjax.prune_mask(0.5, score=clipjax.scores.taylor(), every=1, stop=1),
            clipjax.fake_quantize(4, step=clipjax.steps.absmax(), every=2),
        )
    )


def check(params, state):
    for holds in CHECKS:
        holds(params, state)


@every_model
@pytest.mark.parametrize("row", table.kinds(table.ROWS))
def test_every_transformation_keeps_every_container(model, row):
    """Traced: updates fit the params, the state keeps structure, shapes and dtypes (raw paths in it would not)."""
    params, _ = models.MODELS[model]()
    tx = row.tx(optax.sgd(0.25))

    def update(params):
        state = tx.init(params)
        return (params, state), table.step(tx, params, state, params)

    chex.assert_trees_all_equal_shapes_and_dtypes(*jax.eval_shape(update, params))


# The whole chain lands in every container, below. Alone run those that store more than it does, and all in `make slow`;
# where shapes are many, none does.
STORING = ("prune_groups", "prune_units", "prune_rigl", "quantize_sqnr", "quantize_inner")
WHOLE_CHAIN_ONLY = {"scanned": "many shapes to compile", "vit": "many shapes to compile"}


@pytest.mark.parametrize("model", [m for m in models.MODELS if m not in WHOLE_CHAIN_ONLY])
@pytest.mark.parametrize("row", table.cases([m for m in table.ROWS if m.holds], STORING))
def test_every_transformation_lands_in_every_container(model, row):
    """Two updates."""
    params, _ = models.MODELS[model]()
    rng = np.random.default_rng(2)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.1, p.dtype), params)
    tx = row.tx(optax.sgd(0.25))
    state, step = jax.jit(tx.init)(params), jax.jit(functools.partial(table.step, tx))
    for _ in range(2):
        params, state = step(params, state, grads)
    row.holds(params, state)


@pytest.mark.parametrize("model", [m for m in models.MODELS if m not in ("nnx", "equinox")])
def test_chain_trains_in_train_state(model):
    """Nested dicts, a scanned Linen model, a ViT and boxed params in Linen's `TrainState`."""
    params, loss = models.MODELS[model]()
    state = TrainState.create(apply_fn=None, params=params, tx=chain())

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    for _ in range(STEPS):
        state, value = step(state)
        check(state.params, state.opt_state)
    assert bool(jnp.isfinite(value))


def test_clipjax_train_state_passes_extra_arguments_on():
    """`grad=`, `refresh=` and `value=` reach the optimizer; a field of a subclass is replaced, as in Flax."""

    class Stateful(clipjax.flax.TrainState):
        batch_stats: float = 0.0

    tx = optax.chain(
        optax.sgd(1.0),
        optax.contrib.reduce_on_plateau(patience=1),
        clipjax.prune_mask(0.5, score=clipjax.scores.gradient()),
    )
    params = {"kernel": jnp.ones((1, 2))}
    grads = {"kernel": jnp.float32([[0.25, 0.5]])}
    state = Stateful.create(apply_fn=None, params=params, tx=tx)
    new = jax.jit(lambda s: s.apply_gradients(grads=grads, grad=grads, value=jnp.float32(3), batch_stats=2.0))(state)
    assert new.params["kernel"].tolist() == [[0.0, 0.5]] and int(new.step) == 1 and new.batch_stats == 2
    assert float(new.opt_state[1].best_value) == 3 and new.tx is tx
    held = state.apply_gradients(grads=grads, grad=grads, value=jnp.float32(3), refresh=False)
    assert held.params["kernel"].tolist() == [[0.75, 0.5]]
    with pytest.raises(ValueError, match="needs `grad`"):
        state.apply_gradients(grads=grads, value=jnp.float32(3))


def test_chain_trains_in_nnx_optimizer():
    """`nnx.Optimizer` boxes the state and names the leaves of params differently at init and at update."""
    model = models.Wired(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.Param)
    x = models.inputs(4, models.WIDTH)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: models.distance(model(x)))(model)
        optimizer.update(model, grads)

    before = jax.tree.structure(nnx.state(optimizer))
    for _ in range(STEPS):
        step(model, optimizer)
        check(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert jax.tree.structure(nnx.state(optimizer)) == before


def test_chain_trains_in_equinox():
    """`eqx.filter_jit` and `eqx.apply_updates`; leaves that are no arrays are None."""
    params, loss = models.equinox()
    tx = chain()

    @eqx.filter_jit
    def step(params, state):
        grads = eqx.filter_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
        check(params, state)


@pytest.mark.parametrize("row", table.paths(table.ROWS))
def test_partition_spec_of_a_boxed_state(row):
    """Rule 8: arrays of a param's shape keep its box and its spec, all others are replicated."""
    params, _ = models.boxed()
    state = jax.eval_shape(row.tx().init, params)
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)

    def fits(leaf, spec):
        value = leaf.unbox() if is_box(leaf) else leaf
        expected = {(8, 8): P("embed", "mlp"), (8,): P("mlp")}
        assert value is None or spec == expected.get(value.shape, P())

    jax.tree.map(fits, state, nn.get_partition_spec(state), is_leaf=is_box)


def test_report_and_quantized_read_a_boxed_state():
    """Telemetry and integers come out of boxed params as out of plain ones."""
    params, _ = models.boxed()
    tx = clipjax.fake_quantize(4)
    with jax.disable_jit():
        params, state = table.step(tx, params, tx.init(params), params)
    found = clipjax.quantized(params, state)
    is_grid = lambda x: isinstance(x, clipjax.Quantized)
    assert sum(map(is_grid, jax.tree.leaves(found, is_leaf=is_grid))) == 2


class Constant(eqx.Module):
    value: float
    note: None = None

    def __call__(self, count):
        return self.value


class Wrapped(eqx.Module):
    value: eqx.nn.Linear


def test_a_module_without_layers_is_a_schedule():
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    tx = clipjax.prune_mask(Constant(0.5), stop=2)
    state = tx.update(params, tx.init(params), params)[1]
    assert float(clipjax.report(state)["prune_mask/sparsity"]) == 0.5


def test_a_container_of_layers_is_no_box():
    """Even where it names them as boxes name their array."""
    params = eqx.filter(Wrapped(eqx.nn.Linear(4, 3, key=jax.random.key(0))), eqx.is_array)
    rows = clipjax.summarize(params, clipjax.prune_mask(0.5).init(params)).rows
    assert {row["path"]: row["picked"] for row in rows}["value/weight"] == "prune"


def test_trees_of_targets_may_be_of_any_container():
    """An Equinox model is callable, and no schedule; a frozen dict may hold one leaf."""
    params, _ = models.equinox()
    halves = jax.tree.map(lambda p: 0.5, params)
    state = clipjax.prune_mask(halves).init(params)
    state = clipjax.prune_mask(halves).update(params, state, params)[1]
    assert float(clipjax.report(state)["prune_mask/sparsity"]) == 0.5
    bits = clipjax.choose_bits(params, target_db=20.0)
    state = clipjax.fake_quantize(bits).init(params)
    assert {int(b) for b in jax.tree.leaves(state.projection.bits)} == set(jax.tree.leaves(bits))
    mask = clipjax.make_mask(freeze({"in": {"kernel": jnp.arange(8.0)}}), freeze({"in": {"kernel": 0.25}}))
    assert int(mask["in"]["kernel"].sum()) == 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """Fields in another order than that of their names, in which dicts of paths are."""

    kernel: jax.Array
    bias: jax.Array


CONTAINERS = {
    "frozen": lambda layers: freeze(layers),
    "ordered": lambda layers: collections.OrderedDict(reversed(layers.items())),
    "dataclasses": lambda layers: {name: Layer(**layer) for name, layer in layers.items()},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_no_container_changes_a_number(name):
    """Masks of units and steps are stored by path: each finds its own leaf, whatever the order of the leaves."""
    rng = np.random.default_rng(0)
    shapes = {"first": (4, 6), "second": (6, 3), "third": (6, 3)}
    layers = {
        k: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32), "bias": jnp.ones(s[1])} for k, s in shapes.items()
    }
    unit = clipjax.structures.unit()
    tx = optax.chain(optax.sgd(0.5), clipjax.prune_mask(0.5, structure=unit), clipjax.fake_quantize(3, axis=-1))
    found = []
    for params in (layers, CONTAINERS[name](layers)):
        updates, state = tx.update(params, tx.init(params), params)
        metrics = clipjax.report(state, per_leaf=True)
        found.append((dict(zip(trees.paths(updates), jax.tree.leaves(updates), strict=True)), metrics))
    chex.assert_trees_all_equal(*found)
    assert found[0][1]["prune_mask/removed"] == 6


@pytest.mark.parametrize("axis", [None, -1])
def test_integers_come_out_of_an_nnx_optimizer(axis):
    model = models.Wired(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), clipjax.fake_quantize(4, axis=axis)), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    params = nnx.state(model, nnx.Param)
    is_grid = lambda x: isinstance(x, clipjax.Quantized)
    found = [q for q in jax.tree.leaves(clipjax.quantized(params, optimizer.opt_state), is_leaf=is_grid) if is_grid(q)]
    assert found and all(isinstance(x, jax.Array) for q in found for x in (q.codes, q.step, q.zero_point))
    assert "total" in str(clipjax.summarize(params, optimizer.opt_state))
