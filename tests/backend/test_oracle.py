"""The CPU kernel against transformers, on models in which every parameter is random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_kernels import cpu_kernel, greedy, prompt_logits
from numpy.typing import NDArray
from odd_shapes import SEEDS, SHAPES, Shape, random_ids
from tiny import Tiny, relative_error

from flashformer.formats import BF16


def oracle_greedy(model: Tiny, ids: list[int], n: int) -> list[int]:
    tokens, past = torch.tensor([ids]), None
    result: list[int] = []
    with torch.no_grad():
        for _ in range(n):
            out = model.oracle(tokens, past_key_values=past, use_cache=True)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            result.append(int(tokens))
    return result


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_f32_equals_transformers(index: int) -> None:
    shape = SHAPES[index]
    model = shape.make(SEEDS[index])
    ids = random_ids(index, 37, shape.vocab)
    with cpu_kernel(model, n_workers=1 + index % 4) as kernel:
        assert relative_error(prompt_logits(kernel, ids), model.logits(ids)) <= 2e-4
        found = greedy(kernel, ids, 64)
    assert found == oracle_greedy(model, ids, 64)
    assert len(set(found)) >= 24, "the text is too monotonous to prove anything: choose another seed"


def test_long_context_crosses_key_chunks() -> None:
    shape = Shape(6, 2, 26, 90, 91, 400)
    model = shape.make(seed=1)
    ids = random_ids(5, 700, shape.vocab)
    expected = model.logits(ids)
    with cpu_kernel(model, n_workers=3, ctx=800) as kernel:
        assert relative_error(prompt_logits(kernel, ids), expected) <= 2e-4


def test_bf16_kv_cache_stays_close() -> None:
    model = SHAPES[16].make(seed=2)
    ids = random_ids(6, 60, SHAPES[16].vocab)
    with cpu_kernel(model, kv=BF16) as kernel:
        error = relative_error(prompt_logits(kernel, ids), model.logits(ids))
    assert 1e-6 < error < 2e-2


def rms(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize("exact", [False, True])
def test_bf16_error_is_no_larger_than_transformers_own(exact: bool) -> None:
    """Both run the same bf16 weights; the reference is transformers in fp32 on those weights."""
    shape = Shape(4, 2, 32, 128, 256, 500, layers=3)
    ratios = []
    for seed in range(20):
        model = shape.make(seed=300 + seed, stored="bf16")
        prompts = [random_ids(1000 * seed + i, 24, shape.vocab) for i in range(8)]
        expected = [model.logits(ids) for ids in prompts]
        with cpu_kernel(model, weights=BF16, kv=BF16, exact=exact) as kernel:
            ours = [rms(prompt_logits(kernel, ids) - e) for ids, e in zip(prompts, expected, strict=True)]
        model.oracle.bfloat16()
        theirs = [rms(model.logits(ids) - e) for ids, e in zip(prompts, expected, strict=True)]
        assert min(theirs) > 0
        ratios.append(rms(np.array(ours, np.float32)) / rms(np.array(theirs, np.float32)))
    print(f"ratio of errors: median {np.median(ratios):.3f}, largest {max(ratios):.3f}")
    assert np.median(ratios) <= 1.0
    assert max(ratios) <= 1.25


def test_f32_matrices_are_rounded_to_bf16_as_torch_does() -> None:
    """The same bits as from a checkpoint whose matrices were stored in bf16. Norms and biases stay fp32."""
    shape = SHAPES[8]
    ids = random_ids(3, 20, shape.vocab)
    wide, stored = (shape.make(9, stored=fmt) for fmt in ("f32", "bf16"))
    mixed = {role: stored.tensors[role] if t.data.ndim == 2 else t for role, t in wide.tensors.items()}
    found = []
    for tensors in (wide.tensors, mixed):
        with cpu_kernel(replace(wide, tensors=tensors), weights=BF16) as kernel:
            found.append(prompt_logits(kernel, ids))
    assert found[0].tobytes() == found[1].tobytes()
