"""Inner loops of products, read from the disassembly of the extension: their sums, and what they leave in the stack.

A loop is a jump backwards with no other jump between its target and itself, so everything in it runs in every turn.
It belongs to a product if it multiplies and adds in whole ymm or zmm registers. Symbols are not needed, for extensions
are installed without them: functions are told apart by the unwind table, which every extension keeps.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

KINDS = {"vdpbf16ps": "dot", "vpdpbusd": "bytes", "vpmaddubsw": "bytes"}  # besides fused multiply-adds, which are "fma"
FMA = re.compile(r"vfn?m(add|sub)\d{3}ps")
READS_TARGET = ("vfm", "vfnm", "vdp", "vpdp", "vpternlog", "vpermi2", "vpermt2")  # the last operand is a source too
VECTOR = re.compile(r"%([xyz])mm(\d+)")
HEADER = re.compile(r"^([0-9a-f]+) <(.+)>:$")
LINE = re.compile(r"^\s*([0-9a-f]+):\t(?:(?:notrack|bnd|lock|rep\w*|data16|[cds]s|\{\w+\}) +)*(\S+)\s*([^#]*)")
UNWIND = re.compile(r"\bFDE\b.* pc=([0-9a-f]+)\.\.([0-9a-f]+)")
OPERAND = re.compile(r"(?:\([^)]*\)|[^,(])+")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: tuple[str, ...]  # AT&T order: the target is the last

    def __str__(self) -> str:
        return f"{self.address:x}: {self.name} {','.join(self.operands)}"

    @cached_property
    def jump(self) -> int | None:
        """Address of a direct jump."""
        direct = self.name.startswith("j") and re.match(r"([0-9a-f]+)(?: |$)", self.operands[0])
        return int(direct[1], 16) if direct else None

    @property
    def width(self) -> str:
        """Of the target: xmm, ymm, zmm, or nothing if it is no vector."""
        found = VECTOR.match(self.operands[-1]) if self.operands else None
        return f"{found[1]}mm" if found else ""

    @property
    def kind(self) -> str | None:
        """Key of the product that this is part of."""
        if self.width not in ("ymm", "zmm"):
            return None
        return "fma" if FMA.fullmatch(self.name) else KINDS.get(self.name)


@dataclass(frozen=True)
class Loop:
    """`function`: its symbol or address. `stack`: the registers that point into the stack there."""

    function: str
    stack: tuple[str, ...]
    body: tuple[Instruction, ...]

    @cached_property
    def products(self) -> set[tuple[str, str]]:
        """(width, kind)"""
        return {(i.width, i.kind) for i in self.body if i.kind}

    def _slot(self, operand: str) -> str | None:
        """The operand if it is memory in the stack."""
        return operand.split("{")[0] if any(f"({r}" in operand for r in self.stack) else None

    @cached_property
    def spills(self) -> tuple[Instruction, ...]:
        """What moves between vector registers and the stack."""
        return tuple(i for i in self.body if any(map(self._slot, i.operands)) and any(map(VECTOR.search, i.operands)))

    @cached_property
    def accumulators(self) -> set[str]:
        """What one turn leaves to the next: whole vector registers, or places in the stack, read and then written."""
        written: set[str] = set()
        carried: set[str] = set()
        for i in self.body:
            if not any(map(VECTOR.search, i.operands)):
                continue
            *sources, target = i.operands
            zeroed = "xor" in i.name and len(set(sources)) == 1 and len(sources) == 2
            merged = i.name.startswith(READS_TARGET) or ("{%k" in target and "{z}" not in target)
            read = [] if zeroed else [*sources, target] if merged else sources
            places = {self._place(operand) for operand in read if "%xmm" not in operand}
            carried.update(place for place in places if place and place not in written)
            if place := self._place(target):
                written.add(place)
        return carried & written

    def _place(self, operand: str) -> str | None:
        register = VECTOR.match(operand)
        return register[2] if register else self._slot(operand)

    def __str__(self) -> str:
        what = " and ".join(sorted(f"{kind} in {width}" for width, kind in self.products))
        where = f"loop of {what} at {self.body[0].address:#x} of {self.function}"
        return "\n    ".join([f"{where}, {len(self.accumulators)} accumulators:", *map(str, self.spills)])


def functions(text: str, bounds: Sequence[tuple[int, int]] = ()) -> Iterator[tuple[str, list[Instruction]]]:
    """(symbol or address, instructions) of what objdump -d printed; `bounds` divide what has no symbols, in order."""
    begins = [begin for begin, _ in bounds]
    name, current, found = "", -1, list[Instruction]()
    for line in text.splitlines():
        if header := HEADER.match(line):
            if found:
                yield name, found
            name, found = header[2], []
        elif match := LINE.match(line):
            address = int(match[1], 16)
            at = bisect_right(begins, address) - 1
            if at != current and bounds:
                if found:
                    yield name, found
                    name, found = f"the function at {address:#x}", []
                current = at
            found.append(Instruction(address, match[2], tuple(OPERAND.findall(match[3].strip()))))
    if found:
        yield name, found


def loops(text: str, bounds: Sequence[tuple[int, int]] = ()) -> Iterator[Loop]:
    """The inner loops of products."""
    for name, instructions in functions(text, bounds):
        if not any(i.kind for i in instructions):
            continue
        framed = any(i.name == "mov" and i.operands == ("%rsp", "%rbp") for i in instructions)
        index = {i.address: at for at, i in enumerate(instructions)}
        jumps = [at for at, i in enumerate(instructions) if i.name.startswith("j")]
        for before, at in zip([-1, *jumps], jumps, strict=False):
            begin = index.get(target, at + 1) if (target := instructions[at].jump) is not None else at + 1
            if before < begin <= at:
                loop = Loop(name, ("%rsp", "%rbp") if framed else ("%rsp",), tuple(instructions[begin : at + 1]))
                if loop.products:
                    yield loop


def loops_of(extension: Path) -> list[Loop]:
    """Of a shared library. Fails where binutils, which compilers come with, are missing."""
    objdump = shutil.which("objdump")
    assert objdump, "objdump is missing, by which the inner loops are read: install binutils"

    def printed(*options: str) -> str:
        return subprocess.run([objdump, *options, extension], check=True, capture_output=True, text=True).stdout

    bounds = sorted((int(a, 16), int(b, 16)) for a, b in UNWIND.findall(printed("--dwarf=frames")))
    assert bounds, f"{extension} has no unwind table, by which its functions are told apart"
    return list(loops(printed("-d", "-C", "--no-show-raw-insn"), bounds))
