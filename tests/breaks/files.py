"""Breaks of clipjax/_files."""

from breaks.mutant import Mutant

MUTANTS = (
    Mutant("_files/small_trees.py", "self._sum != self._expected", "False", "one_entry", "damage"),
    Mutant(
        "_files/small_trees.py", "if zlib.crc32(entry[4:], _VERSION) != checksum:", "if False:", "one_entry", "damage"
    ),
    Mutant("_files/small_trees.py", "len(set(names)) != len(names)", "False", "one_entry", "damage"),
    Mutant("_files/small_trees.py", "if not coder.eof or", "if", "one_entry", "inflates"),
    Mutant("_files/small_trees.py", "if len(rows) > _MOST_LEAVES:", "if False:", "one_entry", "does_not_take"),
    Mutant("_files/small_trees.py", "if len(name) > _LONGEST_NAME:", "if False:", "one_entry", "does_not_take"),
    Mutant("_files/saving.py", "writer.size <= SMALL", "True", "one_entry", "large_tree"),
    Mutant(
        "_files/byte_stream.py",
        "if checksum is None and self.seen is not None:",
        "if False:",
        "one_entry",
        "comes_back",
    ),
    Mutant("_files/step_search.py", " + np.float32(0)  # no -0", "  # no -0", "saving", "sign_of_zero"),
    Mutant(
        "_files/alphabets.py", "np.where(there, searched, book.size)", "book.size", "symbol_codes", "book_has_every"
    ),
    Mutant(
        "_files/ans.py",
        "reversed(list(symbol_counts.chunks(symbols())))",
        "list(symbol_counts.chunks(symbols()))",
        "symbol_codes",
        "order_0",
    ),
    Mutant("_files/zero_densities.py", "classes[order] = sorted", "classes[:] = sorted", "symbol_codes", "densities"),
    Mutant(
        "_files/leaf_entries.py", "if self.checksum not in (None, zlib.crc32(data)):", "if False:", "fuzz", "damage"
    ),
    Mutant("_files/leaf_entries.py", "if not reader.intact():", "if False:", "fuzz", "damage"),
    Mutant("_files/atomic_file.py", "os.fsync(file.fileno())", "pass", "files", "flushed"),
    Mutant(
        "_files/atomic_file.py",
        "os.replace(temporary, path)",
        "os.truncate(path, 0) or os.replace(temporary, path)",
        "files",
        "killed or flushed",
    ),
    Mutant("_files/layouts.py", '.replace("/", "~1")', "", "saving", "slashes"),
    Mutant("_files/layouts.py", "if isinstance(node, Quantized):", "if False:", "saving_quantized", "equal or leaf"),
    Mutant(
        "_files/leaf_entries.py",
        "2 if _FORMAT in forms else 1 if _QUANTIZED in forms else 0",
        "1 if _QUANTIZED in forms else 0",
        "saving_quantized",
        "third_version",
    ),
    Mutant(
        "_files/leaf_entries.py", "dtype=dtype or self.dtype", "dtype=self.dtype", "saving_quantized", "like_is_any"
    ),
    Mutant(
        "_files/saving.py",
        "dequantize or (chosen and not leaf.quantized)",
        "dequantize",
        "saving_quantized",
        "other_leaves",
    ),
    Mutant("_files/saving.py", "fits = free and all(", "fits = free or all(", "saving_quantized", "like_must_fit"),
    Mutant(
        "_files/saving.py",
        "target.codes if isinstance(target, Quantized) else target",
        "target",
        "saving_quantized",
        "codes_go",
    ),
    Mutant(
        "_files/quantized_leaves.py",
        "if len(relative) < len(body):",
        "if False:",
        "quantized_leaves",
        "no_more_bytes or affine",
    ),
    Mutant(
        "_files/quantized_leaves.py",
        "return -top - lowest.reshape(shape)",
        "return 0 * lowest.reshape(shape)",
        "quantized_leaves",
        "no_more_bytes",
    ),
    Mutant("_files/quantized_leaves.py", "if cursor.left:", "if False:", "quantized_leaves", "hostile_fields"),
    Mutant("_files/quantized_fields.py", "else axes[0]", "else axes", "saving_quantized", "equal"),
    Mutant(
        "_files/quantized_fields.py",
        "fields.step != _usual_step(fields, shape)",
        "fields.step",
        "quantized_leaves",
        "no_more_bytes",
    ),
    Mutant(
        "_files/quantized_fields.py",
        "len(blocked) <= len(shape) and ",
        "",
        "saving_quantized",
        "cannot_hold",
    ),
    Mutant(
        "_files/quantized_fields.py",
        "fields.dtypes != _usual(fields.bits)",
        "False",
        "saving_quantized",
        "equal",
    ),
    Mutant("_files/format_leaves.py", "if cursor.left:", "if False:", "format_leaves", "hostile"),
    Mutant("_files/format_leaves.py", "fields.axis != _usual_axis(shape)", "False", "format_leaves", "come_back"),
    Mutant(
        "_files/format_leaves.py", "fields.shapes != _usual_shapes(fields, shape)", "True", "format_leaves", "follows"
    ),
    Mutant(
        "_files/format_leaves.py", "_commonest(codes), checked)", "None, checked)", "format_leaves", "no_more_bytes"
    ),
    Mutant("_files/format_leaves.py", "fields.dtypes != _stored(form)", "False", "format_leaves", "cannot_hold"),
    Mutant(
        "_files/format_leaves.py", "if not set(fields.axis) <= set", "if False and set", "format_leaves", "cannot_hold"
    ),
    Mutant("_files/integer_arrays.py", "if size > most:", "if False:", "quantized_leaves", "hostile_fields"),
    Mutant(
        "_files/integer_arrays.py",
        "cursor.compare(checksum, alphabets.patterns(x))",
        "pass",
        "quantized_leaves",
        "hostile_fields",
    ),
    Mutant("_files/integer_arrays.py", "if x.size <= most else None", "", "saving_quantized", "more_steps"),
    Mutant("_files/integer_arrays.py", "if sparse else None", "if False else None", "quantized_leaves", "codebook"),
    Mutant("_files/byte_stream.py", "if value > most or shift > 70:", "if value > most:", "symbol_codes", "limits"),
    Mutant("__main__.py", 'print(f"clipjax: {source} {note}", file=sys.stderr)', "pass", "commands", "floats"),
)
