"""Breaks of clipjax/_files."""

from breaks.mutant import Mutant

MUTANTS = (
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
    Mutant("_files/leaf_entries.py", "if zlib.crc32(data) != self.checksum:", "if False:", "fuzz", "damage"),
    Mutant("_files/leaf_entries.py", "if not reader.intact():", "if False:", "fuzz", "damage"),
    Mutant("_files/container.py", "os.fsync(file.fileno())", "pass", "files", "flushed"),
    Mutant(
        "_files/container.py",
        "os.replace(temporary, path)",
        "shutil.copyfile(temporary, path)",
        "files",
        "killed or flushed",
    ),
    Mutant("_files/layouts.py", '.replace("/", "~1")', "", "saving", "slashes"),
)
