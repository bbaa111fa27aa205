"""The gradients that arrive at a transformation: kinds that are refused, and the mesh axes that they are split over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from clipjax._arrays import picked_leaves, sharding, trees
from clipjax.typing import PerLeaf, Tree

AxisName: TypeAlias = str | Sequence[str] | PerLeaf | None
"""Mesh axes of a surrounding `shard_map`: a name, names, or `per_leaf` for names by leaf; None outside of one."""


_REMEDY = {
    False: "Mask integer leaves with `optax.masked`.",
    True: "Split complex gradients with `optax.contrib.split_real_and_imaginary`; where the norm of each leaf is taken,"
    " which that would make two norms, give `jnp.stack([g.real, g.imag])` instead.",
}


def check_real(updates: Tree) -> None:
    """Raise for gradients that are not real floats."""
    for i, g in enumerate(trees.flatten(updates)[0]):
        if g is not None and not jnp.issubdtype(g.dtype, jnp.floating):
            path, remedy = trees.paths(updates)[i], _REMEDY[jnp.issubdtype(g.dtype, jnp.complexfloating)]
            raise TypeError(f"`updates` must be real floats, got {g.dtype} at {path!r}. {remedy}")


def sharded_over(axis_name: AxisName, paths: list[str], leaves: list[jax.Array]) -> list[tuple[str, ...]]:
    """For each leaf, those axes among `axis_name` that it is sharded over in a surrounding `shard_map`."""

    def names(value: str | Sequence[str] | None) -> tuple[str, ...]:
        return () if value is None else (value,) if isinstance(value, str) else tuple(value)

    if isinstance(axis_name, PerLeaf):
        return [names(picked_leaves.for_leaf(axis_name, path, x)) for path, x in zip(paths, leaves, strict=True)]
    # `axis_index` differs along its axis by definition: where its type does not show it, check_vma=False tracks nothing
    tracked = {name for name in names(axis_name) if name in sharding.varies(jax.lax.axis_index(name))}
    return [tuple(n for n in names(axis_name) if n not in tracked or n in sharding.varies(x)) for x in leaves]
