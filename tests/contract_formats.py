"""The rows of the contract for weights on formats."""

import dataclasses

import jax
import numpy as np
from contract_leaves import kernels
from contract_row import TIMES, row

import clipjax
from clipjax import formats

# Blocks of two inputs where there are so many; else one for all inputs.
PAIR = formats.register(dataclasses.replace(formats.q8_0(), name="pairs of q8_0", block=2))
FORMATS = clipjax.per_leaf(lambda path, leaf: formats.int4(None) if leaf.shape[-2] % 2 else PAIR)


def on_format(params, state):
    """Every kernel is the decode of bytes, bit for bit."""
    found = clipjax.quantized(params, state)
    is_formed = lambda x: isinstance(x, clipjax.Quantized)
    rows = jax.tree.leaves(found, is_leaf=is_formed), jax.tree.leaves(params)
    formed = [(q, p) for q, p in zip(*rows, strict=True) if is_formed(q)]
    assert len(formed) == len(kernels(params))
    for q, p in formed:
        np.testing.assert_array_equal(clipjax.dequantize(q, dtype=p.dtype), p)


FORMAT_ROWS = [
    row("quantize_formats", "weight", lambda _, **times: clipjax.fake_quantize(FORMATS, **times), on_format, **TIMES),
    row("quantize_formats_every", "weight", lambda _: clipjax.fake_quantize(FORMATS, every=1), on_format),
]
