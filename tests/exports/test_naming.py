"""`rename`: which tensors a tree becomes, with their names checked before anything is written."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from on_format import on_format

import clipjax
from clipjax import formats
from clipjax._exports import tensor_names

X = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32), np.float32))


def tensors(params, rename=None, opt_state=None, axis=None):
    return tensor_names.tensors(params, opt_state, rename, axis, ".")


def test_paths_are_names_and_contracted_axes_come_last():
    q = on_format(formats.q8_0(), X)
    params = {"a": [{"kernel": X}, None, {"kernel": q}], "embed": {"embedding": X}, "scale": jnp.ones(4, jnp.bfloat16)}
    found = {t.name: t for t in tensors(params)}
    assert list(found) == ["a.0.kernel", "a.2.kernel", "embed.embedding", "scale"]
    assert found["a.0.kernel"].shape == (32, 64) and found["embed.embedding"].shape == (64, 32)
    np.testing.assert_array_equal(found["a.0.kernel"].values(), np.asarray(X).T)
    assert found["scale"].dtype == jnp.bfloat16 == found["scale"].values().dtype
    codes, (scales,) = found["a.2.kernel"].codes()
    assert (codes.shape, scales.shape, found["a.2.kernel"].form) == ((32, 64), (32, 2), formats.q8_0())
    np.testing.assert_array_equal(found["a.2.kernel"].values(), np.asarray(clipjax.dequantize(q)).T)


def test_rename_sees_shapes_and_gives_names_or_parts():
    seen = {}

    def rename(path, leaf):
        seen[path] = (leaf.shape, leaf.dtype)
        halves = [("gate", slice(0, 16), None), ("up", slice(16, 32), None)]
        return {"gate_up/kernel": halves, "head": "output"}.get(path)

    params = {"gate_up": {"kernel": on_format(formats.q8_0(), X)}, "head": X.astype(jnp.float16), "rest": jnp.int32(3)}
    found = tensors(params, rename)
    assert [(t.name, t.shape) for t in found] == [("gate", (16, 64)), ("up", (16, 64)), ("output", (32, 64))]
    assert seen == {"gate_up/kernel": ((64, 32), jnp.float32), "head": ((64, 32), jnp.float16), "rest": ((), jnp.int32)}
    np.testing.assert_array_equal(found[1].codes()[0], np.asarray(params["gate_up"]["kernel"].codes).T[16:])


def test_names_that_divide_a_leaf_leave_no_row_out():
    """One name may cut rows off, as those that pad a vocabulary, and layers may be left out."""
    x = jnp.zeros((3, 64, 32))
    for listed, error in (
        ([("a", slice(0, 16), None), ("b", slice(16, 24), None)], r"every row that it divides, got 24. Leaf 'k' of .*"),
        ([("a", (1, slice(0, 8)), None), ("b", (1, slice(16, None)), None)], "got 24.* has 32 rows of layer 1, which"),
    ):
        with pytest.raises(ValueError, match=error):
            tensors({"k": x}, lambda path, leaf, listed=listed: listed)
    parts = [("a", (1, slice(None, None, 2)), None), ("b", (1, slice(1, None, 2)), None), ("c", (2, slice(0, 8)), None)]
    assert [t.shape for t in tensors({"k": x}, lambda path, leaf: parts)] == [(16, 64), (16, 64), (8, 64)]


def test_boxes_of_nnx_and_axes_by_leaf():
    model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    coded = jax.tree.map(lambda x: on_format(formats.q8_0(), x) if x.ndim > 1 else x, state)
    for tree in (state, coded, nnx.to_pure_dict(state), nnx.to_pure_dict(coded)):
        assert [(t.name, t.shape) for t in tensors(tree)] == [("bias", (32,)), ("kernel", (32, 64))]
    found = tensors(state, axis=clipjax.per_leaf(lambda path, leaf: 0 if leaf.ndim > 1 else None))
    assert [t.shape for t in found] == [(32,), (64, 32)]


def test_leaves_on_a_grid_are_their_values():
    """A file of another tool does not know the steps of a grid: the values are in it, in the dtype of the params."""
    tx = clipjax.fake_quantize(4)
    params = {"kernel": X.astype(jnp.bfloat16)}
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    (found,) = tensors(params, opt_state=state)
    assert found.form is None and found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.values(), np.asarray(params["kernel"]).T)
    (other,) = tensors(clipjax.quantized(params, state))
    np.testing.assert_array_equal(other.values().astype(jnp.bfloat16), np.asarray(params["kernel"]).T)
    with pytest.raises(ValueError, match="`params` must be on the grid"):
        tensors({"kernel": params["kernel"] * 1.1}, opt_state=state)
    with pytest.raises(ValueError, match="`params` must hold arrays where there is an `opt_state`"):
        tensors(clipjax.quantized(params, state), opt_state=state)


def test_a_state_from_before_start_is_refused():
    """Its params are floats still, which a file of the format would be expected not to have."""
    tx = clipjax.fake_quantize(formats.q8_0(), start=10)
    with pytest.raises(ValueError, match=r"`opt_state` must have quantized a leaf.*before `start`.*hold_once"):
        tensors({"kernel": X}, opt_state=tx.init({"kernel": X}))


@pytest.mark.parametrize(
    ("rename", "error"),
    [
        (lambda path, leaf: "one", "`rename` must return each name once, got 'one'. Leaves 'a' and 'b'"),
        (lambda path, leaf: [("x", None, None)] * 2, "each name once"),
        (lambda path, leaf: 3, "`rename` must return names, got 3 for leaf 'a'"),
        (lambda path, leaf: "", "must return names"),
        (lambda path, leaf: [("x", None)], "must return names"),
        (lambda path, leaf: [(None, None, None)], "must return names"),
        (lambda path, leaf: ("x", None, None), "must return names"),
        (lambda path, leaf: [("x", 99, None)], "Leaf 'a' of shape"),
        (lambda path: path, "`rename` must be a function of"),
        ("blk", r"`rename` must be a function \(path, leaf\), got 'blk'"),
    ],
)
def test_a_rename_that_returns_something_else(rename, error):
    with pytest.raises((ValueError, TypeError), match=error):
        tensors({"a": X, "b": X}, rename)


def test_keys_and_complex_numbers_are_no_weights():
    for leaf in (jax.random.key(0), jnp.ones(2, jnp.complex64)):
        with pytest.raises(TypeError, match=r"Leaves must be real arrays, got .* at 'k'"):
            tensors({"k": leaf})
        assert tensors({"k": leaf}, lambda path, leaf: None) == []
