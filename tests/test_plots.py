"""Plots: the data that is drawn, against NumPy. Norms are in reports/test_plotted.py, figures in test_figures.py."""

import sys

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import clipjax
from clipjax import formats, plots, steps

pytestmark = pytest.mark.usefixtures("strict")

RNG = np.random.default_rng(0)
W = RNG.normal(scale=0.3, size=(32, 8)).astype(np.float32)
PARAMS = {"body": {"kernel": jnp.asarray(W), "bias": jnp.zeros(8)}, "head": {"kernel": jnp.asarray(W[:8] / 2)}}


def every(path, leaf):
    return True


def shown(figure):
    """The figure as it is written, so that whatever fails when it is drawn fails here; ticks of "100 %" are text."""
    figure.draw_without_rendering()
    return figure


def stems(axis):
    """Places and heights of the levels, and the ticks below the axis."""
    counts, ticks = axis.get_lines()
    feet = np.array([segment[:, 1] for segment in axis.collections[0].get_segments()]).reshape(-1, 2)
    assert feet[:, 1].tolist() == counts.get_ydata().tolist()
    return np.asarray(counts.get_xdata()), np.asarray(counts.get_ydata()), np.asarray(ticks.get_xdata())


def histograms(axis):
    """Counts and edges by label; the patches of others are the bars of a legend."""
    return {patch.get_label(): patch.get_data()[:2] for patch in axis.patches}


def reference_levels(q):
    """Codes less their zero point, how often each occurs, and their step at each weight."""
    codes = np.asarray(q.codes, np.int64) - np.asarray(q.zero_point)
    return np.unique(codes, return_counts=True)


def held(tx, params=PARAMS):
    return clipjax.hold_once(tx, params)


GRIDS = {
    "4 bits": (clipjax.fake_quantize(4), range(-7, 8)),
    "ternary": (clipjax.fake_quantize(2), (-1, 0, 1)),
    "1 bit": (clipjax.fake_quantize(1), (-1, 1)),
    "a number": (clipjax.fake_quantize(3, step=0.25), range(-3, 4)),
    "units": (clipjax.fake_quantize(4, axis=-1), range(-7, 8)),
    "groups": (clipjax.fake_quantize(3, group=4), range(-3, 4)),
    "pruned": (optax.chain(clipjax.prune_mask(0.5, scope="leaf"), clipjax.fake_quantize(4)), range(-7, 8)),
    "without latent weights": (clipjax.fake_quantize(4, carry=False), range(-7, 8)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_weights_stand_at_the_levels_of_the_grid(name):
    tx, levels = GRIDS[name]
    params, state = held(tx)
    axis = shown(plots.weights(params, state)).axes[0]
    q = clipjax.quantized(params, state)["body"]["kernel"]
    codes, counts = reference_levels(q)
    scale = float(q.step) if q.step.size == 1 else 1.0
    places, heights, ticks = stems(axis)
    np.testing.assert_allclose(places, codes * scale, rtol=1e-6)
    assert heights.tolist() == counts.tolist() and heights.sum() == W.size
    np.testing.assert_allclose(ticks, np.array(levels) * scale, rtol=1e-6)
    assert axis.get_xlabel().startswith("weight / its step\n" if q.step.size > 1 else "weight\n")
    assert f"256 weights, {np.mean(np.asarray(params['body']['kernel']) == 0):.0%} zeros" in axis.get_xlabel()


def test_weights_on_an_affine_grid_have_its_levels_on_both_sides():
    params, state = held(clipjax.fake_quantize(3, step=steps.minmax()), {"w": jnp.asarray(W + np.float32(0.5))})
    q = clipjax.quantized(params, state)["w"]
    low, high = -3 - int(q.zero_point), 3 - int(q.zero_point)
    assert low > -3
    places, _, ticks = stems(plots.weights(params, state).axes[0])
    np.testing.assert_allclose(places, reference_levels(q)[0] * float(q.step), rtol=1e-6)
    np.testing.assert_allclose(ticks, np.arange(low, high + 1) * float(q.step), rtol=1e-6, atol=1e-9)


def test_weights_with_unbounded_codes_have_the_levels_that_occur():
    params, state = held(clipjax.fake_quantize(step=0.125), {"w": jnp.asarray(W)})
    places, _, ticks = stems(plots.weights(params, state).axes[0])
    assert places.tolist() == ticks.tolist() == np.unique(np.rint(W / 0.125) * 0.125).tolist()


def test_weights_behind_the_levels_are_the_latent_ones_or_those_before():
    tx = clipjax.fake_quantize(3)
    params, state = held(tx)
    latent = np.asarray(state.carry["body"]["kernel"], np.float64)
    before = {"body": {"kernel": PARAMS["body"]["kernel"] * 2}, "head": PARAMS["head"]}
    for figure, label, wanted in (
        (plots.weights(params, state), "latent weights", latent),
        (plots.weights(params, state, before=before), "before", 2 * W.astype(np.float64)),
    ):
        drawn = histograms(shown(figure).axes[0])
        assert list(drawn) == [label]
        counts, edges = np.histogram(wanted, plots.BINS)
        assert drawn[label][0].tolist() == counts.tolist()
        np.testing.assert_allclose(drawn[label][1], edges)
    other = plots.weights(params, where=every, before=PARAMS)
    assert list(histograms(other.axes[1])) == ["before", "weights"]


def test_weights_in_units_of_their_steps_have_the_histogram_behind_in_the_same_unit():
    params, state = held(clipjax.fake_quantize(4, axis=-1))
    step = np.asarray(clipjax.quantized(params, state)["body"]["kernel"].step, np.float64)
    counts, edges = histograms(plots.weights(params, state, before=PARAMS).axes[0])["before"]
    wanted, bins = np.histogram(W / step, plots.BINS)
    assert counts.tolist() == wanted.tolist()
    np.testing.assert_allclose(edges, bins)


@pytest.mark.parametrize("tx", [clipjax.fake_quantize(formats.q4_0()), clipjax.fake_quantize(4, start=5), None])
def test_weights_without_a_grid_are_a_histogram(tx):
    """On a format, before the first refresh, and without a state."""
    params, state = {"w": jnp.asarray(W)}, None
    if tx is not None:
        state = tx.init(params)
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    axis = shown(plots.weights(params, state)).axes[0]
    counts, edges = histograms(axis)["weights"]
    assert counts.tolist() == np.histogram(np.asarray(params["w"], np.float64), edges)[0].tolist()
    assert not axis.get_lines()


def test_weights_that_are_not_finite_are_counted_and_left_out():
    w = W.copy()
    w[0, :3] = np.nan, np.inf, -np.inf
    params, state = held(clipjax.fake_quantize(4), {"w": jnp.asarray(w)})
    axis = shown(plots.weights(params, state)).axes[0]
    assert stems(axis)[1].sum() == W.size - 3 and "3 not finite" in axis.get_xlabel()
    axis = shown(plots.weights({"w": jnp.full((2, 2), jnp.nan)})).axes[0]
    assert "4 not finite" in axis.get_xlabel() and axis.get_yscale() == "linear"


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.ones((1, 1)),
        jnp.zeros((4, 4)),
        jnp.full((3, 3), 1e-42),
        jnp.asarray(W, jnp.bfloat16),
        jnp.asarray(W, jnp.float16),
        jnp.asarray([[-3e38, 3e38]]),
        np.array([[1e300, -1e300]]),
        W,
    ],
    ids=["one entry", "zeros", "tiny", "bf16", "f16", "huge", "f64", "numpy"],
)
def test_weights_of_any_scale_and_dtype(leaf):
    counts, edges = histograms(shown(plots.weights({"w": leaf})).axes[0])["weights"]
    assert counts.sum() == leaf.size and np.isfinite(edges).all()
    assert counts.tolist() == np.histogram(np.asarray(leaf).astype(np.float64), edges)[0].tolist()


def test_weights_leave_out_biases_none_empty_and_integer_leaves():
    params = {"a": jnp.ones((2, 2)), "b": None, "bias": jnp.ones((2, 2)), "c": jnp.ones((0, 2)), "d": jnp.ones(3)}
    figure = plots.weights(params | {"e": jnp.ones((2, 2), jnp.int32)})
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a"]
    figure = plots.weights(params, where=every)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["a", "bias", "d"]
    with pytest.raises(ValueError, match=r"`where` must pick a leaf, got .*'bias'.*where=lambda path, leaf: True"):
        plots.weights({"bias": jnp.ones(3)})


@pytest.mark.parametrize("container", [flax.core.freeze, nnx.State, lambda params: [params, None], lambda p: (p,)])
def test_plots_take_any_container(container):
    params = container({"lin": {"kernel": jnp.asarray(W)}})
    params, state = held(clipjax.fake_quantize(4), params)
    assert stems(plots.weights(params, state, before=params).axes[0])[1].sum() == W.size
    assert shown(plots.layers(params, state)).axes[1].patches[0].get_width() == 4
    assert plots.sizes(params).axes[0].patches[0].get_width() == W.nbytes


def test_plots_take_a_model_in_an_nnx_optimizer():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), clipjax.fake_quantize(2)), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    params, state = nnx.state(model, nnx.Param), optimizer.opt_state
    assert stems(plots.weights(params, state).axes[0])[0].size == 3
    assert plots.layers(params, state).axes[1].patches[0].get_width() == 2


def test_weights_of_other_params_are_refused():
    params, state = held(clipjax.fake_quantize(4))
    with pytest.raises(ValueError, match=r"'body/kernel', 'head/kernel'.*the params do not have"):
        plots.weights({"w": jnp.ones((2, 2))}, state)
    with pytest.raises(ValueError, match=r"`before` must have 'body/kernel' in its shape, got None"):
        plots.weights(params, before={"head": params["head"]})
    with pytest.raises(ValueError, match=r"`before` must have 'head/kernel' in its shape, got \(32, 8\)"):
        plots.weights(params, before=params | {"head": params["body"]})


def test_layers_are_those_of_summarize():
    masked = clipjax.prune_mask(0.7, scope="leaf", where=lambda path, leaf: "body/kernel" in path)
    tx = optax.chain(masked, clipjax.fake_quantize(3, where=lambda path, leaf: "head/kernel" in path))
    params, state = held(tx, PARAMS | {"total": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}})
    table = clipjax.summarize(params, state).to_dict()
    left, right = shown(plots.layers(params, state)).axes
    paths = ["body/kernel", "head/kernel", "total/kernel"]
    assert [label.get_text() for label in left.get_yticklabels()] == paths
    assert [bar.get_width() for bar in left.patches] == [table[path]["sparsity"] for path in paths]
    assert left.patches[0].get_width() == np.mean(np.asarray(params["body"]["kernel"]) == 0) > 0.69
    assert [bar.get_width() for bar in right.patches] == [32, 3, 16]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first leaf is at the top


def test_layers_named_as_a_total_and_layers_on_a_format():
    params, state = held(clipjax.fake_quantize(formats.q4_0(), where=every), {"total": jnp.ones((32, 2))})
    left, right = plots.layers(params | {"governed": jnp.zeros((2, 2))}, state, where=every).axes
    assert [bar.get_width() for bar in left.patches] == [1.0, 0.0]
    assert [bar.get_width() for bar in right.patches] == [32, 4.5]


def bars(axis):
    return {label.get_text(): bar.get_width() for label, bar in zip(axis.get_yticklabels(), axis.patches, strict=True)}


def test_sizes_are_those_of_summarize_and_of_the_file():
    params, _ = held(optax.chain(clipjax.prune_mask(0.8), clipjax.fake_quantize(4)))
    axis = shown(plots.sizes(params)).axes[0]
    total = clipjax.summarize(params).to_dict()["total"]
    wanted = {"raw": 4 * (256 + 8 + 64), "packed": total["packed_bytes"], "file": len(clipjax.pack(params))}
    assert bars(axis) == wanted | {"entropy": total["entropy_bytes"]}
    assert axis.texts[0].get_text() == "1,312 bytes, 100.0%"
    with pytest.raises(ValueError, match="`params` must have an array with entries, got 0"):
        plots.sizes({"a": None, "b": jnp.zeros((0, 3))})


def test_sizes_on_a_format_are_those_of_its_codes_and_scales():
    params, state = clipjax.hold_once(
        clipjax.fake_quantize(formats.q4_0()), {"w": jnp.asarray(RNG.normal(size=(256, 32)), "f4")}
    )
    found = bars(plots.sizes(params, state).axes[0])
    assert found["packed"] == 256 * 32 * 4.5 / 8
    assert (
        found["file"] == len(clipjax.pack(clipjax.quantized(params, state))) < bars(plots.sizes(params).axes[0])["file"]
    )


def test_sizes_without_constriction_are_raw_and_entropy(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert list(bars(plots.sizes({"w": jnp.asarray(W.round(1))}).axes[0])) == ["raw", "entropy"]


def reference_front(points):
    """Those that no other one beats: by every pair."""
    return sorted((a, b) for a, b in points if not any(x <= a and y <= b and (x, y) != (a, b) for x, y in points))


@pytest.mark.parametrize("seed", range(3))
def test_pareto_joins_the_points_that_no_other_beats(seed):
    pairs = [(float(a), float(b)) for a, b in np.random.default_rng(seed).integers(1, 12, (25, 2))]
    axis = shown(plots.pareto({str(i): pair for i, pair in enumerate(pairs)})).axes[0]
    (line,) = axis.get_lines()
    assert list(map(tuple, line.get_xydata().tolist())) == reference_front(pairs)
    assert line.get_drawstyle() == "steps-post" and axis.get_xscale() == "log"
    beaten, best = (list(map(tuple, points.get_offsets().tolist())) for points in axis.collections)
    assert sorted(beaten + best) == sorted(pairs) and sorted(best) == reference_front(pairs)
    assert [text.get_text() for text in axis.texts] == [str(i) for i in range(25)]


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ({}, r"have a point, got \{\}"),
        ({"a": (1, 2), "b": (0, 1)}, r"have bytes > 0 and an error at 'b', got \(0, 1\)"),
        ({"b": (10, float("nan"))}, "at 'b', got .*nan.*diverged"),
        ({"b": 3}, "at 'b', got 3"),
    ],
)
def test_pareto_refuses_what_is_no_point(points, words):
    with pytest.raises(ValueError, match=f"`points` must .*{words}"):
        plots.pareto(points)
