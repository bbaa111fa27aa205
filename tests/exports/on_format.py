"""Leaves on a format without training: what `form.quantize` makes of an array."""

import jax.numpy as jnp

from clipjax._maths import format_blocks, integers


def on_format(form, x, axis=None, path="kernel"):
    """A `Quantized` of the blocks of `x`, whose last axis is the output unless `axis` says otherwise."""
    placed = format_blocks.resolve(form, axis, path, x)
    view = format_blocks.view(jnp.asarray(x, jnp.float32), placed)
    codes, scales = form.quantize(view, jnp.inf, None, placed.within)
    stored = format_blocks.stored(scales, placed)
    return integers.formed(form, format_blocks.joined(codes, placed, x), stored, placed.outputs)
