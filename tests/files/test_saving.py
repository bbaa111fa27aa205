"""The small file keeps every bit of every leaf, whatever the tree, the dtype and the values."""

import collections
import os
import subprocess
import sys

import equinox as eqx
import flax.core
import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from same_bits import bits, same

import clipjax
from clipjax._files import leaf_codec
from clipjax._maths.grids import short

DTYPES = list(leaf_codec.DTYPES.values())
Pair = collections.namedtuple("Pair", "first second")
RNG = np.random.default_rng(0)


def round_trip(tree, **kwargs):
    return clipjax.unpack(clipjax.pack(tree), **kwargs)


@st.composite
def leaves(draw):
    """Arrays of any dtype made of any bits: few of them or many, sorted into columns or not, or k * s."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    most = 2 if dtype.kind == "b" else 16 if dtype.name in ("int4", "uint4", "float4_e2m1fn") else 256
    most = 4 if dtype.name in ("int2", "uint2") else most
    raw = lambda *size: rng.integers(0, most, (*size, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    kind = draw(st.sampled_from(["any", "few", "sparse", "grid", "columns"]))
    if kind == "any" or 0 in shape:
        return raw(*shape)
    if kind in ("grid", "columns") and dtype.name in ("float32", "float16", "bfloat16"):
        steps = 1 if kind == "grid" or not shape else shape[-1]
        step = np.asarray(short(jnp.asarray(rng.uniform(0.01, 2, steps), jnp.float32), 4))
        return (rng.integers(-7, 8, shape) * step).astype(np.float32).astype(dtype).reshape(shape)
    book = raw(draw(st.integers(1, 5)))
    chosen = book[rng.integers(0, book.size, shape)]
    return np.asarray(chosen if kind == "few" else np.where(rng.random(shape) < 0.2, chosen, np.zeros((), dtype)))


KEYS = st.one_of(st.text(max_size=6), st.sampled_from(["a/b", "~", "", "__metadata__", "~1", "kernel"]))
TREES = st.recursive(
    st.one_of(leaves(), st.none()),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(st.integers(-3, 3), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=6,
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(TREES)
def test_any_tree_comes_back_bit_for_bit(tree):
    same(round_trip(tree), tree)
    same(round_trip(tree, like=tree), tree)


def test_keys_with_slashes_are_other_leaves_than_nested_ones():
    tree = {"a/b": np.zeros(2), "a": {"b": np.ones(2)}, "a~1b": np.ones(3)}
    same(round_trip(tree), tree)
    same(round_trip(tree, like=tree), tree)


def grid(shape, bits, axis=None, dtype=np.float32, zeros=0.0, group=1):
    """An array that is k * s, with the codes and the step."""
    groups = (shape[0] // group, *shape[1:]) if group > 1 else shape[-1:] if axis else ()
    step = np.asarray(short(jnp.asarray(RNG.uniform(0.05, 0.2, groups), jnp.float32), bits))
    codes = np.clip(np.rint(RNG.normal(size=shape) * 2 ** (bits - 2)), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) + 0.0
    codes = np.where(RNG.random(shape) < zeros, 0, codes).astype(np.float32)
    return codes.astype(int), step, (codes * np.repeat(step, group, 0) if group > 1 else codes * step).astype(dtype)


LARGE = {
    "raw": lambda n: RNG.normal(size=n).astype(np.float32),
    "4_bit": lambda n: grid((n // 1000, 1000), 4)[2],
    "per_column": lambda n: grid((n // 1000, 1000), 4, axis=-1)[2],
    "pruned": lambda n: np.where(RNG.random(n) < 0.9, 0, RNG.normal(size=n)).astype(np.float32),
    "1_bit": lambda n: np.where(RNG.random(n) < 0.5, np.float32(0.3), np.float32(-0.3)),
    "zeros": lambda n: np.zeros(n, np.float32),
    "bfloat16": lambda n: RNG.normal(size=n).astype(jnp.bfloat16),
    "minus_zero_and_nan": lambda n: np.where(
        RNG.random(n) < 0.5, np.float32(-0.0), np.uint32(0x7FC00123).view(np.float32)
    ),
    "codes": lambda n: RNG.integers(-5, 5, n).astype(np.int8),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_leaf_comes_back(name):
    x = LARGE[name](300_000)
    same(round_trip({name: x}, max_bytes=1 << 24), {name: x})


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_ten_million_entries_come_back(name):
    x = LARGE[name](10_000_000)
    same(round_trip({name: x}), {name: x})


def test_signalling_nan_payloads_and_minus_zero():
    raw = np.array([0x7F800001, 0xFFC12345, 0x80000000, 0, 0x7F800000, 1], np.uint32).view(np.float32)
    assert bits(round_trip(raw)) == bits(raw)
    many = np.repeat(raw, 500).reshape(60, 50)
    assert len(clipjax.pack(many)) < many.nbytes / 4
    assert bits(round_trip(many)) == bits(many)


def test_grid_never_eats_the_sign_of_zero():
    """-0 is no code of a grid: code 0 is +0."""
    x = grid((50, 40), 4)[2]
    x[x == 0] = -0.0
    assert np.signbit(x[x == 0]).all()
    assert bits(round_trip(x)) == bits(x)


def test_64_bit_leaves_come_back_as_numpy():
    tree = {"count": np.int64(2**40), "x": np.array([1 / 3, np.nan])}
    back = round_trip(tree)
    assert isinstance(back["x"], np.ndarray) and back["x"].flags.writeable
    same(back, tree)


def test_python_numbers_come_back_as_arrays():
    assert round_trip({"a": True, "b": 2.5})["b"] == 2.5


def test_frozen_dict_named_tuple_and_linen_boxes_through_like():
    params = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))).init(
        jax.random.key(0), jnp.ones((1, 4))
    )["params"]
    tree = Pair(flax.core.freeze({"x": params}), jnp.arange(3))
    same(round_trip(tree, like=tree), tree)
    assert sorted(round_trip(tree)["first"]["x"]) == ["bias", "kernel"]  # without the box's field


def test_nnx_state_through_like():
    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    back = round_trip(state, like=jax.tree.map(jnp.zeros_like, state))
    same(back, state)
    assert nnx.merge(graph, back)(jnp.ones((1, 4))).shape == (1, 3)
    assert sorted(round_trip(state)) == ["bias", "kernel"]


def test_keys_of_an_nnx_model_are_refused_with_both_ways_out():
    """The state of a model with Dropout has the key of its random stream."""
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    with pytest.raises(TypeError, match=r"PRNG key at '.*key'\..*`nnx\.state\(model, nnx\.Param\)`.*key_data\(key\)"):
        clipjax.pack(nnx.state(model))
    same(round_trip(nnx.state(model, nnx.Param), like=nnx.state(model, nnx.Param)), nnx.state(model, nnx.Param))
    keys = jax.random.split(jax.random.key(3), 2)
    data = round_trip({"key": jax.random.key_data(keys)})["key"]
    assert data.dtype == jnp.uint32 and (jax.random.wrap_key_data(data) == keys).all()


def test_equinox_module_through_like():
    model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"must be arrays, got .* at 'activation'"):
        clipjax.pack(model)
    other = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(1))
    back = round_trip(eqx.filter(model, eqx.is_array), like=other)
    np.testing.assert_array_equal(back(jnp.ones(3)), model(jnp.ones(3)))


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"a": jnp.zeros(3)}, "have the leaves of the file, got .*'b'"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(2), "c": jnp.zeros(2)}, "leaves of the file, got .*'c'"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(3)}, "shapes and dtypes, got .*float32.* at 'b'"),
        ({"a": jnp.zeros(3), "b": jax.ShapeDtypeStruct((2,), jnp.int32)}, "shapes and dtypes, got .*int32"),
    ],
)
def test_like_must_fit(like, words):
    with pytest.raises(ValueError, match=words):
        round_trip({"a": jnp.zeros(3), "b": jnp.zeros(2)}, like=like)


@pytest.mark.parametrize("leaf", ["text", object(), jax.random.key(0), np.array(["a"]), np.array([None])])
def test_what_is_no_array_is_refused(leaf):
    with pytest.raises(TypeError, match="at 'a/b'"):
        clipjax.pack({"a": {"b": leaf}})


def test_leaves_go_where_they_shall_be():
    mesh = jax.make_mesh((8,), ("x",))
    rows, everywhere = jax.NamedSharding(mesh, jax.P("x")), jax.NamedSharding(mesh, jax.P())
    tree = {"bias": jnp.arange(5.0), "kernel": jnp.asarray(grid((16, 4), 4, axis=-1)[2])}
    for sharding in ({"bias": everywhere, "kernel": rows}, lambda path, x: rows if x.shape == (16, 4) else everywhere):
        back = round_trip(tree, sharding=sharding)
        same(back, tree)
        assert back["kernel"].sharding == rows and back["bias"].sharding == everywhere
        assert round_trip(tree, sharding=sharding, dequantize=False)["kernel"].codes.sharding == rows
    assert round_trip(tree, sharding=jax.devices()[3])["bias"].devices() == {jax.devices()[3]}


@pytest.mark.parametrize(
    ("kwargs", "dtype", "axis", "group"),
    [
        ({"bits": 4}, jnp.int8, None, None),
        ({"bits": 8}, jnp.int8, None, None),
        ({"bits": 10}, jnp.int16, None, None),
        ({"bits": 4, "axis": -1}, jnp.int8, -1, None),
        ({"bits": 4, "axis": -1, "group": 32}, jnp.int8, -1, 32),
        ({"bits": 4, "dtype": jnp.bfloat16}, jnp.int8, None, None),
        ({"bits": 4, "axis": -1, "dtype": jnp.bfloat16}, jnp.int8, -1, None),
        ({"bits": 8, "dtype": np.float16}, jnp.int8, None, None),
        ({"bits": 4, "axis": -1, "zeros": 0.9}, jnp.int8, -1, None),
    ],
)
def test_codes_and_steps(kwargs, dtype, axis, group):
    """`dequantize=False` finds the grid from the values alone."""
    codes, step, x = grid((256, 96), **kwargs)
    q = round_trip(x, dequantize=False)
    assert (q.codes.dtype, q.axis, q.group) == (dtype, axis, group)
    assert bits(clipjax.dequantize(q.codes, q.step, x.dtype)) == bits(x)
    if x.dtype == np.float32:
        np.testing.assert_array_equal(q.codes, codes)
        np.testing.assert_array_equal(np.asarray(q.step).squeeze(), step)
        assert q.bits == kwargs["bits"]


def test_codes_that_are_not_symmetric_have_a_zero_point():
    codes = RNG.integers(-40, 200, (200, 100))
    x = (codes * np.float32(0.25)).astype(np.float32)
    q = round_trip(x, dequantize=False)
    assert q.codes.dtype == jnp.int8 and q.bits == 8
    np.testing.assert_array_equal(np.asarray(q.codes).astype(int) - int(q.zero_point), codes)


def test_codes_alone_where_there_is_a_grid():
    tree = {"bias": RNG.normal(size=8).astype(np.float32), "kernel": grid((64, 8), 4)[2], "ids": np.arange(9) % 2}
    back = round_trip(tree, dequantize=False)
    assert [k for k, v in back.items() if isinstance(v, clipjax.Quantized)] == ["kernel"]
    x = tree["kernel"].copy()
    x[0, 0] = 0.123
    assert not isinstance(round_trip(x, dequantize=False), clipjax.Quantized)
    assert bits(round_trip(x, dequantize=False)) == bits(x)


def test_the_grid_of_fake_quantize_is_found():
    tx = clipjax.fake_quantize(4, axis=-1)
    params = {"kernel": jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32)}
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    params = jax.tree.map(lambda p, u: p + u, params, updates)
    have, want = round_trip(params, dequantize=False)["kernel"], clipjax.quantized(params, state)["kernel"]
    np.testing.assert_array_equal(have.codes, want.codes)
    np.testing.assert_array_equal(have.step.ravel(), want.step.ravel())


def test_missing_coder_names_the_extra():
    code = (
        "import sys; sys.modules['constriction'] = None\n"
        "import clipjax, numpy as np\n"
        "clipjax.unpack(clipjax.pack(np.random.default_rng(0).normal(size=9)))\n"
        "try: clipjax.pack(np.arange(1000) % 7 % 3)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert "clipjax[files]" in done.stdout, done.stderr
