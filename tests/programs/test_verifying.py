"""verify=: outputs of the whole and of the smaller model, and what is refused without it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clipjax
from clipjax import shrink
from clipjax._programs import verifying
from clipjax._programs.analysis import Analysis
from clipjax._programs.groups import Group, Member

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
DEAD = np.array([1, 2])


def params():
    rng = np.random.default_rng(1)
    made = {"in": rng.normal(size=(4, 5)), "out": rng.normal(size=(5, 3))}
    made["in"][:, DEAD] = 0
    made["out"][DEAD] = 0
    return {k: jnp.asarray(x, jnp.float32) for k, x in made.items()}


def group(proved=True, statistics=()):
    members = [Member("in", -1, np.arange(5)), Member("out", -2, np.arange(5))]
    return Group(5, members, proved, (), statistics)


def relu(params, x):
    return jax.nn.relu(x @ params["in"]) @ params["out"]


def normed(params, x):
    """A statistic over the units."""
    h = jax.nn.relu(x @ params["in"])
    return {"logits": (h - h.mean(-1, keepdims=True)) @ params["out"], "double": 2 * h.sum(-1)}


BY_HAND = [{"in": -1, "out": 0}]


def test_outputs_that_stay_pass_and_others_are_named():
    for groups in (BY_HAND, [group()], Analysis([], [group()], (), relu)):
        assert shrink(params(), groups, verify=(relu, X)).change <= 1e-6
        assert shrink(params(), groups, verify=(relu, (X,))).change <= 1e-6
        assert shrink(params(), groups).change is None
    message = "`verify/logits` must change by at most 1e-05 of its range, got 0.*Leave out.*`exact=False`"
    with pytest.raises(ValueError, match=message):
        shrink(params(), BY_HAND, verify=(normed, X))
    shrunk = shrink(params(), BY_HAND, exact=False, verify=(normed, X))
    wanted, got = (normed(p, X)["logits"] for p in (params(), shrunk.variables))
    np.testing.assert_allclose(shrunk.change, jnp.abs(wanted - got).max() / jnp.ptp(wanted), rtol=1e-5)
    assert shrunk.variables["in"].shape == (4, 3)


def test_what_ran_before_is_what_was_analyzed():
    """`apply_small` may be another function, of the smaller model alone."""
    small = lambda params, x: 1.5 * relu(params, x)
    assert shrink(params(), BY_HAND, verify=(small, X)).change <= 1e-6
    with pytest.raises(ValueError, match="`verify/output` must change by at most 1e-05"):
        shrink(params(), Analysis([], [group()], (), relu), verify=(small, X))


def test_a_group_of_a_walk_alone_or_with_a_statistic_needs_a_word():
    walk, statistic = group(proved=False), group(statistics=("reduce_sum (model.py:7) runs over it",))
    message = r"`in` must have units proved to be free.*`verify=\(apply_small, args\)`.*`rebuild=` to `analyze`"
    for exact in (True, False):
        with pytest.raises(ValueError, match=message):
            shrink(params(), [walk], exact=exact)
        assert shrink(params(), [walk], exact=exact, verify=(relu, X)).widths == {"in": 3, "out": 3}
    with pytest.raises(ValueError, match=r"`in` must have no statistic over its units.*model.py:7.*`exact=False`"):
        shrink(params(), [statistic], verify=(normed, X))
    assert shrink(params(), [statistic], exact=False).widths == {"in": 3, "out": 3}
    analysis = Analysis([], [], [statistic], normed)
    kept = shrink(params(), analysis)
    assert kept.widths == {} and kept.dead == {"in": 2} and kept._replace(opt_state=0).dead == {"in": 2}
    shrunk = shrink(params(), analysis, exact=False, verify=(normed, X))
    assert shrunk.widths == {"in": 3, "out": 3} and shrunk.change > 0.01 and shrunk.dead == {}
    alive = {"in": jnp.ones((4, 5)), "out": jnp.ones((5, 3))}  # nothing is cut: nothing to prove
    assert shrink(alive, [walk, statistic]).widths == {"in": 5, "out": 5}


class Norm(nn.Module):
    width: int | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="bn")(nn.Dense(self.width, name="in")(x))
        return nn.Dense(2, name="out")(nn.relu(x))


def test_statistics_that_a_model_returns_are_compared_without_the_units_that_are_cut():
    def apply(variables, x):
        width = variables["params"]["in"]["kernel"].shape[-1]
        return Norm(width).apply(variables, x, True, mutable=["batch_stats"])

    variables = Norm(5).init(jax.random.key(0), X, True)
    inside = variables["params"]
    inside["in"]["kernel"] = inside["in"]["kernel"].at[:, DEAD].set(0)
    inside["bn"]["scale"] = inside["bn"]["scale"].at[DEAD].set(0)
    inside["out"]["kernel"] = inside["out"]["kernel"].at[DEAD].set(0)
    analysis = clipjax.analyze(apply, variables, X)
    shrunk = shrink(variables, analysis, verify=(apply, X))
    assert shrunk.widths["in/kernel"] == 3 and shrunk.change <= 1e-6
    assert apply(shrunk.variables, X)[1]["batch_stats"]["bn"]["mean"].shape == (3,)
    with pytest.raises(ValueError, match=r"must run the smaller model, got ScopeParamShapeError.*by the shapes"):
        shrink(variables, analysis, verify=(lambda v, x: Norm(5).apply(v, x, True, mutable=["batch_stats"]), X))


def test_a_collection_of_statistics_that_is_returned_alone_is_known_too():
    def apply(variables, x):
        width = variables["params"]["in"]["kernel"].shape[-1]
        outputs, new = Norm(width).apply(variables, x, True, mutable=["batch_stats"])
        return outputs, new["batch_stats"]

    variables = Norm(5).init(jax.random.key(0), X, True)
    dead = {"in": {"kernel": np.s_[:, DEAD]}, "bn": {"scale": np.s_[DEAD]}, "out": {"kernel": np.s_[DEAD]}}
    for layer, leaves in dead.items():
        for name, at in leaves.items():
            variables["params"][layer][name] = variables["params"][layer][name].at[at].set(0)
    analysis = clipjax.analyze(apply, variables, X)
    shrunk = shrink(variables, analysis, verify=(apply, X))
    assert shrunk.widths["in/kernel"] == 3 and shrunk.change <= 1e-6
    assert apply(shrunk.variables, X)[1]["bn"]["mean"].shape == (3,)


@pytest.mark.parametrize("verify", [relu, (relu,), (X, relu), (relu, X, X), "relu"])
def test_verify_must_be_a_pair(verify):
    with pytest.raises(TypeError, match=r"`verify` must be a pair \(apply_small, args\), got"):
        shrink(params(), BY_HAND, verify=verify)


INF, NAN = float("inf"), float("nan")
KINDS = {
    "equal": ([1.0, 3.0], [1.0, 3.0], 0.0),
    "range": ([1.0, 3.0], [1.0, 3.5], 0.25),
    "constant": ([4.0, 4.0], [4.0, 5.0], 0.25),
    "zeros": ([0.0, 0.0], [0.0, 1e-9], INF),
    "nan": ([NAN, INF, 1.0, 3.0], [NAN, INF, 1.0, 3.0], 0.0),
    "new nan": ([1.0, 3.0], [1.0, NAN], INF),
    "other infinity": ([1.0, INF], [1.0, -INF], INF),
    "empty": ([], [], 0.0),
    "scalar": (4.0, 5.0, 0.25),
    "complex": (np.array([0, 4j], np.complex64), np.array([0, 3j], np.complex64), 0.25),
    "bool": (np.array([True, False]), np.array([True, True]), 1.0),
    "key": (jax.random.key(1), jax.random.key(1), 0.0),
}


@pytest.mark.parametrize("case", KINDS)
def test_the_change_of_an_output(case):
    wanted, got, change = KINDS[case]
    wanted, got = (x if hasattr(x, "dtype") else np.asarray(x, np.float32) for x in (wanted, got))
    ((found, _),) = verifying.changes({"y": wanted, "none": None}, {"y": got, "none": None}).values()
    assert found == change


def test_other_outputs_are_refused():
    for got, message in (
        ({"z": X}, r"`verify` must return \['y'\], got \['z'\]. `apply_small` must be the same model"),
        ({"y": X[:, :2]}, r"`verify/y` must have shape and dtype \(\(6, 4\), 'float32'\), got \(\(6, 2\), 'float32'\)"),
        ({"y": X.astype(jnp.bfloat16)}, "`verify/y` must have shape and dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            verifying.changes({"y": X}, got)


@pytest.mark.parametrize(
    ("dtype", "repaired", "allowed"),
    [
        ("float64", [], 1e-10),
        ("float32", [], 1e-5),
        ("float32", ["bfloat16", "float32"], 3e-2),
        ("float16", ["float64"], 4e-3),
        ("bfloat16", [], 3e-2),
        ("int32", ["float32"], 0.0),
    ],
)
def test_what_rounding_explains_by_dtype(dtype, repaired, allowed):
    verifying.check({"y": (allowed, dtype)}, repaired, {})
    with pytest.raises(ValueError, match=f"`verify/y` must change by at most {allowed} of its range"):
        verifying.check({"y": (1.01 * allowed + 1e-12, dtype)}, repaired, {})
