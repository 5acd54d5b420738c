"""Text of tokens that come one by one, where it is no text: the same as of all at once, soon, and for little work."""

from __future__ import annotations

from functools import cache
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from flashformer.checkpoint.template import Templates
from flashformer.checkpoint.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CUT = [b"\xe2\x82", b"\x82\xacx\xe2", b"x\xf0\x9f", b"\x98\x80\xf0\x9f", b"\xef\xbf\xbd", b"\x82\x82\xe2", b"ab", b" "]
UNKNOWN = 5000


class Counting(Tokenizer):
    """`n_decoded`: tokens given to `decode`."""

    n_decoded = 0

    def decode(self, ids: list[int]) -> str:  # type: ignore[override]
        self.n_decoded += len(ids)
        return super().decode(ids)


def byte_level() -> Inner:
    """Tokens of single bytes, and of several that begin or end inside a character."""
    byte = {ord(char): char for char in ALPHABET if ord(char) < 256}
    others = iter(char for char in ALPHABET if ord(char) >= 256)
    byte |= {i: next(others) for i in range(256) if i not in byte}
    tokens = [*(bytes([i]) for i in range(256)), *CUT]
    vocab = {"".join(byte[i] for i in token): id_ for id_, token in enumerate(tokens)}
    inner = Inner(models.BPE(vocab=vocab, merges=[]))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>"])
    return inner


def byte_fallback() -> Inner:
    pieces = [*(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abc\ufffd\u20ac", "\u2581d"]
    inner = Inner(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>"])
    return inner


@cache
def made(kind: str) -> Counting:
    return Counting({"byte level": byte_level, "byte fallback": byte_fallback}[kind](), Templates("", {}), {})


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([*(stream.step(i) or "" for i in ids), stream.finish() or ""])


def held_to_the_end(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Pieces that end in U+FFFD are held, however long they are: the text that is due where bytes are no text."""
    text, window, n_given = "", list[int](), 0
    for i in [*ids, None]:
        window += [] if i is None else [i]
        piece = tokenizer.decode(window)[len(tokenizer.decode(window[:n_given])) :]
        if i is None or (piece and not piece.endswith("\ufffd")):
            text += piece
            window, n_given = window[n_given:], len(window) - n_given
    return text


def runs(ids: list[int]) -> st.SearchStrategy[list[int]]:
    """Lists of a few patterns, each repeated."""
    pattern = st.tuples(st.lists(st.sampled_from(ids), min_size=1, max_size=5), st.integers(1, 25))
    return st.lists(pattern, max_size=5).map(lambda found: [i for ids, n in found for i in ids * n])


ODD = [0x41, 0x80, 0x82, 0xAC, 0xBF, 0xE2, 0xEF, 0xF0, 0x9F, 0x98, 0xFF]


@given(runs([*ODD, *range(256, 256 + len(CUT) + 1), UNKNOWN]))
def test_bytes_that_are_no_text_are_those_of_decode(ids: list[int]) -> None:
    tokenizer = made("byte level")
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@given(runs([*(byte for byte in ODD if byte != 0xEF), *range(256, 256 + 7), UNKNOWN]))
def test_runs_of_single_bytes_give_what_they_gave_held_to_the_end(ids: list[int]) -> None:
    """Without EF, with which three bytes may be U+FFFD itself."""
    tokenizer = made("byte fallback")
    assert streamed(tokenizer, ids) == held_to_the_end(tokenizer, ids)


SPECIAL = {"byte level": 256 + len(CUT), "byte fallback": 256 + 7}
PATTERNS = [
    ("byte level", [0x80]),
    ("byte level", [0xE2]),
    ("byte level", [0xF0, 0x9F, 0x98]),
    ("byte level", [257]),  # ends one character and begins the next one
    ("byte level", [259]),
    ("byte level", [260]),  # U+FFFD itself
    ("byte level", [0x80, SPECIAL["byte level"]]),
    ("byte level", [UNKNOWN]),
    ("byte level", [SPECIAL["byte level"]]),
    ("byte fallback", [0x80]),
    ("byte fallback", [0xE2]),
    ("byte fallback", [0x80, 0xE2, 0x82, 0xAC]),
    ("byte fallback", [0xEF, 0xBF, 0xBD]),
    ("byte fallback", [260]),  # U+FFFD itself
    ("byte fallback", [0x80, 263]),
    ("byte fallback", [263]),
]


@pytest.mark.parametrize(("kind", "pattern"), PATTERNS, ids=str)
def test_the_work_for_a_token_does_not_grow_with_what_came_before(kind: str, pattern: list[int]) -> None:
    tokenizer, n = made(kind), 1500
    ids = list(islice(cycle(pattern), n))
    stream, given_chars = tokenizer.stream(), 0
    tokenizer.n_decoded = 0
    for i, id_ in enumerate(ids):
        given_chars += len(stream.step(id_) or "")
        if i % 60 == 59:  # a whole number of patterns
            n_decoded = tokenizer.n_decoded
            assert given_chars >= len(tokenizer.decode(ids[: i + 1])) - 32
            tokenizer.n_decoded = n_decoded
    assert tokenizer.n_decoded <= 40 * n
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_a_few_tokens_are_held_as_before() -> None:
    """Pieces change only where more is held than a character can be."""
    for kind, letter, text in (("byte level", 0x42, "B"), ("byte fallback", 257, "a")):
        stream = made(kind).stream()
        assert [stream.step(i) for i in (0x41, *[0x80] * 7, letter)] == ["A", *[None] * 7, "\ufffd" * 7 + text]
        stream = made(kind).stream()
        steps = [stream.step(i) for i in (0xE2, SPECIAL[kind], 0x82, UNKNOWN, 0xAC)]
        assert steps == [None, None, None, None, "\u20ac"]
