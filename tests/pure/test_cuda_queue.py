"""Forwards of the CUDA kernel that are queued before they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fake_gpu import FakeGpu
from launches import HEAD_BEGIN, N_PHASES, WORKERS, counter, kernel, put, reporting, sound, token_of

import flashformer as ff
from flashformer.backends.base import Want
from flashformer.backends.cuda.kernel import CudaKernel


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu(sound)


@pytest.fixture
def made(gpu: FakeGpu) -> Iterator[CudaKernel]:
    with kernel(gpu) as one:
        yield one


def queued(gpu: FakeGpu) -> int:
    """Launches that have not begun."""
    return len(gpu.launches) - gpu.n_launched


def step(made: CudaKernel, tokens: list[int], pos: int, again: tuple[int, ...] | None = ()) -> list[int]:
    """One forward of a row of every slot."""
    for row, token in enumerate(tokens):
        put(made, [token], row=row, slot=row, pos=pos)
    made.forward(len(tokens), again)
    return made.tokens[: len(tokens)].tolist()


def behind(tokens: list[int], pos: int) -> list[int]:
    return [token_of(token, pos) for token in tokens]


@pytest.mark.parametrize("first", [[5], [5, 9]])
def test_tokens_are_those_of_forwards_one_by_one(gpu: FakeGpu, made: CudaKernel, first: list[int]) -> None:
    tokens = first
    for pos in range(3, 12):
        due = behind(tokens, pos)
        tokens = step(made, tokens, pos, () if pos < 11 else None)
        assert tokens == due
        assert queued(gpu) == (1 if pos < 11 else 0)
    assert len(gpu.launches) == 9
    assert [int(launch["token"][0]) for _, launch in gpu.launches] == [5] + [-1] * 8
    assert [int(launch["pos"][0]) for _, launch in gpu.launches] == [*range(3, 12)]
    bases = [int(launch["base"]) for _, launch in gpu.launches]
    assert bases == [WORKERS * N_PHASES * i for i in range(9)]


def test_a_stop_token_ends_it(gpu: FakeGpu, made: CudaKernel) -> None:
    """The launch that was queued behind it did nothing, and the next one goes on where the counter stands."""
    (token,) = behind([5], 3)
    assert step(made, [5], 3, (499, token)) == [token]
    assert gpu.launches[1][1]["stops"][:2].tolist() == [499, token]
    assert step(made, [token], 4, None) == behind([token], 4)  # whoever goes on in spite of it
    assert len(gpu.launches) == 3
    assert gpu.launches[2][1]["token"][0] == token


def test_another_forward_may_come_instead(gpu: FakeGpu, made: CudaKernel) -> None:
    (token,) = step(made, [5], 3)
    assert step(made, [7], 40) == behind([7], 40)
    assert [int(launch["token"][0]) for _, launch in gpu.launches] == [5, -1, 7, -1]
    put(made, [1, 2], slot=1, want=[Want.NOTHING, Want.LOGITS])
    made.forward(2)
    assert made.tokens[0] == token_of(2, 1)
    np.testing.assert_array_equal(made.logits[0], token_of(2, 1) + np.arange(made.logits.shape[1]))
    assert queued(gpu) == 0
    put(made, [3], want=Want.NOTHING)
    made.forward(1)
    assert counter(gpu, gpu.launches[-1][1])[0] == WORKERS * (5 * N_PHASES + HEAD_BEGIN)
    assert token == token_of(5, 3)


@pytest.mark.parametrize("name", ["slot", "pos", "seed", "temperature", "top_k", "top_p", "min_p"])
def test_it_must_be_the_same_rows(gpu: FakeGpu, made: CudaKernel, name: str) -> None:
    (token,) = step(made, [5], 3)
    put(made, [token], pos=4)
    column = getattr(made.rows, name)
    column[0] = 0.5 if column.dtype == np.float32 else 1
    made.forward(1)
    _, launch = gpu.launches[-1]
    assert (len(gpu.launches), launch["token"][0], launch[name][0]) == (3, token, column[0])


def test_what_needs_the_host_is_not_queued(gpu: FakeGpu, made: CudaKernel) -> None:
    for want in (Want.NOTHING, Want.LOGITS):
        put(made, [5], want=want)
        made.forward(1, ())
    put(made, [5, 6], want=[Want.NOTHING, Want.TOKEN])
    made.forward(2, ())
    step(made, [5], made.program.target.ctx - 1)
    step(made, [5], 3, tuple(range(17)))
    put(made, [5])
    made.rows.adjust_token[0], made.rows.adjust_penalty[0], made.rows.adjust_end[0] = 3, 2, 1
    made.forward(1, ())
    assert len(gpu.launches) == 6
    made.rows.adjust_end[0] = 0
    made.keep_times()  # they are those of the forward that was asked for
    step(made, [5], 3)
    assert len(gpu.launches) == 7


@pytest.mark.parametrize("words", [{0: 1, 1: 3, 2: 7}, {8: 2}])
def test_what_goes_wrong_is_told_by_the_forward_that_meets_it(
    gpu: FakeGpu, made: CudaKernel, words: dict[int, int]
) -> None:
    (token,) = step(made, [5], 3)
    gpu.run = reporting(words)
    with pytest.raises((ff.DeviceError, ff.NumericalError)):
        step(made, [token], 4)
    gpu.run = sound
    assert step(made, [token], 4) == behind([token], 4)


@pytest.mark.parametrize("words", [{0: 1, 1: 3, 2: 7}, {8: 2}])
def test_what_goes_wrong_in_a_forward_that_nobody_asks_for_is_forgotten(
    gpu: FakeGpu, made: CudaKernel, words: dict[int, int]
) -> None:
    step(made, [5], 3)
    gpu.run = reporting(words)
    put(made, [7], pos=9)
    gpu.run_launches(2)
    gpu.run = sound
    assert step(made, [7], 9) == behind([7], 9)
    assert step(made, behind([7], 9), 10) == behind(behind([7], 9), 10)


def test_closing_does_not_wait_for_it(gpu: FakeGpu) -> None:
    with kernel(gpu) as made:
        step(made, [5], 3)
        assert queued(gpu) == 1
    assert gpu.closed
