"""Answers in OpenAI's shapes, whole and in chunks. Everything here runs in the thread that makes the answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import msgspec

from ..engine import Timing
from .errors import ApiError
from .shapes import ChatDelta, ChatLogprobs, ChatMessage, ChatToken, ChatTokenChoice, TextLogprobs, Timings, Usage
from .tokens import Entry, Likely, Vocabulary

Json = Mapping[str, Any]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Done:
    """An answer to one prompt that came to its end."""

    index: int
    choice: int  # of those for one prompt
    text: str  # "" where it was streamed
    entries: list[Entry] | None  # where log probabilities were asked for; empty where streamed
    finish_reason: str
    n_prompt: int
    n_new: int
    cached: int  # tokens of the prompt that were not computed again
    cache_miss: str | None  # why not more
    timing: Timing | None  # None where no token was wanted
    clamped: bool  # the context left less room than max_tokens
    queue_ms: float
    measured_gb_s: float | None


def event(data: Json) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that broke off: no [DONE] follows."""
    return event(error.body)


def usage(done: Sequence[Done]) -> Usage:
    """Of a prompt with several choices its tokens count once."""
    first = [one for one in done if one.choice == 0]
    n_prompt, n_new = sum(one.n_prompt for one in first), sum(one.n_new for one in done)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached for one in first)},
    }


def timings(done: Done) -> Timings:
    """Of one answer."""
    timing = done.timing
    known = {} if timing is None else {name: getattr(timing, name) for name in timing.__dataclass_fields__}
    return {
        "queue_ms": done.queue_ms,
        "cached_tokens": done.cached,
        **({} if done.cache_miss is None else {"cache_miss": done.cache_miss}),
        "max_tokens_clamped": done.clamped,
        **speed(known.pop("gb_s", None), done.measured_gb_s),
        **cast(Timings, {name: value for name, value in known.items() if value is not None}),
    }


def speed(gb_s: float | None, measured_gb_s: float | None) -> Timings:
    """Bytes of weights and KV read per second, 1e9 bytes, beside what this machine was measured to read."""
    given: Timings = {} if gb_s is None else {"gb_s": gb_s}
    return given if measured_gb_s is None else {**given, "measured_gb_s": measured_gb_s}


class Answer:
    """Writes one answer down. Subclasses know the shape of a choice."""

    prefix: ClassVar[str]
    whole: ClassVar[str]
    part: ClassVar[str]

    def __init__(self, model: str, fingerprint: str, vocabulary: Vocabulary, *, include_usage: bool) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._fingerprint = {"system_fingerprint": fingerprint}
        self._no_usage: Json = {"usage": None} if include_usage else {}
        self.vocabulary = vocabulary

    # ---- in chunks ------------------------------------------------------------------------------------------

    def first(self, index: int) -> bytes:
        """What comes before any text; may be nothing."""
        raise NotImplementedError

    def chunk(self, index: int, text: str, entries: list[Entry] | None, **further: Any) -> bytes:
        return self._chunk([self._delta(index, text, entries)], **further)

    def finish(self, done: Done) -> bytes:
        """The last chunk of a choice; `timings` stand in the very last one."""
        further = {} if self._no_usage else {"timings": timings(done)}
        return self._chunk([{**self._delta(done.index, "", None), "finish_reason": done.finish_reason}], **further)

    def last(self, done: Sequence[Done]) -> bytes:
        if not self._no_usage:
            return DONE
        return self._chunk([], usage=usage(done), timings=timings(done[-1])) + DONE

    def _chunk(self, choices: list[Json], **further: Any) -> bytes:
        return event({**self._head, "object": self.part, **self._fingerprint, "choices": choices,
                      **self._no_usage, **further})  # fmt: skip

    def _delta(self, index: int, text: str, entries: list[Entry] | None) -> Json:
        raise NotImplementedError

    # ---- whole ----------------------------------------------------------------------------------------------

    def body(self, done: Sequence[Done]) -> bytes:
        return msgspec.json.encode(
            {
                **self._head,
                "object": self.whole,
                **self._fingerprint,
                "choices": [{**self._choice(one), "finish_reason": one.finish_reason} for one in done],
                "usage": usage(done),
                "timings": timings(done[-1]),
            }
        )

    def _choice(self, done: Done) -> Json:
        raise NotImplementedError


class ChatAnswer(Answer):
    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> bytes:
        delta: ChatDelta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _delta(self, index: int, text: str, entries: list[Entry] | None) -> Json:
        delta: ChatDelta = {"content": text} if text or entries else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(entries), "finish_reason": None}

    def _choice(self, done: Done) -> Json:
        message: ChatMessage = {"role": "assistant", "content": done.text, "refusal": None}
        return {"index": done.index, "message": message, "logprobs": self._logprobs(done.entries)}

    def _logprobs(self, entries: list[Entry] | None) -> ChatLogprobs | None:
        """Of the tokens of the text; the one that ended it is not among them."""
        if entries is None:
            return None
        content: list[ChatTokenChoice] = [
            {**self._token(entry.chosen), "top_logprobs": [self._token(other) for other in entry.top]}
            for entry in entries
            if not entry.ends
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: Likely) -> ChatToken:
        assert token.logprob is not None  # something predicts every token of an answer
        raw = self.vocabulary.bytes_of(token.token_id)
        return {"token": self.vocabulary.text_of(token.token_id), "logprob": token.logprob, "bytes": list(raw)}


class CompletionAnswer(Answer):
    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def first(self, index: int) -> bytes:
        return b""

    def _delta(self, index: int, text: str, entries: list[Entry] | None) -> Json:
        return {"index": index, "text": text, "logprobs": self._logprobs(entries), "finish_reason": None}

    def _choice(self, done: Done) -> Json:
        return {"index": done.index, "text": done.text, "logprobs": self._logprobs(done.entries)}

    def _logprobs(self, entries: list[Entry] | None) -> TextLogprobs | None:
        """Four lists, an entry per token, the one that ended the text included."""
        if entries is None:
            return None
        name_of = self.vocabulary.name_of
        return {
            "tokens": [name_of(entry.chosen.token_id) for entry in entries],
            "token_logprobs": [entry.chosen.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, entry: Entry) -> dict[str, float] | None:
        """The likeliest, and the chosen token where it is not one of them. Of two with one name, the likelier."""
        found: dict[str, float] = {}
        for token in (*entry.top, entry.chosen):
            if token.logprob is None:
                return None
            found.setdefault(self.vocabulary.name_of(token.token_id), token.logprob)
        return found
