"""Stop strings: where a text is cut, and that a stream gives out nothing that the cut takes back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import byte_tokenizer, model_folder
from hypothesis import given
from hypothesis import strategies as st

import flashformer as ff
from flashformer.engine.request import make_request
from flashformer.engine.stops import StopFinder

PROMPT = "def f(x):"
LETTERS = st.sampled_from("aab🙂é")  # few, so that stops overlap themselves and each other
TEXTS = st.text(LETTERS, max_size=30)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=4, unique=True)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the shortest beginning of the text that ends with a stop, less the longest that ends it."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def feed_all(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    """What is given out piece by piece, and the stop."""
    finder, given_out = StopFinder(stops), []
    for piece in pieces:
        text, stop = finder.feed(piece)
        given_out.append(text)
        if stop is not None:
            return given_out, stop
    return [*given_out, finder.rest()], None


def split(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(text=TEXTS, stops=STOPS, places=st.lists(st.integers(0, 40), max_size=12))
def test_b35_any_split_gives_the_same_cut(text: str, stops: list[str], places: list[int]) -> None:
    given_out, stop = feed_all(split(text, places), stops)
    assert ("".join(given_out), stop) == cut(text, stops)


@given(text=TEXTS, stops=STOPS)
def test_b35_no_more_is_held_back_than_may_begin_a_stop(text: str, stops: list[str]) -> None:
    finder, given_out = StopFinder(stops), ""
    for end in range(1, len(text) + 1):
        new, stop = finder.feed(text[end - 1])
        given_out += new
        if stop is not None:
            break
        held = text[len(given_out) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_b35_examples() -> None:
    assert cut("aabaaab", ["aaab"]) == ("aab", "aaab")
    assert feed_all(["aa", "ba", "aab"], ["aaab"]) == (["", "aab", ""], "aaab")
    assert feed_all(["one\n", "\ntwo"], ["\n\n", "\n\ntwo"]) == (["one", ""], "\n\n")  # complete first
    assert feed_all(["xab"], ["b", "ab"]) == (["x"], "ab")  # complete at once: the longest
    assert feed_all(["ab", "c"], ["abd"]) == (["", "abc", ""], None)
    assert feed_all(["ab"], ["abd"]) == (["", "ab"], None)


# ---- through a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory):
    with ff.load(model_folder(tmp_path_factory.mktemp("model")), device="reference", threads=1) as loaded:
        yield loaded


def scripted(llm: ff.LLM, text: str, **settings: Any) -> tuple[list[ff.Piece], ff.Output]:
    """Pieces and output of an answer whose tokens are the bytes of `text`, whatever the model would choose."""
    ids = byte_tokenizer(add_bos=False).encode(text).ids
    kernel, left, forward = llm.kernel, iter(ids), llm.kernel.forward

    def scripted_forward(n_rows: int, again: tuple[int, ...] | None = None) -> None:
        forward(n_rows, again)
        kernel.tokens[0] = next(left)

    kernel.forward = scripted_forward  # type: ignore[method-assign]
    try:
        stream = llm.stream(PROMPT, **{"max_tokens": len(ids), "ignore_eos": True} | settings)
        return list(stream), stream.output
    finally:
        del kernel.forward


CASES = [
    ("one\n\ntwo", "\n\n"),
    ("price: 5 € and more", "€ a"),
    ("a🙂b🙂c", "🙂c"),
    ("é" * 9, "ééé"),
    ("no stop here", "zzz"),
    ("ends with half a sto", "stop"),
    ("xx", "x"),
]


@pytest.mark.parametrize(("text", "stop"), CASES)
def test_b35_streams_are_cut_at_the_stop(llm: ff.LLM, text: str, stop: str) -> None:
    """One byte per token: stops lie across tokens, and characters do too."""
    expected, found = cut(text, [stop])
    pieces, out = scripted(llm, text, stop=stop)
    assert "".join(piece.text for piece in pieces) == out.text == expected
    assert (out.finish_reason, out.stop) == (("stop", stop) if found else ("length", None))
    n_bytes = len((expected + stop if found else text).encode())
    assert out.token_ids == byte_tokenizer(add_bos=False).encode(text).ids[:n_bytes]  # all that were made
    assert [piece.token_id for piece in pieces if piece.token_id is not None] == out.token_ids


def test_b35_a_character_cut_off_by_the_end_of_the_text(llm: ff.LLM) -> None:
    for stop, text in (("�", "a"), ("b", "a�")):
        pieces, out = scripted(llm, "a🙂", stop=stop, max_tokens=3)
        assert "".join(piece.text for piece in pieces) == out.text == text
        assert out.finish_reason == ("length" if stop == "b" else "stop")


def test_b35_what_is_held_back_comes_out_when_the_model_ends_the_text(tmp_path: Path, llm: ff.LLM) -> None:
    free = llm.generate(PROMPT, max_tokens=12, ignore_eos=True)
    at = next(i for i in range(3, 12) if free.token_ids[i] not in free.token_ids[:i])
    ends = model_folder(tmp_path / "ends", generation={"eos_token_id": free.token_ids[at]})
    with ff.load(ends, device="reference", threads=1) as other:
        plain = other.generate(PROMPT, max_tokens=12)
        stream = other.stream(PROMPT, max_tokens=12, stop=plain.text[-1] + "never")
        pieces = list(stream)
    assert (stream.output.text, stream.output.finish_reason, stream.output.stop) == (plain.text, "stop", None)
    assert pieces[-1] == ff.Piece(plain.text[-1], None)
    assert stream.output.token_ids == plain.token_ids


def test_several_stops_the_first_complete_wins(llm: ff.LLM) -> None:
    text = llm.generate(PROMPT, max_tokens=20, ignore_eos=True).text
    stops = [text[8:10], text[5:6], text[12:]]
    out = llm.generate(PROMPT, max_tokens=20, stop=stops, ignore_eos=True)
    assert (out.text, out.stop) == cut(text, stops)
    assert out.stop is not None


def test_stops_need_text(llm: ff.LLM) -> None:
    asked = ff.SamplingSettings(stop="x")
    ids = np.array([1], np.int32)
    with pytest.raises(ff.RequestError, match="stop: this model has no tokenizer"):
        make_request(ids, asked, llm.defaults, llm.spec, 96, has_text=False)
    assert make_request(ids, asked, llm.defaults, llm.spec, 96, has_text=True).stops == ("x",)
