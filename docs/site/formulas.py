"""Formulas of docstrings as MathML, which browsers draw by themselves: no script, and no request to another host."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml import converter

_INLINE = re.compile(r":math:`([^`]+)`")
_EXAMPLE = re.compile(r"^([ ]*)Example:$", re.MULTILINE)  # the plural is what the parser knows
_DISPLAY = re.compile(r"^([ ]*)\.\. math::(.*(?:\n(?:\1[ ]+\S.*|[ ]*))*)", re.MULTILINE)


def inline(match: re.Match[str]) -> str:
    """:math:`...` in a line of text."""
    return f"<span>{converter.convert(_known(match[1]))}</span>"  # Markdown would take a line of it for a block


def display(match: re.Match[str]) -> str:
    """A formula in lines of its own."""
    formula = " ".join(textwrap.dedent(match[2]).split())
    return f"{match[1]}<p>{converter.convert(_known(formula), display='block')}</p>\n\n{match[1]}"


def _known(formula: str) -> str:
    """Without spacing that the converter does not know."""
    return formula.replace(r"\,", r"\;").replace(r"\!", "")


def rendered(text: str) -> str:
    """A docstring whose formulas are MathML."""
    return _INLINE.sub(inline, _DISPLAY.sub(display, _EXAMPLE.sub(r"\1Examples:", text)))


class Formulas(griffe.Extension):
    """Renders the formulas of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = rendered(obj.docstring.value)
