"""The iterator that callers see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from inspect import GEN_RUNNING, getgeneratorstate
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

from ..errors import RequestError
from .batch import Batch
from .logprobs import TokenLogprobs, token_logprobs
from .request import Request
from .slots import Slots
from .stats import Output, make_timing
from .stops import StopFinder

if TYPE_CHECKING:
    from ..checkpoint import Tokenizer


class Piece(NamedTuple):
    """What one token added. `text` is empty while a character is incomplete, while it may be the beginning of a stop
    string, and for the token that ends the text."""

    text: str
    token_id: int | None  # None: text that was held back, at the end
    logprobs: TokenLogprobs | None = None  # where asked for


@dataclass
class _Answer:
    """What there is of an answer so far."""

    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    step_ns: list[int] = field(default_factory=list)
    ttft_ns: int = 0
    cached: int = 0
    cache_miss: str | None = None
    stop: str | None = None
    cancelled: bool = False


class Stream(Iterator[Piece]):
    """Pieces of one answer as they are made.

    `close` (also from another thread, and by leaving a `with` block) cancels within one forward. `output` is
    what has been made so far; its finish_reason is "cancelled" unless the answer came to its own end. The slot
    is taken at the first piece and given back at the end, at close, or when the stream is garbage collected. Pieces
    may be taken by one thread after another, not by two at once.
    """

    def __init__(
        self,
        batch: Batch,
        slots: Slots,
        request: Request,
        *,
        tokenizer: Tokenizer | None,
        step_bytes: Callable[[int], int],
        encode_ns: int,
    ) -> None:
        self._request = request
        self._slots = slots
        self._step_bytes = step_bytes  # read by a token, of its number of positions
        self._answer = answer = _Answer()
        # The generator does not know the stream, so that dropping this one ends that one and frees the slot at once.
        self._pieces = _pieces(answer, batch, slots, request, tokenizer, encode_ns)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        try:
            piece = next(self._pieces)
        except ValueError:
            if getgeneratorstate(self._pieces) == GEN_RUNNING:
                raise RequestError("another thread is taking a piece of this stream: take turns") from None
            if self._answer.cancelled:  # the other thread was inside `close`, and is done
                raise StopIteration from None
            raise
        if self._answer.cancelled:  # by another thread, while this one was inside
            self._pieces.close()
        return piece

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._answer.cancelled = True
        try:
            self._pieces.close()
        except ValueError:  # another thread is inside: it sees the flag after its forward, or when it wakes
            self._slots.wake()

    @property
    def finish_reason(self) -> str:
        ids = self._answer.ids
        if self._answer.stop is not None or (ids and ids[-1] in self._request.stop_ids):
            return "stop"
        return "length" if len(ids) == self._request.max_tokens else "cancelled"

    @property
    def output(self) -> Output:
        first = len(self._request.ids) + 1  # positions that the second token reads
        n_bytes = sum(map(self._step_bytes, range(first, first + len(self._answer.step_ns))))
        return Output(
            text="".join(self._answer.texts),
            token_ids=list(self._answer.ids),
            prompt_token_ids=self._request.ids.tolist(),
            seed=self._request.seed,
            finish_reason=self.finish_reason,
            timing=make_timing(self._answer.ttft_ns, self._answer.step_ns, n_bytes),
            logprobs=None if self._request.logprobs is None else list(self._answer.logprobs),
            cached_tokens=self._answer.cached,
            cache_miss=self._answer.cache_miss,
            stop=self._answer.stop,
        )


def _pieces(
    answer: _Answer,
    batch: Batch,
    slots: Slots,
    request: Request,
    tokenizer: Tokenizer | None,
    encode_ns: int,
) -> Generator[Piece, None, None]:
    """The pieces of a stream, noted in `answer` as they are made."""
    ids, texts, me = answer.ids, answer.texts, threading.get_ident
    stop_ids, n_top, logprobs = request.stop_ids, request.logprobs, None
    text_stream = tokenizer.stream() if tokenizer is not None else _NoText()
    detokenize, finder = text_stream.step, StopFinder(request.stops) if request.stops else None
    begin = perf_counter_ns() - encode_ns
    reusable = len(request.ids) - (request.max_tokens > 0)  # the first token comes from running the last one
    with slots.taken(request.ids, reusable, lambda: answer.cancelled) as slot:
        if slot is None:
            return
        answer.cached, answer.cache_miss = slot.n, slot.miss
        sequence = batch.sequence(slot, request)
        with closing(batch.tokens(sequence)) as tokens:
            for new, took_ns in tokens:
                if answer.cancelled:
                    return
                if new < 0:
                    continue
                after = perf_counter_ns()
                text = "" if new in stop_ids else detokenize(new) or ""
                if finder is not None:
                    text, answer.stop = finder.feed(text)
                if sequence.logits is not None and n_top is not None:
                    logprobs = token_logprobs(sequence.logits, new, n_top)
                    answer.logprobs.append(logprobs)
                ids.append(new)
                texts.append(text)
                now = perf_counter_ns()
                if answer.ttft_ns:
                    answer.step_ns.append(took_ns + now - after)
                else:
                    answer.ttft_ns = now - begin
                yield Piece(text, new, logprobs)
                if answer.stop is not None:
                    return
                slot.owner = me()
    rest = text_stream.finish() or ""
    if finder is not None:
        rest, answer.stop = finder.feed(rest)
        rest += finder.rest()
    if rest:
        texts.append(rest)
        yield Piece(rest, None)


def run_out(streams: list[Stream], has_free_slot: Callable[[], bool]) -> list[Output]:
    """Takes all pieces of streams: one after another, and beside each other as long as slots are free."""
    waiting, running = streams[:], list[Stream]()
    try:
        while waiting or running:
            if waiting and (not running or has_free_slot()):
                running.append(waiting.pop(0))
                pieces = running[-1:]  # it takes its slot now
            else:
                pieces = running[:]
            for stream in pieces:
                if next(stream, None) is None:
                    running.remove(stream)
    finally:
        for stream in streams:
            stream.close()
    return [stream.output for stream in streams]


class _NoText:
    """Stands in for a tokenizer's stream where the model has none."""

    def step(self, token_id: int) -> str | None:
        return None

    def finish(self) -> str | None:
        return None
