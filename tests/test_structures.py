"""Structures: what is removed together."""

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import structures
from clipjax._maths import ranking

pytestmark = pytest.mark.usefixtures("strict")

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def reference_units(x, axis, reduce):
    """One value per index of the axis, kept with size 1 in the others."""
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return getattr(np, reduce)(x, axis=others, keepdims=True)


def test_element_is_every_weight_alone():
    element = structures.element()
    np.testing.assert_array_equal(element.reduce(X), X)
    assert element.whole and element.min_keep == 1 == structures.block(2, 2).min_keep
    element.check(jnp.ones(()), jnp.ones(()))


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
def test_unit_reduces_all_other_axes(axis, reduce):
    unit = structures.unit(axis, reduce=reduce)
    got = unit.reduce(jnp.asarray(X))
    np.testing.assert_allclose(got, reference_units(X, axis, reduce), rtol=1e-5, atol=1e-6)
    assert not unit.whole and unit.min_keep == 1


def test_unit_mean_does_not_prefer_large_units():
    """A conv and a dense kernel of equal weights score alike: the mean, not the sum."""
    unit = structures.unit()
    assert float(unit.reduce(jnp.ones((3, 3, 8, 2))).max()) == float(unit.reduce(jnp.ones((5, 2))).max()) == 1


def test_unit_of_stacked_layers_has_an_entry_for_each_layer():
    got = structures.unit(axis=(0, -1)).reduce(jnp.asarray(X))
    np.testing.assert_allclose(got, X.mean(1, keepdims=True), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`axis` must name different axes of every picked leaf, got \(0, -2\).*'w'"):
        structures.unit(axis=(0, -2)).check(*[{"w": jnp.ones((2, 3))}] * 2)
    with pytest.raises(ValueError, match=r"`axis` must name an axis, got \(\)"):
        structures.unit(axis=())


def test_unit_of_a_vector_is_the_entry():
    np.testing.assert_array_equal(structures.unit().reduce(jnp.arange(3.0)), [0, 1, 2])


@pytest.mark.parametrize("axis", [1, -2])
def test_unit_check_names_the_leaf_and_its_rank(axis):
    with pytest.raises(ValueError, match=rf"`axis` must exist in every picked leaf, got {axis}.*'enc/w' has rank 1"):
        structures.unit(axis).check(*[{"enc": {"w": jnp.ones(3)}}] * 2)


def reference_n_of_m(scores, n, m, axis):
    """NVIDIA's rule by a stable sort of every group; the last group may be short."""
    moved = np.moveaxis(scores, axis, -1)
    mask = np.zeros(moved.shape, bool)
    for index in np.ndindex(moved.shape[:-1]):
        for first in range(0, moved.shape[-1], m):
            group = moved[index][first : first + m]
            for i in np.argsort(-group, kind="stable")[:n]:
                mask[(*index, first + i)] = True
    return np.moveaxis(mask, -1, axis)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 4), (1, 3), (3, 8)])
def test_n_of_m_keeps_the_best_of_every_group(n, m, axis):
    """Mishra et al., 2021; on any axis, with a padded last group and ties to the earlier position."""
    scores = np.round(np.random.default_rng(1).normal(size=(5, 6, 7)) * 2).astype(np.float32)
    got = structures.n_of_m(n, m, axis).keep(ranking.order(jnp.asarray(scores)))
    np.testing.assert_array_equal(got, reference_n_of_m(scores, n, m, axis))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2, 0), (1.5, 4)])
def test_n_of_m_out_of_range(n, m):
    with pytest.raises(ValueError, match=r"^`[nm]` must be .+, got .+\. .+\.$"):
        structures.n_of_m(n, m)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 1), (2, 5, 7)])
@pytest.mark.parametrize(("height", "width"), [(2, 3), (4, 4), (1, 1)])
def test_block_scores_are_means_and_expand_covers_the_leaf(shape, height, width):
    """The last blocks may be smaller: their mean is over the entries that there are."""
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    block = structures.block(height, width)
    units = np.asarray(block.reduce(jnp.asarray(x)))
    for i, j in np.ndindex(units.shape[-2:]):
        part = x[..., i * height : (i + 1) * height, j * width : (j + 1) * width]
        np.testing.assert_allclose(units[..., i, j], part.mean((-2, -1)), rtol=1e-5, atol=1e-6)
    rows, columns = np.arange(shape[-2]) // height, np.arange(shape[-1]) // width
    np.testing.assert_array_equal(block.expand(jnp.asarray(units), x), units[..., rows[:, None], columns[None]])


def test_block_needs_two_axes():
    with pytest.raises(ValueError, match=r"`axis` must exist in every picked leaf.*'b' has rank 1"):
        structures.block(2, 2).check(*[{"b": jnp.ones(3)}] * 2)
