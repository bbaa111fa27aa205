"""Breaks of clipjax/_exports."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_exports/rows.py", "int(layer) % leaf.shape[0], leaf.shape[1:]", "0, leaf.shape[1:]", "rows"),
    Mutant("_exports/rows.py", "np.arange(n)[span][order]", "np.arange(n)[order]", "rows", "floats"),
    Mutant("_exports/rows.py", "if picking.embedding(path) else (", "if False else (", "rows", "default_outputs"),
    Mutant("_exports/rows.py", "ids.size % size == 0 and", "", "rows", "several_outputs"),
    Mutant(
        "_exports/rows.py", "picked.layer * scale.shape[0] // codes.shape[0]", "picked.layer", "rows", "codes or first"
    ),
    Mutant("_exports/rows.py", "(apart, ", "(True, ", "rows", "first_axis"),
    Mutant("_exports/rows.py", "wanted == own, ", "True, ", "rows", "another_axis"),
    Mutant("_exports/naming.py", "name not in owners, ", "True, ", "naming", "something_else"),
    Mutant("_exports/naming.py", "if isinstance(q, Quantized) and q.format else", "if True else", "naming", "grid"),
)
