"""A `Quantized` in the tree that is saved: the same integers and steps come back, in no more bytes than the floats."""

import json
import struct

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from same_bits import bits, q, same

import clipjax
from clipjax import Quantized, __main__, steps
from clipjax._files import alphabets, saving, step_search

RNG = np.random.default_rng(0)


def round_trip(tree, dequantize=False, **kwargs):
    return clipjax.unpack(clipjax.pack(tree), dequantize=dequantize, **kwargs)


def metadata(data):
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]


CASES = {
    "one_step": lambda: q((30, 20)),
    "columns": lambda: q((30, 20), step=(1, 20), axis=1),
    "last_axis": lambda: q((30, 20), step=(1, 20), axis=-1),
    "rows": lambda: q((30, 20), step=(30, 1), axis=0),
    "no_axis_of_its_own": lambda: q((30, 20), step=(1, 1), axis=()),
    "stacked": lambda: q((3, 30, 20), step=(3, 1, 20), axis=(0, -1)),
    "groups": lambda: q((64, 20), step=(4, 20), axis=1, group=16),
    "stacked_groups": lambda: q((2, 64, 20), step=(2, 4, 20), axis=(0, 2), group=16),
    "kernel": lambda: q((3, 3, 8, 16), step=(1, 1, 1, 16), axis=3),
    "affine": lambda: q((30, 20), step=(1, 20), zero=(1, 20), axis=1),
    "affine_groups": lambda: q((64, 20), step=(4, 20), zero=(4, 20), axis=1, group=16),
    "affine_scalar": lambda: Quantized(
        jnp.arange(-7, 8, dtype=jnp.int8), jnp.float32(0.5), jnp.int32(-7), 4, None, None
    ),
    "large": lambda: q((800, 700), step=(1, 700), axis=1),
    "empty": lambda: q((0, 3), step=(1, 3), axis=1),
    "empty_columns": lambda: q((5, 0), step=(1, 0), axis=1),
    "scalar": lambda: q(()),
    "vector": lambda: q((9,)),
    "unbounded": lambda: q((30, 20), bits=None),
    "far_apart": lambda: Quantized(
        jnp.asarray([[-(2**30), 2**30, 5], [0, 1, 2**31 - 1]], jnp.int32),
        jnp.float32(1),
        jnp.int32(0),
        None,
        None,
        None,
    ),
    "far_apart_and_few": lambda: Quantized(
        jnp.asarray(RNG.choice([-(2**30), 3, 2**30], (40, 30)), jnp.int32),
        jnp.float32(1),
        jnp.int32(0),
        None,
        None,
        None,
    ),
    "few_of_many_levels": lambda: Quantized(
        jnp.asarray(RNG.choice([-30_000, 0, 30_000], (40, 30)), jnp.int16), jnp.float32(1), jnp.int32(0), 16, None, None
    ),
    "alike": lambda: Quantized(jnp.full((40, 30), 3, jnp.int8), jnp.ones((1, 30)), jnp.int32(0), 4, 1, None),
    "wider_codes": lambda: q((30, 20), kind="int32"),
    "unsigned_codes": lambda: Quantized(jnp.arange(8, dtype=jnp.uint8), jnp.float32(0.5), jnp.int32(3), 4, None, None),
    "int4_codes": lambda: Quantized(jnp.arange(-7, 8).astype(jnp.int4), jnp.float32(0.5), jnp.int32(0), 4, None, None),
    "format": lambda: q((8, 32), step=(8, 1), axis=0, group=32, format="q4_0"),
    "more_steps_than_codes": lambda: Quantized(
        jnp.arange(4, dtype=jnp.int8), jnp.ones(100), jnp.int32(0), 4, None, None, "f"
    ),
    "format_of_other_dtypes": lambda: Quantized(
        jnp.asarray(RNG.integers(0, 256, (8, 16)), jnp.uint8),
        jnp.asarray(RNG.uniform(size=(3, 8, 2)), jnp.float16),
        jnp.asarray(RNG.uniform(size=(8, 2)), jnp.bfloat16),
        4,
        -1,
        32,
        "größe",
    ),
    **{f"{b}_bits": lambda b=b: q((20, 15), bits=b, step=(1, 15), axis=1) for b in (1, 2, 8, 9, 16)},
}


@pytest.mark.parametrize("name", CASES)
def test_an_equal_quantized_comes_back(name, tmp_path):
    tree = {"a": CASES[name](), "b": [jnp.arange(3.0), None]}
    same(round_trip(tree), tree)
    same(round_trip(tree, like=tree), tree)
    clipjax.save(tmp_path / "net", tree)
    same(clipjax.load(tmp_path / "net", dequantize=False), tree)
    if tree["a"].format is None:
        same(round_trip(tree, dequantize=True), tree | {"a": clipjax.dequantize(tree["a"])})


def blocked(shape):
    """The shape of an array that broadcasts to another, block by block."""
    return tuple(int(RNG.choice([1, n, n // 2 or 1])) for n in shape[RNG.integers(0, len(shape) + 1) :])


def test_any_fields_come_back():
    """Shapes, steps, axes and groups at random."""
    for _ in range(60):
        shape = tuple(RNG.integers(0, 7, RNG.integers(0, 4)) * 2)
        axis = [None, -1, 0, (), (0, -1)][RNG.integers(5)]
        group = [None, 1, 128, 40_000][RNG.integers(4)]
        width = [None, *range(1, 17)][RNG.integers(17)]
        leaf = q(
            shape, width, blocked(shape), blocked(shape), axis, group, format=[None, "", "x" * 300][RNG.integers(3)]
        )
        same(round_trip([leaf]), [leaf])


def test_python_numbers_are_steps():
    leaf = round_trip(Quantized(jnp.array([1, 2], jnp.int8), 0.5, 0, 4, None, None))
    assert bits(leaf.step) == bits(np.float32(0.5)) and bits(leaf.zero_point) == bits(np.int32(0))


def test_it_is_a_leaf_wherever_it_stands():
    leaf, other = CASES["columns"](), CASES["affine"]()
    same(round_trip(leaf), leaf)
    tree = {"a/b": (leaf, [other, None]), "c": {3: {"codes": jnp.arange(3), "q": leaf}, 5: ()}}
    same(round_trip(tree), tree)
    boxed = flax.core.freeze({"kernel": nn.Partitioned(leaf, ("a", "b")), "bias": jnp.arange(2.0)})
    same(round_trip(boxed, like=boxed), boxed)
    same(round_trip(boxed), {"bias": jnp.arange(2.0), "kernel": leaf})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"bits": 4},
        {"bits": 5, "step": steps.minmax(), "axis": -1, "group": 8},
        {"bits": 3, "axis": -1, "dtype": jnp.bfloat16},
        {"bits": None, "step": 0.05},
    ],
)
def test_integers_of_a_trained_net(kwargs, monkeypatch):
    """`quantized` saved and loaded gives the params bit for bit, in their dtype, and the integers as they were."""
    dtype = kwargs.pop("dtype", jnp.float32)
    params = {"kernel": jnp.asarray(RNG.normal(size=(64, 40)), dtype), "bias": jnp.ones(40, dtype)}
    tx = clipjax.fake_quantize(**kwargs)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    integers = clipjax.quantized(params, state)
    assert isinstance(integers["kernel"], Quantized)
    same(round_trip(integers), integers)
    same(round_trip(integers, dequantize=True, like=params), params)
    assert len(clipjax.pack(integers)) <= len(clipjax.pack(params)) + 8
    monkeypatch.setattr(saving, "SMALL", -1)
    assert len(clipjax.pack(integers)) <= len(clipjax.pack(params))


def test_nothing_is_searched_for(monkeypatch):
    def search(*_):
        raise AssertionError("a step was searched for")

    monkeypatch.setattr(step_search, "steps", search)
    tree = {"a": CASES["columns"](), "b": CASES["affine_groups"]()}
    same(round_trip(tree), tree)
    with pytest.raises(AssertionError, match="searched"):
        clipjax.pack(np.arange(100, dtype=np.float32).repeat(3))


def test_only_files_with_a_quantized_are_of_the_second_or_third_version(listed):
    """Who knows the first version alone refuses such a file by that number; other files stay as they were."""
    assert metadata(clipjax.pack({"a": jnp.arange(3.0)}))["clipjax"] == "1"
    data = clipjax.pack({"a": CASES["columns"](), "b": jnp.arange(3.0)})
    assert metadata(data)["clipjax"] == "2"
    assert metadata(data)["leaves"].split()[0][8:] == "*30,20"
    scales = (jnp.zeros((1, 20), jnp.uint16),)
    formed = Quantized(jnp.zeros((32, 20), jnp.uint8), None, None, 4, (1,), 32, "q4_0", scales)
    data = clipjax.pack({"a": CASES["columns"](), "b": formed})
    assert metadata(data)["clipjax"] == "3"
    assert metadata(data)["leaves"].split()[1][8:] == "#32,20"


def test_other_leaves_come_back_as_they_were():
    """Who saved integers has chosen which leaves are some; a grid is found in a file of plain arrays alone."""
    plain = {"bias": jnp.ones(40), "kernel": clipjax.dequantize(CASES["one_step"]())}
    assert all(isinstance(x, Quantized) for x in round_trip(plain).values())
    tree = plain | {"a": CASES["one_step"]()}
    same(round_trip(tree), tree)


def test_like_is_any_tree_with_these_leaves():
    leaf = CASES["columns"]()
    tree = {"a": leaf, "b": jnp.arange(3.0)}
    floats = tree | {"a": clipjax.dequantize(leaf)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    for like in (tree, floats, shapes, jax.eval_shape(lambda: floats)):
        same(round_trip(tree, like=like), tree)
        same(round_trip(tree, like=like, dequantize=True), floats)
    half = flax.core.freeze({"a": jax.ShapeDtypeStruct((30, 20), jnp.bfloat16), "b": jnp.zeros(3)})
    back = round_trip(tree, like=half, dequantize=True)
    assert bits(back["a"]) == bits(clipjax.dequantize(leaf, dtype=jnp.bfloat16)) and isinstance(back, type(half))
    same(round_trip(floats, like=tree, dequantize=True), floats)  # a template of integers for a file of floats


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"a": jnp.zeros((30, 20)), "b": jnp.zeros(3)}, "leaves of the file, got .*'b'"),
        ({"b": CASES["columns"]()}, "leaves of the file, got .*'a', 'b'"),
        ({"a": jnp.zeros((20, 30))}, r"float32'.* at 'a'"),
        ({"a": jnp.zeros((30, 20), jnp.int8)}, "int8'.* at 'a'"),
        ({"a": CASES["vector"]()}, "Quantized'.* at 'a'"),
    ],
)
@pytest.mark.parametrize("dequantize", [True, False])
def test_like_must_fit(like, words, dequantize):
    with pytest.raises(ValueError, match=words):
        round_trip({"a": CASES["columns"]()}, like=like, dequantize=dequantize)
    if "a" in like and isinstance(like["a"], Quantized):
        with pytest.raises(ValueError, match=r"Quantized'.* at 'a'"):  # no floats
            round_trip({"a": jnp.arange(9)}, like=like, dequantize=dequantize)


def test_codes_go_where_the_leaf_shall_be():
    mesh = jax.make_mesh((8,), ("x",))
    rows, everywhere = jax.NamedSharding(mesh, jax.P("x")), jax.NamedSharding(mesh, jax.P())
    tree = {"a": q((64, 20), step=(4, 20), axis=1, group=16), "b": jnp.arange(5.0)}
    of_fields = Quantized(rows, everywhere, everywhere, 4, 1, 16)
    by_shape = lambda path, x: rows if x.shape == (64, 20) else everywhere
    for sharding in ({"a": rows, "b": everywhere}, by_shape, {"a": of_fields, "b": everywhere}):
        back = round_trip(tree, sharding=sharding)
        same(back, tree)
        assert back["a"].codes.sharding == rows and back["b"].sharding == everywhere
        assert round_trip(tree, sharding=sharding, dequantize=True)["a"].sharding == rows
    back = round_trip(tree, sharding=jax.devices()[3])
    assert back["a"].codes.devices() == {jax.devices()[3]} and bits(clipjax.dequantize(back["a"])) == bits(
        clipjax.dequantize(tree["a"])
    )


def test_a_format_is_kept_and_not_guessed():
    leaf = CASES["format"]()
    with pytest.raises(ValueError, match="`codes` must have the scales of its format"):
        round_trip({"a": leaf}, dequantize=True)
    assert round_trip({"a": leaf})["a"].format == "q4_0"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"codes": jnp.zeros((4, 4))}, TypeError, "Codes must be whole, .*got float32, float32, int32. .* at 'x/y'"),
        ({"codes": jnp.zeros((4, 4), bool)}, TypeError, "got bool"),
        ({"codes": np.zeros((4, 4), np.int64)}, TypeError, "got int64"),
        ({"step": np.float64(1)}, TypeError, "got int8, float64"),
        ({"zero_point": jnp.float32(1)}, TypeError, "float32, float32"),
        ({"step": jnp.ones((3, 1))}, ValueError, r"must broadcast to \(4, 4\), got \(3, 1\) and \(\).* at 'x/y'"),
        ({"zero_point": jnp.ones((1, 1, 1), jnp.int32)}, ValueError, "must broadcast"),
        ({"bits": 17}, ValueError, "`bits` must be between 1 and 16, got 17.* at 'x/y'"),
        ({"group": 0}, ValueError, "`group` must be"),
        ({"axis": "last"}, ValueError, "`axis` must be"),
        ({"format": 3}, TypeError, "`format` must be the name"),
        ({"format": "x" * 2000}, ValueError, "1024 bytes at most"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(change, error, words):
    fields = {"codes": jnp.zeros((4, 4), jnp.int8), "step": jnp.float32(1), "zero_point": jnp.int32(0), "bits": 4}
    with pytest.raises(error, match=words):
        clipjax.pack({"x": {"y": Quantized(**{**fields, "axis": None, "group": None, **change})}})


def test_inspect_and_expand(tmp_path, capsys):
    leaf, named = q((200, 100), step=(1, 100), axis=1), CASES["format"]()
    small, back = str(tmp_path / "small"), str(tmp_path / "back.safetensors")
    clipjax.save(small, {"a": leaf, "b": named, "c": jnp.arange(3.0)})
    assert __main__.main(["inspect", small]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "float32[200,100]  80000" in rows["a"] and rows["a"].endswith("4-bit codes + 100 steps, order 0")
    assert "4-bit codes + 8 steps + format q4_0" in rows["b"]
    assert __main__.main(["expand", small, back]) == 1
    assert "must have the scales of its format" in capsys.readouterr().err
    formed = Quantized(jnp.ones((64, 20), jnp.uint8), None, None, 4, (1,), 32, "q4_0", (jnp.ones((2, 20), jnp.uint16),))
    clipjax.save(small, {"a": leaf, "b": formed, "c": jnp.arange(3.0)})
    assert __main__.main(["inspect", small]) == 0
    assert "codes + 40 scales of q4_0, constant" in capsys.readouterr().out
    assert __main__.main(["expand", small, back]) == 0
    with open(back, "rb") as file:
        assert alphabets.patterns(np.asarray(clipjax.dequantize(leaf))).tobytes() in file.read()


def test_a_tiny_file_cannot_ask_for_gigabytes():
    leaf = Quantized(jnp.zeros((100, 100), jnp.int8), jnp.float32(1), jnp.int32(0), 4, None, None)
    with pytest.raises(ValueError, match="`max_bytes` must allow for all leaves, got 39999"):
        round_trip({"x": leaf}, max_bytes=39_999)
    same(round_trip({"x": leaf}, max_bytes=40_000), {"x": leaf})
