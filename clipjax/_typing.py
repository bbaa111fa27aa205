"""Names for the shapes of things that travel through the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

Tree: TypeAlias = Any
"""A pytree of arrays; leaves that a member does not govern are None."""

Scalar: TypeAlias = float | int | jax.Array
Where: TypeAlias = Callable[[str, Any], bool]
"""`where(path, leaf) -> bool` picks leaves."""
