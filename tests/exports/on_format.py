"""Leaves on a format without training: what `form.quantize` makes of an array."""

import jax.numpy as jnp
import numpy as np

from clipjax import Quantized
from clipjax._maths import format_blocks


def on_format(form, x, axis=None, path="kernel"):
    """A `Quantized` of the blocks of `x`, whose last axis is the output unless `axis` says otherwise."""
    placed = format_blocks.resolve(form, axis, path, x)
    codes, scales = form.quantize(format_blocks.view(jnp.asarray(x, jnp.float32), placed), jnp.inf, None)
    counts, rank = format_blocks.shape(x, placed), x.ndim
    boxes = np.asarray(codes).reshape(*counts, *placed.box)
    codes = boxes.transpose([i + side * rank for i in range(rank) for side in (0, 1)]).reshape(x.shape)
    scales = format_blocks.stored(scales)
    return Quantized(jnp.asarray(codes), None, None, form.bits, placed.outputs, form.block, form.name, scales)
