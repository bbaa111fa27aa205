"""The shape of the package: modules import downwards only, stay small, need jax and optax alone, export the public."""

import ast
import pathlib
import re
import subprocess
import sys
import types

import pytest

import clipjax

PACKAGE = pathlib.Path(clipjax.__file__).parent
TESTS = pathlib.Path(__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = [*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]

FAMILIES = "projections selections roundings steps widths structures scores thresholds formats"

# CONTRIBUTING.md draws this. A room may use the rooms of the levels above it in the table, and inside a room a module
# those that stand before it; the rooms of one level do not know each other.
LEVELS = (
    {"": "_format typing"},
    {"_arrays": "arguments trees sharding stacks elementwise dtypes picked_leaves leaf_axes"},
    {
        "_maths": "split_axes wide exact_counts random_draws averages ring_buffers intervals norms square_sums"
        " singular_values ranking code_costs line_classes grids step_groups float_codes block_bytes block_scales"
        " integer_blocks float_blocks known_formats free_formats format_blocks integers products step_fitting levels"
        " grid_errors landing straight_through",
    },
    {
        "_programs": "axes origins equations rules walking means exactness layers proving groups roles program models"
        " analysis squared_inputs sensitivities group_leaves group_units cutting dead_units verifying shrinking",
    },
    {"": FAMILIES},
    {
        "_gradients": "incoming threshold_state error_feedback rescaling norm_clipping clipping scaling_to_norm"
        " skipping with_gradient",
        "_weights": "refreshing allowed_values constraints latents moments surroundings visiting projecting clamping"
        " sparsities masks zeros pruning bit_widths quantize_state leaf_grid leaf_format leaf_levels code_rates"
        " quantize_arguments quantizing quantized_params choosing_bits checking holding_once logit_clipping",
        "_files": "byte_stream symbol_counts ans zero_densities symbol_codes step_search alphabets leaf_codec"
        " integer_arrays quantized_fields quantized_leaves format_leaves container small_trees atomic_file"
        " leaf_entries layouts saving",
    },
    {
        "_exports": "leaf_rows casting tensor_names reading_leaves gguf_blocks gguf_metadata gguf_writing"
        " gguf_reading llama_sizes llama onnx_weights onnx_layouts onnx_codes onnx_editing onnx_packing onnx_nodes"
        " onnx_matching onnx_writing compressed_tensors safetensors_writing safetensors_reading",
        "_reports": "distributions reporting summarizing plotted figures",
    },
    {"": "plots __init__ __main__ flax"},
)
PLACES = {
    f"{room}.{name}" if room else name: (level, room, place)
    for level, rooms in enumerate(LEVELS)
    for room, names in rooms.items()
    for place, name in enumerate(names.split())
}


def imports(path):
    """The clipjax modules that a file imports, as `_room.module`, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clipjax":
            room = node.module.removeprefix("clipjax").removeprefix(".")
            inside = {".".join(filter(None, (room, alias.name))) for alias in node.names}
            found |= {name if name in MODULES else room for name in inside}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("clipjax.") for a in node.names if a.name.startswith("clipjax.")}
        assert not getattr(node, "level", 0), f"{path} has a relative import"
    return found - {""}


def test_every_module_has_its_place():
    rooms = {f"{room}.__init__" for level in LEVELS for room in level if room}
    assert set(PLACES) | rooms == set(MODULES)
    assert len(LEVELS) <= 8


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(".__init__")])
def test_imports_lower_levels_only(name):
    level, room, place = PLACES[name]
    for other in imports(MODULES[name]):
        other_level, other_room, other_place = PLACES[other]
        lower = other_level < level
        before = (other_level, other_room) == (level, room) and other_place < place
        assert lower or before, f"{name} (level {level}) imports {other} (level {other_level})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_past_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("name", MODULES)
def test_no_vague_names(name):
    assert not {"utils", "helpers", "misc", "common", "config"} & set(name.replace(".", "_").split("_"))


def functions(path):
    """Every function of a file, with its source lines."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            begin = body[0].lineno - 1 if body else node.end_lineno
            yield node.name, lines[begin : node.end_lineno]


@pytest.mark.parametrize("name", MODULES)
def test_no_function_past_60_lines_without_a_comment(name):
    """Docstrings do not count: they are read on their own."""
    for function, lines in functions(MODULES[name]):
        assert len(lines) <= 60 or any("# " in line for line in lines), f"{name}.{function}: {len(lines)} lines"


READERS = {
    "bits": "_weights.bit_widths",
    "sparsity": "_weights.sparsities",
    "axis": "_arrays.leaf_axes",
    "group": "_maths.step_groups",
    "threshold": "_gradients.threshold_state",
    "bound": "_maths.intervals",
    "where": "_arrays.picked_leaves",
}
"""The one module that finds out what kind of argument it was given; all others work with what it returns."""

ASKS = {"isinstance", "callable", "is_tree", "is_schedule", "for_leaf", "values", "schedule"}


def asked(path):
    """The names of which a file asks what kind they are: `isinstance(bits, ...)`, `arguments.is_tree(bits)`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Name):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            asker = ast.unparse(node.func)
            private = isinstance(node.func, ast.Attribute) and not asker.startswith(
                ("arguments.", "trees.", "picking.for_leaf", "picking.values")
            )
            if function in ASKS and not private:
                yield node.args[0].id


@pytest.mark.parametrize("argument", READERS)
def test_one_module_reads_each_argument(argument):
    readers = {name for name, path in MODULES.items() if argument in asked(path)}
    assert readers == {READERS[argument]}


def test_contributing_draws_the_rooms():
    """Each room and family of the table stands in CONTRIBUTING.md on a line with its level, counted from 1."""
    drawn = (PACKAGE.parent / "CONTRIBUTING.md").read_text().splitlines()
    for level, rooms in enumerate(LEVELS, start=1):
        for room, names in rooms.items():
            for place in [f"{room}/"] if room else [f"{name}.py" for name in names.split()]:
                assert any(line.startswith(f"| {level} |") and f"`{place}`" in line for line in drawn), place


def test_rooms_lists_every_file_with_the_first_paragraph_of_its_docstring():
    listed = re.findall(r"^- `(\w+)\.py`: (.*)$", (PACKAGE.parent / "docs" / "rooms.md").read_text(), re.MULTILINE)
    order = [(room, name) for rooms in LEVELS for room, names in rooms.items() for name in names.split()]
    paths = [PACKAGE / room / f"{name}.py" for room, name in order]
    docstrings = [ast.get_docstring(ast.parse(path.read_text())) for path in paths]
    assert listed == [
        (path.stem, " ".join(text.split("\n\n")[0].split())) for path, text in zip(paths, docstrings, strict=True)
    ]


BLOCKED = (
    "flax",
    "chex",
    "equinox",
    "sklearn",
    "matplotlib",
    "rich",
    "orbax",
    "safetensors",
    "onnx",
    "constriction",
    "gguf",
    "hypothesis",
    "pandas",
)

ALONE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import jax.numpy as jnp, optax, clipjax
tx = optax.chain(
    clipjax.clip(1.0), optax.sgd(0.1), clipjax.clamp_weights(1.0), clipjax.prune_mask(0.5),
    clipjax.fake_quantize(2, step=0.5),
)
params = {{"kernel": jnp.ones((2, 2))}}
updates, state = tx.update(params, tx.init(params), params)
print(sorted(optax.apply_updates(params, updates)["kernel"].ravel().tolist()))
"""


def test_core_needs_jax_and_optax_alone():
    """Every extra refused, the whole chain still runs. `optax` itself may import what it lists."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.0, 0.0, 0.5, 0.5]"


def test_all_is_what_is_public():
    """`__all__` is sorted, and is every name of the package without an underscore."""
    names = {name for name in vars(clipjax) if not name.startswith("_") and name != "flax"}  # once it is imported
    assert clipjax.__all__ == sorted(clipjax.__all__)
    assert set(clipjax.__all__) == names


@pytest.mark.parametrize("name", clipjax.__all__)
def test_public_names_are_documented(name):
    value = getattr(clipjax, name)
    assert (value.__doc__ and value.__doc__[0].isupper()) or isinstance(value, types.ModuleType)
