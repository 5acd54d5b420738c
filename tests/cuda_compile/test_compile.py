"""The CUDA kernel compiled for the devices and models it is for: it fits into registers, code cache and shared memory.

Needs NVRTC, no driver and no GPU.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
from cuda_models import B200, H100, RTX_5090, checked, cuda_target
from cuda_resources import layer_source, program
from programs import spec

from flashformer.backends.cuda import probe
from flashformer.backends.cuda.nvrtc import (
    ENTRY,
    Source,
    architecture,
    compile_cubin,
    device_headers,
    resources,
    source_of,
)
from flashformer.backends.cuda.specialize import Specialization, specialize
from flashformer.check import check
from flashformer.formats import F16, find_quant
from flashformer.model.outline import read_outline
from flashformer.model.spec import QkNorm
from flashformer.program import build

MOST_REGISTERS = 168  # of 288 threads of the only block on a multiprocessor
MOST_LAYER_BYTES = 80 << 10  # of code that a multiprocessor keeps from one layer to the next

PLAIN_HEAD = dataclasses.replace(cuda_target(n_workers=H100.n_sm, quant=find_quant("int4-g64")), head_quant=None)

CASES = {
    "llama 8b, H100": lambda: specialize(program("llama-3.1-8b", H100), H100, n_rows=1),
    "llama 8b, H100, 8 rows": lambda: specialize(program("llama-3.1-8b", H100), H100, n_rows=8),
    "llama 8b, H100, 16 rows": lambda: specialize(program("llama-3.1-8b", H100), H100, n_rows=16),
    "llama 8b, H100, times": lambda: specialize(program("llama-3.1-8b", H100), H100, n_rows=8, times=True),
    "llama 8b, H100, int4": lambda: specialize(program("llama-3.1-8b", H100, "int4-g128"), H100, n_rows=8),
    "llama 8b, B200, int8": lambda: specialize(program("llama-3.1-8b", B200, "int8-g32"), B200, n_rows=16),
    "llama 1b, B200, int4 with zeros": lambda: specialize(program("llama-3.2-1b", B200, "int4-g32-zp"), B200, n_rows=8),
    "llama 8b, RTX 5090": lambda: specialize(program("llama-3.1-8b", RTX_5090), RTX_5090, n_rows=8),
    "llama 8b, RTX 5090, int4": lambda: specialize(
        program("llama-3.1-8b", RTX_5090, "int4-g32-zp"), RTX_5090, n_rows=4
    ),
    "llama 8b, H100, int4, bf16 head": lambda: specialize(
        check(build(read_outline("shape:llama-3.1-8b").spec, PLAIN_HEAD)), H100, n_rows=16
    ),
    "qwen 3, H100, f16": lambda: specialize(program("qwen3-0.6b", H100, fmt=F16, kv=F16), H100, n_rows=16),
    "every switch, B200": lambda: specialize(
        checked(
            spec(n_layers=2, bias=True, qk_norm=QkNorm.WIDTH, post_norm=True, window=300, score_softcap=50.0),
            n_workers=B200.n_sm,
            quant=find_quant("int4-g64"),
        ),
        B200,
        n_rows=16,
    ),
}


@cache
def specialization(case: str) -> Specialization:
    return CASES[case]()


@cache
def compiled(case: str) -> tuple[bytes, str]:
    return compile_cubin(source_of(specialization(case)))


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_fits(case: str) -> None:
    one, (cubin, log) = specialization(case), compiled(case)
    found = resources(cubin)
    assert 32 < found.registers <= MOST_REGISTERS
    assert found.local_bytes == 0
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log
    assert found.shared_bytes == 0  # all of it is dynamic
    assert 80_000 < one.shared_bytes <= 232448
    assert found.code_bytes > 10_000


@pytest.mark.parametrize("case", CASES)
def test_the_code_of_a_layer_stays_in_the_cache(case: str) -> None:
    layer = resources(compile_cubin(layer_source(specialization(case)))[0]).code_bytes
    assert layer < resources(compiled(case)[0]).code_bytes
    assert layer <= MOST_LAYER_BYTES


def test_warnings_are_none() -> None:
    _, log = compiled("llama 8b, H100")
    assert "warning" not in log
    assert ENTRY in log


@pytest.mark.parametrize("facts", [H100, B200, RTX_5090], ids=lambda f: f.arch)
def test_the_probe_fits_twice_on_a_multiprocessor(facts: object) -> None:
    headers = tuple(sorted(device_headers().items()))
    source = Source('#include "probe.cuh"\n', headers, architecture(facts.capability))  # type: ignore[attr-defined]
    found = resources(compile_cubin(source)[0], probe.ENTRY)
    assert found.registers * probe.THREADS * probe.BLOCKS_PER_SM <= 65536
    assert (found.local_bytes, found.shared_bytes) == (0, 0)


def test_no_two_cases_are_the_same_kernel() -> None:
    assert len({(one.capability, one.constants) for one in map(specialization, CASES)}) == len(CASES)
