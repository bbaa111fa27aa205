"""Collects files of many types out of packages that pip, npm and apt install: what Magika is compressed on.

    python benchmarks/real/file_corpus.py [--out out/files] [--jobs 4]

Of every package in packages.txt at most 200 files are kept, at most 24 of an extension, each between 16 bytes and
1 MB; what a file holds occurs once in the corpus. A package is in one split with all its files: of ten hashes of its
name, seven train, one tunes, two test. OUT/index.jsonl names the files: path, package, split, extension.

It needs `apt-get`, `dpkg-deb`, `npm` and `pip`, and goes on where it stopped. A package that its registry no longer has
is named and left out.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import registries
from rich.progress import track

PACKAGES = Path(__file__).with_name("packages.txt")
SPLITS = ("train",) * 7 + ("tuning",) + ("test",) * 2
AN_EXTENSION, A_PACKAGE = 24, 200
SIZES = range(16, 1_000_001)


def digest(text: str) -> int:
    """A number that is the same in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split(package: str) -> str:
    """Train, tuning or test."""
    return SPLITS[digest(package) % len(SPLITS)]


def chosen(folder: Path) -> list[Path]:
    """Some of each extension, in an order that a hash of their names gives."""
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_size in SIZES and os.access(path, os.R_OK)
    ]
    found.sort(key=lambda path: digest(str(path.relative_to(folder))))
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    for path in found:
        counts[path.suffix.lower()] += 1
        if counts[path.suffix.lower()] <= AN_EXTENSION:
            kept.append(path)
    return kept[:A_PACKAGE]


def collect(line: str, out: Path) -> list[dict[str, Any]]:
    """The rows of a package, whose files are copied to OUT under the hash of what they hold."""
    registry, name = line.split()
    with tempfile.TemporaryDirectory() as temporary:
        registries.unpack(registries.fetch(registry, name, Path(temporary)), Path(temporary, "files"))
        rows = []
        for path in chosen(Path(temporary, "files")):
            key = hashlib.sha256(path.read_bytes()).hexdigest()[:24]
            kept = Path(split(line), f"{key}{path.suffix.lower()[:12]}")
            target = out / kept
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            extension = path.suffix.lower().removeprefix(".")
            rows.append({"path": str(kept), "package": line, "split": split(line), "extension": extension, "key": key})
        return rows


def once(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of which no other holds the same, so that nothing that is trained on is in another split."""
    counts: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        counts[row["key"]].add(row["split"])
    first: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["package"], row["path"])):
        if len(counts[row["key"]]) == 1:
            first.setdefault(row["key"], row)
    return list(first.values())


def main() -> None:
    """Collects what OUT lacks, and writes the index."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/files"))
    parser.add_argument("--jobs", type=int, default=4)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [line for line in PACKAGES.read_text().splitlines() if line and not line.startswith("#")]
    done = options.out / "packages.jsonl"
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    left = [line for line in lines if line not in {row["package"] for row in rows}]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool, done.open("a") as file:
        running = {pool.submit(collect, line, options.out): line for line in left}
        for future in track(concurrent.futures.as_completed(running), "packages", len(running)):
            line = running[future]
            try:
                found = future.result()
            except registries.ERRORS as error:
                print(f"{line}: left out, {type(error).__name__}", flush=True)
                continue
            rows += found
            file.writelines(json.dumps(row) + "\n" for row in found)
            file.flush()
    index = once(rows)
    (options.out / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in index))
    for name in dict.fromkeys(SPLITS):
        inside = [row for row in index if row["split"] == name]
        print(f"{name}: {len(inside)} files of {len({row['package'] for row in inside})} packages")


if __name__ == "__main__":
    main()
