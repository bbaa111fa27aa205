"""Every score with every structure, allocation and life cycle: each builds, refreshes in a scan, and removes its count.

The whole product is slow; `make test` runs a part in which every value of each column meets every one of each other.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from erdos_renyi_reference import erdos_renyi

import clipjax
from clipjax import scores, structures

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": jnp.asarray(RNG.normal(size=(10, 12)), jnp.float32), "bias": jnp.zeros(12)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(12, 6)) * 0.3, jnp.float32)},
}
SHAPES = {"a": (10, 12), "b": (12, 6)}
STEPS, TARGET = 8, 0.5

SCORES = {
    "magnitude": scores.magnitude(),
    "rms": scores.magnitude("rms"),
    "relative": scores.relative_magnitude(),
    "random": scores.random(),
    "gradient": scores.gradient(),
    "taylor": scores.taylor(0.0),
    "movement": scores.movement(),
    "fisher": scores.fisher(),
    "external": scores.external(jax.tree.map(lambda p: jnp.cos(40 * p), PARAMS)),
}
STRUCTURES = {
    "element": structures.element(),
    "unit": structures.unit(),
    "block": structures.block(4, 3),
    "n_of_m": structures.n_of_m(2, 4),
}
SCOPES = ("global", "leaf", "erk", "tree")
CYCLES = {
    "once": {"start": 1},
    "repeated": {"start": 1, "every": 2, "stop": 7},
    "schedule": {"sparsity": optax.polynomial_schedule(0.0, TARGET, 3, 6), "every": 2, "stop": 6},
    "carry": {"every": 2, "carry": True},
    "inner": {"every": 3, "inner": optax.sgd(0.1, momentum=0.9)},
    "rigl": {"every": 2, "stop": 6, "inner": optax.adam(0.1), "regrow": optax.cosine_decay_schedule(0.3, 6)},
    "set": {"every": 2, "stop": 6, "inner": optax.adam(0.1), "regrow": 0.3, "grow": scores.random()},
}


def legal(score, structure, scope, cycle):
    if structure == "n_of_m":
        return scope == "global" and cycle not in ("schedule", "rigl", "set")
    return not (scope == "tree" and cycle == "schedule")


LEGAL = [row for row in itertools.product(SCORES, STRUCTURES, SCOPES, CYCLES) if legal(*row)]


def pairwise(rows):
    """A part of the rows in which every pair of values that stands in any row stands in one."""
    open_ = {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}
    while open_:
        best = max(rows, key=lambda row: len(open_ & set(itertools.combinations(enumerate(row), 2))))
        open_ -= set(itertools.combinations(enumerate(best), 2))
        yield best


# These take the code path of another score, with another formula: one row each shows that they are scores at all.
ALIKE = {"rms": "magnitude", "relative": "magnitude", "movement": "gradient", "fisher": "gradient"}
PATHS = [row for row in LEGAL if row[0] not in ALIKE]
CHOSEN = [*pairwise(PATHS), *(next(row for row in LEGAL if row[0] == score) for score in ALIKE)]
ALL = [pytest.param(*row, marks=[] if row in CHOSEN else pytest.mark.slow, id="-".join(row)) for row in LEGAL]


def build(score, structure, scope, cycle):
    arguments = dict(CYCLES[cycle])
    sparsity = arguments.pop("sparsity", TARGET)
    if scope == "tree":
        sparsity = {"a": {"kernel": 0.25}, "b": {"kernel": 0.75}}
    if structure == "n_of_m":
        sparsity = None
    else:
        arguments["scope"] = "leaf" if scope == "tree" else scope
    tx = clipjax.prune_mask(sparsity, score=SCORES[score], structure=STRUCTURES[structure], **arguments)
    return clipjax.with_gradient(tx if "inner" in arguments else optax.chain(optax.sgd(0.1), tx))


@functools.cache
def gradients(steps):
    """One gradient a step, drawn once: drawing inside every program would take most of its compile time."""

    def draw(key):
        keys = jax.random.split(key, 3)
        return {
            "a": {"kernel": jax.random.normal(keys[0], SHAPES["a"]), "bias": jax.random.normal(keys[1], (12,))},
            "b": {"kernel": jax.random.normal(keys[2], SHAPES["b"])},
        }

    return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), steps))


def train(tx, steps=STEPS, params=PARAMS):
    """Params and pruning state after each of the steps, from one scan."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    run = jax.jit(functools.partial(jax.lax.scan, step))
    return run((params, tx.init(params)), gradients(steps))[1]


def unit_counts(structure):
    rows = {name: -(-shape[0] // 4) * -(-shape[1] // 3) for name, shape in SHAPES.items()}
    return {
        "element": {name: int(np.prod(shape)) for name, shape in SHAPES.items()},
        "unit": {name: shape[-1] for name, shape in SHAPES.items()},
        "block": rows,
    }[structure]


def expected(structure, scope):
    """How many units are removed, in each leaf where that is settled, else in all."""
    if structure == "n_of_m":  # columns of 10: groups of 4, 4 and 2; columns of 12: three groups of 4
        return {"a": 12 * 4, "b": 6 * 6}
    sizes = unit_counts(structure)
    if scope == "global":
        return round(TARGET * sum(sizes.values()))
    parts = {"leaf": {"a": TARGET, "b": TARGET}, "tree": {"a": 0.25, "b": 0.75}}
    share = erdos_renyi(TARGET, SHAPES, sizes) if scope == "erk" else parts[scope]
    return {name: round(share[name] * n) for name, n in sizes.items()}


def masks(state):
    """The unit masks of both kernels, stacked over the steps."""
    found = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mask")) if hasattr(s, "mask")]
    mask = found[0].mask
    if "a/kernel" in mask:
        return {"a": np.asarray(mask["a/kernel"]), "b": np.asarray(mask["b/kernel"])}
    return {name: np.asarray(mask[name]["kernel"]) for name in "ab"}


@pytest.mark.parametrize(("score", "structure", "scope", "cycle"), ALL)
def test_every_combination_hits_its_count(score, structure, scope, cycle):
    params, state = train(build(score, structure, scope, cycle))
    removed = {name: (~mask).reshape(STEPS, -1).sum(1) for name, mask in masks(state).items()}
    wanted = expected(structure, scope)
    if isinstance(wanted, dict):
        assert {name: int(n[-1]) for name, n in removed.items()} == wanted
    else:
        assert int(removed["a"][-1] + removed["b"][-1]) == wanted
    if cycle == "schedule":
        total = removed["a"] + removed["b"]
        assert total[0] == 0 and (np.diff(total) >= 0).all() and len(set(total)) >= 3
    for name, mask in masks(state).items():
        weights = np.asarray(params[name]["kernel"])
        full = np.stack([STRUCTURES[structure].expand(jnp.asarray(m), w) for m, w in zip(mask, weights, strict=True)])
        assert (weights[~np.broadcast_to(full, weights.shape)] == 0).all()


def test_the_part_that_runs_always_meets_every_pair():
    """And it is a part: the rest is for `make slow`."""
    pairs = {pair for row in PATHS for pair in itertools.combinations(enumerate(row), 2)}
    assert pairs <= {pair for row in CHOSEN for pair in itertools.combinations(enumerate(row), 2)}
    assert {row[0] for row in CHOSEN} == set(SCORES) and set(ALIKE.values()) <= {row[0] for row in PATHS}
    assert len(CHOSEN) < len(LEGAL) / 4


ILLEGAL = [
    ("regrow", {"structure": structures.n_of_m(2, 4), "sparsity": None, "inner": optax.sgd(0.1), "regrow": 0.3}),
    ("sparsity", {"structure": structures.n_of_m(2, 4)}),
    ("sparsity", {"sparsity": None}),
    ("sparsity", {"sparsity": {"a": {"kernel": 0.5}}}),
    ("carry", {"inner": optax.sgd(0.1), "regrow": 0.3, "carry": True}),
    ("regrow", {"inner": optax.sgd(0.1), "regrow": 1.5}),
    ("inner", {"regrow": 0.3}),
    ("grow", {"grow": scores.random()}),
    ("scores", {"score": scores.external({"a": {"kernel": jnp.ones((10, 12))}})}),
    ("scores", {"score": scores.external(jax.tree.map(lambda p: p[:1], PARAMS))}),
]


@pytest.mark.parametrize("case", range(len(ILLEGAL)))
def test_illegal_combinations_name_argument_value_and_remedy(case):
    name, arguments = ILLEGAL[case]
    with pytest.raises(ValueError, match=rf"^`{name}` must .+, got .+\. .+\.$"):
        clipjax.prune_mask(**{"sparsity": 0.5} | arguments).init(PARAMS)


# Growing again


@functools.cache
def rigl(optimizer, grow):
    tx = clipjax.prune_mask(
        0.75, every=3, stop=6, inner=OPTIMIZERS[optimizer](), regrow=0.3, grow=GROW[grow], key=jax.random.key(5)
    )
    return train(tx)


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "adafactor": lambda: optax.adafactor(0.1, momentum=0.9, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(0.1),
}
GROW = {"gradient": scores.gradient(decay=0.0), "random": scores.random()}


def mostly(values, usual, others):
    """Every optimizer with the usual value, some with the others too; `make slow` runs every pair."""
    return [
        pytest.param(optimizer, value, marks=[] if value == usual or optimizer in others else pytest.mark.slow)
        for optimizer in OPTIMIZERS
        for value in values
    ]


@pytest.mark.parametrize(("optimizer", "grow"), mostly(GROW, "gradient", ["adam"]))
def test_rigl_and_set_exchange_weights_that_start_at_zero(optimizer, grow):
    params, state = rigl(optimizer, grow)
    kept = masks(state)
    count = 192 - round(0.75 * 192)
    exchanged = [0] * STEPS
    for name, mask in kept.items():
        weights = np.asarray(params[name]["kernel"])
        assert (weights[~mask] == 0).all()
        for step in range(1, STEPS):
            grown = mask[step] & ~mask[step - 1]
            exchanged[step] += int(grown.sum())
            assert (weights[step][grown] == 0).all()
    assert all(sum(int(m[step].sum()) for m in kept.values()) == count for step in range(STEPS))
    assert exchanged[3] > 0 and exchanged[6] > 0 and sum(exchanged) == exchanged[3] + exchanged[6]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_of_removed_and_regrown_weights_are_zero(optimizer):
    _, state = rigl(optimizer, "gradient")
    kept, checked = masks(state), 0
    keyed, _ = jax.tree_util.tree_flatten_with_path(state.inner)
    for path, moment in keyed:
        for name, mask in kept.items():
            if f"'{name}'" in jax.tree_util.keystr(path) and moment.shape == mask.shape:
                grown = np.concatenate([np.zeros_like(mask[:1]), mask[1:] & ~mask[:-1]])
                assert (np.asarray(moment)[~mask | grown] == 0).all()
                assert (np.asarray(moment)[-1][mask[-1]] != 0).any()
                checked += 1
    assert checked >= 2


def test_rigl_worked_example():
    """Evci et al., algorithm 1, by hand: the smallest of the kept goes, the largest gradient of the others comes."""
    tx = clipjax.prune_mask(0.5, every=1, stop=2, inner=optax.sgd(0.0), regrow=0.5)
    params, state = {"kernel": jnp.array([[4.0, -3.0, 2.0, 1.0]])}, None
    state = tx.init(params)
    grads = [[0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 5.0, 9.0], [0.0, 7.0, 0.0, 0.0]]
    # keeps 2 of 4: at count 0 drops to {4} and grows the earliest of equals, -3; at 1 drops -3, grows the last;
    # at 2 drops the last (it is 0), grows the second, from zero.
    wanted = [[4.0, -3.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]]
    kept = [[True, True, False, False], [True, False, False, True], [True, True, False, False]]
    for grad, values, mask in zip(grads, wanted, kept, strict=True):
        updates, state = tx.update({"kernel": jnp.array([grad])}, state, params)
        params = optax.apply_updates(params, updates)
        assert params["kernel"].tolist() == [values]
        assert state.projection.mask["kernel"].tolist() == [mask]


def test_acdc_compresses_and_decompresses():
    """Peste et al., "AC/DC", 2021: dense and sparse phases in turn; `regrow=0` only lets weights come back."""
    phases = lambda count: jnp.where((count // 2) % 2 == 0, 0.5, 0.0)
    _, state = train(clipjax.prune_mask(phases, every=2, stop=4, inner=optax.adam(0.1), regrow=0.0))
    removed = sum((~mask).reshape(STEPS, -1).sum(1) for mask in masks(state).values())
    assert removed.tolist() == [96, 96, 0, 0, 96, 96, 96, 96]


def test_falling_sparsity_grows_by_the_growth_score():
    """Where more may stay than are left, the growth score chooses, not the position."""
    tx = clipjax.prune_mask(
        lambda count: jnp.where(count == 0, 0.75, 0.5), every=1, stop=1, inner=optax.sgd(0.0), regrow=0.0
    )
    params = {"kernel": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    state = tx.init(params)
    for grad in ([0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 5.0, 9.0]):
        updates, state = tx.update({"kernel": jnp.array([grad])}, state, params)
        params = optax.apply_updates(params, updates)
    assert state.projection.mask["kernel"].tolist() == [[True, False, False, True]]


def test_lottery_ticket_rewinds_to_the_first_weights():
    """Frankle and Carbin, 2019: the mask of trained weights on the weights of the start."""
    trained = jax.tree.map(lambda x: x[-1], train(optax.with_extra_args_support(optax.sgd(0.1)))[0])
    kernels = {name: trained[name]["kernel"] for name in "ab"}
    ticket = clipjax.make_mask(kernels, 0.5)
    tx = clipjax.prune_mask(mask={name: {"kernel": m} for name, m in ticket.items()})
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    start = optax.apply_updates(PARAMS, updates)
    for name, m in ticket.items():
        np.testing.assert_array_equal(start[name]["kernel"], np.where(m, PARAMS[name]["kernel"], 0))


INSIDE = {
    "masked": lambda: optax.masked(optax.adam(0.1), {"a": True, "b": False}),
    "partition": lambda: optax.partition({"x": optax.adam(0.1), "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "chain": lambda: optax.chain(clipjax.clip(1.0, carry=True), optax.adam(0.1), clipjax.clamp_weights(1.0)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_moments_inside_wrappers_are_found(name):
    params, state = train(clipjax.prune_mask(0.5, inner=INSIDE[name]()), 3)
    mask = masks(state)["a"]
    found = [np.asarray(x) for x in jax.tree.leaves(state.inner) if x.shape == mask.shape]
    assert len(found) >= 2 and all((x[~mask] == 0).all() and (x != 0).any() for x in found)


def test_inner_whose_moments_cannot_be_found_is_refused_by_name():
    """An `init` that needs the arrays themselves: `optax.tree.map_params` gives it none."""
    odd = optax.GradientTransformation(lambda p: jax.tree.leaves(p)[0] * 0, lambda u, s, p=None: (u, s))
    with pytest.raises(ValueError, match=r"`inner` must be an optimizer in whose state.*fails"):
        clipjax.prune_mask(0.5, inner=odd).init(PARAMS)


@pytest.mark.parametrize(("optimizer", "wrap"), mostly(["multi_steps", "inject"], "inject", ["adam", "muon"]))
def test_pruned_weights_stay_zero_between_refreshes(optimizer, wrap):
    """In a chain behind every optimizer, with MultiSteps around and with an injected sparsity."""
    if wrap == "inject":
        factory = optax.inject_hyperparams(clipjax.prune_mask, static_args=("every", "stop"))
        tx = optax.chain(OPTIMIZERS[optimizer](), factory(sparsity=0.5, every=3, stop=6))
    else:
        prune = clipjax.prune_mask(0.5, every=2, stop=2)
        tx = optax.MultiSteps(optax.chain(OPTIMIZERS[optimizer](), prune), every_k_schedule=2)
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
    params, _ = train(tx)
    zero = [np.concatenate([np.ravel(params[name]["kernel"][i] == 0) for name in "ab"]) for i in range(STEPS)]
    first = 1 if wrap == "multi_steps" else 0
    assert all(z.sum() >= 96 for z in zero[first:])
    assert all((later | ~earlier).all() for earlier, later in itertools.pairwise(zero[first:]))
