"""A model without a tokenizer, as `shape:NAME` are: token ids in, and an event for every token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from serving import CHAT, CHATS, COMPLETIONS, PROMPT, Running, running

import flashformer as ff
from flashformer.engine import Options
from flashformer.engine.engine import make_llm
from flashformer.engine.setup import set_up
from flashformer.model import load_model

IDS, N = [5, 9, 77], 20


@pytest.fixture
def llm(folder: Path) -> Iterator[ff.LLM]:
    model = replace(load_model(folder), tokenizer=None)
    with make_llm(model, set_up(model.spec, model.stored_format, Options(device="cpu", threads=1))) as made:
        yield made


@pytest.fixture
def here(llm: ff.LLM, tmp_path: Path) -> Iterator[Running]:
    with running(llm, tmp_path) as server:
        yield server


def test_every_token_is_an_event(here: Running) -> None:
    asked = {"prompt": IDS, "max_tokens": N, "ignore_eos": True}
    *events, end = here.events(COMPLETIONS, **asked)
    assert end == "[DONE]"
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons == [None] * N + ["length"]
    assert {choice["text"] for event in events for choice in event["choices"]} == {""}
    body = here.post(COMPLETIONS, **asked).json()
    assert (body["choices"][0]["text"], body["usage"]["completion_tokens"]) == ("", N)


def test_log_probabilities_name_the_ids(here: Running, llm: ff.LLM) -> None:
    made = llm.generate(IDS, max_tokens=N, ignore_eos=True).token_ids
    expected = [f"token_id:{token_id}" for token_id in made]
    asked = {"prompt": IDS, "max_tokens": N, "ignore_eos": True, "logprobs": 1}
    assert here.post(COMPLETIONS, **asked).json()["choices"][0]["logprobs"]["tokens"] == expected
    choices = [choice for event in here.events(COMPLETIONS, **asked)[:-1] for choice in event["choices"]]
    assert [choice["logprobs"]["tokens"] for choice in choices[:-1]] == [[name] for name in expected]


@pytest.mark.parametrize("stream", [False, True])
def test_text_is_refused(here: Running, stream: bool) -> None:
    for path, body in ((CHATS, {"messages": CHAT}), (COMPLETIONS, {"prompt": PROMPT})):
        answer = here.post(path, **body, stream=stream)
        assert answer.status_code == 400
        assert "no tokenizer: give prompts as lists of token ids" in answer.json()["error"]["message"]
    assert here.post(COMPLETIONS, prompt=IDS, max_tokens=1).status_code == 200
