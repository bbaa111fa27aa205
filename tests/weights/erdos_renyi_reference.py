"""The allocation of RigL in NumPy, against which scope "erk" is tested."""

import numpy as np


def erdos_renyi(sparsity, shapes, sizes):
    """Evci et al., rigl/sparse_utils.py `get_sparsities_erdos_renyi`: dense layers one by one, then one epsilon."""
    dense = set()
    while True:
        divisor, rhs, raw = 0.0, 0.0, {}
        for name, shape in shapes.items():
            if name in dense:
                rhs -= sizes[name] * sparsity
            else:
                rhs += sizes[name] * (1 - sparsity)
                raw[name] = sum(shape) / np.prod(shape)
                divisor += raw[name] * sizes[name]
        epsilon = rhs / divisor
        if max(raw.values()) * epsilon <= 1:
            break
        dense |= {name for name, p in raw.items() if p == max(raw.values())}
    return {name: 0.0 if name in dense else 1 - epsilon * raw[name] for name in shapes}
