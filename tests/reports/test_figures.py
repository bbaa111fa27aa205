"""Figures: those of others are drawn into, notebooks show ours, and nothing keeps them; matplotlib is imported late."""

import gc
import subprocess
import sys
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from clipjax import plots

PARAMS = {"body": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}, "head": {"kernel": jnp.eye(4)}}
HISTORY = {"clip_norm/norm_pre": np.array([0.5, 3.0]), "clip_norm/threshold": np.ones(2)}
CALLS = {
    "weights": lambda ax: plots.weights(PARAMS, ax=ax),
    "layers": lambda ax: plots.layers(PARAMS, ax=ax),
    "norms": lambda ax: plots.norms(HISTORY, ax=ax),
    "sizes": lambda ax: plots.sizes(PARAMS, ax=ax),
    "pareto": lambda ax: plots.pareto({"a": (1, 2)}, ax=ax),
}


@pytest.mark.parametrize("name", CALLS)
def test_plots_draw_into_given_axes(name):
    """Of a figure or of a part of one, and return the figure; a wrong number says how many to pass."""
    count = 2 if name in ("weights", "layers") else 1
    figure = Figure()
    part = figure.subfigures(1, 2)[1]
    axes = part.subplots(1, count)
    before = list(figure.axes)
    assert CALLS[name](axes) is figure
    figure.draw_without_rendering()
    assert figure.axes == before and all(axis.has_data() for axis in np.ravel(axes))
    words = rf"`ax` must have {count} axes, got 3.*subplots\(1, {count}\).*leave `ax` out"
    with pytest.raises(ValueError, match=words):
        CALLS[name](Figure().subplots(1, 3))
    with pytest.raises(TypeError, match="`ax` must be a Axes, got <Figure"):
        CALLS[name](Figure())


@pytest.mark.parametrize("name", CALLS)
def test_notebooks_show_a_figure_and_nothing_keeps_it(name):
    from IPython.core.formatters import DisplayFormatter

    figure = CALLS[name](None)
    data, _ = DisplayFormatter().format(figure)
    assert data["image/png"].startswith(b"\x89PNG")
    gone = weakref.ref(figure)
    del figure, data
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("limits", "ticks"),
    [((0.9, 4), [1, 1.5, 2, 3]), ((0.9, 30), [1, 2, 5, 10, 20]), ((3e-4, 300), [1e-3, 1e-2, 0.1, 1, 10, 100])],
)
def test_log_scales_have_ticks_at_any_limits(limits, ticks):
    """Also at limits that are set after the plot."""
    figure = plots.norms(HISTORY)
    (axis,) = figure.axes
    axis.set_ylim(limits)
    figure.draw_without_rendering()
    shown = [float(y) for y in axis.get_yticks() if limits[0] <= y <= limits[1]]
    np.testing.assert_allclose(shown, ticks)


WITHOUT = """
import sys
import clipjax
assert not [name for name in sys.modules if name.startswith("matplotlib")]
assert clipjax.plots.weights
sys.modules["matplotlib"] = None
try:
    clipjax.plots.pareto({"a": (1, 2)})
except ImportError as error:
    print(error)
"""


def test_matplotlib_is_imported_by_the_first_plot_alone():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Figures need `matplotlib`: pip install 'clipjax[plots]'."


def test_plots_leave_settings_and_pyplot_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    for call in CALLS.values():
        call(None)
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_pareto_labels_overlap_neither_each_other_nor_the_border():
    points = {"a plain one": (150_000, 2.2), "another": (150_001, 2.2), "third": (150_002, 2.21), "small": (4_000, 2.5)}
    figure = plots.pareto(points)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 for box in boxes)
