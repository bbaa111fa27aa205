"""Formats that are known by their ids: what a state or a file names is found again from the number alone."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import jax

from clipjax._arrays import arguments
from clipjax.typing import Format, Quantize, Scales

_known: dict[int, Format] = {}


def register(form: Format) -> Format:
    """Remember a format, with `quantize` where it has none, and return it; refuse one whose id another has."""
    other = _known.get(form.id)
    made = form if form.quantize else dataclasses.replace(form, quantize=_in_two_steps(form))
    same = other is None or _told(other) == _told(form)
    remedy = "Give it another name, or register it once, where the module that makes it is imported."
    arguments.require(same, "name", "belong to one format", form.name, remedy)
    return _known.setdefault(form.id, made)


def _told(form: Format) -> tuple[object, ...]:
    """What a caller gave of a format, to tell the same from another of its name."""
    return form.name, form.fit, form.encode, form.decode


def _in_two_steps(form: Format) -> Quantize:
    def quantize(
        x: jax.Array, limit: jax.typing.ArrayLike, precision: int | None, axes: tuple[int, ...] = (-1,)
    ) -> tuple[jax.Array, Scales]:
        scales = form.fit(x, limit, precision, axes)
        return form.encode(x, scales, limit), scales

    return quantize


def made(name: str, build: Callable[[str], Format]) -> Format:
    """The format of this name, built once: functions that are jitted with it are found again."""
    found = look_up(name)
    return found if found is not None else register(build(name))


def find(number: int) -> Format:
    """The format of an id; ValueError for one that is not known."""
    found = _known.get(number)
    if found is None:
        remedy = "Call its factory in `clipjax.formats`, or `formats.register` your own, before the state is read."
        raise ValueError(f"The format's id must be that of a known format, got {number}. {remedy}")
    return found


def look_up(name: str) -> Format | None:
    """The format of a name, None for one that is not known."""
    found = _known.get(zlib.crc32(name.encode()))
    return found if found is not None and found.name == name else None


def named(name: str) -> Format:
    """The format of a name; ValueError for one that is not known."""
    found = look_up(name)
    remedy = "Call its factory in `clipjax.formats`, or `formats.register` your own."
    arguments.require(found is not None, "format", "be known", name, remedy)
    assert found is not None
    return found
