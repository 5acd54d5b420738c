"""Which rows make up a forward: over scripted kernels and the reference, without and with a model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import model_folder
from hypothesis import given
from hypothesis import strategies as st

import flashformer as ff
from flashformer.backends.base import Want
from flashformer.engine.batch import AHEAD, MIXED_ROWS, deal
from flashformer.engine.request import SamplingSettings

PROMPTS = ["left", "the right one", "def f(x):", "a" * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: Any) -> ff.LLM:
    return ff.load(folder, **({"device": "reference", "threads": 2} | options))


# ---- dealing rows -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 700), min_size=1, max_size=16), st.integers(16, 80), st.integers(1, 70))
def test_rows_are_dealt(left: list[int], n_rows: int, chunk: int) -> None:
    chunk = min(chunk, n_rows)
    counts = deal(left, n_rows, chunk)
    decoding = [count for n, count in zip(left, counts, strict=True) if n == 0]
    prompts = [(n, count) for n, count in zip(left, counts, strict=True) if n]
    most = min(chunk, n_rows - len(decoding), MIXED_ROWS if decoding else chunk)
    assert all(count == 1 for count in decoding), "who decodes waits for nobody"
    assert sum(count for _, count in prompts) == min(most, sum(n for n, _ in prompts)), "no room is left"
    assert all(count <= n for n, count in prompts)
    assert sum(counts) <= n_rows
    unfinished = next((i for i, (n, count) in enumerate(prompts) if count < n), len(prompts))
    assert all(count == 0 for _, count in prompts[unfinished + 1 :]), "who came first is served first"


def test_a_prompt_alone_has_the_chunk_and_few_rows_beside_others() -> None:
    assert deal([500], 64, 64) == [64]
    assert deal([0, 500, 0, 3], 64, 64) == [1, MIXED_ROWS, 1, 0]
    assert deal([0, 3, 500], 64, 64) == [1, 3, MIXED_ROWS - 3]
    assert deal([0] * 16, 16, 16) == [1] * 16
    assert deal([0] * 15 + [9], 16, 16) == [1] * 16


# ---- forwards of several sequences --------------------------------------------------------------------


class Forwards:
    """What every forward of `llm` was of: (slot, position, what it wanted) of its rows."""

    def __init__(self, llm: ff.LLM) -> None:
        self.rows: list[list[tuple[int, int, int]]] = []
        self.again: list[tuple[int, ...] | None] = []
        self._rows, self._forward = llm.kernel.rows, llm.kernel.forward
        llm.kernel.forward = self  # type: ignore[method-assign,assignment]

    def __call__(self, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        columns = (self._rows.slot, self._rows.pos, self._rows.want)
        self.rows.append([tuple(column[i].item() for column in columns) for i in range(n_rows)])
        self.again.append(again)
        self._forward(n_rows, again)


def token_ids(llm: ff.LLM, prompt: Any, **settings: Any) -> list[int]:
    return llm.generate(prompt, **({"max_tokens": 8, "ignore_eos": True} | settings)).token_ids


def test_sequences_share_their_forwards(folder: Path) -> None:
    with load(folder, streams=2) as llm:
        alone = [token_ids(llm, prompt) for prompt in PROMPTS[:2]]
        llm.forget()
        forwards = Forwards(llm)
        streams = [llm.stream(prompt, max_tokens=8, ignore_eos=True) for prompt in PROMPTS[:2]]
        found = [[], []]  # type: list[list[int | None]]
        for pieces in zip(*streams, strict=False):
            for ids, piece in zip(found, pieces, strict=True):
                ids.append(piece.token_id)
        assert [ids[:8] for ids in found] == alone
        assert len([rows for rows in forwards.rows if len(rows) == 2]) >= 4
        assert len(forwards.rows) <= 12


def test_nobody_waits_longer_than_for_a_part_of_a_prompt(folder: Path) -> None:
    """While a long prompt is computed, a row of the one that decodes is in every forward."""
    with load(folder, streams=2, prompt_chunk=32) as llm:
        forwards = Forwards(llm)
        first = llm.stream(PROMPTS[0], max_tokens=60, ignore_eos=True)
        next(first)
        late = llm.stream([5] * 60, max_tokens=2, ignore_eos=True)
        thread = threading.Thread(target=lambda: next(late))
        forwards.rows.clear()
        thread.start()
        while thread.is_alive():
            next(first)
        thread.join()
        of_late = [rows for rows in forwards.rows if any(slot == 1 for slot, _, _ in rows)]
        assert sum(slot == 1 for rows in forwards.rows for slot, _, _ in rows) >= 60
        decoding = [rows for rows in of_late if any(slot == 0 for slot, _, _ in rows)]
        assert len(decoding) >= len(of_late) - AHEAD
        assert all(sum(slot == 1 for slot, _, _ in rows) <= MIXED_ROWS for rows in decoding)
        first.close()
        late.close()


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_a_list_of_prompts_is_answered_together(folder: Path, streams: int) -> None:
    with load(folder, streams=streams) as llm:
        alone = [token_ids(llm, prompt, max_tokens=4 + i) for i, prompt in enumerate(PROMPTS)]
        llm.forget()
        forwards = Forwards(llm)
        found = llm.generate(PROMPTS, max_tokens=7, ignore_eos=True)
        assert [output.token_ids[: 4 + i] for i, output in enumerate(found)] == alone
        assert max(len({slot for slot, _, _ in rows}) for rows in forwards.rows) == streams


def test_lists_from_several_threads_do_not_wait_for_each_other_forever(folder: Path) -> None:
    with load(folder, streams=3) as llm:
        alone = [output.token_ids for output in llm.generate(PROMPTS, max_tokens=6, ignore_eos=True)]
        found: dict[int, list[list[int]]] = {}

        def ask(i: int) -> None:
            found[i] = [output.token_ids for output in llm.generate(PROMPTS, max_tokens=6, ignore_eos=True)]

        threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found.get(i) for i in range(5)] == [alone] * 5


def test_an_error_in_a_list_closes_the_others(folder: Path) -> None:
    with load(folder, streams=2) as llm:
        forward, fuse = llm.kernel.forward, [4]

        def failing(n_rows: int, again: tuple[int, ...] | None = None) -> None:
            fuse[0] -= 1
            if fuse[0] <= 0:
                raise ff.DeviceError("the GPU is gone")
            forward(n_rows, again)

        llm.kernel.forward = failing  # type: ignore[method-assign]
        with pytest.raises(ff.DeviceError):
            llm.generate(PROMPTS, max_tokens=7, ignore_eos=True)
        llm.kernel.forward = forward  # type: ignore[method-assign]
        assert len(llm.generate(PROMPTS, max_tokens=3, ignore_eos=True)) == len(PROMPTS)


def test_a_warm_prompt_is_not_computed_again(folder: Path) -> None:
    with load(folder, streams=2, prompt_chunk=16) as llm:
        alone = token_ids(llm, [5] * 40 + [6])
        llm.forget()
        forwards = Forwards(llm)
        assert llm.warm([5] * 40) == 0
        assert [len(rows) for rows in forwards.rows] == [16, 16, 8]
        assert all(want == Want.NOTHING for rows in forwards.rows for _, _, want in rows)
        assert llm.warm([5] * 40) == 40
        output = llm.generate([5] * 40 + [6], max_tokens=8, ignore_eos=True)
        assert (output.cached_tokens, output.token_ids) == (40, alone)
        other = llm.stream(PROMPTS[0], max_tokens=20, ignore_eos=True)
        next(other)
        forwards.rows.clear()
        assert llm.warm([7] * 20) == 0
        assert [len(rows) for rows in forwards.rows] == [1 + MIXED_ROWS] * 2 + [5], "beside one that decodes"
        other.close()


def test_a_warm_prompt_that_is_cancelled_ends_within_one_forward(folder: Path) -> None:
    with load(folder, prompt_chunk=16) as llm:
        forwards = Forwards(llm)
        warming = llm.start([5] * 60, SamplingSettings(), warm=True)
        forward = llm.kernel.forward
        llm.kernel.forward = lambda *given: (forward(*given), warming.close())[0]  # type: ignore[method-assign,func-returns-value]
        assert list(warming) == []
        llm.kernel.forward = forward  # type: ignore[method-assign]
        assert [len(rows) for rows in forwards.rows] == [16]
        assert llm.generate([5] * 60, max_tokens=1).cached_tokens == 16


def test_a_stream_that_is_not_read_stands_still(folder: Path) -> None:
    with load(folder, streams=2) as llm:
        forwards = Forwards(llm)
        resting = llm.stream(PROMPTS[0], max_tokens=40, ignore_eos=True)
        next(resting)
        forwards.rows.clear()
        expected = token_ids(llm, PROMPTS[1], max_tokens=30)
        assert sum(slot == 0 for rows in forwards.rows for slot, _, _ in rows) == AHEAD
        rest = [piece.token_id for piece in resting if piece.token_id is not None]
    with load(folder, streams=1) as llm:
        assert token_ids(llm, PROMPTS[0], max_tokens=40)[1:] == rest
        assert token_ids(llm, PROMPTS[1], max_tokens=30) == expected


def test_logprobs_are_those_of_each_token_whoever_runs_the_forward(folder: Path) -> None:
    """To what the reference computes alike in a product of several rows."""
    settings = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3, "temperature": 1.0, "seed": 5}
    with load(folder, streams=4) as llm:
        alone = [llm.generate(prompt, **settings) for prompt in PROMPTS]
        together: dict[int, ff.Output] = {}

        def ask(i: int) -> None:
            together[i] = llm.generate(PROMPTS[i], **settings)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, due in enumerate(alone):
        found = together[i]
        assert found.token_ids == due.token_ids
        assert found.logprobs is not None
        assert due.logprobs is not None
        for one, other in zip(found.logprobs, due.logprobs, strict=True):
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_penalties_and_biases_are_each_sequences_own(folder: Path) -> None:
    ways = [
        {"repeat_penalty": 1.5},
        {},
        {"logit_bias": {7: 5.0}},
        {"repeat_penalty": 1.2, "temperature": 1.0, "seed": 3},
    ]
    with load(folder, streams=4) as llm:
        alone = [token_ids(llm, "abc", **way) for way in ways]
        streams = [llm.stream("abc", max_tokens=8, ignore_eos=True, **way) for way in ways]  # type: ignore[arg-type]
        found: list[list[int | None]] = [[] for _ in ways]
        for pieces in zip(*streams, strict=False):
            for ids, piece in zip(found, pieces, strict=True):
                ids.append(piece.token_id)
    assert [ids[:8] for ids in found] == alone


def test_an_error_of_one_sequence_is_its_own(folder: Path) -> None:
    """The forward of both fails; each is run alone, and only one of them fails again."""
    with load(folder, streams=2) as llm:
        alone = token_ids(llm, PROMPTS[1])
        good, bad = (llm.stream(prompt, max_tokens=8, ignore_eos=True) for prompt in (PROMPTS[1], PROMPTS[0]))
        ids = [next(good).token_id]
        next(bad)
        rows, forward = llm.kernel.rows, llm.kernel.forward
        slot = 1  # of the second

        def failing(n_rows: int, again: tuple[int, ...] | None = None) -> None:
            if slot in rows.slot[:n_rows]:
                raise ff.NumericalError("not finite in layer 1", layer=1)
            forward(n_rows, again)

        llm.kernel.forward = failing  # type: ignore[method-assign]
        ids += [piece.token_id for piece in good if piece.token_id is not None]
        assert ids == alone
        with pytest.raises(ff.NumericalError):
            for _ in bad:
                pass
        llm.kernel.forward = forward  # type: ignore[method-assign]
        assert token_ids(llm, PROMPTS[1]) == alone


def test_an_interrupt_after_a_forward_loses_nothing(folder: Path) -> None:
    """Results that were not noted are computed again, for all."""
    with load(folder, streams=2) as llm:
        alone = [token_ids(llm, prompt) for prompt in PROMPTS[:2]]
        forward, fuse = llm.kernel.forward, [3]

        def interrupted(n_rows: int, again: tuple[int, ...] | None = None) -> None:
            forward(n_rows, again)
            fuse[0] -= 1
            if fuse[0] == 0:
                raise KeyboardInterrupt

        streams = [llm.stream(prompt, max_tokens=8, ignore_eos=True) for prompt in PROMPTS[:2]]
        ids = [[next(stream).token_id] for stream in streams]
        llm.kernel.forward = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            ids[0].extend(piece.token_id for piece in streams[0])
        ids[1] += [piece.token_id for piece in streams[1] if piece.token_id is not None]
        assert ids[1] == alone[1]
        assert ids[0] == alone[0][: len(ids[0])]
        assert 1 < len(ids[0]) < 8


def test_the_kernel_is_told_when_the_same_rows_come_again(folder: Path) -> None:
    with load(folder, streams=2) as llm:
        forwards = Forwards(llm)
        token_ids(llm, PROMPTS[0], max_tokens=4, ignore_eos=True)
        assert forwards.again == [None, (), (), None]
        forwards.again.clear()
        llm.generate(PROMPTS[0], max_tokens=4, ignore_eos=True, logprobs=1)
        llm.generate(PROMPTS[0], max_tokens=4, ignore_eos=True, repeat_penalty=1.1)
        assert set(forwards.again) == {None}


def test_times_of_tokens_made_ahead_are_those_of_their_forwards(folder: Path) -> None:
    with load(folder, streams=2) as llm:
        forward = llm.kernel.forward

        def slow(n_rows: int, again: tuple[int, ...] | None = None) -> None:
            threading.Event().wait(0.01)
            forward(n_rows, again)

        llm.kernel.forward = slow  # type: ignore[method-assign]
        streams = [llm.stream(prompt, max_tokens=8, ignore_eos=True) for prompt in PROMPTS[:2]]
        for _ in zip(*streams, strict=False):
            pass
        for stream in streams:
            timing = stream.output.timing
            assert timing.p50_ms is not None
            assert timing.p50_ms >= 10


def test_rows_of_a_sequence_that_is_gone_are_not_run(folder: Path) -> None:
    with load(folder, streams=2) as llm:
        forwards = Forwards(llm)
        closed, dropped = (llm.stream(prompt, max_tokens=40, ignore_eos=True) for prompt in PROMPTS[:2])
        next(closed), next(dropped)
        closed.close()
        del dropped
        forwards.rows.clear()
        token_ids(llm, PROMPTS[2])
        assert all(len({slot for slot, _, _ in rows}) == 1 for rows in forwards.rows)
        wants = [want for rows in forwards.rows for _, _, want in rows]
        assert wants.count(Want.TOKEN) == 8
        assert np.count_nonzero(np.array(wants) == Want.LOGITS) == 0
