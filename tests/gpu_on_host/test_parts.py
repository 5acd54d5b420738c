"""Forwards of more rows than a kernel of the GPU takes: several launches, the same bits."""

from __future__ import annotations

import gpu_on_host.whole as models
import pytest
from gpu_on_host.whole import Case, assert_same_bits, gpu_of, run_plan

CASE = Case("Llama", 2, "f16", "int4-g64", "int4-g64-zp", "f16", 3)
SHARED_BYTES = 80_000  # room for 4 rows


def test_parts_of_a_forward_give_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CASE.load()
    monkeypatch.setattr(models, "SHARED_BYTES", SHARED_BYTES)
    parts = CASE.load()
    try:
        assert (tuple(whole._kernels), tuple(parts._kernels)) == ((1, 8, 16), (1, 4))
        assert_same_bits(run_plan(parts), run_plan(whole))
        assert len(gpu_of(parts).launches) > len(gpu_of(whole).launches)
    finally:
        whole.close()
        parts.close()
