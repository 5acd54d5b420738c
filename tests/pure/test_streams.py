"""Slots, streams and threads over the reference backend: cancelling, waiting, closing, forking."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from folders import model_folder
from threads import joined, started, until

import flashformer as ff

PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: object) -> ff.LLM:
    return ff.load(folder, device="reference", threads=2, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llm(folder: Path):
    with load(folder, streams=2) as loaded:
        yield loaded


def test_closing_a_stream_cancels_and_frees_its_slot(folder: Path) -> None:
    with load(folder) as llm:
        expected = llm.generate(PROMPT, max_tokens=8, ignore_eos=True)
        stream = llm.stream(PROMPT, max_tokens=8, ignore_eos=True)
        for _ in range(3):
            next(stream)
        with pytest.raises(ff.RequestError, match="slots"):
            llm.generate("a")
        stream.close()
        assert stream.output.finish_reason == "cancelled"
        assert stream.output.token_ids == expected.token_ids[:3]
        assert list(stream) == []
        assert llm.generate(PROMPT, max_tokens=8, ignore_eos=True).token_ids == expected.token_ids
        next(llm.stream("dropped"))  # and so free at once
        assert llm.generate("a", max_tokens=1).finish_reason == "length"


def _interrupted(llm: ff.LLM) -> None:
    with llm.stream(PROMPT, max_tokens=8) as stream:
        for _ in stream:
            raise KeyboardInterrupt


def test_an_error_in_the_loop_over_pieces_leaves_the_model_usable(folder: Path) -> None:
    with load(folder) as llm:
        with pytest.raises(KeyboardInterrupt):
            _interrupted(llm)
        assert len(llm.generate(PROMPT, max_tokens=8, ignore_eos=True).token_ids) == 8


def test_close_from_another_thread_ends_a_stream(llm: ff.LLM) -> None:
    stream = llm.stream(PROMPT, max_tokens=60, ignore_eos=True)
    for count, _ in enumerate(stream):
        if count == 2:
            closer = threading.Thread(target=stream.close)
            closer.start()
            closer.join()
    assert stream.output.finish_reason == "cancelled"
    assert len(stream.output.token_ids) == 3


@pytest.mark.parametrize("streams", [1, 3])
def test_threads_get_what_each_gets_alone(folder: Path, streams: int) -> None:
    prompts = [f"prompt {i}" * (i + 1) for i in range(5)]
    with load(folder, streams=streams, prompt_chunk=4) as llm:
        alone = [llm.generate(p, max_tokens=10, temperature=1.0, seed=9).token_ids for p in prompts]
        found: dict[int, list[int]] = {}

        def ask(i: int) -> None:
            found[i] = llm.generate(prompts[i], max_tokens=10, temperature=1.0, seed=9).token_ids

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(5)] == alone


def test_interleaved_streams_do_not_disturb_each_other(llm: ff.LLM) -> None:
    alone = [llm.generate(p, max_tokens=8, ignore_eos=True).token_ids for p in ("left", "right")]
    pairs = zip(*(llm.stream(p, max_tokens=8, ignore_eos=True) for p in ("left", "right")), strict=False)
    ids = [[piece.token_id for piece in side] for side in zip(*pairs, strict=True)]
    assert [i[:8] for i in ids] == alone


# ---- prefixes that are cached -------------------------------------------------------------------------


def test_what_a_slot_holds_is_not_computed_again(folder: Path) -> None:
    with load(folder, prompt_chunk=4) as llm:
        forwards: list[int] = []
        forward = llm.kernel.forward
        llm.kernel.forward = lambda n, *a: (forwards.append(n), forward(n, *a))[1]  # type: ignore[method-assign,func-returns-value]
        first = llm.generate(PROMPT, max_tokens=6, ignore_eos=True)
        n = len(first.prompt_token_ids)
        assert first.cache_miss == "no slot holds a beginning of the prompt"
        again = llm.generate(PROMPT, max_tokens=6, ignore_eos=True)
        assert (again.cached_tokens, again.cache_miss, again.token_ids) == (n - 1, None, first.token_ids)
        turn = first.prompt_token_ids + first.token_ids + [40, 41]
        forwards.clear()
        longer = llm.generate(turn, max_tokens=1)
        assert (longer.cached_tokens, longer.cache_miss) == (n + 5, None)  # an answer's last token was not put through
        assert forwards == [3]
        assert (llm.generate([*turn[:7], 99, 98], max_tokens=1).cache_miss or "").endswith("was cached at token 7")
        assert llm.generate([200, 3], max_tokens=1).cached_tokens == 0
    with load(folder) as fresh:
        assert fresh.generate(turn, max_tokens=1).token_ids == longer.token_ids


def test_scores_and_logits_share_the_cache(folder: Path) -> None:
    with load(folder) as llm:
        plain = llm.generate(PROMPT, max_tokens=4, ignore_eos=True)
        assert llm.logits(PROMPT).shape[0] == len(plain.prompt_token_ids)
        assert llm.generate(PROMPT, max_tokens=4, ignore_eos=True).cached_tokens == len(plain.prompt_token_ids) - 1
        score = llm.score(PROMPT, plain.token_ids)
        assert score.is_greedy == [True] * 4
        followed = llm.generate(plain.prompt_token_ids + plain.token_ids, max_tokens=1)
        assert followed.cached_tokens == len(plain.prompt_token_ids) + 3


def test_a_cancelled_request_leaves_its_prefix(folder: Path) -> None:
    with load(folder, prompt_chunk=2) as llm:
        expected = llm.generate([5, 6, 7, 8, 9, 10], max_tokens=6, ignore_eos=True)
        llm.forget()
        stream = llm.stream([5, 6, 7, 8, 9, 10], max_tokens=6, ignore_eos=True)
        for _ in range(3):
            next(stream)
        stream.close()
        again = llm.generate([5, 6, 7, 8, 9, 10, *expected.token_ids[:3]], max_tokens=3, ignore_eos=True)
        assert (again.cached_tokens, again.token_ids) == (8, expected.token_ids[3:])


def test_a_stream_closed_within_its_prompt_ends_within_one_forward(folder: Path) -> None:
    with load(folder, prompt_chunk=2) as llm:
        stream, forward, count = llm.stream([5] * 20, max_tokens=6), llm.kernel.forward, list[int]()

        def closing(n_rows: int, again: tuple[int, ...] | None = None) -> None:
            forward(n_rows, again)
            count.append(n_rows)
            if len(count) == 3:
                joined(started(stream.close))

        llm.kernel.forward = closing  # type: ignore[method-assign]
        assert list(stream) == []
        assert count == [2, 2, 2]
        assert stream.output.finish_reason == "cancelled"
        llm.kernel.forward = forward  # type: ignore[method-assign]
        assert llm.generate([5] * 20, max_tokens=1).cached_tokens == 6


# ---- callers in threads -------------------------------------------------------------------------------


def test_c53_errors_of_the_caller_free_the_slot(folder: Path) -> None:
    with load(folder) as llm:
        expected = llm.generate(PROMPT, max_tokens=4, ignore_eos=True).token_ids
        for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):

            def consume(error: type[BaseException] = error) -> None:
                for piece in llm.stream(PROMPT, max_tokens=4):
                    if piece:
                        raise error

            with pytest.raises(error):
                consume()
            assert llm.generate(PROMPT, max_tokens=4, ignore_eos=True).token_ids == expected


def test_c53_an_interrupt_within_a_forward_keeps_what_came_before(folder: Path) -> None:
    with load(folder) as llm:
        expected = llm.generate(PROMPT, max_tokens=6, ignore_eos=True)
        llm.forget()
        forward, count = llm.kernel.forward, list[int]()

        def interrupted(n_rows: int, again: tuple[int, ...] | None = None) -> None:
            count.append(n_rows)
            forward(n_rows, again)
            if len(count) == 3:
                raise KeyboardInterrupt

        llm.kernel.forward = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPT, max_tokens=6, ignore_eos=True)
        llm.kernel.forward = forward  # type: ignore[method-assign]
        turn = expected.prompt_token_ids + expected.token_ids[:4]
        out = llm.generate(turn, max_tokens=2, ignore_eos=True)
        assert out.token_ids == expected.token_ids[4:]
        assert out.cached_tokens == len(expected.prompt_token_ids) + 1


def test_c52_a_request_from_within_a_stream_has_a_slot_or_an_error(llm: ff.LLM) -> None:
    alone = llm.generate("inner", max_tokens=2, ignore_eos=True).token_ids
    with llm.stream("outer", max_tokens=3, ignore_eos=True) as outer:
        for _ in outer:
            assert llm.generate("inner", max_tokens=2, ignore_eos=True).token_ids == alone
    with llm.stream("a") as a, llm.stream("b") as b:
        next(a)
        next(b)
        with pytest.raises(ff.RequestError, match="slots"):
            llm.generate("inner")


def test_c52_nested_in_another_thread_is_an_error_soon(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.engine.slots.NESTED_S", 0.2)
    found: list[Exception] = []
    with load(folder) as llm:

        def nested() -> None:
            with llm.stream("outer", max_tokens=3) as outer:
                next(outer)
                try:
                    llm.generate("inner", max_tokens=2)
                except ff.RequestError as error:
                    found.append(error)

        joined(started(nested))
        assert "slots" in str(found[0])
        assert llm.generate("after", max_tokens=1).finish_reason == "length"


def test_c52_a_stream_that_another_thread_goes_on_with_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashformer.engine.slots.NESTED_S", 0.3)
    found: list[ff.Output] = []
    with load(folder) as llm:
        stream = llm.stream("outer", max_tokens=20, ignore_eos=True)

        def begin_and_ask() -> None:
            next(stream)
            found.append(llm.generate("inner", max_tokens=2, ignore_eos=True))

        threads = started(begin_and_ask)
        until(lambda: llm._slots.n_waiting == 1)
        next(stream)  # the second piece, here: now the slot is this thread's
        threads[0].join(0.6)
        assert threads[0].is_alive()
        stream.close()
        joined(threads)
    assert len(found[0].token_ids) == 2


def test_c52_a_stream_closed_while_its_piece_is_made_frees_its_slot(
    llm: ff.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream(PROMPT, max_tokens=4, ignore_eos=True)

    class Closing:
        def step(self, token_id: int) -> str:
            joined(started(stream.close))  # too late for the forward, too early for the next one
            return "x"

    monkeypatch.setattr(llm.tokenizer, "stream", Closing)
    assert next(stream).text == "x"
    assert all(slot.owner is None for slot in llm._slots._slots)
    assert list(stream) == []


def test_c52_streams_passed_from_thread_to_thread(llm: ff.LLM) -> None:
    """As asyncio.to_thread does: a piece here, a piece there, with fewer slots than streams."""
    prompts = [f"task {i}" for i in range(5)]
    alone = [llm.generate(p, max_tokens=8, ignore_eos=True).token_ids for p in prompts]

    async def one(prompt: str) -> list[int | None]:
        stream, ids = llm.stream(prompt, max_tokens=8, ignore_eos=True), []
        while (piece := await asyncio.to_thread(next, stream, None)) is not None:
            ids.append(piece.token_id)
        return [i for i in ids if i is not None]

    async def all_of_them() -> list[list[int | None]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
        return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(all_of_them()) == alone


def test_c52_a_stream_is_read_by_one_thread_at_a_time(llm: ff.LLM) -> None:
    stream, forward = llm.stream(PROMPT, max_tokens=4), llm.kernel.forward
    refused: list[Exception] = []

    def steal() -> None:
        try:
            next(stream)
        except ff.RequestError as error:
            refused.append(error)

    def forward_and_steal(n_rows: int, again: tuple[int, ...] | None = None) -> None:
        joined(started(steal))
        forward(n_rows, again)

    llm.kernel.forward = forward_and_steal  # type: ignore[method-assign]
    try:
        next(stream)
    finally:
        del llm.kernel.forward
        stream.close()
    assert "another thread" in str(refused[0])


def test_c52_a_stream_that_waits_for_a_slot_can_be_closed(folder: Path) -> None:
    with load(folder) as llm:
        holder = llm.stream("holder")
        next(holder)
        waiting, pieces = llm.stream("waiting"), list[ff.Piece]()
        threads = started(lambda: pieces.extend(waiting))
        until(lambda: llm._slots.n_waiting == 1)
        waiting.close()
        joined(threads)
        assert (pieces, waiting.output.finish_reason) == ([], "cancelled")
        holder.close()


@pytest.mark.parametrize("streams", [1, 3])
def test_c52_streams_closed_at_random_leave_no_slot_taken(folder: Path, streams: int) -> None:
    with load(folder, streams=streams, prompt_chunk=3) as llm:
        expected = llm.generate(PROMPT, max_tokens=5, ignore_eos=True).token_ids

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(6):
                stream = llm.stream(PROMPT if rng.random() < 0.5 else [3] * 9, max_tokens=5, ignore_eos=True)
                closer = threading.Timer(rng.uniform(0, 0.02), stream.close)
                closer.start()
                for _ in stream:
                    pass
                closer.join()

        joined(started(*(lambda seed=seed: work(seed) for seed in range(4))))  # type: ignore[misc]
        assert all(slot.owner is None for slot in llm._slots._slots)
        assert llm.generate(PROMPT, max_tokens=5, ignore_eos=True).token_ids == expected


def test_a_closed_model_refuses(folder: Path) -> None:
    llm = load(folder, streams=2)
    stream = llm.stream(PROMPT)
    next(stream)
    llm.close()
    llm.close()
    for call in (llm.generate, llm.stream, llm.logits):
        with pytest.raises(ff.DeviceError, match="closed"):
            call("a")
    with pytest.raises(ff.DeviceError, match="closed"):
        next(stream)


def _in_child(llm: ff.LLM, pipe) -> None:
    try:
        llm.generate("a", max_tokens=1)
    except ff.DeviceError as error:
        pipe.send(str(error))
    else:
        pipe.send("no error")


def test_a_forked_child_is_refused_and_the_parent_goes_on(llm: ff.LLM) -> None:
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(llm, there))
    child.start()
    assert "forked child" in here.recv()
    child.join()
    assert llm.generate("a", max_tokens=1).finish_reason == "length"


def test_a_loop_that_is_left_frees_the_slot(folder: Path) -> None:
    with load(folder) as llm:
        for _ in range(3):
            for piece in llm.stream(PROMPT, max_tokens=8, ignore_eos=True):
                if piece:
                    break
        assert llm.generate(PROMPT, max_tokens=4, ignore_eos=True).finish_reason == "length"


def test_a_stream_whose_cache_was_forgotten_says_so(folder: Path) -> None:
    with load(folder) as llm:
        expected = llm.generate(PROMPT, max_tokens=6, ignore_eos=True).token_ids
        with llm.stream(PROMPT, max_tokens=8, ignore_eos=True) as stream:
            for _ in range(3):
                next(stream)
            llm.forget()
            with pytest.raises(ff.DeviceError, match="something else wrote"):
                next(stream)
        again = llm.generate(PROMPT, max_tokens=6, ignore_eos=True)
        assert (again.cached_tokens, again.token_ids) == (0, expected)
