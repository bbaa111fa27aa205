"""Transformations before the optimizer: clipping, skipping, thresholds that follow a history."""
