"""The inner loops of the installed extension keep their sums in registers, for every instruction set it holds.

A sum that a compiler lays in the stack gives the same bits at a fraction of the speed, and no other test sees it. There
is no allowance: a constant that is read from the stack in every step takes a load from the weights as well. Loops with
branches inside are not held to it: they are the element-wise ones (activation functions, the exponentials of attention,
the last elements of a norm). That no product hides among those is what the count of its instances proves. An address is
given its name by the object files of the build, which are not stripped: objdump -dC.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from disassembly import Loop, functions, loops, loops_of

from flashformer.backends.cpu.native import load_native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WIDTHS = {"avx2": "ymm", "avx512": "zmm", "avx512bf16": "zmm", "amx": "zmm"}


@cache
def extension() -> tuple[Loop, ...]:
    return tuple(loops_of(Path(load_native().__file__)))


def flags(isa: str) -> list[str]:
    """With which CMakeLists.txt compiles an instruction set."""
    listed = dict(re.findall(r"^set\(flags_(\w+) (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE))
    text: str = listed[isa]
    while match := re.search(r"\$\{flags_(\w+)\}", text):
        text = text.replace(match[0], listed[match[1]])
    return text.split()


def expected(isa: str, program: Path) -> Counter[tuple[str, str, int]]:
    """(width, kind, accumulators) -> instances of a product, by the constants of csrc/."""
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-w", *flags(isa), f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, HERE / "shapes.cpp", "-o", program], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return Counter((WIDTHS[isa], kind, int(n)) for kind, n, *_ in map(str.split, lines))


def test_no_inner_loop_moves_vectors_to_or_from_the_stack() -> None:
    spilling = [loop for loop in extension() if loop.spills]
    if spilling:
        pytest.fail(f"{len(spilling)} of {len(extension())} loops\n" + "\n".join(map(str, spilling)), pytrace=False)


def test_every_instance_of_a_product_is_among_the_loops(tmp_path: Path) -> None:
    found: Counter[tuple[str, str, int]] = Counter()
    for loop in extension():
        for width, kind in loop.products:
            found[width, kind, len(loop.accumulators)] += 1
    wanted = sum((expected(isa, tmp_path / isa) for isa in WIDTHS), Counter())
    assert {(width, kind) for width, kind, _ in wanted} == {
        ("ymm", "fma"), ("ymm", "bytes"), ("zmm", "fma"), ("zmm", "bytes"), ("zmm", "dot"),
    }  # fmt: skip
    missing = {shape: (found[shape], n) for shape, n in wanted.items() if found[shape] < n}
    assert not missing, f"(width, kind, accumulators): (loops found, instances compiled) {missing}"


def listing(*lines: str, setup: str = "push %rbp") -> str:
    """As objdump prints a function of `setup` and a loop of `lines`."""
    body = [setup, *lines, "cmp %rdx,%rdi", "jne 1001 <f+0x1>", "ret"]
    return "\n".join(["0000000000001000 <f>:", *(f"    {0x1000 + n:x}:\t{text}" for n, text in enumerate(body))])


STEP = (
    "vmovdqu64 (%rcx),%zmm4",
    "prefetcht0 (%rax)",
    "vpbroadcastd (%rdx),%zmm5        # 1234 <x>",
    "vdpbf16ps %zmm5,%zmm4,%zmm0",
    "vdpbf16ps 0x40(%rdx){1to16},%zmm4,%zmm1",
)


def test_a_clean_loop() -> None:
    (loop,) = loops(listing(*STEP, "mov 0x8(%rsp),%rcx"))
    assert loop.products == {("zmm", "dot")}
    assert loop.accumulators == {"0", "1"}
    assert not loop.spills  # that of a general register costs no vector


@pytest.mark.parametrize(
    ("spills", "accumulators"),
    [
        (["vdpbf16ps -0x40(%rsp),%zmm4,%zmm1"], 2),
        (["vpandd 0x80(%rsp,%r9,1),%zmm4,%zmm6"], 2),
        (["vpbroadcastd 0x8(%rsp),%zmm6"], 2),
        (["vmovaps %zmm4,0x40(%rsp)"], 2),
        (["vmovaps 0x40(%rsp),%zmm7", "vdpbf16ps %zmm5,%zmm4,%zmm7", "vmovaps %zmm7,0x40(%rsp)"], 3),
    ],
)
def test_spills_are_found_and_sums_in_the_stack_counted(spills: list[str], accumulators: int) -> None:
    (loop,) = loops(listing(*STEP, *spills))
    assert [i.name for i in loop.spills] == [text.split()[0] for text in spills if "%rsp" in text]
    assert len(loop.accumulators) == accumulators
    assert "of f, " in str(loop)
    assert spills[0] in str(loop)


def test_rbp_is_the_stack_only_where_it_was_set_from_rsp() -> None:
    lines = (*STEP, "vmovaps -0x40(%rbp),%zmm6")
    assert [len(loop.spills) for loop in loops(listing(*lines, setup="mov %rsp,%rbp"))] == [1]
    assert [len(loop.spills) for loop in loops(listing(*lines, setup="mov %rdi,%rbp"))] == [0]


def test_what_one_turn_makes_and_uses_itself_is_no_accumulator() -> None:
    own = (
        "vpxor %ymm6,%ymm6,%ymm6",
        "vpmaddubsw %ymm1,%ymm2,%ymm7",
        "vpaddd %ymm7,%ymm6,%ymm6",
        "vpaddd %ymm6,%ymm0,%ymm0",
    )
    (loop,) = loops(listing(*own, "vpaddq %xmm8,%xmm9,%xmm9"))
    assert loop.accumulators == {"0"}
    (merged,) = loops(listing(*own, "vmovaps %ymm0,%ymm3{%k1}", "vmovaps %ymm0,%ymm4{%k1}{z}"))
    assert merged.accumulators == {"0", "3"}


@pytest.mark.parametrize(
    "lines", [("vaddps %zmm0,%zmm1,%zmm1",), ("vfmadd231ss %xmm0,%xmm1,%xmm2",), (*STEP, "je 1006")]
)
def test_other_loops_are_left_out(lines: tuple[str, ...]) -> None:
    assert not list(loops(listing(*lines)))


def test_functions_without_symbols_are_told_apart_by_their_bounds() -> None:
    first, second = listing(*STEP, setup="mov %rsp,%rbp"), listing(*STEP, "vmovaps (%rbp),%zmm6")
    moved = "\n".join(second.splitlines()[1:]).replace("    10", "    20").replace("jne 10", "jne 20")
    text = f"{first}\n{moved}"
    assert [len(loop.spills) for loop in loops(text)] == [0, 1]
    assert [len(loop.spills) for loop in loops(text, [(0x1000, 0x1010), (0x2000, 0x2010)])] == [0, 0]
    assert [name for name, _ in functions(text, [(0x1000, 0x1010), (0x2000, 0x2010)])] == [
        "f",
        "the function at 0x2000",
    ]
