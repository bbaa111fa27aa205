"""What users import: names and keywords of the tree before, types that an editor shows, nothing private in sight."""

import inspect
import json
import pathlib

import pytest

import clipjax

# Without what the families held beside their factories (`steps.fit`, `selections.choose`, …), and the second path to
# `clipjax.choose_step` and `clipjax.choose_bits` through them.
OLD = json.loads((pathlib.Path(__file__).parent / "signatures.json").read_text())

FAMILIES = (
    "formats",
    "plots",
    "projections",
    "roundings",
    "scores",
    "selections",
    "steps",
    "structures",
    "thresholds",
    "widths",
)

# Interfaces whose fields changed with issues 8 and 9, before any release.
CHANGED = {
    "Projection": "hold, vanishes, survives and near became apply_frozen, and a private record",
    "Context": "again, which gave targets, became memory, which gives what lies there before the update",
}


def find(name):
    found = clipjax
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", OLD["__all__"])
def test_every_public_name_is_still_there(name):
    assert name in clipjax.__all__ and hasattr(clipjax, name)


@pytest.mark.parametrize("name", sorted(OLD.keys() - {"__all__"} - CHANGED.keys()))
def test_keywords_are_those_of_before(name):
    """Old keywords in their old order; new ones may follow."""
    new = list(inspect.signature(find(name)).parameters)
    assert [keyword for keyword in new if keyword in OLD[name]] == OLD[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_show_their_factories_alone(name):
    family = getattr(clipjax, name)
    assert dir(family) == sorted(family.__all__)
    for public in family.__all__:
        value = getattr(family, public)
        assert value.__doc__ and (inspect.isfunction(value) or inspect.isclass(value))


def test_the_package_shows_public_names_alone():
    assert dir(clipjax) == clipjax.__all__


@pytest.mark.parametrize("name", [n for n in clipjax.__all__ if inspect.isfunction(getattr(clipjax, n))])
def test_parameters_say_what_may_be_passed(name):
    """Every parameter and result has a type, and none of them is a bare Any."""
    for parameter in inspect.signature(getattr(clipjax, name)).parameters.values():
        assert parameter.annotation not in (inspect.Parameter.empty, "Any"), parameter
    assert inspect.signature(getattr(clipjax, name)).return_annotation not in (inspect.Signature.empty, "Any")


def test_interfaces_are_public_in_one_place():
    for name in (
        "Context",
        "Format",
        "Projection",
        "Rounding",
        "Rule",
        "Score",
        "Selection",
        "Step",
        "Structure",
        "Width",
    ):
        assert getattr(clipjax, name) is getattr(clipjax.typing, name)
