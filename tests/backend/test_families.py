"""Every family on the CPU kernel and on the reference, against transformers, over the table in families.py."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import cpu_kernel, greedy, prefill, program_of, prompt_logits
from families import CASES, CTX, MIN_DISTINCT, NEW, PROMPT, Case
from numpy.typing import NDArray
from odd_shapes import random_ids
from tiny import Tiny, forward, relative_error, tiny

from flashformer.backends.reference import ReferenceKernel
from flashformer.check import check
from flashformer.formats import BF16, F16
from flashformer.model import RopeKind

TOLERANCE = 2e-4
CHUNKS = (1, 7, 64, PROMPT)
FAMILIES = sorted({case.architecture for case in CASES})
CASES_OF = {name: [case for case in CASES if case.architecture == name] for name in FAMILIES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_f32_equals_transformers(case: Case) -> None:
    """Logits of a prompt three times as long as any window and any original positions, and 64 greedy tokens."""
    model, ids = case.make(), case.prompt()
    for layer in model.spec.layers:
        assert 3 * (layer.window or 0) <= PROMPT
        if layer.rope is not None and layer.rope.kind is not RopeKind.LINEAR:
            assert 3 * layer.rope.original_positions <= PROMPT
    with cpu_kernel(model, n_workers=1 + case.index % 4, ctx=CTX) as kernel:
        assert relative_error(prompt_logits(kernel, ids), model.logits(ids)) <= TOLERANCE
        found = greedy(kernel, ids, NEW)
    assert found == model.greedy(ids, NEW)
    assert len(set(found)) >= MIN_DISTINCT, "the text is too monotonous to prove anything: choose another seed"


def bits(model: Tiny, ids: list[int], n_workers: int, chunk: int) -> bytes:
    with cpu_kernel(model, n_workers=n_workers, rows=PROMPT, ctx=CTX) as kernel:
        return prefill(kernel, ids, chunk=chunk).tobytes()


@every_case
def test_threads_and_chunks_do_not_matter(case: Case) -> None:
    """Two of the 16 ways for every configuration, all of them for every family; all for all under --long."""
    model, ids = case.make(), case.prompt()
    expected = bits(model, ids, 1, PROMPT)
    for step in range(2):
        way = (2 * case.index + step) % 16
        assert bits(model, ids, 1 + way % 4, CHUNKS[way // 4]) == expected


@pytest.mark.long
@every_case
def test_no_way_to_cut_the_work_matters(case: Case) -> None:
    model, ids = case.make(), case.prompt()
    found = {bits(model, ids, n_workers, chunk) for n_workers in (1, 2, 3, 4) for chunk in CHUNKS}
    assert len(found) == 1


@every_case
def test_reference_equals_transformers(case: Case) -> None:
    model, ids = case.make(), case.prompt(24)
    program = program_of(model, n_workers=1 + case.index % 3, rows=16, ctx=CTX)
    kernel = ReferenceKernel(check(program), model.tensors, case.index)
    found = [forward(kernel, ids[begin:end], pos=begin) for begin, end in ((0, 13), (13, 14), (14, 24))]
    assert relative_error(np.concatenate(found), model.logits(ids)) <= TOLERANCE


def rms(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_bf16_error_is_no_larger_than_transformers_own(architecture: str) -> None:
    """Over three configurations; both run the same bf16 weights, the judge is transformers in fp32 on them."""
    ours, theirs = [], []
    for case in CASES_OF[architecture][1:8:3]:
        model, ids = case.make("bf16"), case.prompt(60)
        expected = model.logits(ids)
        with cpu_kernel(model, n_workers=2, weights=BF16, kv=BF16, ctx=CTX) as kernel:
            ours.append(rms(prompt_logits(kernel, ids) - expected) / rms(expected))
        model.oracle.bfloat16()
        theirs.append(rms(model.logits(ids) - expected) / rms(expected))
    assert min(theirs) > 0
    assert max(our / their for our, their in zip(ours, theirs, strict=True)) <= 1.0


@pytest.mark.parametrize("architecture", FAMILIES)
def test_f16_weights_are_widened_exactly(architecture: str) -> None:
    """Activations stay fp32, so that with an fp32 cache the result is that of fp32 on the rounded weights."""
    for case in CASES_OF[architecture][2:9:3]:
        model, ids = case.make("f16"), case.prompt(60)
        with cpu_kernel(model, n_workers=2, weights=F16, ctx=CTX) as kernel:
            assert relative_error(prompt_logits(kernel, ids), model.logits(ids)) <= TOLERANCE


def test_window_of_one_key() -> None:
    """Logits only: transformers' cache keeps all keys where the window leaves none of those before the last."""
    options = {"architecture": "MistralForCausalLM", "scale": 0.17, "sliding_window": 1, "num_hidden_layers": 3}
    model, ids = tiny(1, **options), random_ids(1, 40, 101)
    for chunk in (1, 7, 16):
        with cpu_kernel(model) as kernel:
            assert relative_error(prompt_logits(kernel, ids, chunk=chunk), model.logits(ids)) <= TOLERANCE
