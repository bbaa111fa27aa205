"""Arrays laid out over devices as others are."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from clipjax._arrays import arguments


def laid_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` sharded as another array of its shape; only explicit mesh axes ask for it."""
    sharding = jax.typeof(like).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types or sharding == jax.typeof(x).sharding:
        return x
    traced = arguments.traced(x) or arguments.traced(like)
    return jax.reshard(x, sharding) if traced else jax.device_put(x, like.sharding)  # no mesh has to be set then


def filled(value: ArrayLike, like: jax.Array) -> jax.Array:
    """A value that broadcasts to an array, in its shape, dtype and sharding.

    `jnp.full_like` asks an array that exists for its shards, and fails in a branch where the value is traced.
    """
    return laid_as(jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape), like)


def replicated(x: jax.Array) -> jax.Array:
    """`x` whole on every device of a mesh of automatic axes, where XLA might shard it as an array that it meets."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or set(mesh.axis_types) != {jax.sharding.AxisType.Auto}:
        return x
    return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P()))


def reshaped(x: jax.Array, shape: tuple[int, ...], *, like: jax.Array, spec: jax.P | None = None) -> jax.Array:
    """`x` in another shape; on explicit mesh axes sharded by `spec` over the mesh of `like`, by default not at all."""
    mesh = jax.typeof(like).sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return jnp.reshape(x, shape)
    spec = jax.P(*[None] * len(shape)) if spec is None else spec
    return jnp.reshape(x, shape, out_sharding=jax.NamedSharding(mesh, spec))


def respecified(
    x: jax.Array, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]
) -> jax.sharding.NamedSharding | None:
    """Where mesh axes are explicit: the sharding of an array, its spec changed; else None."""
    sharding = jax.typeof(x).sharding
    spec = tuple(sharding.spec)
    return jax.NamedSharding(sharding.mesh, jax.P(*change(spec))) if any(spec) else None


def whole(x: jax.Array, axes: Container[int]) -> jax.Array:
    """Where mesh axes are explicit: an array whose devices have all entries along some axes."""
    sharding = jax.typeof(x).sharding
    spec = tuple(None if i in axes else names for i, names in enumerate(sharding.spec))
    return x if spec == tuple(sharding.spec) else jax.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*spec)))


def with_whole_groups(x: jax.Array, axis: int, count: int) -> jax.Array:
    """Where mesh axes are explicit: an array whose devices have whole groups, of `count` along an axis.

    Where the devices along that axis do not divide the groups, every device gets all of them.
    """
    sharding = jax.typeof(x).sharding
    spec = tuple(sharding.spec)
    names = jax.tree.leaves(spec[axis])
    fits = not names or count % math.prod(sharding.mesh.shape[name] for name in names) == 0
    return x if fits else whole(x, (axis,))


def varies(x: jax.Array) -> frozenset[str]:
    """The axes of a surrounding `shard_map` along which an array is known to differ."""
    return jax.typeof(x).mat.varying
