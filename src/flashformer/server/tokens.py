"""Tokens as answers show them: their text, their bytes, and where in the text they stand."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from ..engine.logprobs import TokenLogprobs
from ..errors import RequestError

if TYPE_CHECKING:
    from ..engine import LLM

LEAST = -9999.0  # stands for minus infinity, which JSON does not have


class Likely(NamedTuple):
    """A token and its log probability; None for the first token of a text, which nothing predicts."""

    token_id: int
    logprob: float | None


class Entry(NamedTuple):
    """A token of an answer, or of an echoed prompt."""

    chosen: Likely
    top: list[Likely]  # the likeliest, best first
    offset: int  # characters of the text before it
    ends: bool  # it ended the text and is no part of it


class Vocabulary:
    """The tokens of one model; of one without a tokenizer, their ids."""

    def __init__(self, llm: LLM) -> None:
        try:
            self._bytes_of: Callable[[int], bytes] | None = lru_cache(1 << 16)(llm.tokenizer.token_bytes)
            self._decode: Callable[[list[int]], str] = llm.tokenizer.decode
        except RequestError:
            self._bytes_of = None

    @property
    def has_text(self) -> bool:
        return self._bytes_of is not None

    def bytes_of(self, token_id: int) -> bytes:
        return f"token_id:{token_id}".encode() if self._bytes_of is None else self._bytes_of(token_id)

    def text_of(self, token_id: int) -> str:
        """A byte that is no character by itself becomes U+FFFD."""
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def name_of(self, token_id: int) -> str:
        """As `text_of`, but bytes that are no characters are written in hexadecimal, as OpenAI writes them."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decode(self, ids: list[int]) -> str:
        return "" if self._bytes_of is None else self._decode(ids)

    def is_text(self, token_id: int) -> bool:
        """Whether the token is part of the text, which special tokens are not."""
        return self._bytes_of is not None and self._decode([token_id]) != ""


class Placing:
    """Counts the characters of a text, of which the tokens come one by one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._n_chars = 0

    def entry(self, token_id: int, found: TokenLogprobs | None, *, ends: bool = False) -> Entry:
        """`found`: None for the first token of a prompt."""
        offset = self._n_chars
        if not ends and self._vocabulary.is_text(token_id):
            self._n_chars += len(self._decoder.decode(self._vocabulary.bytes_of(token_id)))
        if found is None:
            return Entry(Likely(token_id, None), [], offset, ends)
        top = [Likely(other, max(value, LEAST)) for other, value in found.top]
        return Entry(Likely(token_id, max(found.logprob, LEAST)), top, offset, ends)
