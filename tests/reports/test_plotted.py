"""The norms that a plot reads from reports: stacked, in a sequence, of each leaf, and what is no history."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import plots

pytestmark = pytest.mark.usefixtures("strict")


def shown(figure):
    """Drawn, so that what fails then fails here."""
    figure.draw_without_rendering()
    return figure


NORM = np.array([0.5, 3.0, 0.9, np.nan, 4.0, 0.0], np.float32)
THRESHOLD = np.array([np.inf, 2.0, 1.0, 1.0, 1.0, 1.0], np.float32)
HISTORY = {"loss": NORM, "clip_norm/norm_pre": NORM, "clip_norm/threshold": THRESHOLD, "clip_norm/norm_post": NORM}


@pytest.mark.parametrize("stacked", [True, False])
def test_norms_mark_the_updates_above_the_threshold_and_those_not_finite(stacked):
    each = [{key: jnp.asarray(value[i]) for key, value in HISTORY.items()} for i in range(len(NORM))]
    axis = shown(plots.norms(HISTORY if stacked else each)).axes[0]
    norm, threshold, above, lost = axis.get_lines()
    np.testing.assert_array_equal(norm.get_ydata(), NORM)
    np.testing.assert_array_equal(threshold.get_ydata(), THRESHOLD)
    assert (above.get_xdata().tolist(), above.get_ydata().tolist()) == ([1, 4], [3.0, 4.0])
    assert lost.get_xdata().tolist() == [3]
    assert axis.get_yscale() == "log" and "33.3%" in axis.get_title(loc="left")


def test_norms_of_a_run():
    tx = optax.chain(clipjax.clip_norm(1.0), clipjax.skip_spikes(clipjax.clip_norm(2.0), 8.0))
    params = {"w": jnp.ones(2)}

    def step(state, factor):
        _, state = tx.update({"w": jnp.full(2, factor)}, state, params)
        return state, clipjax.report(state)

    factors = jnp.array([0.1, 1.0, 3.0])
    axes = shown(plots.norms(jax.lax.scan(step, tx.init(params), factors)[1])).axes
    names = ["clip_norm", "clip_norm_1", "skip_spikes"]
    assert sorted(axis.get_title(loc="left").split(":")[0] for axis in axes) == names
    first = next(axis for axis in axes if axis.get_title(loc="left").startswith("clip_norm:"))
    np.testing.assert_allclose(first.get_lines()[0].get_ydata(), np.sqrt(2) * np.asarray(factors), rtol=1e-6)
    assert first.get_lines()[2].get_xdata().tolist() == [1, 2]


def test_norms_of_each_leaf_where_the_reports_have_them():
    tx, params = clipjax.clip_norm(1.0, per="leaf"), {"a": jnp.ones(2), "b": jnp.ones(2)}
    state, reports = tx.init(params), []
    for factor in (0.5, 2.0):
        _, state = tx.update({"a": jnp.full(2, factor), "b": jnp.zeros(2)}, state, params)
        reports.append(clipjax.report(state, per_leaf=True))
    figure = shown(plots.norms(reports))
    assert [axis.get_title(loc="left").split(":")[0] for axis in figure.axes] == ["clip_norm/a", "clip_norm/b"]
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), [0.5 * np.sqrt(2), 2 * np.sqrt(2)], rtol=1e-6)
    assert figure.axes[1].get_lines()[0].get_ydata().tolist() == [0, 0]
    mean = plots.norms([clipjax.report(state)]).axes
    assert len(mean) == 1 and mean[0].get_lines()[0].get_ydata().size == 1


def test_norms_without_a_gradient_are_a_gap_and_without_positive_values_have_no_log_scale():
    gone = {"clip_norm/norm_pre": np.array([-1.0, 0.0]), "clip_norm/threshold": np.array([np.inf, np.inf])}
    axis = shown(plots.norms(gone)).axes[0]
    assert np.isnan(axis.get_lines()[0].get_ydata()[0]) and axis.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ({}, "have norms"),
        ([], "have norms"),
        ({"prune_mask/sparsity": np.ones(2)}, r"have norms, got \['prune_mask/sparsity'\].*clip_norm"),
        ({"clip_norm/norm_pre": 1.0, "clip_norm/threshold": 1.0}, r"of shape \[updates\], got \(\)"),
        ({"clip_norm/norm_pre": np.ones((2, 3)), "clip_norm/threshold": np.ones((2, 3))}, r"got \(2, 3\).*one run"),
        ({"clip_norm/norm_pre": np.ones(0), "clip_norm/threshold": np.ones(0)}, r"got \(0,\)"),
        ({"clip_norm/norm_pre": np.ones(3), "clip_norm/threshold": np.ones(2)}, r"got \(3,\)"),
    ],
)
def test_norms_refuse_what_is_no_history(history, words):
    with pytest.raises(ValueError, match=f"`history` must .*{words}"):
        plots.norms(history)
