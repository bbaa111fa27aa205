"""Breaks of clipjax/_exports."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_exports/rows.py", "layer, kept = int(layer) % n, outputs[1:]", "layer, kept = 0, outputs[1:]", "rows"),
    Mutant("_exports/rows.py", "np.arange(n)[span][order]", "np.arange(n)[order]", "rows", "floats"),
    Mutant("_exports/rows.py", "if picking.embedding(path) else", "if False else", "rows", "default_outputs"),
    Mutant("_exports/rows.py", "ids.size % size == 0 and", "", "rows", "several_outputs"),
    Mutant("_exports/rows.py", "ids[picked.layer].min(initial=ids.size)", "0", "rows", "several_outputs"),
    Mutant("_exports/rows.py", "not alone, ", "True, ", "rows", "axis_of_layers"),
    Mutant("_exports/naming.py", "name not in owners, ", "True, ", "naming", "something_else"),
    Mutant("_exports/naming.py", "if isinstance(q, Quantized) and q.format else", "if True else", "naming", "grid"),
)
