"""One break of the core."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A line of clipjax, what it is broken into, and the tests that must notice it."""

    file: str  # in clipjax/
    old: str
    new: str
    tests: str  # without "test_" and ".py"
    expression: str = ""  # pytest -k
