"""Slots, streams and threads over the reference backend: cancelling, waiting, closing, forking."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from pathlib import Path

import pytest
from folders import model_folder

import flashformer as ff
from flashformer.engine.slots import Slots

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
        next(llm.stream("dropped"))
        gc.collect()
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


def test_waiting_for_a_slot_has_a_bound() -> None:
    slots = Slots(1, 0.05)
    holder = threading.Thread(target=slots.acquire)
    holder.start()
    holder.join()
    with pytest.raises(ff.RequestError, match="no slot became free"):
        slots.acquire()
    slots.release(0)
    assert slots.acquire() == 0


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
