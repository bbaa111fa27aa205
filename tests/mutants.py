"""Mutation test: one-line breaks of the core, each of which must turn its tests red. Run by `make mutants`.

Each break is made in a temporary copy of the tree, and a narrow selection of the tests runs there. A break that no
test notices fails the run, and so does one whose text is not found exactly once: then the code has moved on, and its
line in breaks.py must follow it.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from breaks import MUTANTS

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("clipjax", "tests", "benchmarks", "pyproject.toml", "README.md")


def copy(target):
    """The tree as it is on disk, without caches."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def pytest(root, names, expression):
    """Exit status and output of pytest in a copy of the tree."""
    files = [str(path) for name in names for path in (root / "tests").rglob(f"test_{name}.py")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow"]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command += [*files, "-k", expression]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout[-2000:]


def control():
    """Every selection is green on the unbroken tree: the output of the files where it is not."""
    selected = {}
    for mutant in MUTANTS:
        for name in mutant.tests.split():
            selected.setdefault(name, set()).add(f"({mutant.expression})")
    with tempfile.TemporaryDirectory(prefix="control") as name:
        root = pathlib.Path(name)
        copy(root)
        for file, expressions in sorted(selected.items()):
            status, output = pytest(root, [file], " or ".join(sorted(expressions)))
            if status not in (0, 5):
                yield f"test_{file}.py is red without any mutant:\n{output}"


def verdict(mutant):
    """What the tests say: "killed", or what is wrong with the mutant, and the seconds it took."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant") as name:
        root = pathlib.Path(name)
        copy(root)
        path = root / "clipjax" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"FOUND {text.count(mutant.old)} TIMES", 0.0
        path.write_text(text.replace(mutant.old, mutant.new))
        status, output = pytest(root, mutant.tests.split(), mutant.expression)
    results = {0: "SURVIVED", 1: "killed", 5: "NO TEST SELECTED"}
    return results.get(status, f"ERROR {output[-300:]}"), time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="run the mutants whose file or text contains this")
    parser.add_argument("--no-control", action="store_true", help="do not run the selections on the unbroken tree")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.file + m.old]
    alive = 0
    for complaint in () if options.no_control else control():
        alive += 1
        print(complaint, flush=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, (result, seconds) in zip(chosen, pool.map(verdict, chosen), strict=True):
            alive += result != "killed"
            print(f"{result:18} {seconds:5.1f} s  {mutant.file:16} {mutant.old.strip()[:72]}", flush=True)
    print(f"{len(chosen)} mutants, {alive} complaints.")
    return alive > 0


if __name__ == "__main__":
    sys.exit(main())
