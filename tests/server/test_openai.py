"""OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from serving import CHAT, NAME, PROMPT, Running, chat_folder, load, running

import flashformer as ff

KEY = "sk-test"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ff.LLM]:
    with load(chat_folder(tmp_path_factory.mktemp("model"))) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def here(llm: ff.LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(llm, tmp_path_factory.mktemp("at"), api_key=KEY) as server:
        yield server


@pytest.fixture
def client(here: Running) -> Iterator[openai.OpenAI]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(here.path))) as http:
        yield openai.OpenAI(api_key=KEY, base_url="http://server/v1", http_client=http, max_retries=0)


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
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
