"""One request in its thread: from a checked request to the bytes of its answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..engine import Output, Piece, Stream
from ..engine.logprobs import TokenLogprobs, token_logprobs
from ..engine.request import DEFAULT_MAX_TOKENS, LIMITS
from ..errors import RequestError
from .answers import Answer, Done, speed
from .bridge import Bridge, Gone
from .metrics import Metrics
from .schema import Ask
from .tokens import Entry, Placing

if TYPE_CHECKING:
    from ..engine import LLM
    from ..engine.prompts import Prompt

SPEED_TOKENS = 16  # every so many, a chunk of a stream says how fast it is
PART_ENTRIES = 64  # of an echoed prompt in one chunk
MAX_LOGPROBS = 1 << 18  # in one answer


@dataclass
class Pace:
    """How fast the tokens of one answer come: the last SPEED_TOKENS, without the first one of all."""

    step_bytes: Callable[[int], int]  # read by a token, of its number of positions
    n_positions: int
    gb_s: float = 0.0
    tok_s: float = 0.0
    _since: float | None = None  # by perf_counter
    _n: int = 0
    _n_bytes: int = 0

    def note(self, now: float) -> bool:
        """A token has come: whether the pace is a new one."""
        self.n_positions += 1
        if self._since is None:  # before it there was the prompt
            self._since = now
            return False
        self._n += 1
        self._n_bytes += self.step_bytes(self.n_positions)
        if self._n < SPEED_TOKENS:
            return False
        took = max(now - self._since, 1e-9)
        self.gb_s, self.tok_s = self._n_bytes / took / 1e9, self._n / took
        self._since, self._n, self._n_bytes = now, 0, 0
        return True


class Work:
    """`run` is for one thread. `n_positions` and `gb_s` may be read by any."""

    def __init__(
        self, llm: LLM, ask: Ask, answer: Answer, metrics: Metrics, measured_gb_s: float | None, arrived: float
    ) -> None:
        """`arrived`: by perf_counter."""
        self._llm, self._ask, self._answer, self._metrics = llm, ask, answer, metrics
        self._measured_gb_s = measured_gb_s
        self._arrived, self._queue_s = arrived, 0.0
        self._pace = Pace(llm.step_bytes, 0)

    @property
    def n_positions(self) -> int:
        return self._pace.n_positions

    @property
    def gb_s(self) -> float:
        return self._pace.gb_s

    def run(self, bridge: Bridge) -> bytes:
        """Puts the answer on the bridge but for its end, and gives that. Raises Gone, and what the engine raises."""
        metrics = self._metrics
        self._queue_s = perf_counter() - self._arrived
        metrics.queue.observe(self._queue_s)
        try:
            return self._run(bridge)
        except BaseException as error:
            metrics.end("abort" if isinstance(error, Gone) else "error")
            raise
        finally:
            metrics.latency.observe(perf_counter() - self._arrived)

    def _run(self, bridge: Bridge) -> bytes:
        prompts = self._ask.prompts(self._llm)
        streams = [self._streams(bridge, prompt) for prompt in prompts]  # all are checked before one runs
        self._require_bounded(streams)
        bridge.begin()
        done = list[Done]()
        for prompt, choices in zip(prompts, streams, strict=True):
            for choice, stream in enumerate(choices):
                done.append(self._one(bridge, len(done), choice, prompt, stream))
        return self._answer.last(done) if self._ask.stream else self._answer.body(done)

    def _streams(self, bridge: Bridge, prompt: Prompt) -> list[Stream]:
        """One for each choice."""
        found: list[Stream] = []
        for choice in range(self._ask.n):
            bridge.check()
            settings = self._ask.settings
            if choice and settings.seed is not None:
                settings = replace(settings, seed=(settings.seed + choice) % (LIMITS.seed[1] + 1))
            given = found[0].output.prompt_token_ids if found else prompt  # encoded once
            found.append(self._llm.start(given, settings, warm=self._ask.warm))
        return found

    def _require_bounded(self, streams: list[list[Stream]]) -> None:
        """What a whole answer holds is in memory until it is sent. Raises RequestError."""
        if self._ask.settings.logprobs is None:
            return
        n_each = self._ask.settings.logprobs + 1
        n_prompt = sum(len(choices[0].output.prompt_token_ids) for choices in streams) if self._ask.echo else 0
        n_new = len(streams) * (self._ask.settings.max_tokens or DEFAULT_MAX_TOKENS)
        n = self._ask.n * (n_prompt + min(n_new, len(streams) * self._llm.setup.target.ctx)) * n_each
        if n > MAX_LOGPROBS:
            raise RequestError(
                f"logprobs: {n} of them in one answer, at most {MAX_LOGPROBS} are given: "
                "ask for fewer likely tokens, prompts, choices or new tokens"
            )

    def _one(self, bridge: Bridge, index: int, choice: int, prompt: Prompt, stream: Stream) -> Done:
        with stream, bridge.cancelling(stream.close):
            ids = stream.output.prompt_token_ids
            self._pace = Pace(self._llm.step_bytes, len(ids))
            said = _Said(bridge, self._answer, index) if self._ask.stream else _Kept(self._answer, index)
            placing = Placing(self._answer.vocabulary)
            if self._ask.echo:
                text = prompt if isinstance(prompt, str) else self._answer.vocabulary.decode(ids)
                entries = self._prompt_entries(bridge, ids, placing)
                said.add(text, entries[:PART_ENTRIES] or None)
                for at in range(PART_ENTRIES, len(entries), PART_ENTRIES):
                    said.add("", entries[at : at + PART_ENTRIES])
            self._generate(bridge, stream, said, placing)
        done = self._done(index, choice, stream.output, said)
        self._count(done)
        said.finish(done)
        return done

    def _generate(self, bridge: Bridge, stream: Stream, said: _Said | _Kept, placing: Placing) -> None:
        metrics, settings, pace = self._metrics, self._ask.settings, self._pace
        stop_ids = () if settings.ignore_eos else self._llm.spec.eos_ids
        before, held = None, list[Entry]()  # of tokens whose text is held back, which a stop string may cut off
        for piece in stream:
            now = perf_counter()
            known: dict[str, Any] = {}
            if piece.token_id is not None:
                if before is None:
                    metrics.first_token.observe(now - self._arrived)
                else:
                    metrics.next_token.observe(now - before)
                before = now
                metrics.generation_tokens.inc()
                if pace.note(now):
                    known = {"timings": {"tok_s": pace.tok_s, **speed(pace.gb_s, self._measured_gb_s)}}
            held += _entries(piece, placing, stop_ids)
            due = held if piece.text or not settings.stops else []
            said.add(piece.text, due or None, **known)
            held = held[len(due) :]
        bridge.check()  # closed, the stream has ended early
        if held and stream.output.stop is None:
            said.add("", held)

    def _prompt_entries(self, bridge: Bridge, ids: list[int], placing: Placing) -> list[Entry]:
        """Of every token of the prompt, what the tokens before it made of it; none where that was not asked for."""
        n_top = self._ask.settings.logprobs
        if n_top is None:
            return []
        entries = [placing.entry(ids[0], None)]
        with closing(self._llm.logit_parts(ids)) as parts:
            for begin, rows in parts:
                bridge.check()
                for position, row in enumerate(rows, begin + 1):
                    if position < len(ids):
                        entries.append(placing.entry(ids[position], token_logprobs(row, ids[position], n_top)))
        return entries

    def _done(self, index: int, choice: int, output: Output, said: _Said | _Kept) -> Done:
        warm, n_prompt = self._ask.warm, len(output.prompt_token_ids)
        asked = 0 if warm else self._ask.settings.max_tokens or DEFAULT_MAX_TOKENS
        return Done(
            index=index,
            choice=choice,
            text="".join(said.texts),
            entries=None if self._ask.settings.logprobs is None else said.entries,
            finish_reason=output.finish_reason,
            n_prompt=n_prompt,
            n_new=len(output.token_ids),
            cached=output.cached_tokens,
            cache_miss=output.cache_miss,
            timing=None if warm else output.timing,
            clamped=asked > self._llm.setup.target.ctx - n_prompt,
            queue_ms=1e3 * self._queue_s,
            measured_gb_s=self._measured_gb_s,
        )

    def _count(self, done: Done) -> None:
        metrics = self._metrics
        metrics.end(done.finish_reason)
        metrics.prompt_tokens.inc(done.n_prompt)
        metrics.prefix_queries.inc(done.n_prompt)
        metrics.prefix_hits.inc(done.cached)
        if done.timing is not None and done.timing.tok_s:
            metrics.per_token.observe(1 / done.timing.tok_s)


class _Said:
    """A choice that goes out as it is made."""

    def __init__(self, bridge: Bridge, answer: Answer, index: int) -> None:
        self._bridge, self._answer, self._index = bridge, answer, index
        self._is_mute = not answer.vocabulary.has_text  # then a token's event is empty, and still says that it came
        self.texts: list[str] = []  # nothing is kept
        self.entries: list[Entry] = []
        if first := answer.first(index):
            bridge.put(first)

    def add(self, text: str, entries: list[Entry] | None, **further: Any) -> None:
        if text or entries or further or self._is_mute:
            self._bridge.put(self._answer.chunk(self._index, text, entries, **further))

    def finish(self, done: Done) -> None:
        self._bridge.put(self._answer.finish(done))


class _Kept:
    """A choice that is sent when all is made."""

    def __init__(self, answer: Answer, index: int) -> None:
        self.texts: list[str] = []
        self.entries: list[Entry] = []

    def add(self, text: str, entries: list[Entry] | None, **further: Any) -> None:
        self.texts.append(text)
        self.entries += entries or []

    def finish(self, done: Done) -> None:
        pass


def _entries(piece: Piece, placing: Placing, stop_ids: tuple[int, ...]) -> list[Entry]:
    found: TokenLogprobs | None = piece.logprobs
    if found is None:
        return []
    return [placing.entry(found.token_id, found, ends=found.token_id in stop_ids)]
