"""Axes as products and sums of atoms: united, split, cut, reshaped, and mapped back to entries. D0, section 2.2."""

from __future__ import annotations

import numpy as np
import pytest

from clipjax._programs import axes
from clipjax._programs.axes import Axis


def test_product_of_two_is_read_from_both_sides():
    heads, width = Axis(4), Axis(3)
    flat = axes.product([heads, width])
    assert axes.places(flat, heads).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert axes.places(flat, width).tolist() == [0, 1, 2] * 4


def test_sum_of_two_has_offsets():
    a, b = Axis(2), Axis(3)
    both = axes.total([a, b, a])
    assert axes.places(both, a).tolist() == [0, 1, -1, -1, -1, 0, 1]
    assert axes.places(both, b).tolist() == [-1, -1, 0, 1, 2, -1, -1]


def test_united_products_align_their_factors():
    flat, kv, repeats = Axis(8), Axis(2), Axis(4)
    axes.unite(axes.product([kv, repeats]), flat, "")
    finer = axes.product([Axis(4), Axis(2)])
    axes.unite(finer, flat, "")
    assert [atom.size for atom in axes.atoms(flat)] == [2, 2, 2]
    assert axes.places(finer, axes.found(kv)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_united_sums_align_their_cuts():
    a, b = axes.total([Axis(2), Axis(6)]), axes.total([Axis(5), Axis(3)])
    axes.unite(a, b, "")
    assert [atom.size for atom in axes.atoms(a)] == [2, 3, 3]
    assert axes.atoms(a) == axes.atoms(b)


def test_sums_are_cut_inside_of_a_part():
    a, b = Axis(2), Axis(6)
    first, second = axes.cut(axes.total([a, b]), [3, 5], "")
    assert [atom.size for atom in axes.atoms(first)] == [2, 1] and [atom.size for atom in axes.atoms(b)] == [1, 5]
    assert axes.atoms(second) == axes.atoms(b)[1:]


def test_sum_under_a_product_is_cut_in_its_outer_factor():
    inner = Axis(4)
    whole = axes.product([Axis(6), inner])
    first, second = axes.cut(whole, [8, 16], "")
    assert axes.places(first, inner).tolist() == [0, 1, 2, 3] * 2
    assert (first.size, second.size) == (8, 16)
    assert not any(atom.pins for atom in axes.atoms(whole))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda: axes.unite(axes.product([Axis(2), Axis(3)]), axes.product([Axis(3), Axis(2)]), "why"),
        lambda: axes.split(axes.product([Axis(2), Axis(3)]), [3, 2], "why"),
        lambda: axes.cut(axes.product([Axis(2), Axis(3)]), [2, 4], "why"),
        lambda: axes.split(axes.total([Axis(3), Axis(5)]), [2, 4], "why"),
        lambda: axes.unite(Axis(3), Axis(4), "why"),
    ],
    ids=["unite", "split", "cut", "split a sum", "sizes"],
)
def test_what_does_not_divide_is_pinned_with_the_reason(break_it, monkeypatch):
    pinned = []
    monkeypatch.setattr(axes, "pin", lambda axis, reason: pinned.append((axis, reason)))
    break_it()
    assert pinned and all("why" in reason for _, reason in pinned)


def test_an_axis_cannot_be_a_part_of_itself():
    atom = Axis(1)
    whole = axes.total([atom, Axis(0)])
    assert whole is atom
    part = Axis(3)
    around = axes.product([part, Axis(2)])
    part.size = 6  # as if a program had made one of both
    axes.unite(part, around, "why")
    assert "an axis would be a part of itself" in next(iter(part.pins))


def test_pins_of_an_atom_go_to_what_it_is_united_with():
    a, b = Axis(6, ["fixed"]), axes.product([Axis(2), Axis(3)])
    axes.unite(a, b, "")
    assert all("fixed" in atom.pins for atom in axes.atoms(b))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 6), (24,)),
        ((24,), (4, 6)),
        ((2, 3, 4), (6, 4)),
        ((2, 3, 4), (2, 12)),
        ((1, 4, 1), (2, 2)),
        ((6, 4), (2, 3, 4)),
    ],
)
def test_reshaped_axes_keep_every_entry_where_it_is(before, after):
    own = [Axis(n) for n in before]
    made = axes.regroup(own, after, "")
    assert tuple(axis.size for axis in made) == after
    atoms = dict.fromkeys(atom for axis in own for atom in axes.atoms(axis))
    for atom in atoms:
        at = np.zeros(before, int)
        for dim, axis in enumerate(own):
            found = axes.places(axis, atom)
            if (found >= 0).any():
                at = np.broadcast_to(found.reshape([-1 if i == dim else 1 for i in range(len(before))]), before)
        want = at.reshape(after)
        for dim, axis in enumerate(made):
            found = axes.places(axis, atom)
            if (found >= 0).any():
                shaped = found.reshape([-1 if i == dim else 1 for i in range(len(after))])
                assert (np.broadcast_to(shaped, after) == want).all()


def test_an_entry_of_two_units_is_told():
    a = Axis(3)
    assert axes.places(axes.product([a, a]), a) is None


def test_an_axis_that_meets_itself_at_another_place_is_pinned():
    whole = Axis(6000)
    before, last = axes.cut(whole, [5999, 1], "")
    axes.unite(whole, axes.total([Axis(1), before]), "add")
    assert all("at another place" in next(iter(atom.pins)) for atom in (before, last))
    twice = Axis(4)
    axes.unite(axes.total([twice, twice]), axes.total([twice, twice]), "add")
    assert not twice.pins
