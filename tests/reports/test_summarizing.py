"""summarize: how each leaf is pruned and quantized, and how its weights are distributed, against NumPy in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import formats, steps, structures

pytestmark = pytest.mark.usefixtures("strict")

WIDTHS = (2, 3, 4, 5, 8)
FACTS = ("sigma", "max_sigma", "kurtosis", *(f"sqnr_db_{b}" for b in WIDTHS))
RNG = np.random.default_rng(0)
SAMPLES = {
    "gaussian": (RNG.normal(scale=0.2, size=(400, 250)), 3.0, 0.05),
    "laplace": (RNG.laplace(size=(400, 250)), 6.0, 0.3),
    "uniform": (RNG.uniform(-3, 3, size=(400, 250)), 1.8, 0.02),
    "two": (RNG.choice([-0.5, 0.5], size=(400, 250)), 1.0, 1e-6),
}


def row(leaf, **kwargs):
    return clipjax.summarize({"w": leaf}, **kwargs).to_dict()["w"]


def reference(w):
    """From 0, over what is finite and not 0."""
    w = np.asarray(w).astype(np.float64)
    w = w[np.isfinite(w) & (w != 0)]
    sigma = np.sqrt(np.mean(w**2))
    return {"sigma": sigma, "max_sigma": np.abs(w).max() / sigma, "kurtosis": np.mean(w**4) / sigma**4}


def reference_sqnr(w, bits):
    """With the step that `choose_step` gives."""
    s, top = float(clipjax.choose_step(jnp.asarray(w, jnp.float32), bits)), 2 ** (bits - 1) - 1
    w = np.asarray(w, np.float64)
    noise = np.sum((np.clip(np.round(w / s), -top, top) * s - w) ** 2)
    return 10 * np.log10(np.sum(w**2) / noise)


def update(tx, params, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", SAMPLES)
def test_sigma_and_kurtosis_of_known_distributions(name):
    """The plain kurtosis: 3 for a Gaussian, 6 for a Laplacian."""
    w, kurtosis, tolerance = SAMPLES[name]
    found = row(jnp.asarray(w, jnp.float32))
    for key, wanted in reference(w).items():
        np.testing.assert_allclose(found[key], wanted, rtol=1e-5)
    assert abs(found["kurtosis"] - kurtosis) < tolerance


def test_kurtosis_is_scipys_where_the_mean_is_zero():
    stats = pytest.importorskip("scipy.stats")
    w = SAMPLES["laplace"][0]
    w = np.concatenate([w, -w]).astype(np.float32)
    np.testing.assert_allclose(row(jnp.asarray(w))["kurtosis"], stats.kurtosis(w.ravel(), fisher=False), rtol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "uniform"])
def test_sqnr_against_the_direct_computation(name):
    w = SAMPLES[name][0].astype(np.float32)
    found = row(jnp.asarray(w))
    for bits in WIDTHS:
        np.testing.assert_allclose(found[f"sqnr_db_{bits}"], reference_sqnr(w, bits), atol=0.02)


def test_sqnr_of_a_gaussian_is_the_known_one():
    """The distortion, by an integral, at the best steps that are known for a Gaussian (Max, 1960)."""
    found = row(jnp.asarray(SAMPLES["gaussian"][0], jnp.float32))
    x = np.linspace(-9, 9, 400_001)
    density = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()
    for bits, s in ((2, 1.224), (3, 0.6508), (4, 0.3534), (5, 0.1933), (8, 0.0309)):
        top = 2 ** (bits - 1) - 1
        distortion = np.sum((np.clip(np.round(x / s), -top, top) * s - x) ** 2 * density)
        assert abs(found[f"sqnr_db_{bits}"] + 10 * np.log10(distortion)) < 0.15


def test_sqnr_is_what_choose_bits_compares_with_its_target():
    w = jnp.asarray(SAMPLES["laplace"][0], jnp.float32)
    found = row(w, widths=range(2, 9))
    for target in (8.0, 15.0, 20.0, 30.0):
        wanted = next(b for b in range(2, 9) if found[f"sqnr_db_{b}"] >= target)
        assert clipjax.choose_bits({"w": w}, target_db=target) == {"w": wanted}


def test_only_survivors_count():
    """Zeros, NaN and infinities change nothing."""
    w = RNG.normal(size=(20, 20)).astype(np.float32)
    alone = row(jnp.asarray(w))
    holes = np.concatenate([w.ravel(), np.zeros(300, np.float32), [np.nan, np.inf, -np.inf, -0.0]]).astype(np.float32)
    found = row(jnp.asarray(holes))
    np.testing.assert_allclose([found[key] for key in FACTS], [alone[key] for key in FACTS], rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_any_scale(scale):
    """The fourth power of 1e30 is beyond f32, that of 1e-30 below it."""
    w = RNG.normal(size=(50, 50))
    found, alone = row(jnp.asarray(w * scale, jnp.float32)), row(jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(found["sigma"] / scale, alone["sigma"], rtol=1e-5)
    np.testing.assert_allclose([found[k] for k in FACTS[1:]], [alone[k] for k in FACTS[1:]], rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_bf16_and_narrower(dtype):
    w = jnp.asarray(RNG.normal(size=(30, 30)), dtype)
    found = row(w)
    for key, wanted in reference(np.asarray(w).astype(np.float64)).items():
        np.testing.assert_allclose(found[key], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "leaf",
    [jnp.zeros((3, 3)), jnp.zeros((0, 3)), jnp.full((2,), jnp.nan), jnp.arange(4), jnp.ones(2, bool), jnp.ones(2) * 1j],
    ids=["zero", "empty", "nan", "integer", "bool", "complex"],
)
def test_leaves_without_a_float_weight_have_no_distribution(leaf):
    summary = clipjax.summarize({"w": leaf, "none": None})
    assert all(summary.to_dict()["w"][key] is None for key in FACTS)
    assert "sigma" not in str(summary) and summary._repr_html_().count("<table>") == 1
    assert repr(summary) == str(summary)
    assert list(summary.to_dict()) == ["w", "total"]


def test_scalar_and_no_leaves():
    found = row(jnp.float32(-2.0))
    assert (found["sigma"], found["max_sigma"], found["kurtosis"], found["sqnr_db_2"]) == (2.0, 1.0, 1.0, np.inf)
    assert row(-2.0)["sigma"] == 2.0
    assert list(clipjax.summarize({}).to_dict()) == ["total"]


def test_two_tables():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    summary = clipjax.summarize(params)
    first, second = str(summary).split("\n\n")
    assert first.splitlines()[0].split() == (
        "path picked left_out shape sparsity masked bits step off_grid sqnr_db bytes packed_bytes coded_bytes"
        " entropy_bytes state_bytes".split()
    )
    assert [line.split()[0] for line in first.splitlines()[1:]] == ["bias", "kernel", "total"]
    assert second.splitlines()[0].split() == ["path", *FACTS]
    assert [line.split()[0] for line in second.splitlines()[1:]] == ["kernel"]
    assert summary._repr_html_().count("<table>") == 2 and summary._repr_html_().count("sqnr_db_8") == 1


def network():
    k = jax.random.normal(jax.random.key(0), (32, 20))
    dense = {"kernel": k, "bias": jnp.zeros(20), "scale": jnp.ones((1, 20))}
    return {"Embed_0": {"embedding": k}, "dense": dense, "head": {"kernel": k.T}}


CHAIN = optax.chain(
    optax.sgd(1e-2, momentum=0.9),
    clipjax.prune_mask(0.8, where=lambda path, leaf: path == "dense/kernel", start=5),
    clipjax.fake_quantize(4, where=lambda path, leaf: "kernel" in path, start=5),
)


def test_a_dry_run_says_what_training_ends_with():
    """Picked leaves and why others are not, zeros, bits, bytes, and the bytes of the state, before any update."""
    params = network()
    table = clipjax.summarize(params, tx=CHAIN, widths=()).to_dict()
    picked = {path: cells["picked"] or cells["left_out"] for path, cells in table.items()}
    assert picked == {
        "Embed_0/embedding": "embedding",
        "dense/bias": "rank 1",
        "dense/kernel": "prune+quantize",
        "dense/scale": "named scale",
        "head/kernel": "quantize",
        "governed": "",
        "total": "",
    }
    dense, head, governed = (table[name] for name in ("dense/kernel", "head/kernel", "governed"))
    assert dense["sparsity"] == dense["masked"] == 0.8 and governed["masked"] == 0.8 and head["masked"] is None
    assert dense["bits"] == head["bits"] == 4 and dense["off_grid"] == head["off_grid"] == 0
    assert dense["packed_bytes"] < dense["bytes"] / 6 and governed["bytes"] == 2 * 640 * 4
    state = CHAIN.init(params)
    assert table["total"]["state_bytes"] == sum(x.nbytes for x in jax.tree.leaves(state))
    assert clipjax.summarize(params, tx=optax.adam(1e-3), widths=()).to_dict()["dense/kernel"]["picked"] == ""
    with pytest.raises(ValueError, match="`opt_state` must be None with `tx`"):
        clipjax.summarize(params, state, tx=CHAIN)


def test_what_the_params_show_stands_beside_what_the_state_says():
    """A mask and a grid that something has moved the weights off."""
    params, state = update(CHAIN, network(), steps=7)
    held = clipjax.summarize(params, state, widths=()).to_dict()["dense/kernel"]
    assert held["sparsity"] >= held["masked"] == 0.8 and held["off_grid"] == 0
    params["dense"]["kernel"] = params["dense"]["kernel"] * 0.9 + 1e-3
    moved = clipjax.summarize(params, state, widths=()).to_dict()["dense/kernel"]
    assert moved["sparsity"] == 0 and moved["masked"] == 0.8 and moved["off_grid"] == 640
    early = clipjax.summarize(*update(CHAIN, network(), steps=3), widths=()).to_dict()["dense/kernel"]
    assert (early["bits"], early["step"], early["off_grid"], early["masked"]) == (None, None, None, 0.0)


@pytest.mark.parametrize("widths", [(), []])
def test_no_widths_no_sqnr(widths):
    found = row(jnp.ones(3), widths=widths)
    assert found["sigma"] == 1.0 and not any(key.startswith("sqnr_db_") for key in found)


@pytest.mark.parametrize("widths", [(0,), (4, 17), 4, (2.5,), np.array([2, 3])])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ValueError, match="`widths` must"):
        row(jnp.ones(3), widths=widths)


def test_quantized_leaves_show_the_latent_weights():
    """The params themselves lie on the grid of 3 bits, and would have no error at 3 bits."""
    params = {"kernel": jnp.asarray(RNG.normal(size=(40, 40)), jnp.float32)}
    new, state = update(clipjax.fake_quantize(3), params)
    found = clipjax.summarize(new, state).to_dict()["kernel"]
    np.testing.assert_allclose(found["sigma"], reference(params["kernel"])["sigma"], rtol=1e-6)
    np.testing.assert_allclose(found["sqnr_db_3"], found["sqnr_db"], atol=0.02)
    assert found["picked"] == "quantize" and row(new["kernel"])["sqnr_db_3"] > 100


@pytest.mark.parametrize("order", ["prune", "quantize", "inner"])
def test_pruned_weights_do_not_count(order):
    """In any order: the latent weights behind a pruned one may be other than 0."""
    params = {"kernel": jnp.asarray(RNG.normal(size=(40, 40)), jnp.float32)}
    prune, quantize = clipjax.prune_mask(0.8), clipjax.fake_quantize(2)
    chain = {
        "prune": optax.chain(prune, quantize),
        "quantize": optax.chain(quantize, prune),
        "inner": clipjax.fake_quantize(2, inner=prune),
    }[order]
    new, state = update(chain, params)
    mask = np.asarray(optax.tree.get(state, "mask")["kernel"])
    assert mask.mean() == pytest.approx(0.2)
    found = clipjax.summarize(new, state).to_dict()["kernel"]
    for key, wanted in reference(np.asarray(params["kernel"])[mask]).items():
        np.testing.assert_allclose(found[key], wanted, rtol=1e-5)
    assert found["picked"] == "prune+quantize"


def test_blocks_of_masks_that_do_not_broadcast_are_passed_over():
    params = {"kernel": jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)}
    new, state = update(clipjax.prune_mask(0.5, structure=structures.block(2, 3)), params)
    found = clipjax.summarize(new, state).to_dict()["kernel"]
    np.testing.assert_allclose(found["sigma"], reference(new["kernel"])["sigma"], rtol=1e-6)
    assert found["picked"] == "prune"


def test_sigma_is_that_of_the_step_rule():
    """One step for k = 1 and two bits: s = σ."""
    w = jnp.asarray(RNG.normal(size=(30, 30)) + 0.5, jnp.float32)
    step = float(clipjax.choose_step(w, 2, step=steps.sigma(1.0)))
    np.testing.assert_allclose(row(w)["sigma"], step, rtol=1e-5)


def test_a_wider_grid_is_never_worse():
    """Each has all levels of the narrower one, also for weights that lie on a grid already."""
    row = clipjax.summarize({"w": jnp.array([[1.0, 2.0, 3.0], [-1.0, -3.0, 2.0]])}).to_dict()["w"]
    assert row["sqnr_db_2"] < row["sqnr_db_3"] == row["sqnr_db_4"] == row["sqnr_db_8"] == np.inf


def test_a_weight_that_is_not_finite_is_passed_over():
    tx, params = clipjax.fake_quantize(4), {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    updates = {"w": jnp.zeros((8, 8)).at[0, 0].set(jnp.inf)}
    updates, state = tx.update(updates, tx.init(params), params)
    assert np.isfinite(clipjax.summarize(optax.apply_updates(params, updates), state).to_dict()["w"]["sqnr_db"])


def test_keys_are_no_weights():
    assert list(clipjax.summarize({"w": jnp.ones(2), "key": jax.random.key(0)}).to_dict()) == ["w", "total"]


@pytest.mark.parametrize("tx", [clipjax.prune_mask(0.5), clipjax.fake_quantize(4)], ids=["prune", "quantize"])
def test_the_state_of_other_params_is_refused(tx):
    state = tx.init({"body": {"kernel": jnp.ones((4, 4))}})
    with pytest.raises(
        ValueError, match=r"^`state` must belong to these params, got \['body/kernel'\], which the params"
    ):
        clipjax.summarize({"bodi": {"kernel": jnp.ones((4, 4))}}, state)


@pytest.mark.parametrize("form", [formats.q4_0(), formats.int4(32), formats.mxfp4(), formats.int8()], ids=str)
def test_sizes_of_a_format_are_those_of_its_codes_and_scales(form):
    """What `save` writes of the codes, not of the values, of which blocks with scales of their own have many."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (256, 64))}
    tx = clipjax.fake_quantize(form)
    params, state = clipjax.hold_once(tx, params)
    row = clipjax.summarize(params, state, widths=()).to_dict()["kernel"]
    assert row["packed_bytes"] == np.ceil(row["bits"] * 256 * 64 / 8) < 1.03 * row["bytes"] * row["bits"] / 32
    written = len(clipjax.pack(clipjax.quantized(params, state)))
    assert 0 < written - row["coded_bytes"] < 400  # the header
    assert row["coded_bytes"] < 1.02 * row["packed_bytes"]
    params["kernel"] = params["kernel"] * 1.01  # off its levels: values are what there is
    assert clipjax.summarize(params, state, widths=()).to_dict()["kernel"]["coded_bytes"] > row["coded_bytes"]
