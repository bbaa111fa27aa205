"""Files of earlier versions, kept as they were written: every one loads, bit for bit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same_bits import bits, same

import clipjax

SAVED = pathlib.Path(__file__).parent / "saved"


def chain():
    """Params of a chain that clips, clamps, prunes and quantizes; the bf16 kernel is kept as its bits."""
    with np.load(SAVED / "chain.npz") as arrays:
        dense = {"bias": arrays["dense.bias"], "kernel": arrays["dense.kernel"]}
        return {"dense": dense, "out": {"kernel": arrays["out.kernel"].view(jnp.bfloat16)}}


def groups():
    """A kernel with a step for each group of rows, and one of few values."""
    with np.load(SAVED / "groups.npz") as arrays:
        return dict(arrays)


def containers():
    """Every container, and dtypes of all widths."""
    return {
        "list": [np.arange(5, dtype=np.int16), None, (np.float64(2.5), np.array([True, False]))],
        "h": np.array([1, -0.0, np.nan, np.inf], np.float16),
        "a/b": np.asarray(jnp.array([[1, -2], [3, 7]], jnp.int4)),
        "z": {3: np.ones(2, np.uint8), 7: ()},
        "c": np.array([1 + 2j], np.complex64),
        "empty": np.zeros((0, 3), np.float32),
    }


TREES = {"chain": chain, "groups": groups, "containers": containers}


@pytest.mark.parametrize("name", TREES)
def test_a_file_of_the_first_version_loads(name):
    expected = TREES[name]()
    same(clipjax.load(SAVED / f"{name}.safetensors"), expected)
    same(clipjax.load(SAVED / f"{name}.safetensors", like=expected), expected)


def test_codes_and_steps_are_found_in_it():
    back, expected = clipjax.load(SAVED / "groups.safetensors", dequantize=False), groups()
    q = back["groups"]
    assert (q.bits, q.axis, q.group, q.step.shape) == (4, -1, 32, (4, 24))
    assert bits(clipjax.dequantize(q)) == bits(expected["groups"])
    assert bits(back["book"]) == bits(expected["book"])


@pytest.mark.parametrize("dequantize", [True, False])
def test_integers_of_the_first_version_load_into_a_template(dequantize):
    """That version wrote an array for each field of a `Quantized`; `like` says that they belong together."""
    with np.load(SAVED / "integers.npz") as arrays:
        params = {
            "a": {"bias": np.ones(12, np.float32), "kernel": arrays["a.kernel"]},
            "b": {"kernel": arrays["b.kernel"]},
        }
    group = clipjax.per_leaf(lambda path, leaf: 4 if path == "a/kernel" else None)
    tx = clipjax.fake_quantize(4, axis=-1, group=group)
    _, state = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    like = clipjax.quantized(params, state)
    loaded = clipjax.load(SAVED / "integers.safetensors", like=like, dequantize=dequantize)
    assert loaded["a"]["kernel"].group == 4 and loaded["b"]["kernel"].bits == 4
    for layer in "ab":
        np.testing.assert_array_equal(clipjax.dequantize(loaded[layer]["kernel"]), params[layer]["kernel"])
    assert clipjax.load(SAVED / "integers.safetensors")["a"]["kernel"]["codes"].dtype == jnp.int8
