"""The bits of the logits depend on the model, the rows before, and the instruction set: on nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_kernels import cpu_kernel, greedy, prefill, program_of, prompt_logits
from numpy.typing import NDArray
from odd_shapes import SHAPES, random_ids
from tiny import put, relative_error

from flashformer import _cpu
from flashformer.backends.base import Want
from flashformer.checkpoint.tensor import Tensor
from flashformer.env import PREFETCHES
from flashformer.formats import BF16, F32, QUANTS, Format

FORMATS = [(F32, F32), (BF16, BF16), (BF16, F32)]
MODEL = SHAPES[8]
N_IDS = 300  # more than one chunk of keys


def ids() -> list[int]:
    return random_ids(77, N_IDS, MODEL.vocab)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
@pytest.mark.parametrize(("weights", "kv"), FORMATS, ids=lambda f: f.name)
def test_threads_and_chunks(isa: str, weights: Format, kv: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in _cpu.isas():
        assert isa != "portable"
        pytest.skip(f"this CPU has no {isa}: nothing to run")
    monkeypatch.setenv("FLASHFORMER_ISA", isa)
    model = MODEL.make(4)
    seen: dict[bytes, tuple[int, int]] = {}
    for n_workers in (1, 2, 3, 4):
        with cpu_kernel(model, n_workers=n_workers, weights=weights, kv=kv, rows=N_IDS, ctx=N_IDS + 20) as kernel:
            assert kernel.describe()["isa"] == isa
            for chunk in (1, 7, 64, N_IDS):
                seen[prefill(kernel, ids(), chunk=chunk).tobytes()] = (n_workers, chunk)
    assert len(seen) == 1, f"different bits: {sorted(seen.values())}"


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_instruction_sets_agree(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within rounding: each walks k in the same order, but rounds products differently."""
    if isa not in _cpu.isas():
        pytest.skip(f"this CPU has no {isa}: nothing to run")
    model, prompt = MODEL.make(4), ids()[:40]
    found: list[NDArray[np.float32]] = []
    for name in (_cpu.isas()[-1], isa):
        monkeypatch.setenv("FLASHFORMER_ISA", name)
        with cpu_kernel(model) as kernel:
            found.append(prompt_logits(kernel, prompt))
    assert relative_error(found[1], found[0]) < 1e-5


@pytest.mark.parametrize(
    "weights", [F32, BF16, *(QUANTS[name] for name in ("int8-g32", "int4-g32", "nf4-g64"))], ids=str
)
def test_prefetches(weights: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that are asked for early, once or twice, or never give the same bits, for one row and for several."""
    model, prompt = MODEL.make(4), ids()[:40]
    formats = {"body_quant": weights, "head_quant": weights} if weights.name in QUANTS else {"weights": weights}
    seen: set[bytes] = set()
    for prefetch in PREFETCHES:
        monkeypatch.setenv("FLASHFORMER_PREFETCH", prefetch)
        with cpu_kernel(model, **formats) as kernel:
            seen.update(prefill(kernel, prompt, chunk=chunk).tobytes() for chunk in (1, 2, 3, 9))
    assert len(seen) == 1


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
def test_subnormals(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, products and sums next to and below the least normal number: one row as among others, bits and signs."""
    if isa not in _cpu.isas():
        assert isa != "portable"
        pytest.skip(f"this CPU has no {isa}: nothing to run")
    monkeypatch.setenv("FLASHFORMER_ISA", isa)
    model, prompt = replace(MODEL, tied=False).make(4), ids()[:40]
    head = model.tensors["lm_head"]
    exponents = np.random.default_rng(6).uniform(-41, -37, head.data.shape)
    small = Tensor(head.name, F32, (np.sign(head.data) * 10.0**exponents).astype(np.float32))
    model = replace(model, tensors={**model.tensors, "lm_head": small})
    with cpu_kernel(model, weights=BF16, kv=BF16) as kernel:
        logits = [prompt_logits(kernel, prompt, chunk=chunk) for chunk in (1, 2, 9)]
    least = np.finfo(np.float32).tiny
    assert (np.abs(logits[0]) < least).any()
    assert (np.abs(logits[0]) > 10 * least).any()
    assert logits[0].tobytes() == logits[1].tobytes() == logits[2].tobytes()


def test_random_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 runs, each by workers that stall at random."""
    model, prompt = MODEL.make(4), ids()[:9]
    with cpu_kernel(model) as kernel:
        expected = prefill(kernel, prompt, chunk=64).tobytes()
    monkeypatch.setenv("FLASHFORMER_DELAYS", "12345")
    runs = 0
    for n_workers in (2, 3, 4):
        with cpu_kernel(model, n_workers=n_workers) as kernel:
            for run in range(334):  # in chunks of 1 to 9 rows: forwards without the head and with it alternate
                assert prefill(kernel, prompt, chunk=1 + run % 9).tobytes() == expected
                runs += 1
    assert runs >= 1000


def test_ties_go_to_the_lowest_id_whoever_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits are equal, and workers that stall leave tiles with low ids to those that had higher ones."""
    monkeypatch.setenv("FLASHFORMER_DELAYS", "3")
    model = replace(MODEL, tied=False).make(4)
    head = model.tensors["lm_head"]
    nothing = Tensor(head.name, head.format, np.zeros_like(head.data))
    model = replace(model, tensors={**model.tensors, "lm_head": nothing})
    head_phase, moved = program_of(model, n_workers=3).head_begin, 0
    with cpu_kernel(model, n_workers=3, options={"log_capacity": 10_000}) as kernel:
        for pos in range(150):
            put(kernel, 0, [5], pos=pos, slot=0, want=Want.TOKEN)
            kernel.clear_logs()
            kernel.forward(1)
            assert kernel.tokens[0] == 0
            for worker in range(3):
                tiles = [unit for phase, kind, unit, _ in kernel.log(worker) if (phase, kind) == (head_phase, 1)]
                moved += tiles != sorted(tiles)
    assert moved > 0


@pytest.mark.parametrize(("weights", "kv"), FORMATS, ids=lambda f: f.name)
def test_company_does_not_matter(weights: Format, kv: Format) -> None:
    """A row's logits are the same alone and among 15 rows of other slots at other positions."""
    model = MODEL.make(4)
    prompts = [random_ids(seed, 3 + 19 * seed, MODEL.vocab) for seed in range(16)]
    with cpu_kernel(model, n_workers=3, weights=weights, kv=kv, streams=16, ctx=320) as kernel:
        for slot, prompt in enumerate(prompts):
            prefill(kernel, prompt[:-1], chunk=64, slot=slot)
        alone = []
        for slot, prompt in enumerate(prompts):
            put(kernel, 0, prompt[-1:], pos=len(prompt) - 1, slot=slot, want=Want.LOGITS)
            kernel.forward(1)
            alone.append(kernel.logits[0].tobytes())
        for row, slot in enumerate(np.random.default_rng(3).permutation(16).tolist()):
            put(kernel, row, prompts[slot][-1:], pos=len(prompts[slot]) - 1, slot=slot, want=Want.LOGITS)
        kernel.forward(16)
        together = {int(kernel.rows.slot[row]): kernel.logits[row].tobytes() for row in range(16)}
    assert [together[slot] for slot in range(16)] == alone
    assert len(set(alone)) == 16


def test_sampled_tokens_are_keyed_by_seed_and_position() -> None:
    """The token is the argmax of logits / T + noise, with the noise that backends/noise.py defines."""
    from flashformer.backends.noise import gumbel

    model, prompt = MODEL.make(4), ids()[:30]
    tokens = set()
    with cpu_kernel(model, n_workers=3) as kernel:
        logits = prefill(kernel, prompt, chunk=64).astype(np.float64)
        for seed in (0, 1, 7, 2**40 + 5, 2**64 - 1):
            for temperature in (0.3, 1.0, 4.0):
                put(kernel, 0, prompt[-1:], pos=len(prompt) - 1, slot=0, want=Want.TOKEN)
                kernel.rows.temperature[0], kernel.rows.seed[0], kernel.rows.choice[0] = temperature, seed, 2
                kernel.forward(1)
                noise = gumbel(seed, 2, len(prompt) - 1, np.arange(MODEL.vocab))
                scores = logits / temperature + noise
                best = np.sort(scores)[-2:]
                assert best[1] - best[0] > 1e-4, "too close to tell: choose another seed"
                assert int(kernel.tokens[0]) == int(scores.argmax())
                tokens.add(int(kernel.tokens[0]))
    assert len(tokens) > 5


def test_greedy_text_under_bf16_is_the_same_for_all_threads() -> None:
    model = MODEL.make(4)
    found = []
    for n_workers in (1, 4):
        with cpu_kernel(model, n_workers=n_workers, weights=BF16, kv=BF16, ctx=400) as kernel:
            found.append(greedy(kernel, ids()[:50], 64))
    assert found[0] == found[1]
