"""The token loop, and the iterator that callers see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from inspect import GEN_RUNNING, getgeneratorstate
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Kernel, Want
from ..errors import DeviceError, RequestError
from .adjust import Adjustments
from .forward import run_prompt
from .logprobs import TokenLogprobs, token_logprobs
from .request import Request
from .slots import Slot, Slots, Turns
from .stats import Output, make_timing
from .stops import StopFinder

if TYPE_CHECKING:
    from ..checkpoint import Tokenizer


def token_loop(
    kernel: Kernel, turns: Turns, slot: Slot, request: Request, chunk: int, logits: NDArray[np.float32] | None
) -> Generator[int, None, None]:
    """Runs the prompt from `slot.n` on, then one forward per token; yields token ids, or -1 between chunks of the
    prompt: a place to stop. Closing it between yields ends it. Before a token is yielded, `logits` (vocab_size) are
    set to those that it was chosen from, where wanted.
    """
    rows, forward, results, take = kernel.rows, kernel.forward, kernel.tokens, turns.take
    token, slots, pos, want = rows.token, rows.slot, rows.pos, rows.want
    temperature, top_k, top_p, min_p = rows.temperature, rows.top_k, rows.top_p, rows.min_p
    seed, choice, adjust_begin, adjust_end = rows.seed, rows.choice, rows.adjust_begin, rows.adjust_end
    heat, most = np.float32(request.temperature), np.int32(request.top_k)
    share, least = np.float32(request.top_p), np.float32(request.min_p)
    key, wanted, held = np.uint64(request.seed), Want.TOKEN if logits is None else Want.LOGITS, slot.ids
    ids, n, index = request.ids, len(request.ids), slot.index
    adjusted = request.repeat_penalty != 1 or len(request.logit_bias) > 0
    changes = Adjustments(rows, slot, ids, request.repeat_penalty, request.logit_bias) if adjusted else None
    first, last = (changes.begin, changes.end) if changes else (0, 0)
    end = n + request.max_tokens - 1  # of the positions whose tokens run
    stops = None if changes or logits is not None else tuple(request.stop_ids)

    def put(row: int) -> None:
        want[row], temperature[row], top_k[row], top_p[row], min_p[row] = wanted, heat, most, share, least
        seed[row], choice[row], adjust_begin[row], adjust_end[row] = key, 0, first, last

    def run_chunk(begin: int, end: int) -> int:
        """Tokens [begin, end) of the prompt: the new token after the last one, -1 before."""
        if end < n:
            run_prompt(kernel, slot, ids, begin, end, want=Want.NOTHING, last=Want.NOTHING)
            return -1
        put(end - begin - 1)
        run_prompt(kernel, slot, ids, begin, end, want=Want.NOTHING, last=wanted)
        return result()

    def run_token(last_token: int, at: int) -> int:
        if slot.n != at:
            raise DeviceError("something else wrote to the cache of this request (`forget`): ask again")
        token[0], slots[0], pos[0] = last_token, index, at
        put(0)
        forward(1, stops if at + 1 < end and not turns.n_waiting else None)
        held[at], slot.n = last_token, at + 1
        return result()

    def result() -> int:
        if logits is not None:
            logits[:] = kernel.logits[0]
        return results.item(0)

    for begin in range(slot.n, n, chunk):
        new = take(run_chunk, begin, min(begin + chunk, n))
        yield new
    for at in range(n, end):
        if new in request.stop_ids:
            return
        if changes is not None:
            changes.note(new)
            last = changes.end
        new = take(run_token, new, at)
        yield new


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
        kernel: Kernel,
        turns: Turns,
        slots: Slots,
        request: Request,
        *,
        chunk: int,
        tokenizer: Tokenizer | None,
        step_bytes: Callable[[int], int],
        encode_ns: int,
    ) -> None:
        self._request = request
        self._slots = slots
        self._step_bytes = step_bytes  # read by a token, of its number of positions
        self._answer = answer = _Answer()
        # The generator does not know the stream, so that dropping this one ends that one and frees the slot at once.
        self._pieces = _pieces(answer, kernel, turns, slots, request, chunk, tokenizer, encode_ns)

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
            stop=self._answer.stop,
        )


def _pieces(
    answer: _Answer,
    kernel: Kernel,
    turns: Turns,
    slots: Slots,
    request: Request,
    chunk: int,
    tokenizer: Tokenizer | None,
    encode_ns: int,
) -> Generator[Piece, None, None]:
    """The pieces of a stream, noted in `answer` as they are made."""
    ids, texts, clock, me = answer.ids, answer.texts, perf_counter_ns, threading.get_ident
    stop_ids, n_top, logprobs = request.stop_ids, request.logprobs, None
    logits = None if n_top is None else np.empty(kernel.program.spec.vocab_size, np.float32)
    text_stream = tokenizer.stream() if tokenizer is not None else _NoText()
    detokenize, finder = text_stream.step, StopFinder(request.stops) if request.stops else None
    record = answer.step_ns.append
    begin = clock() - encode_ns
    with slots.taken(request.ids, len(request.ids) - 1, lambda: answer.cancelled) as slot:
        if slot is None:
            return
        answer.cached = slot.n
        for new in token_loop(kernel, turns, slot, request, chunk, logits):
            if answer.cancelled:
                return
            if new < 0:
                continue
            text = "" if new in stop_ids else detokenize(new) or ""
            if finder is not None:
                text, answer.stop = finder.feed(text)
            if logits is not None and n_top is not None:
                logprobs = token_logprobs(logits, new, n_top)
                answer.logprobs.append(logprobs)
            ids.append(new)
            texts.append(text)
            now = clock()
            if answer.ttft_ns:
                record(now - begin)
            else:
                answer.ttft_ns = now - begin
            yield Piece(text, new, logprobs)
            if answer.stop is not None:
                return
            slot.owner = me()
            begin = clock()
    rest = text_stream.finish() or ""
    if finder is not None:
        rest, answer.stop = finder.feed(rest)
        rest += finder.rest()
    if rest:
        texts.append(rest)
        yield Piece(rest, None)


def run_out(stream: Stream) -> Output:
    """Takes all pieces of a stream."""
    with stream:
        for _ in stream:
            pass
    return stream.output


class _NoText:
    """Stands in for a tokenizer's stream where the model has none."""

    def step(self, token_id: int) -> str | None:
        return None

    def finish(self) -> str | None:
        return None
