"""The shape of the package: modules import downwards only, stay small, need jax and optax alone, export the public."""

import ast
import pathlib
import subprocess
import sys
import types

import pytest

import clipjax

PACKAGE = pathlib.Path(clipjax.__file__).parent
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}

FILES = [*PACKAGE.glob("*.py"), *pathlib.Path(__file__).parent.glob("*.py")]

# DESIGN.md, "Layout". Inside levels 0 and 1 the order of a line is the order of imports: a module may use those before.
LEVELS = (
    (0, ("_typing", "_arguments", "_trees")),
    (1, ("_norms", "_selecting", "_blocks", "_grids", "_fitting", "_landing", "_following", "_windows", "_groups")),
    (
        1,
        (
            "steps",
            "widths",
            "roundings",
            "_plans",
            "_distributions",
            "projections",
            "selections",
            "structures",
            "scores",
            "thresholds",
            "_masks",
        ),
    ),
    (1, ("_ans", "_densities", "_coding", "_multiples", "_alphabets")),  # the small file, from symbols to trees
    (1, ("_payloads", "_container", "_records", "_layouts")),
    (2, ("_projecting",)),
    (3, ("_clipping", "_clamping", "_pruning", "_quantizing", "_forwarding", "_skipping")),
    (4, ("_reporting", "_summarizing", "_packing", "_shrinking")),
    (5, ("__main__",)),
)
LEVEL = {name: level for level, names in LEVELS for name in names}
ORDER = [name for _, names in LEVELS for name in names]


def imports(path):
    """The clipjax modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "clipjax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipjax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("clipjax.")}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_lower_levels_only(name):
    assert name in LEVEL, f"{name} has no level: add it to the table"
    for other in imports(MODULES[name]):
        lower = LEVEL[other] < LEVEL[name]
        earlier = LEVEL[other] == LEVEL[name] <= 1 and ORDER.index(other) < ORDER.index(name)
        assert lower or earlier, f"{name} (level {LEVEL[name]}) imports {other} (level {LEVEL[other]})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_past_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("name", MODULES)
def test_no_vague_names(name):
    assert not {"utils", "helpers", "misc", "common", "config"} & set(name.strip("_").split("_"))


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
