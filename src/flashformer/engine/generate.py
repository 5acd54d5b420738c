"""The token loop, and the iterator that callers see."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..backends.base import Kernel, Want
from .request import Request
from .slots import Slots, Turns
from .stats import Output, make_timing

if TYPE_CHECKING:
    from ..checkpoint import Tokenizer


def token_loop(kernel: Kernel, turns: Turns, slot: int, request: Request, chunk: int) -> Generator[int, None, None]:
    """Runs the prompt, then one forward per token; yields token ids. Closing it between yields ends it.

    Rows are shared with other threads, so they are filled anew in turn, in place, for every forward.
    """
    lock, check = turns.lock, turns.check
    rows, forward, results = kernel.rows, kernel.forward, kernel.tokens
    token, slots, pos, want = rows.token, rows.slot, rows.pos, rows.want
    temperature, seed, choice = rows.temperature, rows.seed, rows.choice
    ids, n = request.ids, len(request.ids)
    heat, key = np.float32(request.temperature), np.uint64(request.seed)
    for begin in range(0, n, chunk):
        end = min(begin + chunk, n)
        count, last = end - begin, end - begin - 1
        with lock:
            check()
            token[:count] = ids[begin:end]
            slots[:count] = slot
            pos[:count] = np.arange(begin, end)
            want[:count] = Want.NOTHING
            if end == n:
                want[last], temperature[last], seed[last], choice[last] = Want.TOKEN, heat, key, 0
            forward(count)
            new = results.item(0)
        if end < n:
            yield -1  # nothing yet: a place to stop
    yield new
    for at in range(n, n + request.max_tokens - 1):
        if new in request.stop_ids:
            return
        with lock:
            check()
            token[0], slots[0], pos[0], want[0] = new, slot, at, Want.TOKEN
            temperature[0], seed[0], choice[0] = heat, key, 0
            forward(1)
            new = results.item(0)
        yield new


class Piece(NamedTuple):
    """What one token added. `text` is empty while a character is incomplete, and for the token that ends the text."""

    text: str
    token_id: int | None  # None: bytes left over at the end


class Stream(Iterator[Piece]):
    """Pieces of one answer as they are made.

    `close` (also from another thread, and by leaving a `with` block) cancels within one forward. `output` is
    what has been made so far; its finish_reason is "cancelled" unless the answer came to its own end. The slot
    is taken at the first piece and given back at the end, at close, or when the stream is garbage collected.
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
        self._tokenizer = tokenizer
        self._step_bytes = step_bytes  # read by a token, of its number of positions
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._step_ns: list[int] = []
        self._ttft_ns = 0
        self._cancelled = False
        self._pieces = self._run(kernel, turns, slots, chunk, encode_ns)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._cancelled = True
        with suppress(ValueError):  # another thread is inside: it sees the flag after its forward
            self._pieces.close()

    @property
    def finish_reason(self) -> str:
        ids = self._ids
        if ids and ids[-1] in self._request.stop_ids:
            return "stop"
        return "length" if len(ids) == self._request.max_tokens else "cancelled"

    @property
    def output(self) -> Output:
        first = len(self._request.ids) + 1  # positions that the second token reads
        n_bytes = sum(map(self._step_bytes, range(first, first + len(self._step_ns))))
        return Output(
            text="".join(self._texts),
            token_ids=list(self._ids),
            prompt_token_ids=self._request.ids.tolist(),
            seed=self._request.seed,
            finish_reason=self.finish_reason,
            timing=make_timing(self._ttft_ns, self._step_ns, n_bytes),
        )

    def _run(
        self, kernel: Kernel, turns: Turns, slots: Slots, chunk: int, encode_ns: int
    ) -> Generator[Piece, None, None]:
        ids, texts, stop_ids, clock = self._ids, self._texts, self._request.stop_ids, perf_counter_ns
        text_stream = self._tokenizer.stream() if self._tokenizer is not None else _NoText()
        detokenize = text_stream.step
        record = self._step_ns.append
        begin = clock() - encode_ns
        slot = slots.acquire()
        try:
            for new in token_loop(kernel, turns, slot, self._request, chunk):
                if self._cancelled:
                    return
                if new < 0:
                    continue
                text = "" if new in stop_ids else detokenize(new) or ""
                ids.append(new)
                texts.append(text)
                now = clock()
                if self._ttft_ns:
                    record(now - begin)
                else:
                    self._ttft_ns = now - begin
                yield Piece(text, new)
                begin = clock()
        finally:
            slots.release(slot)
        rest = text_stream.finish()
        if rest:
            texts.append(rest)
            yield Piece(rest, None)


class _NoText:
    """Stands in for a tokenizer's stream where the model has none."""

    def step(self, token_id: int) -> str | None:
        return None

    def finish(self) -> str | None:
        return None
