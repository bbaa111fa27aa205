"""Leaves as rows: every index and permutation against NumPy, for floats and for the codes and scales of formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_format import on_format

from clipjax import dequantize, formats
from clipjax._exports import leaf_rows
from clipjax._maths import format_blocks

RNG = np.random.default_rng(0)
LAYERS, HEADS, SIZE, WIDTH = 3, 4, 16, 64
WHERE = "Leaf 'kernel'"
PERMUTATION = RNG.permutation(HEADS * SIZE)
INDICES = [None, 2, -1, slice(0, 32), slice(16, None, 2), (1, slice(32, 64))]


def stack(dtype=np.float32):
    return jnp.asarray(RNG.standard_normal((LAYERS, WIDTH, HEADS, SIZE), np.float32)).astype(dtype)


def reference(x, index, permutation=None):
    """[layers, inputs, heads, size] as the rows of a file."""
    x = np.asarray(x).transpose(0, 2, 3, 1)
    layer, part = index if isinstance(index, tuple) else (None, index) if isinstance(index, slice) else (index, None)
    x = x.reshape(-1, WIDTH) if layer is None else x[layer].reshape(-1, WIDTH)
    x = x if part is None else x[part]
    return x if permutation is None else x[permutation]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_floats_are_the_rows_of_the_leaf(index, dtype):
    x = stack(dtype)
    order = RNG.permutation(len(reference(x, index)))
    for permutation in (None, order, order.tolist()):
        picked = leaf_rows.pick(x, (0, 2, 3), index, permutation, WHERE)
        want = reference(x, index, permutation)
        found = leaf_rows.take(x, picked)
        assert (found.dtype, found.shape, picked.shape) == (want.dtype, want.shape, want.shape)
        np.testing.assert_array_equal(found, want)


def put_back(x, picked, part, of_scales=None):
    """Rows that are put back are where they were, and nothing else is written."""
    x, found = np.asarray(x), np.full(x.shape, np.nan)  # holds every code and scale
    leaf_rows.put(found, picked, part, of_scales)
    written = ~np.isnan(found)
    np.testing.assert_array_equal(found[written], x[written])
    assert written.sum() == part.size


FORMS = [formats.q4_0(), formats.q4_1(), formats.nvfp4(), formats.int4(None), formats.fp8_e4m3("array")]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_codes_and_scales_decode_to_the_rows_of_the_values(form, index):
    q = on_format(form, stack(), axis=(0, 2, 3))
    order = RNG.permutation(len(reference(q.codes, index)))
    picked = leaf_rows.with_blocks(leaf_rows.pick(q.codes, (0, 2, 3), index, order, WHERE), q, form, WHERE)
    put_back(q.codes, picked, leaf_rows.take(q.codes, picked))
    codes, scales = leaf_rows.take(q.codes, picked), [leaf_rows.take_scale(s, q.codes, picked) for s in q.scales]
    np.testing.assert_array_equal(codes, reference(q.codes, index, order))
    each = [s if s.ndim == 0 else s.repeat(WIDTH // s.shape[1], 1) for s in scales]
    whole = [s if s.ndim == 0 else np.broadcast_to(s, codes.shape) for s in each]
    np.testing.assert_array_equal(form.decode(codes, whole), reference(dequantize(q), index, order))


def test_blocks_of_several_outputs_stay_together():
    form = formats.fp8_e4m3((128, 128))
    q = on_format(form, jnp.asarray(RNG.standard_normal((2, 256, 256), np.float32)), axis=(0, 2))
    assert q.scales[0].shape == (2, 2, 2)

    def taken(index, permutation=None):
        picked = leaf_rows.with_blocks(leaf_rows.pick(q.codes, (0, 2), index, permutation, WHERE), q, form, WHERE)
        scales = leaf_rows.take_scale(q.scales[0], q.codes, picked)
        put_back(q.scales[0], picked, scales, of_scales=2)
        return scales

    scales = np.asarray(q.scales[0]).transpose(0, 2, 1)
    np.testing.assert_array_equal(taken(None), scales.reshape(4, 2))
    np.testing.assert_array_equal(taken(1), scales[1])
    np.testing.assert_array_equal(taken((1, slice(128, 256))), scales[1, 1:])
    turned = np.r_[np.arange(255, 127, -1), np.arange(128)]
    np.testing.assert_array_equal(taken(0, turned), scales[0, ::-1])
    interleaved = np.arange(256).reshape(2, 128).T.ravel()
    for index, permutation in ((slice(0, 64), None), (slice(64, 192), None), (0, interleaved)):
        with pytest.raises(ValueError, match=r"`rename` must keep rows of one block together.*128 outputs"):
            taken(index, permutation)


def test_default_outputs():
    """The last axis, but of a table that is looked up all others; what is no weight has no inputs."""
    for path, shape, want in (
        ("dense/kernel", (8, 4), (1,)),
        ("conv/kernel", (3, 3, 8, 4), (3,)),
        ("embedder/embedding", (8, 4), (0,)),
        ("layers/norm/scale", (3, 8), (0, 1)),
        ("layers/q/bias", (3, 2, 4), (0, 1, 2)),
        ("norm/weight", (8,), (0,)),
        ("temperature", (), ()),
    ):
        assert leaf_rows.outputs(None, path, jax.ShapeDtypeStruct(shape, jnp.float32)) == want
    assert leaf_rows.outputs((0, -1), "kernel", jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)) == (0, 2)


def test_blocks_along_another_axis_than_the_file_needs_are_refused():
    """Codes in blocks of 32 along one axis are no blocks along another one."""
    q = on_format(formats.q8_0(), jnp.zeros((64, 32)))
    assert leaf_rows.outputs(None, "dense/kernel", q) == leaf_rows.outputs(-1, "dense/kernel", q) == (1,)
    assert leaf_rows.outputs(1, "embed/embedding", q) == (1,)
    for path, axis in (("dense/kernel", 0), ("embed/embedding", None)):
        with pytest.raises(ValueError, match=r"`axis` must name the outputs of every leaf on a format, got \(0,\)"):
            leaf_rows.outputs(axis, path, q)


def test_an_axis_that_names_no_outputs_is_that_of_a_table():
    """So an analysis says of what is looked up, and of biases; a file has the rows of the one, all of the others."""
    for path, shape, want in (("wte", (96, 64), (0,)), ("embed/embedding", (96, 64), (0,)), ("q/bias", (4, 8), (0, 1))):
        assert leaf_rows.outputs((), path, jax.ShapeDtypeStruct(shape, jnp.float32)) == want
    assert format_blocks.resolve(formats.int8(None), (), "embed/embedding", jnp.zeros((96, 64))).counts == (96, 1)
    assert format_blocks.resolve(formats.int8(None), (), "wte", jnp.zeros((96, 64))).counts == (1, 1)
    q = on_format(formats.q8_0(), jnp.zeros((96, 64)), axis=(), path="wte")
    assert leaf_rows.own_outputs(q) == () and leaf_rows.outputs((), "wte", q) == leaf_rows.outputs(0, "wte", q) == (0,)
    across = on_format(formats.q8_0(), jnp.zeros((96, 16)), axis=(), path="wte")
    for leaf, axis, want in ((q, None, r"\(1,\)"), (q, 1, r"\(1,\)"), (across, (), r"\(0,\)")):
        with pytest.raises(ValueError, match=rf"outputs of every leaf on a format, got {want}.*leave the axes \(\)"):
            leaf_rows.outputs(axis, "wte", leaf)


def test_vectors_of_layers_and_scalars():
    """A layer of [layers, outputs] is [outputs], of [layers, inputs] it is [inputs], of [layers] a scalar."""
    x = jnp.arange(12.0).reshape(3, 4)
    for outputs in ((0, 1), (0,)):
        picked = leaf_rows.pick(x, outputs, 1, None, WHERE)
        assert leaf_rows.take(x, picked).tolist() == [4.0, 5.0, 6.0, 7.0] and picked.shape == (4,)
    assert leaf_rows.take(x[:, 0], leaf_rows.pick(x[:, 0], (0,), 2, None, WHERE)).shape == ()
    assert leaf_rows.take(x, leaf_rows.pick(x, (0, 1), (0, slice(1, 3)), [1, 0], WHERE)).tolist() == [2.0, 1.0]
    assert leaf_rows.take(jnp.float32(3), leaf_rows.pick(jnp.float32(3), (), None, None, WHERE)).shape == ()
    assert leaf_rows.take(jnp.zeros((0, 4)), leaf_rows.pick(jnp.zeros((0, 4)), (1,), None, None, WHERE)).shape == (4, 0)


@pytest.mark.parametrize(
    ("index", "permutation", "error"),
    [
        (3, None, "`rename` must pick a layer that there is, got 3"),
        (-4, None, "a layer that there is"),
        (slice(0, 193), None, "rows that there are"),
        (slice(5, 5), None, "rows that there are"),
        ((0, slice(0, 65)), None, "rows that there are"),
        (None, [0, 1], r"a permutation of the rows that it picks, got 'int64\[2\]'. .* 192 rows"),
        (0, [0] * 64, "a permutation"),
        (0, np.arange(64) + 0.5, "a permutation"),
        (0, np.arange(64.0), "a permutation.* as integers, or None"),
        (slice(0, 2), [False, True], r"a permutation of the rows that it picks, got 'bool\[2\]'"),
        (True, None, "must be one, got True"),
        ("0", None, "must be one, got '0'"),
        ((0, 1), None, r"must be one, got \(0, 1\)"),
    ],
)
def test_indices_that_do_not_fit(index, permutation, error):
    with pytest.raises((ValueError, TypeError), match=error):
        leaf_rows.pick(stack(), (0, 2, 3), index, permutation, WHERE)


def test_a_layer_lies_along_the_first_axis_though_it_is_an_input():
    """As by default, and by an analysis, which leaves out axes that a loop runs over."""
    x = jnp.asarray(RNG.standard_normal((3, 64, 8), np.float32))
    np.testing.assert_array_equal(leaf_rows.take(x, leaf_rows.pick(x, (2,), 1, None, WHERE)), np.asarray(x)[1].T)
    for form in (formats.q8_0(), formats.int4(None)):  # blocks of 32, and one scale for the inputs of all layers
        q = on_format(form, x)
        picked = leaf_rows.with_blocks(leaf_rows.pick(x, (2,), 1, None, WHERE), q, form, WHERE)
        scales = leaf_rows.take_scale(q.scales[0], q.codes, picked)
        put_back(q.scales[0], picked, scales, of_scales=3)
        wide = scales.repeat(64 // scales.shape[1], 1)
        np.testing.assert_array_equal(
            form.decode(leaf_rows.take(q.codes, picked), (wide,)), np.asarray(dequantize(q))[1].T
        )
    q = on_format(formats.q8_0(), jnp.zeros((4, 16, 8)))
    with pytest.raises(ValueError, match="`rename` must pick a layer of whole blocks, got 'q8_0'"):
        leaf_rows.with_blocks(leaf_rows.pick(q.codes, (2,), 1, None, WHERE), q, formats.q8_0(), WHERE)
