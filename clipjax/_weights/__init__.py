"""Transformations after the optimizer: projecting, clamping, pruning, quantizing."""
