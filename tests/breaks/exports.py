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
    Mutant("_exports/naming.py", "(began, ", "(True, ", "naming", "start"),
    Mutant("_exports/gguf_blocks.py", "np.uint8(3**i)", "np.uint8(1)", "gguf", "every_code"),
    Mutant("_exports/gguf_blocks.py", " << 4)\n", " << 3)\n", "gguf", "every_code"),
    Mutant(
        "_exports/gguf_writing.py", 'FLOATS[float_type] if len(one.shape) > 1 else "F32"', "FLOATS[float_type]", "gguf"
    ),
    Mutant("_exports/gguf_writing.py", "largest < 65520", "True", "gguf", "bad_input"),
    Mutant("_exports/gguf_writing.py", "size <= LONGEST", "True", "gguf", "bad_input"),
    Mutant("_exports/gguf_writing.py", "(sizes[0], math.prod(sizes[1:]),", "(math.prod(sizes), 1,", "gguf", "expert"),
    Mutant("_exports/gguf_metadata.py", '("UINT32", "INT32"))', '("INT32",))', "gguf", "metadata"),
    Mutant("_exports/assembling.py", "there.all()", "True", "gguf", "fit"),
    Mutant("_exports/assembling.py", "partial or not unread", "True", "gguf", "fit"),
    Mutant("_exports/rows.py", "layer = layer * x.shape[0] // of_scales", "pass", "rows", "first_axis"),
    Mutant("_exports/rows.py", "picked.rows if of_scales is None else picked.blocks", "picked.rows", "rows", "several"),
    Mutant("_exports/rows.py", "turned[...] = rows", "turned[...] += rows", "gguf", "stacks"),
    Mutant("_exports/llama.py", ".swapaxes(1, 2)", "", "llama"),
    Mutant(
        "_exports/llama.py",
        "for table in (LAYER,) if inside else (MODEL, LAYER):",
        "for table in (MODEL, LAYER):",
        "llama",
    ),
    Mutant("_exports/llama.py", "slice(start, start := start +", "slice(start, start +", "llama"),
    Mutant("_exports/onnx_layouts.py", "(*outputs, *inputs[-1:], *inputs[:-1])", "first", "onnx_writing", "lies"),
    Mutant("_exports/onnx_weights.py", "(1 - use.contracted,)", "(1,)", "onnx_writing", "lies"),
    Mutant("_exports/onnx_weights.py", "kept + pair[1 - i] == out", "True", "onnx_writing", "operator"),
    Mutant("_exports/onnx_codes.py", "math.gcd(n, *(int(end) for end in ends))", "n", "onnx_writing", "bytes"),
    Mutant("_exports/onnx_codes.py", "jnp.full(shape, one)", "jnp.full(shape, one + 1)", "onnx_writing", "bytes"),
    Mutant("_exports/onnx_codes.py", "if zero.any() else None", "if False else None", "onnx_writing", "grid"),
    Mutant("_exports/onnx_nodes.py", "max(opset, BLOCKED if block else 13)", "opset", "onnx_writing", "cannot"),
    Mutant("_exports/onnx_nodes.py", "power and found.grouped", "power", "onnx_writing", "operator"),
    Mutant("_exports/onnx_nodes.py", "bool(exact) and ", "", "onnx_writing", "operator"),
    Mutant(
        "_exports/onnx_editing.py",
        "reversed(list(graphs(self.model.graph)))",
        "graphs(self.model.graph)",
        "onnx_writing",
        "subgraphs",
    ),
    Mutant("_exports/onnx_matching.py", "if other is not None:", "if False:", "onnx_writing", "equal"),
    Mutant("_exports/onnx_matching.py", "len(own) <= len(rivals) + 1", "True", "onnx_writing", "equal"),
    Mutant("_exports/onnx_matching.py", "if first else np.moveaxis(taken, 0, -1)", "", "onnx_writing", "stack"),
    Mutant("_exports/onnx_nodes.py", 'not use.attribute("transA", 0) and', "", "onnx_writing", "operator"),
    Mutant("_exports/onnx_nodes.py", "block >= SMALLEST and ", "", "onnx_writing", "operator"),
    Mutant("_exports/onnx_nodes.py", 'use.attribute("axis", 0) == 0', "True", "onnx_writing", "operator"),
)
