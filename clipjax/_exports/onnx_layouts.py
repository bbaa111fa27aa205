"""How the axes of a leaf lie in an initializer: transposed, and some of them made one or left out where they are 1."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from clipjax._exports.onnx_weights import Weight

Order = tuple[int, ...]
"""The axes of a leaf in the order in which an initializer has them; a reshape gives its shape."""

_SEARCHED = 6  # arrays of more axes are not searched in all orders


def laid(x: np.ndarray, order: Order, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a leaf's shape as the initializer has it."""
    return np.transpose(x, order).reshape(shape)


def orders(shape: tuple[int, ...], outputs: tuple[int, ...], weight: Weight) -> Iterator[Order]:
    """Every order in which a leaf may lie in an initializer, the likeliest first.

    That is the one which puts the leaf's outputs where the operator has its own: first in a convolution (and then the
    inputs, [H, W, I] as [I, H, W]) and where the weights of a Gemm are transposed, last in a MatMul.

    Args:
      shape: of the leaf.
      outputs: the axes of the leaf that are outputs.
      weight: the initializer.
    """
    inputs = tuple(i for i in range(len(shape)) if i not in outputs)
    first, last = (*outputs, *inputs), (*inputs, *outputs)
    likely = [tuple(range(len(shape))), first, last]
    if weight.convolves:
        own = 0 in outputs  # these are laid out as ONNX has them
        moved = first if own else (*outputs, *inputs[-1:], *inputs[:-1])
        likely = [moved if weight.outputs == (0,) else (*inputs[-1:], *outputs, *inputs[:-1]), *likely]
    elif weight.outputs is not None:
        likely = [first if weight.outputs[0] == 0 and len(weight.shape) == 2 else last, *likely]
    every = itertools.permutations(range(len(shape))) if len(shape) <= _SEARCHED else iter(())
    seen = set()
    for order in itertools.chain(likely, every):
        if order not in seen and _fits([shape[i] for i in order], weight.shape):
            yield order
        seen.add(order)


def _fits(shape: list[int], other: tuple[int, ...]) -> bool:
    """True where neighbouring axes made one, or axes cut in two, and axes of 1, make one shape of the other."""
    ends = [{int(n) for n in np.cumprod([1, *sizes])} for sizes in (shape, other)]
    return max(ends[0]) == max(ends[1]) and (ends[0] <= ends[1] or ends[1] <= ends[0])
