"""What the bits of a whole forward do not depend on, and what the kernel does beside logits: tokens by every setting,
forwards without a head, forwards that are queued ahead, numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from gpu_on_host.host_gpu import BUILDER
from gpu_on_host.one_forward import MODEL, TARGET, one_kernel, run, same, tensors
from gpu_on_host.simulator import Policy
from gpu_on_host.whole import Case, Plan, checked_program, gpu_of, load, run_plan
from switch_models import random_tensors
from tiny import put

from flashformer.backends.base import Want
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.reference import ReferenceKernel
from flashformer.backends.sampling import choose
from flashformer.checkpoint import Tensor
from flashformer.errors import NumericalError
from flashformer.formats import BF16, from_f32
from flashformer.program.ir import Op, Space

# bf16 with folds, windows and caps; int4 with a head of its own; f16 with norms of heads.
CASES = [
    Case("Gemma2", 0, "bf16", "", "", "bf16", 2),
    Case("Qwen2", 1, "bf16", "int4-g128-zp", "int8-g128", "bf16", 3),
    Case("Qwen3", 1, "f16", "", "", "f16", 5),
]
LENGTHS = (24, 9)  # of the two sequences

ONE_BY_ONE: Plan = [[(0, 1)]] * 24 + [[(1, 1)]] * 9
TOGETHER: Plan = [[(1, 9), (0, 7)], [(0, 16)], [(0, 1)]]
MIXED: Plan = [[(0, 16)], [(0, 5), (1, 3)], [(1, 5)], [(0, 2)], [(1, 1), (0, 1)]]


def bits(kernel: CudaKernel, plan: Plan) -> bytes:
    found = run_plan(kernel, plan)
    assert tuple(len(rows) for rows in found) == LENGTHS
    assert all(np.isfinite(rows).all() for rows in found)
    return b"".join(rows.tobytes() for rows in found)


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[Case, bytes]]:
    yield {case: bits(case.load(gpu={"ahead": True}), MIXED) for case in CASES}
    BUILDER.give_up()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_not_on_how_a_prompt_is_cut_nor_on_company(case: Case, expected: dict[Case, bytes]) -> None:
    """16 rows and 1 row run through different kernels."""
    assert bits(case.load(), ONE_BY_ONE) == expected[case]
    assert bits(case.load(), TOGETHER) == expected[case]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_not_on_the_schedule(case: Case, expected: dict[Case, bytes]) -> None:
    kernel = case.load()
    for seed, policy in enumerate(Policy):
        gpu_of(kernel).options = {"seed": seed + 1, "policy": policy}
        assert bits(kernel, MIXED) == expected[case], policy


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_not_on_any_of_many_schedules(case: Case, expected: dict[Case, bytes]) -> None:
    kernel = case.load()
    for seed in range(150):
        gpu_of(kernel).options = {"seed": 100 + seed}
        assert bits(kernel, (MIXED, TOGETHER, ONE_BY_ONE)[seed % 3]) == expected[case], seed


@pytest.mark.parametrize("n_workers", [3, 8])
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_not_on_the_number_of_blocks(case: Case, n_workers: int, expected: dict[Case, bytes]) -> None:
    assert bits(case.load(gpu={"ahead": True}, n_workers=n_workers), MIXED) == expected[case]


@pytest.mark.parametrize("n_slots", [1, 2])
def test_not_on_the_ring(n_slots: int, expected: dict[Case, bytes]) -> None:
    assert bits(CASES[1].load(gpu={"ahead": True, "n_slots": n_slots}), MIXED) == expected[CASES[1]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_not_on_what_memory_held(case: Case, expected: dict[Case, bytes]) -> None:
    """Buffers of a forward, the KV cache and what is kept for later forwards: NaN before the first one."""
    kernel = case.load()
    gpu, launch = gpu_of(kernel), kernel._launch[0]
    gpu.memory[int(launch["kv"])][:] = 0xFF
    work = gpu.memory[int(launch["work"])]
    hold_nothing = {Space.QKV, Space.PARTIAL, Space.HIDDEN, Space.LOGITS, Space.CANDIDATES, Space.TOKENS}
    for buffer in kernel.program.memory.buffers:
        if buffer.space in hold_nothing:
            work[buffer.offset : buffer.offset + buffer.n_bytes] = 0xFF
    assert bits(kernel, MIXED) == expected[case]


@pytest.mark.parametrize("base", [0, 2**32 - 1, 2**31 - 7, 2**32 - 300])
def test_not_on_the_number_of_arrivals_before(base: int) -> None:
    """Counters wrap around within a forward, between two, and become negative as signed numbers."""
    kernel, n = one_kernel(base=base), 12
    for _ in range(n):
        assert same(run(kernel))
    program = kernel.program
    assert kernel._base == (base + n * program.final_wait(len(program.phases))) % 2**32
    assert program.final_wait(len(program.phases)) * n > 300


def steps(kernel: CudaKernel, n: int, *, ahead: bool) -> tuple[list[list[int]], bytes]:
    """Greedy tokens of two slots, a row each, and the logits behind the last of them."""
    tokens, found = [5, 9], []
    for i in range(n):
        for row, token in enumerate(tokens):
            put(kernel, row, [token], pos=i + 7 * row, slot=row, want=Want.TOKEN)
        kernel.forward(2, () if ahead and i + 1 < n else None)
        tokens = kernel.tokens[:2].tolist()
        found.append(tokens)
    put(kernel, 0, tokens[:1], pos=n, slot=0, want=Want.LOGITS)
    kernel.forward(1)
    return found, kernel.logits[0].tobytes()


def test_forwards_that_are_queued_find_their_tokens() -> None:
    expected = steps(one_kernel(), 5, ahead=False)
    assert len({token for both in expected[0] for token in both}) > 2
    for seed in range(4):
        kernel = one_kernel(options={"seed": seed + 1})
        assert steps(kernel, 5, ahead=True) == expected
        launches = [launch for _, launch in gpu_of(kernel).launches]
        assert [launch["token"][:2].tolist() == [-1, -2] for launch in launches] == [False, *[True] * 4, False]


def first_step(again: tuple[int, ...] | None) -> CudaKernel:
    kernel = one_kernel()
    for row, token in enumerate([5, 9]):
        put(kernel, row, [token], pos=7 * row, slot=row, want=Want.TOKEN)
    kernel.forward(2, again)
    return kernel


@pytest.mark.parametrize("row", [0, 1])
def test_a_forward_that_is_queued_does_nothing_behind_a_stop_token(row: int) -> None:
    apart = first_step(None)
    kernel = first_step((199, int(apart.tokens[row])))
    gpu = gpu_of(kernel)
    gpu.finish()
    assert len(gpu.launches) == 2
    assert gpu.counts["kExpect"] == gpu.counts["kHandoffArrive"] == 0
    for a, b in zip(run(kernel), run(apart), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_forward_without_a_head() -> None:
    """It leaves the cache as one with a head does, and loads none of the head's tiles."""
    case, after = CASES[2], []
    ids = list(range(9))
    for want in (Want.NOTHING, Want.LOGITS):
        kernel = case.load()
        put(kernel, 0, ids, pos=0, slot=1, want=want)
        kernel.forward(len(ids))
        head, copies = kernel.program.phases[kernel.program.head_begin], gpu_of(kernel).counts["kExpect"]
        put(kernel, 0, [40, 41], pos=len(ids), slot=1, want=Want.LOGITS)
        kernel.forward(2)
        after.append((kernel.logits[:2].tobytes(), copies))
    assert head.op is Op.LM_HEAD
    assert after[0][0] == after[1][0]
    assert 0 < after[0][1] < after[1][1]


def test_times_of_phases() -> None:
    """A kernel that notes them computes the same."""
    kernel = one_kernel()
    kernel.keep_times()
    for _ in range(2):
        assert same(run(kernel))
    times = kernel.times()
    assert times.entered.shape == times.left.shape == (TARGET.n_workers, len(kernel.program.phases))
    assert (times.entered < times.left).all()
    assert (times.left[:, :-1] <= times.entered[:, 1:]).all()
    assert times.begin == times.entered.min()
    assert times.end == times.left[:, -1].max()


# ---- tokens


def _draw_settings(kernel: CudaKernel, n: int, seed: int) -> None:
    """Every combination of what may be off."""
    rng, rows, adjusted = np.random.default_rng(seed), kernel.rows, 0
    for row in range(n):
        rows.temperature[row] = 0 if rng.random() < 0.25 else rng.uniform(0.2, 2)
        rows.top_k[row] = rng.integers(1, 60) if rng.random() < 0.4 else 0
        rows.top_p[row] = rng.uniform(0.05, 1) if rng.random() < 0.4 else 1
        rows.min_p[row] = rng.uniform(0, 0.3) if rng.random() < 0.3 else 0
        rows.seed[row], rows.choice[row] = rng.integers(2**63), rng.integers(5)
        if rng.random() < 0.4:
            n_adjusted = int(rng.integers(1, 50))
            begin, adjusted = adjusted, adjusted + n_adjusted
            rows.adjust_begin[row], rows.adjust_end[row] = begin, adjusted
            rows.adjust_token[begin:adjusted] = rng.permutation(MODEL.vocab_size)[:n_adjusted]
            rows.adjust_penalty[begin:adjusted] = rng.uniform(0.5, 2, n_adjusted)
            rows.adjust_bias[begin:adjusted] = rng.normal(size=n_adjusted)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_those_of_the_definition(seed: int) -> None:
    """sampling.py, given the kernel's own logits; and logits are those of a greedy row, whatever the settings."""
    kernel = load(MODEL, tensors(), TARGET)
    ids = np.random.default_rng(seed).integers(0, MODEL.vocab_size, 16).tolist()
    put(kernel, 0, ids, pos=0, slot=0, want=Want.LOGITS)
    kernel.forward(16)
    plain = kernel.logits[:16].copy()
    _draw_settings(kernel, 16, seed)
    kernel.forward(16)
    np.testing.assert_array_equal(kernel.logits[:16], plain)
    assert kernel.tokens[:16].tolist() == [choose(kernel.rows, row, plain[row]) for row in range(16)]
    assert kernel.tokens[:16].tolist() != plain.argmax(1).tolist()


def test_rows_that_want_nothing_lie_between() -> None:
    kernel = load(MODEL, tensors(), TARGET)
    ids = list(range(50, 62))
    put(kernel, 0, ids, pos=0, slot=0, want=Want.LOGITS)
    kernel.forward(12)
    plain = kernel.logits[:12].copy()
    kernel.rows.want[:12] = [Want.NOTHING, Want.TOKEN, Want.LOGITS, Want.NOTHING] * 3
    kernel.forward(12)
    wanting = [row for row in range(12) if row % 4 in (1, 2)]
    assert kernel.tokens[: len(wanting)].tolist() == plain[wanting].argmax(1).tolist()
    np.testing.assert_array_equal(kernel.logits[1 : len(wanting) : 2], plain[wanting[1::2]])


# ---- numbers that are not finite

BAD_ROLES = {
    "embed": (None, 0),
    "layers.1.q": (Op.QKV, 1),
    "layers.0.o": (Op.O_PROJ, 0),
    "layers.0.gate": (Op.GATE_UP, 0),
    "layers.1.down": (Op.DOWN, 1),
    "lm_head": (Op.LM_HEAD, -1),
}


@pytest.mark.parametrize("role", BAD_ROLES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_weight_is_named_by_its_layer(role: str, bad: float) -> None:
    """One element of one matrix, damaged in the memory of the GPU: the error of the reference, then all is well."""
    model, target = replace(MODEL, tied=False), replace(TARGET, weight_format=BF16, kv_format=BF16)
    weights, (op, layer) = random_tensors(model, 5, BF16), BAD_ROLES[role]
    kernel = load(model, weights, target)
    put(kernel, 0, [0, 3, 9], pos=0, slot=0, want=Want.LOGITS)
    kernel.forward(3)
    plain = kernel.logits[:3].copy()
    phase = next((p for p in kernel.program.phases if p.op is op and p.layer == layer), None)
    assert (phase is None) == (op is None)
    at = kernel.program.embed_offset if phase is None or phase.matrix is None else phase.matrix.offset
    first = gpu_of(kernel).memory[int(kernel._launch["weights"][0])][at : at + 2].view(np.uint16)
    kept, damaged = first.copy(), weights[role].data.copy()
    assert kept[0] == damaged[0, 0], "this is not the first element of the matrix"
    damaged[0, 0] = first[:] = from_f32(np.full(1, bad, np.float32), BF16)[0]
    reference = ReferenceKernel(checked_program(model, target), weights | {role: Tensor(role, BF16, damaged)})
    put(reference, 0, [0, 3, 9], pos=0, slot=0, want=Want.LOGITS)
    errors: list[NumericalError] = []
    for some in (kernel, reference):
        with pytest.raises(NumericalError) as caught:
            some.forward(3)
        errors.append(caught.value)
    assert (str(errors[0]), errors[0].layer) == (str(errors[1]), errors[1].layer)
    first[:] = kept
    kernel.forward(3)
    np.testing.assert_array_equal(kernel.logits[:3], plain)
