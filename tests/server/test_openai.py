"""OpenAI's own client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from serving import CHAT, COMPLETIONS, LONG, NAME, PROMPT, Gate, Running, load, running, sent
from threads import BOUND_S, until

import flashformer as ff

KEY = "sk-test"
ENDLESS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[ff.LLM]:
    with load(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def open_gate(llm: ff.LLM) -> Gate:
    return Gate(llm)


@pytest.fixture
def gate(open_gate: Gate) -> Iterator[Gate]:
    yield open_gate
    open_gate.open()


@pytest.fixture(scope="module")
def here(llm: ff.LLM, open_gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(llm, tmp_path_factory.mktemp("at"), api_key=KEY) as server:
        server.client.headers["authorization"] = f"Bearer {KEY}"
        yield server


def client_of(here: Running, **options: Any) -> openai.OpenAI:
    http = httpx.Client(transport=httpx.HTTPTransport(uds=str(here.path)))
    return openai.OpenAI(api_key=KEY, base_url="http://server/v1", http_client=http, **{"max_retries": 0, **options})


@pytest.fixture
def client(here: Running) -> Iterator[openai.OpenAI]:
    with client_of(here) as made:
        yield made


@asynccontextmanager
async def async_client(here: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(here.path)))
    async with openai.AsyncOpenAI(api_key=KEY, base_url="http://server/v1", http_client=http, max_retries=0) as made:
        yield made


async def becomes(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not condition():
            await asyncio.sleep(0.001)


def test_chat(client: openai.OpenAI, llm: ff.LLM) -> None:
    expected = llm.chat(CHAT, max_tokens=12, logprobs=2)
    answer = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=12, logprobs=True, top_logprobs=2, extra_body={"top_k": 0}  # type: ignore[arg-type]
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert expected.logprobs is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert choice.logprobs.content[0].logprob == pytest.approx(expected.logprobs[0].logprob)
    again = [*CHAT, choice.message.model_dump(), {"role": "user", "content": "and?"}]
    answer = client.chat.completions.create(model=NAME, messages=again, max_tokens=2)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > len(expected.token_ids)


def test_chat_stream(client: openai.OpenAI, llm: ff.LLM) -> None:
    expected = llm.chat(CHAT, max_tokens=12)
    stream = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == expected.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)


def test_completion(client: openai.OpenAI, llm: ff.LLM) -> None:
    expected = llm.generate(PROMPT, max_tokens=12)
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, echo=True, logprobs=1)
    assert answer.choices[0].text == PROMPT + expected.text
    assert answer.choices[0].logprobs is not None
    stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected.text
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_errors_are_its_own(client: openai.OpenAI, here: Running) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=NAME, prompt=PROMPT, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=NAME, messages=CHAT, extra_body={"colour": 1})  # type: ignore[arg-type]
    assert (unknown.value.param, unknown.value.code) == ("colour", "unknown_parameter")
    with pytest.raises(openai.NotFoundError) as absent:
        client.completions.create(model="other", prompt=PROMPT)
    assert (absent.value.param, absent.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.AuthenticationError) as stranger:
        client.with_options(api_key="wrong").models.list()
    assert (stranger.value.type, stranger.value.code) == ("authentication_error", "invalid_api_key")


def test_an_engine_that_fails_is_a_server_error(client: openai.OpenAI, gate: Gate) -> None:
    gate.fail(ff.NumericalError("NaN in layer 3", 3), times=1)
    with pytest.raises(openai.InternalServerError) as broken:
        client.completions.create(model=NAME, prompt=PROMPT)
    assert (broken.value.status_code, broken.value.code) == (500, "numerical_error")


def test_a_stream_that_breaks_off_raises(client: openai.OpenAI, gate: Gate) -> None:
    gate.shut()
    gate.let(4)
    stream = client.completions.create(model=NAME, prompt="x", max_tokens=400, stream=True, extra_body=ENDLESS)
    next(stream)
    gate.fail(ff.NumericalError("NaN in layer 3", 3), times=1)
    gate.open()
    with pytest.raises(openai.APIError) as broken:
        list(stream)
    assert (broken.value.code, broken.value.message) == ("numerical_error", "NaN in layer 3")


@pytest.mark.parametrize("echo", [False, True])
def test_a_completion_stream_with_log_probabilities(client: openai.OpenAI, llm: ff.LLM, echo: bool) -> None:
    expected = llm.generate(PROMPT, max_tokens=12, logprobs=2, ignore_eos=True)
    assert expected.logprobs is not None
    asked: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "echo": echo, "extra_body": ENDLESS}
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, logprobs=2, stream=True)]
    assert "".join(choice.text for choice in chunks) == (PROMPT if echo else "") + expected.text
    parts = [choice.logprobs for choice in chunks if choice.logprobs is not None]
    found = [value for part in parts for value in part.token_logprobs or []]
    assert found[-12:] == pytest.approx([token.logprob for token in expected.logprobs], rel=1e-6)
    scored = llm.score(expected.prompt_token_ids[:1], expected.prompt_token_ids[1:]).logprobs if echo else []
    assert found[:-12] == ([None, *(pytest.approx(value, abs=1e-5) for value in scored)] if echo else [])
    whole = client.completions.create(**asked, logprobs=2).choices[0].logprobs
    assert whole is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts for value in getattr(part, name)] == getattr(whole, name)
    assert whole.top_logprobs is not None
    assert all(2 <= len(top) <= 3 for top in whole.top_logprobs[-12:])


def test_the_response_as_it_came(client: openai.OpenAI, llm: ff.LLM) -> None:
    messages: Any = CHAT
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=messages, max_tokens=5)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert int(raw.headers["content-length"]) == len(raw.content)
    assert raw.parse().choices[0].message.content == llm.chat(CHAT, max_tokens=5).text
    raw = client.models.with_raw_response.list()
    assert [model.id for model in raw.parse()] == [NAME]


# ---- more than there is room for ----------------------------------------------------------------------------------


@pytest.fixture
def full(llm: ff.LLM, gate: Gate, tmp_path: Path) -> Iterator[Running]:
    """Nothing may wait, all places are taken, and nothing goes on until the gate is opened."""
    with running(llm, tmp_path, max_waiting=0) as server:
        gate.shut()
        clients = [sent(server, COMPLETIONS, **LONG) for _ in range(2)]
        until(lambda: server.n_running == 2)
        yield server
        for one in clients:
            one.close()
        gate.open()


def test_too_many_is_a_rate_limit(full: Running) -> None:
    with client_of(full) as client, pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=1)
    assert (busy.value.code, busy.value.type) == ("queue_full", "rate_limit_error")
    assert busy.value.response.headers["retry-after"] == "1"


def test_it_asks_again_after_as_long_as_it_is_told(
    full: Running, gate: Gate, llm: ff.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            gate.open()
            full.idle()

    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=sleep))
    with client_of(full, max_retries=3) as client:
        answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=5)
    assert slept == [1.0, 1.0]
    assert answer.choices[0].text == llm.generate(PROMPT, max_tokens=5).text


# ---- several at once ----------------------------------------------------------------------------------------------


def test_several_at_once_and_one_given_up(here: Running, llm: ff.LLM, gate: Gate) -> None:
    chats: list[Any] = [[{"role": "user", "content": f"{PROMPT} {i}"}] for i in range(4)]
    expected = [llm.chat(chat, max_tokens=20).text for chat in chats]
    aborted = here.metric("request_success_total", finished_reason="abort")

    async def scene() -> list[str | None]:
        async with async_client(here) as client:
            create = client.chat.completions.create
            gate.shut()
            doomed = asyncio.create_task(create(model=NAME, messages=chats[0], max_tokens=400, extra_body=ENDLESS))
            await becomes(lambda: here.n_running == 1)
            others = [asyncio.create_task(create(model=NAME, messages=chat, max_tokens=20)) for chat in chats]
            await becomes(lambda: here.n_running == 2 and here.n_waiting == 3)
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            await becomes(lambda: here.n_jobs == 4)
            gate.open()
            return [answer.choices[0].message.content for answer in await asyncio.gather(*others)]

    assert asyncio.run(scene()) == expected
    here.idle()
    assert here.metric("request_success_total", finished_reason="abort") == aborted + 1


def test_streams_at_once_and_one_left_early(here: Running, llm: ff.LLM, gate: Gate) -> None:
    expected = [llm.generate(f"{PROMPT} {i}", max_tokens=20).text for i in range(3)]
    aborted = here.metric("request_success_total", finished_reason="abort")

    async def text(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model=NAME, prompt=prompt, max_tokens=20, stream=True)
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def scene() -> list[str]:
        async with async_client(here) as client:
            gate.shut()
            gate.let(4)
            left = await client.completions.create(
                model=NAME, prompt="x", max_tokens=400, stream=True, extra_body=ENDLESS
            )
            async with left:
                await anext(left)
            await becomes(lambda: here.n_jobs == 0)
            gate.open()
            return await asyncio.gather(*(text(client, f"{PROMPT} {i}") for i in range(3)))

    assert asyncio.run(scene()) == expected
    here.idle()
    assert here.metric("request_success_total", finished_reason="abort") == aborted + 1
