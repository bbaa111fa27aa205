"""Axes cut into blocks or made one, and back, on arrays sharded in any way."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from clipjax._arrays import sharding


def resized(x: jax.Array, axis: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array with other sizes in place of an axis."""
    return (*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def flattened(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, int]:
    """Some axes made one, in this order, the last one running fastest; and which axis of the result that is.

    It is sharded as the first of them. One axis alone is left as it is.
    """
    at, sizes = min(axes), [x.shape[axis] for axis in axes]
    x = jnp.transpose(x, _together(axes, x.ndim))
    x = sharding.whole(x, range(at + 1, at + len(axes)))
    shape = (*x.shape[:at], math.prod(sizes), *x.shape[at + len(axes) :])
    spec = lambda spec: (*spec[: at + 1], *spec[at + len(axes) :])  # noqa: E731
    return jnp.reshape(x, shape, out_sharding=sharding.respecified(x, spec)), at


def unflattened(x: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """The array of this shape of which `flattened` made another."""
    at, order = min(axes), _together(axes, len(shape))
    spec = lambda spec: (*spec[: at + 1], *[None] * (len(axes) - 1), *spec[at + 1 :])  # noqa: E731
    apart = jnp.reshape(x, [shape[axis] for axis in order], out_sharding=sharding.respecified(x, spec))
    return jnp.transpose(apart, sorted(range(len(order)), key=order.__getitem__))


def _together(axes: tuple[int, ...], ndim: int) -> list[int]:
    """All axes, with some of them behind each other where the first of these is."""
    first = min(axes)
    return [*range(first), *axes, *(axis for axis in range(first, ndim) if axis not in axes)]


def split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """An axis cut into groups of a size, the last one padded with zeros: two axes, sharded as the one was."""
    x = sharding.with_whole_groups(x, axis, -(-x.shape[axis] // size))
    padded = jnp.pad(x, [(0, -x.shape[i] % size if i == axis else 0) for i in range(x.ndim)])
    shape = resized(padded, axis, (padded.shape[axis] // size, size))
    return jnp.reshape(
        padded, shape, out_sharding=sharding.respecified(x, lambda spec: (*spec[: axis + 1], None, *spec[axis + 1 :]))
    )


def join(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Two axes made one again, without the padding."""
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    joined = jnp.reshape(
        x, shape, out_sharding=sharding.respecified(x, lambda spec: (*spec[: axis + 1], *spec[axis + 2 :]))
    )
    return jax.lax.slice_in_dim(joined, 0, size, axis=axis)


def spread(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Values that broadcast to a shape block by block: an axis of n entries repeats each to fill the one of the shape.

    Where an axis has one entry, or all of them, this is plain broadcasting and the array is returned as it is.
    """
    for axis in range(-blocks.ndim, 0):
        have, want = blocks.shape[axis], shape[axis]
        if have not in (1, want) and want % have == 0:
            at = axis % blocks.ndim
            wide = jnp.broadcast_to(jnp.expand_dims(blocks, at + 1), resized(blocks, at, (have, want // have)))
            blocks = join(wide, at, want)
    return blocks
