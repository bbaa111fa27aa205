"""Reads a compiled program: what it moves through memory, in how many kernels, in which loops, across which devices.

Not a benchmark but the measure of `aot.py` and of `tests/test_passes.py`: the optimized HLO of any backend, so that the
numbers are those of the program that runs, and need no device to run it on. `python benchmarks/programs/compiled.py
FILE` prints the kernels of a saved program.
"""

from __future__ import annotations

import math
import re
import sys
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "opt-barrier"}
_COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast")
_CALLED = re.compile(r"(?:body|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)")


class Kernel(NamedTuple):
    """One instruction that touches memory.

    Attributes:
      name: of the instruction.
      op: its opcode.
      read: bytes of its operands in main memory.
      written: bytes of its results in main memory.
      largest: bytes of the largest array among both.
      loops: the loops around it, each with how often it runs, 0 where the program does not say.
    """

    name: str
    op: str
    read: int
    written: int
    largest: int
    loops: tuple[tuple[str, int], ...] = ()

    @property
    def moved(self) -> int:
        """Bytes read and written in one execution."""
        return self.read + self.written


class Program(NamedTuple):
    """The kernels of one execution, of the branches that move least, and everything that is sent."""

    kernels: list[Kernel]
    sent: list[tuple[str, int]]

    def large(self, least: int) -> list[Kernel]:
        """The kernels that read or write an array of at least so many bytes."""
        return [k for k in self.kernels if k.largest >= least]

    def once(self) -> int:
        """Bytes moved outside of loops."""
        return sum(k.moved for k in self.kernels if not k.loops)

    def passes(self, least: int) -> list[tuple[int, int]]:
        """What each loop over arrays of at least so many bytes moves: (bytes in one turn, turns)."""
        turns: dict[tuple, list[int]] = {}
        for k in self.large(least):
            if k.loops:
                turns.setdefault(k.loops, []).append(k.moved)
        return [(sum(moved), math.prod(n for _, n in loops)) for loops, moved in turns.items()]


def read(text: str) -> Program:
    """The program of an optimized HLO module, `compiled.as_text()`."""
    computations, entry = _computations(text)
    sent = []
    for lines in computations.values():
        for line in lines:
            found = _INSTRUCTION.match(line)
            if found and _COLLECTIVE.match(found[3]) and not found[3].endswith("-done"):
                sent.append((found[3].removesuffix("-start"), sum(n for n, _ in _sizes(found[2]))))
    return Program(_kernels(entry, computations, ()), sent)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that runs."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif " = " in line:
            lines.append(line.strip())
    return found, entry


def _kernels(name: str, computations: dict[str, list[str]], loops: tuple) -> list[Kernel]:
    kernels, types = [], {}
    for line in computations[name]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, result, op, rest = found.groups()
        types[name] = result
        called = [c for group in _CALLED.findall(rest) for c in re.findall(r"[\w.\-]+", group)]
        if op == "while":
            kernels += _kernels(called[-1], computations, (*loops, (name, _turns(rest, computations))))
        elif op == "conditional":
            branches = [_kernels(c, computations, loops) for c in called]
            kernels += min(branches, key=lambda branch: sum(k.moved for k in branch))
        elif op == "call":
            kernels += _kernels(called[-1], computations, loops)
        elif op not in _FREE and not op.endswith("-done"):
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            kernels.append(_kernel(name, op, result, [types.get(o, "") for o in operands], loops))
    return kernels


def _turns(rest: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: XLA's own count, or the limit of a condition that is one comparison `i < n`; else 0."""
    counted = re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', rest)
    if counted:
        return int(counted[1])
    lines = computations[re.search(r"condition=%?([\w.\-]+)", rest)[1]]
    limits = [re.search(r" constant\((\d+)\)", line) for line in lines if " constant(" in line]
    plain = "compare(" in lines[-1] and "direction=LT" in lines[-1] and len(limits) == 1 and limits[0]
    return int(limits[0][1]) if plain else 0


def _kernel(name: str, op: str, result: str, operands: list[str], loops: tuple) -> Kernel:
    arrays = _sizes(result)
    if op.endswith("-start"):  # (what it writes, what it reads once more, a flag)
        arrays = arrays[:1]
    written = [n for n, main in arrays if main]
    taken = [n for operand in operands for n, main in _sizes(operand) if main]
    return Kernel(name, op, sum(taken), sum(written), max([*taken, *written, 0]), loops)


def _sizes(type_: str) -> list[tuple[int, bool]]:
    """Bytes of every array of a type, and whether it lies in main memory: a TPU keeps some in its vector memory."""
    sizes = []
    for dtype, shape, layout in _ARRAY.findall(type_):
        digits = re.search(r"\d+", dtype)
        bits = _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 32
        count = math.prod(int(n) for n in shape.split(",") if n)
        sizes.append(((bits * count + 7) // 8, "S(" not in layout))
    return sizes


if __name__ == "__main__":
    for kernel in sorted(read(open(sys.argv[1]).read()).kernels, key=lambda k: -k.moved)[:40]:
        print(f"{kernel.moved:>16,d}  {kernel.op:20s} {kernel.name:40s} {' '.join(f'{n} x' for _, n in kernel.loops)}")
