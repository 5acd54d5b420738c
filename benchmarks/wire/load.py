"""Many clients at once: most behave, some read slowly, some leave without a word."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from time import perf_counter
from typing import Any

from .client import CHATS, COMPLETIONS, Address, Call, answered

SLOW_SHARE, LEAVING_SHARE = 0.1, 0.3
CALL_S = 120.0  # an answer that takes longer is counted as broken
MUCH = {CHATS: {"logprobs": True, "top_logprobs": 20}, COMPLETIONS: {"logprobs": 20}}  # for slow readers


@dataclass(frozen=True)
class Ask:
    path: str
    body: Mapping[str, Any]


def asks(n_tokens: int) -> list[Ask]:
    """Different requests, each of which has one answer of `n_tokens` tokens or less."""
    common: dict[str, Any] = {"max_tokens": n_tokens, "ignore_eos": True}
    sampled = {**common, "temperature": 1.0, "top_p": 0.95}
    texts = [f"def total_{i}(values):\n    " for i in range(4)]
    long = "# One line of a file that was read before.\n" * 6
    return [
        *(Ask(COMPLETIONS, {"prompt": text, **common}) for text in texts),
        Ask(COMPLETIONS, {"prompt": long + texts[0], **common}),
        Ask(COMPLETIONS, {"prompt": long + texts[1], **sampled, "seed": 1}),
        *(
            Ask(CHATS, {"messages": [{"role": "user", "content": text}], **sampled, "seed": seed})
            for seed, text in enumerate((*texts[:2], long))
        ),
    ]


@dataclass(frozen=True)
class Visit:
    """A request of a client, and its manners."""

    ask: int
    stream: bool
    slow: bool = False
    leaves_after_s: float | None = None
    leaves_after_parts: int | None = None


def drawn(draw: Random, n_asks: int) -> Visit:
    ask, manners, stream = draw.randrange(n_asks), draw.random(), draw.random() < 0.7
    if manners < SLOW_SHARE:
        return Visit(ask, True, slow=True)
    if manners >= SLOW_SHARE + LEAVING_SHARE:
        return Visit(ask, stream)
    if stream and draw.random() < 0.5:
        return Visit(ask, True, leaves_after_parts=draw.randint(1, 8))
    return Visit(ask, stream, leaves_after_s=draw.expovariate(1 / draw.choice((0.005, 0.05, 0.5))))


@dataclass
class Stage:
    """What became of the requests of so many clients."""

    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)  # by status, or how the client left
    n_differing: int = 0  # complete answers that are not those expected
    first_s: list[float] = field(default_factory=list)  # to the first token of those who stay and read at once
    between_s: list[float] = field(default_factory=list)  # and from one token to the next, 0 where they came together
    mean_s: list[float] = field(default_factory=list)  # and the mean of that, of each answer

    def note(self, visit: Visit, call: Call, outcome: str, expected: str) -> None:
        self.outcomes[outcome] += 1
        if outcome != "200":
            return
        self.n_differing += call.text() != expected
        if visit.stream and not visit.slow:
            times = call.token_times()
            self.first_s += [at - call.sent_s for at in times[:1]]
            self.between_s += [b - a for a, b in pairwise(times)]
            self.mean_s += [(times[-1] - times[0]) / (len(times) - 1)] if len(times) > 1 else []


async def first_answers(address: Address, known: Sequence[Ask]) -> list[str]:
    """One after another. Raises RuntimeError where one is refused."""
    return [(await answered(address, ask.path, ask.body)).text() or "" for ask in known]


async def run_stage(
    address: Address,
    known: Sequence[Ask],
    expected: Sequence[str],
    draw: Random,
    *,
    n_clients: int,
    n_requests: int,
    budget_s: float = float("inf"),
) -> Stage:
    """`n_requests` in all, as many at once as there are clients; no further ones after `budget_s`.

    `expected`: the text of every answer. A client that is refused waits as long as it was told to.
    """
    visits = iter([drawn(draw, len(known)) for _ in range(n_requests)])
    begin = perf_counter()
    stage = Stage()
    clients = [_client(address, known, expected, visits, stage, begin + budget_s) for _ in range(n_clients)]
    await asyncio.gather(*clients)
    stage.seconds = perf_counter() - begin
    return stage


async def _client(
    address: Address,
    known: Sequence[Ask],
    expected: Sequence[str],
    visits: Iterator[Visit],
    stage: Stage,
    end: float,
) -> None:
    for visit in visits:  # shared by all clients
        ask = known[visit.ask]
        further = {"stream": visit.stream, **(MUCH[ask.path] if visit.slow else {})}
        call = Call(ask.path, {**ask.body, **further})
        stage.note(visit, call, await _outcome(address, call, visit), expected[visit.ask])
        if call.status in (429, 503):
            await asyncio.sleep(float(call.headers.get("retry-after", 1)))
        if perf_counter() > end:
            return


async def _outcome(address: Address, call: Call, visit: Visit) -> str:
    patience = CALL_S if visit.leaves_after_s is None else visit.leaves_after_s
    try:
        async with asyncio.timeout(patience):
            await call.run(address, slow=visit.slow, enough=visit.leaves_after_parts)
    except TimeoutError:
        if visit.leaves_after_s is None:
            return "too late"
    except (OSError, EOFError, ValueError) as error:
        return f"broken: {type(error).__name__}"
    if call.is_complete:
        return str(call.status)
    return "left in an answer" if call.parts else "left before one"
