"""Plain maths on arrays: selection, norms, grids, landing."""
