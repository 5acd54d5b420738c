"""Attention beside what the cache holds of other sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_kernels import cpu_kernel, prompt_logits
from odd_shapes import Shape, random_ids
from tiny import put

import flashformer as ff
from flashformer.backends.base import Want
from flashformer.checkpoint import Tensor
from flashformer.formats import BF16, F16, F32, Format

SHAPE = Shape(4, 2, 14, 56, 72, 101, layers=2)
POISON = 100


@pytest.mark.parametrize("kv", [BF16, F16, F32], ids=lambda f: f.name)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("chunk", [1, 8])
def test_what_an_earlier_sequence_left_is_not_read(kv: Format, exact: bool, chunk: int) -> None:
    """Its keys and values are NaN, right behind those of the new one, which may end anywhere in a vector."""
    model = SHAPE.make(seed=1, stored="bf16")
    embed = model.tensors["embed"]
    bits = embed.data.copy()
    bits[POISON] = 0x7F00  # 1.7e38: its square is no float, and its norm NaN
    tensors = {**model.tensors, "embed": Tensor(embed.name, BF16, bits)}
    ids = random_ids(5, 19, POISON)
    with cpu_kernel(replace(model, tensors=tensors), weights=BF16, kv=kv, exact=exact) as kernel:
        expected = prompt_logits(kernel, ids)
        for n in range(1, len(ids)):
            put(kernel, 0, [POISON] * 4, pos=n, slot=0, want=Want.LOGITS)
            with pytest.raises(ff.NumericalError):
                kernel.forward(4)
            np.testing.assert_array_equal(prompt_logits(kernel, ids[:n], chunk=chunk), expected[:n])
