"""Arrays laid out over devices as others are."""

from __future__ import annotations

import jax

from clipjax._arrays import arguments


def laid_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` sharded as another array of its shape; only explicit mesh axes ask for it."""
    sharding = jax.typeof(like).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types or sharding == jax.typeof(x).sharding:
        return x
    traced = arguments.traced(x) or arguments.traced(like)
    return jax.reshard(x, sharding) if traced else jax.device_put(x, like.sharding)  # no mesh has to be set then
