"""Promise 1 over HTTP: what a request gets is what it gets of the engine alone, to the bit, whatever else goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from serving import CHATS, COMPLETIONS, Gate, Running, running, sent
from threads import until

import flashformer as ff
from flashformer.engine.logprobs import TokenLogprobs

STREAMS, N_TOKENS = 8, 16
CROWDS = ((1, 0.15), (3, 0.25), (STREAMS, 0.6))  # clients at once, and their share of all requests
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 1.0, "seed": 3, "logprobs": 3},
    {"temperature": 0.8, "seed": 4, "top_k": 20, "top_p": 0.9, "stop": ["e", "\n\n"]},
    {"temperature": 1.0, "seed": 5, "repeat_penalty": 1.3, "logit_bias": {9: 2.0}, "logprobs": 0, "ignore_eos": True},
)
SHARED = "def total(values):\n    result = 0\n    "
PROMPTS: tuple[str | list[int], ...] = (SHARED + "for", SHARED + "return", [5, 6, 7, *range(30, 60)])
TALKS = ("x", "Naïve?", SHARED * 2)


@dataclass(frozen=True)
class Ask:
    """One of the requests: a talk's user message if `chat`, else a prompt."""

    chat: bool
    given: str | list[int]
    settings: Mapping[str, Any]

    @property
    def path(self) -> str:
        return CHATS if self.chat else COMPLETIONS

    @property
    def subject(self) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": self.given}]} if self.chat else {"prompt": self.given}

    @property
    def body(self) -> dict[str, Any]:
        body = {**self.subject, **self.settings, "max_tokens": N_TOKENS}
        if "logit_bias" in body:
            body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
        if self.chat and "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        return body


ASKS = [
    Ask(chat, given, settings) for chat, all_given in ((False, PROMPTS), (True, TALKS)) for given in all_given
    for settings in SETTINGS
]  # fmt: skip


class Answer(NamedTuple):
    text: str
    finish_reason: str
    n_new: int
    tokens: list[Any] | None  # of each its bytes or name, its log probability and those of the likeliest


# ---- the engine alone ---------------------------------------------------------------------------------------------


def of_engine(llm: ff.LLM, ask: Ask) -> Answer:
    settings: dict[str, Any] = {**ask.settings, "max_tokens": N_TOKENS}
    output = llm.chat(ask.subject["messages"], **settings) if ask.chat else llm.generate(ask.given, **settings)
    tokens = None
    if output.logprobs is not None:
        ends = output.token_ids[-1] in llm.spec.eos_ids and not ask.settings.get("ignore_eos")
        shown = output.logprobs[: len(output.logprobs) - (ask.chat and ends)]
        tokens = [in_chat(llm, token) if ask.chat else in_completion(llm, token) for token in shown]
    return Answer(output.text, output.finish_reason, len(output.token_ids), tokens)


def in_chat(llm: ff.LLM, token: TokenLogprobs) -> tuple[bytes, float, list[tuple[bytes, float]]]:
    raw = llm.tokenizer.token_bytes
    return raw(token.token_id), token.logprob, [(raw(other), value) for other, value in token.top]


def in_completion(llm: ff.LLM, token: TokenLogprobs) -> tuple[str, float, dict[str, float]]:
    def name(token_id: int) -> str:
        raw = llm.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    likeliest_last = [(token.token_id, token.logprob), *reversed(token.top)]  # and of two with one name it is kept
    return name(token.token_id), token.logprob, {name(other): value for other, value in likeliest_last}


# ---- over HTTP ----------------------------------------------------------------------------------------------------


def of_server(here: Running, ask: Ask, stream: bool) -> tuple[Answer, int]:
    """The answer, and how many tokens of the prompt were cached."""
    if stream:
        *chunks, end = here.events(ask.path, **ask.body, stream_options={"include_usage": True})
        assert end == "[DONE]"
        choices, usage = [choice for chunk in chunks for choice in chunk["choices"]], chunks[-1]["usage"]
    else:
        body = here.post(ask.path, **ask.body).json()
        choices, usage = body["choices"], body["usage"]
    text = "".join(c["text"] if "text" in c else c.get("message", c.get("delta")).get("content", "") for c in choices)
    tokens = None
    if "logprobs" in ask.settings:
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        tokens = [token for part in parts for token in (chat_tokens(part) if ask.chat else completion_tokens(part))]
    answer = Answer(text, choices[-1]["finish_reason"], usage["completion_tokens"], tokens)
    return answer, usage["prompt_tokens_details"]["cached_tokens"]


def chat_tokens(logprobs: Mapping[str, Any]) -> Iterator[Any]:
    for token in logprobs["content"]:
        top = [(bytes(other["bytes"]), other["logprob"]) for other in token["top_logprobs"]]
        yield bytes(token["bytes"]), token["logprob"], top


def completion_tokens(logprobs: Mapping[str, Any]) -> Iterator[Any]:
    return zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)


def neighbour(here: Running, draw: Random, vocab_size: int) -> None:
    """Sometimes one that leaves, one that reads a prompt beforehand, or one that takes a slot's cache away."""
    what, ask = draw.random(), draw.choice(ASKS)
    if what < 0.25:
        stream = draw.random() < 0.6
        with sent(here, ask.path, **{**ask.body, "max_tokens": 200, "stream": stream, "ignore_eos": True}) as client:
            if stream and draw.random() < 0.7:
                client.recv(draw.randrange(1, 4000))
    elif what < 0.35:
        here.post(ask.path, **{**ask.body, "max_tokens": 0})
    elif what < 0.5:
        other = [draw.randrange(2, vocab_size) for _ in range(draw.randrange(1, 150))]
        here.post(COMPLETIONS, prompt=other, max_tokens=1)


def n_on_their_way(llm: ff.LLM) -> int:
    """Sequences that the next forward may have."""
    sequences = [ref() for ref in llm._batch._sequences]
    return sum(one is not None and not one.over for one in sequences)


class Watched(Gate):
    def __init__(self, llm: ff.LLM) -> None:
        super().__init__(llm)
        self._rows, self.most_slots = llm.kernel.rows, 0

    def __call__(self, n_rows: int, *again: Any) -> None:
        self.most_slots = max(self.most_slots, len(set(self._rows.slot[:n_rows].tolist())))
        super().__call__(n_rows, *again)


@dataclass
class Checked:
    """Asks and compares, and notes whether there was what could have gone wrong."""

    here: Running
    alone: Sequence[Answer]
    vocab_size: int
    differing: list[tuple[int, bool]] = field(default_factory=list)
    cached: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    streamed: dict[int, set[bool]] = field(default_factory=lambda: defaultdict(set))

    def ask(self, index: int, stream: bool) -> None:
        answer, cached = of_server(self.here, ASKS[index], stream)
        if answer != self.alone[index]:
            self.differing.append((index, stream))
        self.cached[index].add(cached)
        self.streamed[index].add(stream)

    def ask_often(self, seed: int, n: int) -> None:
        draw = Random(seed)
        for _ in range(n):
            neighbour(self.here, draw, self.vocab_size)
            self.ask(draw.randrange(len(ASKS)), draw.random() < 0.5)

    def crowd(self, n_clients: int, n: int) -> None:
        """So many clients at once, each with its share of `n` requests."""
        with ThreadPoolExecutor(n_clients) as pool:
            futures = [pool.submit(self.ask_often, 100 * n_clients + i, round(n / n_clients)) for i in range(n_clients)]
            for future in futures:
                future.result()

    def together(self, llm: ff.LLM, gate: Gate) -> None:
        """Different requests in all slots, none of which begins before all are there."""
        gate.shut()
        chosen = [i for i, ask in enumerate(ASKS) if ask.settings.get("ignore_eos")][:STREAMS]
        with ThreadPoolExecutor(STREAMS) as pool:
            futures = [pool.submit(self.ask, index, i % 2 == 0) for i, index in enumerate(chosen)]
            until(lambda: n_on_their_way(llm) == STREAMS)
            gate.open()
            for future in futures:
                future.result()


@pytest.mark.parametrize(
    ("model", "n"),
    [
        ("tiny", 120),
        pytest.param("tiny", 1000, marks=pytest.mark.long),
        pytest.param("demo", 1000, marks=pytest.mark.long),
    ],
)
def test_the_same_request_gets_the_same_bits(model: str, n: int, folder: Path, tmp_path: Path) -> None:
    source = folder if model == "tiny" else model
    with ff.load(source, device="cpu", dtype="bf16", threads=1, streams=1, ctx=512, prompt_chunk=7) as llm:
        alone = [of_engine(llm, ask) for ask in ASKS]
        vocab_size = llm.spec.vocab_size
    assert len({answer.text for answer in alone}) > len(ASKS) // 2
    with ff.load(source, device="cpu", dtype="bf16", threads=2, streams=STREAMS, ctx=512) as llm:
        gate = Watched(llm)
        with running(llm, tmp_path) as here:
            checked = Checked(here, alone, vocab_size)
            checked.together(llm, gate)
            for n_clients, share in CROWDS:
                checked.crowd(n_clients, round(share * n))
            here.idle()
            n_aborted = here.metric("request_success_total", finished_reason="abort")
    assert checked.differing == []
    assert len(checked.cached) == len(ASKS)
    assert gate.most_slots == STREAMS
    assert n_aborted > 0
    assert any(len(kinds) == 2 for kinds in checked.streamed.values())
    assert any(len(counts) > 1 for counts in checked.cached.values())
