"""Mutation test: one-line breaks of the core, each of which must turn its tests red. Run by `make mutants`.

Each break is made in a temporary copy of the tree, and a narrow selection of the tests runs there. A break that no
test notices fails the run, and so does one whose text is not found exactly once: then the code has moved on, and its
line in breaks/ must follow it.
"""

import argparse
import compileall
import concurrent.futures
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time

from breaks import MUTANTS

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("clipjax", "tests", "benchmarks", "examples", "pyproject.toml", "README.md")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "-m", "not slow")
SECONDS = 900
KILLED, ALIVE = "killed", "SURVIVED"
RESULTS = {0: ALIVE, 1: KILLED, 5: "NO TEST SELECTED"}

# Imported once, by a server that has no threads yet; each run of pytest is a fork of it. None of them imports clipjax.
PRELOADED = ["jax", "optax", "chex", "equinox", "flax.linen", "flax.nnx", "hypothesis", "orbax.checkpoint", "pytest"]


def copy(source, target):
    """The tree as it is on disk; compiled modules too where they lie in a temporary tree."""
    without = shutil.ignore_patterns("__pycache__") if source == ROOT else None
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=without)
        else:
            shutil.copy2(source / name, target / name)


def run(root, names, expression):
    """The process: pytest in a copy of the tree."""
    import pytest

    output = os.open(root / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.chdir(root)
    sys.path[:] = [str(root)] + [path for path in sys.path if not pathlib.Path(path).is_relative_to(ROOT / "tests")]
    files = [str(path) for name in names for path in (root / "tests").rglob(f"test_{name}.py")]
    try:
        status = pytest.main([*OPTIONS, *files, "-k", expression])
    finally:  # an exception of pytest itself would exit with 1, as a failed test does
        sys.stdout.flush()
        os._exit(locals().get("status", pytest.ExitCode.INTERNAL_ERROR))


def pytest(server, root, names, expression):
    """Exit status and output of pytest in a copy of the tree."""
    process = server.Process(target=run, args=(root, names, expression))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return 1, f"stopped after {SECONDS} s"
    output = root / "output"
    return process.exitcode, output.read_text(errors="replace")[-2000:] if output.exists() else ""


def selections(mutants):
    """Of each test file that the mutants name, the expression of all that they select in it."""
    selected = {}
    for mutant in mutants:
        for name in mutant.tests.split():
            selected.setdefault(name, set()).add(f"({mutant.expression})" if mutant.expression else "")
    return {name: "" if "" in parts else " or ".join(sorted(parts)) for name, parts in sorted(selected.items())}


def control(server, template, name, expression):
    """What is wrong with a selection on the unbroken tree, if anything is."""
    with tempfile.TemporaryDirectory(prefix="control") as folder:
        root = pathlib.Path(folder)
        copy(template, root)
        status, output = pytest(server, root, [name], expression)
    return "" if status in (0, 5) else f"test_{name}.py is red without any mutant ({status}):\n{output}"


def verdict(server, template, mutant):
    """What the tests say: "killed", or what is wrong with the mutant, and the seconds it took."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        root = pathlib.Path(folder)
        copy(template, root)
        path = root / "clipjax" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"FOUND {text.count(mutant.old)} TIMES", 0.0
        path.write_text(text.replace(mutant.old, mutant.new))
        status, output = pytest(server, root, mutant.tests.split(), mutant.expression)
    return RESULTS.get(status, f"ERROR {status} {output[-300:]}"), time.perf_counter() - begin


def examine(server, template, options):
    """Prints each complaint and each verdict; returns how many are no "killed"."""
    chosen = [m for m in MUTANTS if options.only in m.file + m.old]
    alive = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        red = [] if options.no_control else selections(chosen).items()
        for complaint in filter(None, pool.map(lambda item: control(server, template, *item), red)):
            alive += 1
            print(complaint, flush=True)
        verdicts = pool.map(lambda mutant: verdict(server, template, mutant), chosen)
        for mutant, (result, seconds) in zip(chosen, verdicts, strict=True):
            alive += result != KILLED
            print(f"{result:18} {seconds:5.1f} s  {mutant.file:28} {mutant.old.strip()[:72]}", flush=True)
    print(f"{len(chosen)} mutants, {alive} complaints.")
    return alive


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only", default="", help="run the mutants whose file or text contains this, and their control"
    )
    parser.add_argument("--no-control", action="store_true", help="do not run the selections on the unbroken tree")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        template = pathlib.Path(folder) / "tree"
        template.mkdir()
        copy(ROOT, template)
        compileall.compile_dir(template / "clipjax", quiet=1)
        # What one run has compiled the others read: a mutant changes few programs of a selection.
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled", "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins want to be imported by pytest, not before it
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(PRELOADED)
        return examine(server, template, options) > 0


if __name__ == "__main__":
    sys.exit(main())
