"""The shape of the package: modules import downwards only, stay small, need jax and optax alone, export the public."""

import ast
import pathlib
import subprocess
import sys
import types

import pytest

import clipjax

PACKAGE = pathlib.Path(clipjax.__file__).parent
TESTS = pathlib.Path(__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = [*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]

FAMILIES = "projections selections roundings steps widths structures scores thresholds"

# CONTRIBUTING.md draws this. A room may use the rooms of the levels above it in the table, and inside a room a module
# those that stand before it; the rooms of one level do not know each other.
LEVELS = (
    {"": "typing"},
    {"_arrays": "arguments trees sharding elementwise dtypes picking"},
    {
        "_maths": "blocks counts drawing ring_buffers intervals norms ranking grids step_groups integers fitting levels"
        " spectra landing straight_through",
        "_programs": "groups group_units shrinking",
    },
    {"": FAMILIES},
    {
        "_gradients": "threshold_state error_feedback norm_clipping clipping skipping with_gradient",
        "_weights": "refreshing constraints latents moments projecting clamping sparsities masks pruning bit_widths leaf_grid quantizing",
    },
    {"_files": "ans densities symbol_codes step_search alphabets leaf_codec container leaf_entries layouts saving"},
    {"_reports": "distributions reporting summarizing"},
    {"": "__init__ __main__"},
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


BLOCKED = (
    "flax",
    "chex",
    "equinox",
    "sklearn",
    "matplotlib",
    "rich",
    "orbax",
    "safetensors",
    "constriction",
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
    names = {name for name in vars(clipjax) if not name.startswith("_")}
    assert clipjax.__all__ == sorted(clipjax.__all__)
    assert set(clipjax.__all__) == names


@pytest.mark.parametrize("name", clipjax.__all__)
def test_public_names_are_documented(name):
    value = getattr(clipjax, name)
    assert (value.__doc__ and value.__doc__[0].isupper()) or isinstance(value, types.ModuleType)
