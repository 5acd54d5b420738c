"""What is refused of a body before it is read, and how little of what was sent comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashformer.server import schema
from flashformer.server.errors import api_error
from flashformer.server.options import MAX_BODY_BYTES
from flashformer.server.schema import MAX_DEPTH, MAX_NUMBERS, MAX_PARTS, read_chat, read_completion, read_object

MESSAGES = b'{"messages": [{"role": "user", "content": "hi"}], '


@contextmanager
def unread() -> Iterator[None]:
    """Nothing in it may parse JSON."""
    with mock.patch.object(schema.json, "loads", side_effect=AssertionError):
        yield


def refusal(read: Callable[[bytes], object], data: bytes) -> dict[str, Any]:
    with pytest.raises(Exception) as found:  # noqa: PT011  (api_error tells which)
        read(data)
    error = api_error(found.value)
    assert error.status == 400, found.value
    return dict(error.body["error"])


def of_size(begin: bytes, repeated: bytes, n: int, end: bytes) -> bytes:
    data = begin + b",".join([repeated] * n) + end
    assert len(data) <= MAX_BODY_BYTES
    return data


TOO_MANY: list[tuple[str, bytes, str]] = [
    ("ids", of_size(b'{"prompt": [', b"1", MAX_NUMBERS + 2, b"]}"), "values"),
    ("null", of_size(b'{"store": [', b"null", MAX_NUMBERS + 2, b"]}"), "values"),
    ("fractions", of_size(b'{"prompt": [', b"1e9", 1_000_000, b"]}"), "fractions"),
    ("lists", of_size(b'{"metadata": [', b"[]", 1_000_000, b"]}"), "lists"),
    ("tools", of_size(b'{"tools": [', b"{}", 1_000_000, b"]}"), "objects"),
    ("messages", of_size(b'{"messages": [', b'{"role":"user","content":""}', 250_000, b"]}"), "objects"),
    ("names", of_size(b"{", b'"a":1', 1_000_000, b"}"), "strings"),
    ("quotes", of_size(b'{"stop": [', b'""', 2_000_000, b"]}"), "strings"),
    ("escapes", of_size(b'{"stop": [', rb'"\\\"[\\"', 600_000, b"]}"), "strings"),
    ("stops", of_size(b'{"prompt": "a", "stop": [', b'"x"', 500_000, b"]}"), "strings"),
    ("biases", of_size(b'{"prompt": "a", "logit_bias": {', b'"1":0', 100_000, b"}}"), "strings"),
    ("never closed", b'{"a":[' * 50_000, "deep"),
]


@pytest.mark.parametrize(
    ("data", "says"), [(data, says) for _, data, says in TOO_MANY], ids=[n for n, _, _ in TOO_MANY]
)
def test_b28_bodies_of_too_many_values_are_not_read(data: bytes, says: str) -> None:
    for read in (read_chat, read_completion):
        with unread():
            message = refusal(read, data)["message"]
        assert says in message
        assert len(message) < 200


def test_what_a_context_may_need_is_read() -> None:
    prompts = [[*range(120_000, 128_192)]] * 16
    assert read_completion(json.dumps({"prompt": prompts}).encode()).prompts(None) == prompts  # type: ignore[arg-type]
    ids = [7] * (MAX_NUMBERS + 1)  # one more than there are commas between them
    assert read_completion(json.dumps({"prompt": ids}).encode()).prompts(None) == [ids]  # type: ignore[arg-type]
    message = {"role": "user", "content": [{"type": "text", "text": "a"}] * 4}
    read_chat(json.dumps({"messages": [message] * 2048}).encode())
    assert read_object(b'{"a":[' + b'"",' * (MAX_PARTS - 4) + b'""]}')["a"] == [""] * (MAX_PARTS - 3)
    with unread():
        refusal(read_object, b'{"a":[' + b'"",' * (MAX_PARTS - 3) + b'""]}')


@pytest.mark.parametrize("sign", ["[", "]", "{", ",", ".", '"', "\\", '\\"', '"[', '\\"[,', "\n", "e", "\u00e9"])
def test_signs_inside_a_text_are_no_values(sign: str) -> None:
    text = sign * (2 * MAX_NUMBERS // len(sign))
    for ascii_only in (True, False):
        data = json.dumps({"prompt": text}, ensure_ascii=ascii_only).encode()
        if len(data) <= MAX_BODY_BYTES:
            assert read_completion(data).prompts(None) == [text]  # type: ignore[arg-type]


def nested(n: int, begin: bytes = b"[", end: bytes = b"]") -> bytes:
    """A body of n levels, the object itself the first."""
    return b'{"prompt": "a", "metadata": ' + begin * (n - 1) + b"1" + end * (n - 1) + b"}"


def test_b31_json_is_read_to_depth_32_and_no_deeper() -> None:
    for begin, end in ((b"[", b"]"), (b'{"a":', b"}")):
        read_completion(nested(MAX_DEPTH, begin, end))
        for n in (MAX_DEPTH + 1, 900, 30_000):
            with unread():
                assert "nested too deep: at most 32" in refusal(read_completion, nested(n, begin, end))["message"]
    assert "not JSON" in refusal(read_completion, nested(20)[:-1])["message"]
    assert "not JSON" in refusal(read_completion, b"]" * 100_000)["message"]
    read_completion(b'{"prompt": "' + b"[" * 900 + b'", "metadata": [' + b"[[]]," * 900 + b"1]}")


def shape(value: Any) -> tuple[int, int, int]:
    """(parts, commas, depth) of what JSON text has, from its value."""
    if isinstance(value, dict | list):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        parts, commas, depths = zip(*map(shape, items), strict=True) if items else ((), (), ())
        return 1 + sum(parts), max(len(value) - 1, 0) + sum(commas), 1 + max(depths, default=0)
    n = 1 if isinstance(value, str) else sum(sign in ".eE" for sign in json.dumps(value))  # as in 1.5, 1e9, true
    return n, 0, 0


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('ab"\\[]{},.e'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\[,', max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4), st.booleans())
def test_values_are_counted_as_they_are(value: dict[str, Any], ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    due = shape(value)
    for name, n in zip(("MAX_PARTS", "MAX_NUMBERS", "MAX_DEPTH"), due, strict=True):
        with mock.patch.object(schema, name, n):
            schema._require_bounded(data)
        if n:
            with mock.patch.object(schema, name, n - 1), pytest.raises(Exception, match=r"at most"):
                schema._require_bounded(data)


LONG = b"A" * (1 << 20)


@pytest.mark.parametrize(
    ("data", "begins"),
    [
        (MESSAGES + b'"' + LONG + b'": 1}', "AAAA"),
        (MESSAGES + b'"x - at `$.' + LONG + b'": 1}', ""),
        (MESSAGES + b'"stream_options": {"' + LONG + b'": 1}}', "stream_options.AAA"),
        (b'{"messages": [{"role": "' + LONG + b'", "content": ""}]}', "messages[0].role: invalid enum value 'AAA"),
        (b'{"messages": [{"role": "user", "content": "", "' + LONG + b'": ""}]}', "messages[0].AAA"),
        (MESSAGES + b'"logit_bias": {"' + LONG + b'": 1}}', "logit_bias: name 'AAA"),
        (MESSAGES + b'"tools": "' + LONG + b'"}', "tools='AAA"),
        (MESSAGES + b'"a": {"' + LONG + b'": 1, "' + LONG + b'": 1}}', "the body has the name 'AAA"),
        (MESSAGES + b'"seed": "' + LONG + b'"}', "seed: expected"),
        (b'"' + LONG + b'"', "the body is 'AAA"),
    ],
)
def test_little_of_what_was_sent_comes_back(data: bytes, begins: str) -> None:
    error = refusal(read_chat, data)
    assert error["message"].startswith(begins)
    assert "..." in error["message"] or begins.startswith("seed")
    assert len(json.dumps(error)) < 500
