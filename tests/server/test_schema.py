"""Bodies of requests: what is refused, by which name, and what the rest means."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashformer.engine import SamplingSettings
from flashformer.server.errors import api_error
from flashformer.server.schema import IGNORED, NEUTRAL, Ask, read_chat, read_completion, read_object

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**body: Any) -> Ask:
    return read_chat(json.dumps({"messages": MESSAGES, **body}).encode())


def completion(**body: Any) -> Ask:
    return read_completion(json.dumps({"prompt": "hi", **body}).encode())


def refusal(read: Any, data: bytes) -> dict[str, Any]:
    """The error of a request that must be refused with 400."""
    with pytest.raises(Exception) as found:  # noqa: PT011  (api_error tells which)
        read(data)
    error = api_error(found.value)
    assert error.status == 400, found.value
    json.dumps(error.body).encode()
    return dict(error.body["error"])


def test_fields_mean_what_the_engine_calls_by_the_same_name() -> None:
    settings = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "seed": 3,
        "stop": ["a", "b"],
        "ignore_eos": True,
        "max_tokens": 5,
    }
    bias = {"5": -100, "17": 1.5}
    expected = {**settings, "logit_bias": {5: -100.0, 17: 1.5}}
    assert chat(**settings, logit_bias=bias, logprobs=True, top_logprobs=3).settings == SamplingSettings(
        **expected, logprobs=3
    )
    assert completion(**settings, logit_bias=bias, logprobs=2).settings == SamplingSettings(**expected, logprobs=2)
    assert chat(logprobs=True).settings.logprobs == 0
    assert completion(logprobs=0).settings.logprobs == 0
    assert chat(max_completion_tokens=9).settings.max_tokens == 9
    assert completion(temperature=1).settings.temperature == 1.0
    for read in (chat, completion):
        asked = read()
        assert asked.settings == SamplingSettings()
        assert (asked.stream, asked.include_usage, asked.warm, asked.echo) == (False, False, False, False)
        assert read(max_tokens=0).warm
        assert read(stream=True, stream_options={"include_usage": True}).include_usage


def test_null_is_as_good_as_nothing() -> None:
    fields = ("max_tokens", "temperature", "top_p", "stop", "logit_bias", "stream", "stream_options", "seed", "model")
    nulls = dict.fromkeys(fields)
    assert chat(**nulls).settings == completion(**nulls).settings == SamplingSettings()


def test_prompts_are_text_ids_or_lists_of_them() -> None:
    expected: list[tuple[Any, list[Any]]] = [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ]
    for prompt, prompts in expected:
        assert completion(prompt=prompt).prompts(None) == prompts  # type: ignore[arg-type]


def test_parts_of_a_message_are_lines() -> None:
    class Model:
        def chat_ids(self, messages: Any, **variables: Any) -> Any:
            return messages, variables

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sent = [{"role": "developer", "content": parts}, {"role": "assistant", "content": "c", "refusal": None}]
    (found,) = chat(messages=sent, chat_template_kwargs={"x": 1}).prompts(Model())  # type: ignore[arg-type]
    messages = [{"role": "developer", "content": "a\nb"}, {"role": "assistant", "content": "c"}]
    assert found == (messages, {"template_variables": {"x": 1}})


WRONG: list[tuple[str, Any, str]] = [
    ("temperature", -1, "temperature"),
    ("temperature", 1e9, "temperature"),
    ("temperature", "1", "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 2, "top_p"),
    ("top_k", -5, "top_k"),
    ("top_k", 1.5, "top_k"),
    ("min_p", 2, "min_p"),
    ("repeat_penalty", 1e9, "repeat_penalty"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("max_tokens", 10**30, "max_tokens"),
    ("seed", -1, "seed"),
    ("seed", 2**64, "seed"),
    ("stop", ["x"] * 50_000, "stop"),
    ("stop", "", "stop"),
    ("stop", "x" * 2**20, "stop"),
    ("stop", [1], "stop[0]"),
    ("logit_bias", {str(i): 0 for i in range(10_000)}, "logit_bias"),
    ("logit_bias", {"5": 101}, "logit_bias"),
    ("logit_bias", {"x": 1}, "logit_bias"),
    ("logit_bias", {"-1": 1}, "logit_bias"),
    ("logit_bias", {"1": 1, "01": 1}, "logit_bias"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("n", 0, "n"),
    ("n", -1, "n"),
    ("n", 9, "n"),
    ("n", 10**9, "n"),
    ("n", True, "n"),
    ("best_of", 2, "best_of"),
    ("tools", [{"type": "function"}], "tools"),
    ("response_format", {"type": "json_object"}, "response_format"),
    ("frequency_penalty", 0.5, "frequency_penalty"),
]


@pytest.mark.parametrize(("field", "value", "param"), WRONG, ids=[f"{f} {str(v)[:20]}" for f, v, _ in WRONG])
def test_b28_b29_b30_out_of_range_is_refused_by_name(field: str, value: Any, param: str) -> None:
    for read, body in ((read_chat, {"messages": MESSAGES}), (read_completion, {"prompt": "hi"})):
        error = refusal(read, json.dumps({**body, field: value}).encode())
        assert error["param"] == param
        assert error["message"].startswith(field)
        assert len(error["message"]) < 400


@pytest.mark.parametrize("value", [-1, 21, 10**9, 1.5])
def test_b29_logprobs(value: Any) -> None:
    assert refusal(read_completion, json.dumps({"prompt": "", "logprobs": value}).encode())["param"] == "logprobs"
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": value}
    assert "logprobs" in refusal(read_chat, json.dumps(body).encode())["param"]
    assert refusal(read_chat, json.dumps({**body, "logprobs": False, "top_logprobs": 2}).encode())["param"]


@pytest.mark.parametrize(
    "prompt", [[], [1.5], [1, True], [None], [["a"]], ["a", 1], [[1], [2.0]], 5, None, {}, ["a"] * 17]
)
def test_b26_what_is_no_prompt_is_refused(prompt: Any) -> None:
    assert refusal(read_completion, json.dumps({"prompt": prompt}).encode())["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"role": "narrator", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": "x", "color": "red"}],
        [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
        MESSAGES * 2049,
    ],
)
def test_b23_what_is_no_conversation_is_refused(messages: Any) -> None:
    assert refusal(read_chat, json.dumps({"messages": messages}).encode())["param"].startswith("messages")


def test_b32_unknown_fields_are_named() -> None:
    for read, body in ((read_chat, {"messages": MESSAGES}), (read_completion, {"prompt": "hi"})):
        error = refusal(read, json.dumps({**body, "temprature": 1}).encode())
        assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")
        error = refusal(read, json.dumps({**body, "stream": True, "stream_options": {"x": 1}}).encode())
        assert error["param"] == "stream_options.x"
        assert refusal(read, json.dumps({**body, "best_of": 2}).encode())["code"] == "unsupported_parameter"
    assert refusal(read_chat, b"{}")["code"] == "missing_required_parameter"
    assert refusal(read_chat, json.dumps({"messages": MESSAGES, "prompt": "x"}).encode())["param"] == "prompt"


def test_b32_fields_without_effect_are_ignored() -> None:
    for name in IGNORED:
        assert chat(**{name: "x"}).settings == completion(**{name: {"a": 1}}).settings == SamplingSettings()
    for name, values in NEUTRAL.items():
        for value in values:
            assert chat(**{name: value}).settings == SamplingSettings()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b"{", "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        (b'{"prompt": "a", "stream_options": {"x": 1, "x": 1}}', "'x' twice"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 10_000, "nested too deep"),
        (b'{"prompt": [' + b"9" * 100_000 + b"]}", "not JSON"),
        (b'{"prompt": "a\0b"}', "not JSON"),
        (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "a", "\\ud800": 1}', "surrogate"),
        (b'{"prompt": "a", "stop": "\\udfff"}', "lone surrogate"),
    ],
)
def test_b27_b31_what_is_no_json_of_ours_is_refused(data: bytes, says: str) -> None:
    assert says in refusal(read_completion, data)["message"]


@pytest.mark.parametrize("text", ["\0", "a" * (1 << 20), "\u0301" * 10**6, "\ufeff\u2028\uffff\U0010ffff"], ids=len)
def test_b27_odd_texts_are_text(text: str) -> None:
    assert completion(prompt=text).prompts(None) == [text]  # type: ignore[arg-type]
    assert completion(stop=text[:1]).settings.stop == (text[:1],)
    if len(text) > 256:
        assert refusal(read_completion, json.dumps({"prompt": "", "stop": text}).encode())["param"] == "stop"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_any_json_is_read_or_refused(value: Any) -> None:
    data = json.dumps(value).encode()
    if isinstance(value, dict):
        assert read_object(data) == value
    for body in (data, json.dumps({"messages": value}).encode(), json.dumps({"prompt": value}).encode()):
        for read in (read_chat, read_completion):
            assert status(read, body) in (None, 400)


def status(read: Any, body: bytes) -> int | None:
    """Of the refusal, if it is refused."""
    try:
        read(body)
    except Exception as error:
        return api_error(error).status
    return None
