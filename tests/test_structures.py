"""Structures: what is removed together."""

import jax.numpy as jnp
import numpy as np
import pytest

from clipjax import structures

pytestmark = pytest.mark.usefixtures("strict")

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def reference_units(x, axis, reduce):
    """One value per index of the axis, kept with size 1 in the others."""
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return getattr(np, reduce)(x, axis=others, keepdims=True)


def test_element_is_every_weight_alone():
    element = structures.element()
    np.testing.assert_array_equal(element.reduce(X), X)
    assert element.whole and element.min_keep == 0
    element.check("any", jnp.ones(()))


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


def test_unit_of_a_vector_is_the_entry():
    np.testing.assert_array_equal(structures.unit().reduce(jnp.arange(3.0)), [0, 1, 2])


@pytest.mark.parametrize("axis", [1, -2])
def test_unit_check_names_the_leaf_and_its_rank(axis):
    with pytest.raises(ValueError, match=rf"`axis` must exist in every picked leaf, got {axis}.*'enc/w' has rank 1"):
        structures.unit(axis).check("enc/w", jnp.ones(3))
