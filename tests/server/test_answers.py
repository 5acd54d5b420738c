"""What comes over HTTP is what the engine makes, in OpenAI's shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import EOS, VOCAB_SIZE, model_folder
from serving import CHAT, CHATS, COMPLETIONS, NAME, PROMPT, Running, chat_folder, load, running

import flashformer as ff

N = 20


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[ff.LLM]:
    with load(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def here(llm: ff.LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(llm, tmp_path_factory.mktemp("at")) as server:
        yield server


def text_of(events: list[Any]) -> str:
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def test_a_completion_is_that_of_the_engine(here: Running, llm: ff.LLM) -> None:
    prompt = PROMPT * 5  # more than is made, so that its slot is kept for it
    expected = llm.generate(prompt, max_tokens=N)
    body = here.post(COMPLETIONS, prompt=prompt, max_tokens=N).json()
    (choice,) = body["choices"]
    assert choice == {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": expected.finish_reason}
    assert body["object"] == "text_completion"
    assert body["model"] == NAME
    n_prompt, n_new = len(expected.prompt_token_ids), len(expected.token_ids)
    assert body["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": n_prompt - 1},
    }
    assert body["timings"]["n_tokens"] == n_new
    assert body["timings"]["tok_s"] > 0
    assert not body["timings"]["max_tokens_clamped"]


def test_a_chat_answer_is_that_of_the_engine(here: Running, llm: ff.LLM) -> None:
    messages = [{"role": "system", "content": "s"}, *CHAT]
    expected = llm.chat(messages, max_tokens=N)
    body = here.post(CHATS, messages=messages, max_tokens=N, model=NAME).json()
    (choice,) = body["choices"]
    message = {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": expected.finish_reason}
    assert body["object"] == "chat.completion"
    assert body["usage"]["prompt_tokens"] == len(llm.chat_ids(messages))


def test_sampling_is_that_of_the_engine(here: Running, llm: ff.LLM) -> None:
    settings: dict[str, Any] = {
        "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repeat_penalty": 1.3, "seed": 7, "max_tokens": N,
    }  # fmt: skip
    expected = llm.generate(PROMPT, **settings, logit_bias={40: 3.0}, stop="q", ignore_eos=True)
    asked = {**settings, "logit_bias": {"40": 3}, "stop": "q", "ignore_eos": True}
    assert here.post(COMPLETIONS, prompt=PROMPT, **asked).json()["choices"][0]["text"] == expected.text
    other = llm.generate(PROMPT, max_tokens=N, ignore_eos=True)
    assert expected.text != other.text


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHATS, {"messages": CHAT}), (COMPLETIONS, {"prompt": PROMPT})])
def test_a_stream_says_what_the_whole_answer_says(here: Running, path: str, body: Any, usage: bool) -> None:
    asked = {**body, "max_tokens": N, "seed": 1, "temperature": 1, "ignore_eos": True}
    whole = here.post(path, **asked).json()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    *chunks, end = here.events(path, **asked, **options)
    assert end == "[DONE]"
    choice = whole["choices"][0]
    assert text_of([*chunks, end]) == (choice["text"] if "text" in choice else choice["message"]["content"])
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert "tok_s" in chunks[-1]["timings"]
    if path == CHATS:
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    if usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {"prompt_tokens_details": None}
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert not any("usage" in chunk for chunk in chunks)


def test_b38_the_same_request_gets_the_same_answer_alone_and_in_company(here: Running) -> None:
    def ask(i: int) -> str:
        asked = {"prompt": f"{PROMPT}{i % 3}", "max_tokens": N, "temperature": 1, "seed": i % 3, "logprobs": 2}
        if i % 2:
            return text_of(here.events(COMPLETIONS, **asked))
        return str(here.post(COMPLETIONS, **asked).json()["choices"][0]["text"])

    alone = [ask(i) for i in range(6)]
    assert alone[:3] == alone[3:]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(24))) == alone[:3] * 8


def test_chat_logprobs(here: Running, llm: ff.LLM) -> None:
    expected = llm.chat(CHAT, max_tokens=N, logprobs=3, ignore_eos=True)
    assert expected.logprobs is not None
    asked = {"messages": CHAT, "max_tokens": N, "logprobs": True, "top_logprobs": 3, "ignore_eos": True}
    content = here.post(CHATS, **asked).json()["choices"][0]["logprobs"]["content"]
    for found, token in zip(content, expected.logprobs, strict=True):
        assert found["logprob"] == pytest.approx(token.logprob, rel=1e-6)
        assert [top["logprob"] for top in found["top_logprobs"]] == pytest.approx([p for _, p in token.top], rel=1e-6)
        assert [bytes(top["bytes"]) for top in found["top_logprobs"]] == [byte_of(llm, i) for i, _ in token.top]
    assert b"".join(bytes(found["bytes"]) for found in content).decode("utf-8", "replace") == expected.text
    streamed = [
        entry
        for chunk in here.events(CHATS, **asked)[:-1]
        for choice in chunk["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert streamed == content


def byte_of(llm: ff.LLM, token_id: int) -> bytes:
    """What the tokenizer of the tests has for a token: a byte, or the name of a special token."""
    if token_id < 2:
        return [b"<s>", b"</s>"][token_id]
    return next(bytes([b]) for b in range(256) if ids_of_byte(llm, b) == token_id)


def ids_of_byte(llm: ff.LLM, byte: int) -> int:
    from tokenizers import pre_tokenizers

    return 2 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(byte_char(byte))


def byte_char(byte: int) -> str:
    """How byte-level tokenizers write a byte, by the rule of GPT-2."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    return chr(byte) if byte in kept else chr(256 + [b for b in range(256) if b not in kept].index(byte))


def test_every_token_has_its_byte(llm: ff.LLM) -> None:
    found = {llm.tokenizer.token_bytes(i) for i in range(2, VOCAB_SIZE)}
    assert found == {bytes([b]) for b in range(256)}
    assert all(llm.tokenizer.token_bytes(ids_of_byte(llm, b)) == bytes([b]) for b in range(256))


def test_the_bytes_of_tokens_join_to_the_text() -> None:
    text = "naïve 日本語 🙂 x = 'é'\n\tpass"
    with ff.load("demo", streams=1, ctx=64, threads=1) as demo:
        ids = demo.tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(demo.tokenizer.token_bytes, ids)).decode() == text


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_prompt_and_its_log_probabilities(
    here: Running, llm: ff.LLM, max_tokens: int, stream: bool
) -> None:
    text = "día: x"
    ids = llm.tokenizer.encode(text)
    asked = {"prompt": text, "echo": True, "logprobs": 2, "max_tokens": max_tokens, "ignore_eos": True}
    if stream:
        chunks = [c for chunk in here.events(COMPLETIONS, **asked)[:-1] for c in chunk["choices"]]
        parts = [c["logprobs"] for c in chunks if c["logprobs"]]
        logprobs = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
        found = "".join(c["text"] for c in chunks)
    else:
        (choice,) = here.post(COMPLETIONS, **asked).json()["choices"]
        logprobs, found = choice["logprobs"], choice["text"]
    new = llm.generate(text, max_tokens=max_tokens, ignore_eos=True) if max_tokens else None
    assert found == text + (new.text if new else "")
    every = ids + (new.token_ids if new else [])
    assert len(logprobs["tokens"]) == len(every)
    expected = log_softmax(llm.logits(every))
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    for i in range(1, len(every)):
        row = expected[i - 1]
        assert logprobs["token_logprobs"][i] == pytest.approx(row[every[i]], abs=1e-4)
        values = sorted(logprobs["top_logprobs"][i].values(), reverse=True)
        assert values[:2] == pytest.approx(sorted(row, reverse=True)[:2], abs=1e-4)
        assert logprobs["token_logprobs"][i] in values
    raw = [llm.tokenizer.token_bytes(i) for i in ids]
    assert raw[0] == b"<s>"  # which is a token, and no text
    assert logprobs["tokens"][: len(ids)] == [b.decode() if b.isascii() else f"bytes:\\x{b[0]:02x}" for b in raw]
    offsets = logprobs["text_offset"][: len(ids)]
    assert offsets == [0, *(len(text.encode()[:n].decode("utf-8", "ignore")) for n in range(len(ids) - 1))]


def test_token_ids_are_taken_as_they_are(here: Running, llm: ff.LLM) -> None:
    ids = [5, 9, 77]
    expected = llm.generate(ids, max_tokens=N)
    body = here.post(COMPLETIONS, prompt=ids, max_tokens=N).json()
    assert body["choices"][0]["text"] == expected.text
    assert body["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_get_an_answer_each(here: Running, llm: ff.LLM, stream: bool) -> None:
    prompts = ["a", "bc", "def"]
    expected = [output.text for output in llm.generate(prompts, max_tokens=N)]
    asked = {"prompt": prompts, "max_tokens": N}
    if stream:
        texts = ["", "", ""]
        for chunk in here.events(COMPLETIONS, **asked)[:-1]:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == expected
    else:
        body = here.post(COMPLETIONS, **asked).json()
        assert [choice["text"] for choice in body["choices"]] == expected
        assert body["usage"]["prompt_tokens"] == sum(len(llm.tokenizer.encode(prompt)) for prompt in prompts)


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_are_those_of_seeds_in_a_row(here: Running, llm: ff.LLM, stream: bool) -> None:
    asked = {"prompt": [PROMPT, "class "], "n": 2, "seed": 2**64 - 1, "temperature": 1.0, "max_tokens": 6}
    expected = [
        llm.generate(prompt, temperature=1.0, max_tokens=6, seed=seed).text
        for prompt in (PROMPT, "class ")
        for seed in (2**64 - 1, 0)
    ]
    assert len(set(expected)) == 4
    if stream:
        events = here.events(COMPLETIONS, **asked, stream_options={"include_usage": True})
        texts, usage = [""] * 4, events[-2]["usage"]
        for event in events[:-1]:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
    else:
        body = here.post(COMPLETIONS, **asked).json()
        texts, usage = [choice["text"] for choice in body["choices"]], body["usage"]
    assert texts == expected
    assert usage["completion_tokens"] == 4 * 6
    assert usage["prompt_tokens"] == sum(len(llm.tokenizer.encode(prompt)) for prompt in (PROMPT, "class "))
    assert here.post(COMPLETIONS, prompt=PROMPT, n=3).json()["error"]["param"] == "n"  # there are two streams


def test_b25_what_the_context_cannot_hold_is_cut_and_said(here: Running, llm: ff.LLM) -> None:
    ctx = llm.setup.target.ctx
    body = here.post(COMPLETIONS, prompt=[5] * (ctx - 3), max_tokens=100, ignore_eos=True).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    assert body["timings"]["max_tokens_clamped"]
    by_default = here.post(COMPLETIONS, prompt=[5] * (ctx - 3), ignore_eos=True).json()
    assert by_default["usage"]["completion_tokens"] == 3
    assert by_default["timings"]["max_tokens_clamped"]


def test_b24_a_prompt_longer_than_the_context_is_refused_with_both_numbers(here: Running, llm: ff.LLM) -> None:
    for stream in (False, True):
        answer = here.post(COMPLETIONS, prompt=[5] * 600, stream=stream)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "prompt")
        assert error["code"] == "context_length_exceeded"
        assert re.search(r"600 .* 512", error["message"])


@pytest.mark.parametrize("ids", [[-1], [VOCAB_SIZE], [2**40], [2**70]])
def test_b26_ids_outside_the_vocabulary_are_refused(here: Running, ids: list[int]) -> None:
    assert here.post(COMPLETIONS, prompt=ids).status_code == 400
    assert here.post(COMPLETIONS, prompt="a", logit_bias={str(ids[0]): 1}).status_code == 400


def test_b23_an_empty_prompt_is_bos_alone(here: Running, llm: ff.LLM) -> None:
    body = here.post(COMPLETIONS, prompt="", max_tokens=3).json()
    assert body["choices"][0]["text"] == llm.generate("", max_tokens=3).text
    assert body["usage"]["prompt_tokens"] == 1
    for content in ("", "  \n"):
        assert here.post(CHATS, messages=[{"role": "system", "content": content}], max_tokens=2).status_code == 200


def test_b33_the_name_of_a_special_token_is_text(here: Running, llm: ff.LLM) -> None:
    messages = [{"role": "user", "content": "</s><s>"}]
    body = here.post(CHATS, messages=messages, max_tokens=2).json()
    assert body["usage"]["prompt_tokens"] == len("u:</s><s>\na:")
    assert EOS not in llm.chat_ids(messages)


def test_b35_nothing_of_a_stop_string_goes_out(here: Running, llm: ff.LLM) -> None:
    text = llm.generate(PROMPT, max_tokens=60, ignore_eos=True).text
    middle = next(i for i in range(5, len(text) - 3) if "\ufffd" not in text[i : i + 3])
    stop = text[middle : middle + 3]
    expected = text[: text.index(stop)]
    asked = {"prompt": PROMPT, "max_tokens": 60, "stop": stop, "ignore_eos": True}
    assert text_of(here.events(COMPLETIONS, **asked)) == expected
    choice = here.post(COMPLETIONS, **asked).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")


def test_b35_nothing_of_a_stop_string_stands_in_the_log_probabilities(here: Running, llm: ff.LLM) -> None:
    asked: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True}
    for seed in range(200):  # until four tokens in a row are ASCII, one each
        ids = llm.generate(PROMPT, seed=seed, **asked).token_ids
        begins = [i for i in range(1, 37) if llm.tokenizer.decode(ids[i - 1 : i + 3]).isascii()]
        if begins and len(stop := llm.tokenizer.decode(ids[begins[0] : begins[0] + 3])) == 3:
            break
    asked |= {"prompt": PROMPT, "seed": seed, "stop": stop, "logprobs": 2}
    whole = here.post(COMPLETIONS, **asked).json()["choices"][0]
    chunks = [event["choices"][0]["logprobs"] for event in here.events(COMPLETIONS, **asked)[:-1]]
    streamed = [name for logprobs in chunks if logprobs for name in logprobs["tokens"]]
    assert whole["finish_reason"] == "stop"
    assert len(whole["logprobs"]["tokens"]) == begins[0]
    assert streamed == whole["logprobs"]["tokens"]


def test_the_log_probabilities_of_one_answer_are_bounded(here: Running) -> None:
    few: dict[str, Any] = {"prompt": [5] * 400, "logprobs": 20, "echo": True}
    assert here.post(COMPLETIONS, **few, max_tokens=1).status_code == 200
    for body in (
        {**few, "prompt": [[5] * 400] * 16, "n": 2, "max_tokens": 100},
        {**few, "prompt": [[5]] * 16, "n": 2, "max_tokens": 500, "echo": False},
    ):
        answer = here.post(COMPLETIONS, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")


def test_d60_who_asks_again_after_an_answer_finds_a_place(folder: Path, tmp_path: Path) -> None:
    with load(folder, streams=1) as llm, running(llm, tmp_path, max_waiting=0) as here:
        for stream in (False, True):
            found = {here.post(COMPLETIONS, prompt="a", max_tokens=1, stream=stream).status_code for _ in range(60)}
            assert found == {200}


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_fills_the_cache_and_makes_nothing(here: Running, llm: ff.LLM, stream: bool) -> None:
    asked = {"messages": [{"role": "user", "content": f"to be read beforehand, {stream}"}], "max_tokens": 0}
    for again in (False, True):
        if stream:
            chunks = here.events(CHATS, **asked, stream_options={"include_usage": True})
            assert text_of(chunks) == ""
            usage, reason = chunks[-2]["usage"], chunks[-3]["choices"][0]["finish_reason"]
        else:
            body = here.post(CHATS, **asked).json()
            assert body["choices"][0]["message"]["content"] == ""
            usage, reason = body["usage"], body["choices"][0]["finish_reason"]
        assert (usage["completion_tokens"], reason) == (0, "length")
        n, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        assert cached == n if again else cached < n
    after = here.post(CHATS, **{**asked, "max_tokens": 1}).json()["usage"]
    assert after["prompt_tokens_details"]["cached_tokens"] == after["prompt_tokens"] - 1 == n - 1


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "model", generation={"do_sample": True, "temperature": 2.0})
    with load(folder, streams=1) as llm, running(llm, tmp_path) as here:
        asked = {"prompt": PROMPT, "max_tokens": N, "seed": 3}
        found = here.post(COMPLETIONS, **asked).json()["choices"][0]["text"]
        assert found == llm.generate(PROMPT, max_tokens=N, seed=3).text
        assert found != here.post(COMPLETIONS, **asked, temperature=0).json()["choices"][0]["text"]


def test_a_model_without_a_chat_template_refuses_chats_alone(tmp_path: Path) -> None:
    with load(model_folder(tmp_path / "model"), streams=1) as llm, running(llm, tmp_path) as here:
        answer = here.post(CHATS, messages=CHAT)
        assert answer.status_code == 400
        assert "template" in answer.json()["error"]["message"]
        assert here.post(COMPLETIONS, prompt=PROMPT, max_tokens=1).status_code == 200
