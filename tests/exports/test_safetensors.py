"""`export_safetensors` and `import_safetensors`: names, shapes, bytes and values there and back; what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_format import on_format
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import clipjax
from clipjax import Quantized, dequantize, export_safetensors, formats, import_safetensors

WRITTEN = {
    "pack-quantized": [formats.int4(32), formats.int4(None, "float32"), formats.int8(), formats.int8(64, "float16")],
    "float-quantized": [formats.fp8_e4m3("array"), formats.fp8_e4m3(), formats.fp8_e4m3((32, 64))],
    "mxfp4-pack-quantized": [formats.mxfp4(), formats.mxfp4("compressed-tensors")],
    "mxfp8-quantized": [formats.mxfp8()],
    "nvfp4-pack-quantized": [formats.nvfp4()],
}
CASES = [(form, name) for name, listed in WRITTEN.items() for form in listed]
OTHER = [formats.q4_0(), formats.nbits(4, 32), formats.nvfp4("modelopt"), formats.fp8_e5m2(), formats.mxfp8("e5m2")]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def config(folder):
    return json.loads((folder / "config.json").read_text())


def header(path):
    with safe_open(path, "numpy") as file:
        return {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}


@pytest.mark.parametrize(("form", "layout"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_codes_and_scales_come_back(form, layout, tmp_path):
    params = {"dense": {"kernel": on_format(form, random(128, 64)), "bias": jnp.ones(64, jnp.bfloat16)}}
    export_safetensors(tmp_path, params)
    group = config(tmp_path)["quantization_config"]["config_groups"]["group_0"]
    assert (group["targets"], group["format"]) == (["dense"], layout)
    back = import_safetensors(tmp_path, like=params, dequantize=False)
    q, old = back["dense"]["kernel"], params["dense"]["kernel"]
    assert isinstance(q, Quantized) and q.axis == old.axis
    assert q.format == form.name or (q.format.split("(")[0] == "mxfp4" and form.name.startswith("mxfp4"))
    np.testing.assert_array_equal(q.codes.astype(jnp.int32), old.codes.astype(jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, q.scales, old.scales)
    np.testing.assert_array_equal(import_safetensors(tmp_path, like=params)["dense"]["kernel"], dequantize(old))
    alone = import_safetensors(tmp_path)
    assert alone.keys() == {"dense.weight", "dense.bias"} and alone["dense.bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(alone["dense.weight"], dequantize(old).T)


def test_the_arrays_are_those_of_compressed_tensors(tmp_path):
    short = np.round(random(128, 24))
    short[::32] = 7.5  # a scale of 1: no value needs more digits than bf16 has
    params = {
        "up": {"kernel": on_format(formats.int4(32), short)},
        "down": {"kernel": on_format(formats.int4(32), short[:64])},
        "four": {"kernel": on_format(formats.nvfp4(), random(64, 24))},
        "head": {"kernel": jnp.ones((24, 8), jnp.float16)},
        "norm": {"scale": jnp.ones(24)},
        "embed": {"embedding": jnp.ones((7, 24))},
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "count": jnp.int32(3),
    }
    (tmp_path / "config.json").write_text('{"hidden_size": 24, "quantization_config": {"old": 1}}')
    export_safetensors(tmp_path, params)
    assert header(tmp_path / "model.safetensors") == {
        "up.weight_packed": ("I32", [24, 16]),
        "up.weight_scale": ("BF16", [24, 4]),
        "up.weight_shape": ("I64", [2]),
        "down.weight_packed": ("I32", [24, 8]),
        "down.weight_scale": ("BF16", [24, 2]),
        "down.weight_shape": ("I64", [2]),
        "four.weight_packed": ("U8", [24, 32]),
        "four.weight_scale": ("F8_E4M3", [24, 4]),
        "four.weight_global_scale": ("F32", [1]),
        "head.weight": ("F16", [8, 24]),
        "norm.weight": ("F32", [24]),
        "embed.weight": ("F32", [7, 24]),
        "count": ("I32", []),
    }
    assert config(tmp_path)["hidden_size"] == 24
    written = config(tmp_path)["quantization_config"]
    assert (written["format"], written["ignore"]) == ("mixed-precision", ["embed", "head"])
    groups = list(written["config_groups"].values())
    assert [group["targets"] for group in groups] == [["down", "up"], ["four"]]
    assert groups[0]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group",
        "group_size": 32,
    }
    back = import_safetensors(tmp_path, like=params)
    assert back["none"] is None and back["count"] == 3 and back["empty"].shape == (0, 3)


def test_scales_stay_short_for_bf16_params_and_words_may_have_room_left(tmp_path):
    params = {"dense": {"kernel": jnp.asarray(random(36, 8), jnp.bfloat16)}}
    params, state = clipjax.hold_once(clipjax.fake_quantize(formats.int8()), params)
    export_safetensors(tmp_path / "8", params, state)
    assert header(tmp_path / "8" / "model.safetensors")["dense.weight_scale"] == ("BF16", [8, 1])
    params, state = clipjax.hold_once(clipjax.fake_quantize(formats.int4(None)), params)
    export_safetensors(tmp_path / "4", params, state)
    assert header(tmp_path / "4" / "model.safetensors")["dense.weight_packed"] == ("I32", [8, 5])
    back = import_safetensors(tmp_path / "4", like=params)
    np.testing.assert_array_equal(back["dense"]["kernel"], params["dense"]["kernel"])


def test_plain_params_take_a_stale_quantization_out_of_the_config(tmp_path):
    (tmp_path / "config.json").write_text('{"a": [1], "quantization_config": {}}')
    export_safetensors(tmp_path, {"a": jnp.ones(3)})
    assert config(tmp_path) == {"a": [1]}


def test_targets_may_be_classes_and_regular_expressions(tmp_path):
    params = {name: {"kernel": on_format(formats.int8(), random(32, 8))} for name in ("up", "down", "left")}
    export_safetensors(tmp_path, params)
    for target, ignore, found in (("Linear", ["left"], {"up", "down"}), ("re:.*p$", ["re:do"], {"up"})):
        changed = config(tmp_path)
        changed["quantization_config"]["config_groups"]["group_0"]["targets"] = [target]
        changed["quantization_config"]["ignore"] = ignore
        (tmp_path / "config.json").write_text(json.dumps(changed))
        there = import_safetensors(tmp_path, dequantize=False)
        assert {name.removesuffix(".weight") for name, x in there.items() if isinstance(x, Quantized)} == found


@pytest.mark.parametrize("form", OTHER, ids=lambda form: form.name)
def test_other_formats_are_their_values_in_the_dtype_of_the_params(form, tmp_path):
    params = {"kernel": jnp.asarray(random(64, 32), jnp.bfloat16)}
    params, state = clipjax.hold_once(clipjax.fake_quantize(form), params)
    export_safetensors(tmp_path, params, state)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    found = import_safetensors(tmp_path)["kernel"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, params["kernel"].T)


def test_layers_of_a_stack_become_modules_and_come_back(tmp_path):
    params = {"layers": {"kernel": on_format(formats.int8(32), random(2, 64, 16), (0, 2))}}
    names = [f"model.layers.{i}.up_proj.weight" for i in range(2)]

    def rename(path, leaf):
        return [(name, i, np.arange(16)[::-1]) for i, name in enumerate(names)]

    export_safetensors(tmp_path, params, rename=rename)
    last = dequantize(params["layers"]["kernel"])[1]
    np.testing.assert_array_equal(import_safetensors(tmp_path)[names[1]], last[:, ::-1].T)
    back = import_safetensors(tmp_path, like=params, rename=rename, dequantize=False)
    np.testing.assert_array_equal(dequantize(back["layers"]["kernel"]), dequantize(params["layers"]["kernel"]))


def test_names_without_weight_come_back(tmp_path):
    """What is quantized is a module in the files, whatever its array is called in the tree."""
    q = on_format(formats.int4(32), random(64, 32))
    params = {"kernel": q, "linear": {"w": q}, "dense": {"kernel": q, "w": random(4, 4)}}
    for rename in (None, lambda path, leaf: f"model.{path}"):
        export_safetensors(tmp_path, params, rename=rename)
        back = import_safetensors(tmp_path, like=params, rename=rename, dequantize=False)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), back, params))


def test_groups_in_another_order_are_refused(tmp_path):
    """Their scales belong to inputs that are no neighbours, so that the values would be others."""
    params = {"dense": {"kernel": on_format(formats.int4(32), random(64, 8))}, "norm": {"scale": jnp.ones(8)}}
    export_safetensors(tmp_path, params)
    arrays = load_file(tmp_path / "model.safetensors")
    save_file(arrays | {"dense.weight_g_idx": np.arange(64, dtype=np.int32) % 2}, tmp_path / "model.safetensors")
    for like in (None, params):
        with pytest.raises(
            ValueError, match=r"`path` must hold groups of neighbours, got 'weight_g_idx'. Module 'dense'"
        ):
            import_safetensors(tmp_path, like=like)
    found = import_safetensors(tmp_path, like={"norm": params["norm"]}, partial=True)
    assert found["norm"]["scale"].tolist() == [1.0] * 8


def test_shards_are_read_together(tmp_path):
    for i in range(2):
        export_safetensors(tmp_path / str(i), {"dense": {f"p{i}": jnp.full(3, float(i))}})
        (tmp_path / str(i) / "model.safetensors").rename(tmp_path / f"model-{i}.safetensors")
    found = import_safetensors(tmp_path)
    assert {name: x.tolist() for name, x in found.items()} == {"dense.p0": [0, 0, 0], "dense.p1": [1, 1, 1]}
    assert import_safetensors(tmp_path / "model-1.safetensors").keys() == {"dense.p1"}
    (tmp_path / "model-1.safetensors").rename(tmp_path / "model-2.safetensors")
    (tmp_path / "model-1.safetensors").write_bytes((tmp_path / "model-2.safetensors").read_bytes())
    with pytest.raises(ValueError, match=re.escape("`path` must hold each name once, got 'dense.p1'. Two of the")):
        import_safetensors(tmp_path)


def write(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


W = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("files", "params", "message"),
    [
        (
            {"part__safetensors": ""},
            {"a": W},
            "`folder` must hold no other safetensors files, got ['part.safetensors']",
        ),
        ({"config__json": "[1]"}, {"a": W}, "`folder` must hold a config.json of an object, got"),
        ({"config__json": "{"}, {"a": W}, "`folder` must hold a config.json of an object, got"),
        (
            {},
            {"d": {"kernel": W, "scale": W}},
            "`rename` must return each name once, got 'd.weight'. Leaves 'd/kernel'",
        ),
        ({}, {"a": W, "b": jnp.zeros(3, jnp.int4)}, "Leaves must be of a dtype that safetensors has, got int4 at 'b'."),
        ({}, {"a": jax.random.key(0)}, "Leaves must be real arrays, got key<fry> at 'a'. Leave it out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_and_nothing_is_written(files, params, message, tmp_path):
    folder = tmp_path / "out"
    if files:
        write(folder, **files)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        export_safetensors(folder, params)
    assert not folder.exists() or {p.name: p.read_text() for p in folder.iterdir()} == {
        name.replace("__", "."): text for name, text in files.items()
    }


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must hold safetensors files, got"):
        import_safetensors(tmp_path)
    params = {"dense": {"kernel": on_format(formats.int4(32), random(64, 8))}}
    export_safetensors(tmp_path, params)
    for key, value, message in (
        ("symmetric", False, "`path` must hold schemes without zero points, got"),
        ("num_bits", 3, "`path` must hold schemes of `clipjax.formats`, got"),
    ):
        changed = config(tmp_path)
        changed["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
        with pytest.raises(ValueError, match=message):
            before = (tmp_path / "config.json").read_text()
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                import_safetensors(tmp_path)
            finally:
                (tmp_path / "config.json").write_text(before)
    with pytest.raises(ValueError, match=r"`like` must be given with `rename`, got None"):
        import_safetensors(tmp_path, rename=lambda path, leaf: path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(ValueError, match=r"`path` must be quantized by compressed-tensors, got 'awq'"):
        import_safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut or extended"):
        import_safetensors(tmp_path)
