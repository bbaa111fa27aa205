"""Structures: what is removed together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import clipjax
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


def flattened_reference(scores, n, m, axes):
    """The rule along the axes made one, in their order, the last one running fastest."""
    rest = [i for i in range(scores.ndim) if i not in [a % scores.ndim for a in axes]]
    moved = scores.transpose(*axes, *rest)
    flat = moved.reshape(-1, *[scores.shape[i] for i in rest])
    mask = reference_n_of_m(flat, n, m, 0).reshape(moved.shape)
    return mask.transpose(np.argsort([*[a % scores.ndim for a in axes], *rest]))


@pytest.mark.parametrize("axes", [(0,), (0, 1), (1, 0), (0, 2), (-1, -4), (-4, -3, -2), (2, 0, 3)], ids=str)
def test_n_of_m_along_several_axes_flattens_them_in_their_order(axes):
    """Groups inside of the last axes, groups that cross its end, a padded last group, axes that are not adjacent."""
    scores = np.round(np.random.default_rng(1).normal(size=(4, 3, 6, 5)) * 2).astype(np.float32)
    for n, m in ((1, 2), (2, 4), (2, 3), (3, 8)):
        got = structures.n_of_m(n, m, axes).keep(ranking.order(jnp.asarray(scores)))
        np.testing.assert_array_equal(got, flattened_reference(scores, n, m, axes))


# The kernels of an attention, one of a convolution, and one of a position table that nothing is contracted with.
AXES = {"q": (-3,), "out": (-3, -2), "conv": (-4, -3, -2), "l_0": (-2,), "l_1": (-1,), "table": ()}
SHAPES = {"q": (8, 2, 6), "out": (2, 6, 5), "conv": (3, 3, 2, 5), "l_0": (8, 8), "l_1": (8, 8), "table": (4, 4)}
INPUTS = clipjax.per_leaf(lambda path, leaf: AXES[path])
OUTPUTS = clipjax.per_leaf(lambda path, leaf: tuple(a for a in range(-leaf.ndim, 0) if a not in AXES[path]))


def kernels():
    rng = np.random.default_rng(3)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items() if AXES[name]}


def test_n_of_m_with_axes_of_each_leaf():
    """In an update too, where layers that are alike but for their axes are no stack; and a resumed run goes on."""
    params = {name: jnp.asarray(x, jnp.bfloat16) for name, x in kernels().items()} | {"none": None}
    scores = {name: np.float32(jnp.abs(x)) for name, x in params.items() if x is not None}
    tx = clipjax.prune_mask(structure=structures.n_of_m(2, 4, axis=INPUTS))
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        again, later = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    masks = clipjax.make_mask(scores, structure=structures.n_of_m(2, 4, axis=INPUTS))
    for name, x in scores.items():
        expected = flattened_reference(x, 2, 4, AXES[name])
        np.testing.assert_array_equal(state.projection.mask[name], expected)
        np.testing.assert_array_equal(masks[name], expected)
    assert state.projection.asked == later.projection.asked >= 0
    # -2 of a matrix is its axis 0: the same mask; other axes are another one, made anew.
    pair = {"l_0": params["l_0"]}
    asked = [clipjax.prune_mask(structure=structures.n_of_m(2, 4, axis=a)) for a in (-2, (0,), INPUTS, -1)]
    made = [tx.update(pair, tx.init(pair), pair)[1].projection.asked for tx in asked]
    assert made[0] == made[1] == made[2] != made[3]


@pytest.mark.parametrize("structure", [structures.n_of_m(2, 4, axis=INPUTS), structures.unit(axis=INPUTS)])
def test_a_leaf_without_axes_is_named_and_can_be_left_out(structure):
    params = {name: jnp.ones(SHAPES[name]) for name in ("l_0", "table")}
    sparsity = None if structure.keep else 0.5
    with pytest.raises(ValueError, match=r"`axis` must name an axis .*, got \(\). Leaf 'table' .*analysis\.kernels"):
        clipjax.prune_mask(sparsity, structure=structure).init(params)
    clipjax.prune_mask(sparsity, structure=structure, where=lambda path, leaf: path != "table").init(params)
    wrong = clipjax.per_leaf(lambda path, leaf: (0, -2))
    with pytest.raises(ValueError, match=r"`axis` must name different axes .*'l_0'"):
        clipjax.make_mask({"l_0": jnp.ones((8, 8))}, structure=structures.n_of_m(2, 4, axis=wrong))


def test_unit_with_axes_of_each_leaf_counts_the_entries_of_all_of_them():
    """Of f32[d, heads, hd] the units are heads * hd, of which round(sparsity * n) go."""
    scores = {name: np.abs(x) for name, x in kernels().items()}
    masks = clipjax.make_mask(scores, 0.5, structure=structures.unit(axis=OUTPUTS), scope="leaf")
    for name, x in scores.items():
        inputs = tuple(a % x.ndim for a in AXES[name])
        units = x.mean(inputs, keepdims=True, dtype=np.float32)
        expected = units >= np.sort(units.ravel())[round(0.5 * units.size)]
        np.testing.assert_array_equal(masks[name], np.broadcast_to(expected, x.shape))
    stack = np.float32([[[1, 9]], [[2, 8]]])
    either = structures.unit(axis=clipjax.per_leaf(lambda path, leaf: (0, 2)))
    np.testing.assert_array_equal(clipjax.make_mask(stack, 0.75, structure=either), [[[0, 1]], [[0, 0]]])


MOVES = ("all-gather", "all-to-all", "collective-permute", " sort(", " gather(", " scatter(")


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("spec", "axes", "moves"),
    [
        (P(None, None, "x"), (0, 1), False),
        (P("x"), (0, 1), False),  # groups of 4 lie in a head
        (P(None, "x"), (0, 1), True),  # a shard splits them
        (P(None, None, "x"), (1, 0), False),
        (P("x", None, "y"), (2, 0), True),
    ],
    ids=str,
)
def test_n_of_m_of_sharded_arrays(kind, spec, axes, moves):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    scores = np.float32(np.random.default_rng(4).normal(size=(4, 8, 8)))
    make = jax.jit(functools.partial(clipjax.make_mask, structure=structures.n_of_m(2, 4, axes)))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(scores, jax.NamedSharding(mesh, spec))
        mask, text = make(sharded), make.lower(sharded).compile().as_text()
    np.testing.assert_array_equal(mask, flattened_reference(scores, 2, 4, axes))
    assert moves or not [word for word in MOVES if word in text]
    if kind == jax.sharding.AxisType.Explicit:
        assert mask.sharding.is_equivalent_to(sharded.sharding, 3)


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
