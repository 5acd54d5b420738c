"""Device sources touch shared and mutable memory through the wrappers of ptx.cuh alone, and the rules see a breach."""

from __future__ import annotations

import pytest
from device_rules import WRAPPERS, violations

from flashformer.backends.cuda.nvrtc import device_headers

NAMES = sorted(device_headers())

PLANTED = [
    'asm("bar.sync 0;");',
    "__shared__ f32 sums[8];",
    "__syncthreads();",
    "const u32 v = __shfl_xor_sync(~0u, x, 1);",
    "const f32 w = __ldg(p);",
    "atomicAdd(counter, 1);",
    "volatile u32 flag = 0;",
    "const u32 t = threadIdx.x;",
    "*to = 1.0f;",
    "const f32 v = *from;",
    "return *from;",
    "sum += *(from + 1);",
    "total = a * *from;",
    "if (*flag) return;",
    "const f32 v = from[i];",
    "const u32 v = launch.report[kReportFlag];",
    "const f32 v = ctx.launch.accumulators[i];",
    "to[2 * i + 1] = v;",
    "const f32 v = launch.residual()[i];",
    "ctx.launch.tokens()[row] = 1;",
    "reinterpret_cast<u32*>(to)[0] = 1;",
    "const i32 t = candidate->token;",
    "launch.candidates(block)->token = 1;",
    "f32 v = *reinterpret_cast<const f32*>(from);",
]
ALLOWED = [
    "const f32 v = ld_global(from + i);",
    "st_global(to + 2 * i, v * w);",
    "const Phase& phase = launch.phases[p];",
    "const Span& span = launch.schedule[p * kWorkers + block];",
    "const i64 end = launch.tape_begin[block + 1];",
    "const i64 stride = launch.model->d_model_stride;",
    "const i32 token = launch.token[row];",
    "c[0] += a[1] * b[2];",
    "f32 c[4] = {};",
    "const u32x4* next = from + i * stride;",
    "const u32 n = 1;  // to[n] = *from",
    'static_assert(sizeof(Launch) == 8, "*from");',
    "inline DEVICE void mma(f32 (&c)[4], const u32 (&a)[4]);",
    "f32 from[2], to[2];",
    "sum += head.from[i];",
    "u16 *keys = launch.keys, *values = keys + n;",
    "x = u32{kTile} * y + (a + b) * c;",
]
AROUND = """#pragma once
namespace flashformer {
inline DEVICE void work(const Launch& launch, const f32* from, f32* to, Candidate* candidate, u32* flag) {
  %s
}
}  // namespace flashformer
"""


@pytest.mark.parametrize("name", NAMES)
def test_no_device_source_breaks_a_rule(name: str) -> None:
    assert violations(name, device_headers()[name]) == []


def test_the_sources_are_all_there() -> None:
    assert {"kernel.cuh", "product.cuh", "attend.cuh", "sample.cuh", "handoff.cuh", WRAPPERS} <= set(NAMES)


@pytest.mark.parametrize("line", PLANTED)
def test_what_is_planted_is_found(line: str) -> None:
    (found,) = violations("planted.cuh", AROUND % line)
    assert found.startswith("planted.cuh:4: ")


@pytest.mark.parametrize("line", ALLOWED)
def test_what_is_allowed_is_not_found(line: str) -> None:
    assert violations("allowed.cuh", AROUND % line) == []


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(".cuh") and n not in (WRAPPERS, "program.cuh")])
def test_what_is_planted_in_a_source_is_found(name: str) -> None:
    text = device_headers()[name]
    at = text.rindex("}  // namespace flashformer")
    spoiled = text[:at] + "inline DEVICE void f(f32* planted) { planted[1] = 2; }\n" + text[at:]
    assert len(violations(name, spoiled)) == 1


def test_the_wrappers_are_where_ptx_is() -> None:
    assert violations("renamed.cuh", device_headers()[WRAPPERS])
    assert violations(WRAPPERS, device_headers()[WRAPPERS]) == []
