"""Texts that are far too long: refused before work is done for them; and odd ones, which cost no more than others."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folders
import pytest
from folders import model_folder
from tokenizer_kinds import KINDS
from transformers import AutoTokenizer

import flashformer as ff
from flashformer.checkpoint.chat import ChatEncoder, Marks
from flashformer.checkpoint.encoding import LONG_CHARS
from flashformer.checkpoint.template import ChatTemplate
from flashformer.checkpoint.tokenizer import Tokenizer, load_tokenizer
from flashformer.engine.request import LIMITS

CTX = folders.CONFIG["max_position_embeddings"]
MOST = LIMITS.chars_per_position * CTX + LIMITS.spare_chars
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{{ (m.twice or '') * 2 }}{% endfor %}{{ tools | tojson }}{{ further or '' }}"
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ff.LLM]:
    folder = model_folder(tmp_path_factory.mktemp("model"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": TEMPLATE}))
    with ff.load(folder, device="reference", threads=2) as loaded:
        yield loaded


class Counted:
    """Characters that went into a method of a class since the last `take`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, name: str, text_at: int) -> None:
        self.n = 0
        method = getattr(kind, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.n += len(args[text_at])
            return method(*args, **kwargs)

        monkeypatch.setattr(kind, name, counting)

    def take(self) -> int:
        n, self.n = self.n, 0
        return n


def refused(call: Callable[[], object], n: int) -> None:
    with pytest.raises(ff.RequestError, match=rf"\b{n} characters: too long for the context of {CTX}\b"):
        call()


def test_b24_text_that_cannot_fit_is_not_encoded(llm: ff.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Counted(monkeypatch, Tokenizer, "encode", 1)
    for call in (llm.generate, llm.stream, llm.logits, lambda prompt: llm.score(prompt, "a")):
        refused(lambda call=call: call("x" * (MOST + 1)), MOST + 1)  # type: ignore[misc]
    for prompt in ("a", [3]):
        refused(lambda prompt=prompt: llm.score(prompt, "x" * (MOST + 1)), MOST + 1)  # type: ignore[misc]
    refused(lambda: llm.score("x" * MOST, "y"), MOST + 1)
    assert encoded.take() <= MOST + 1
    with pytest.raises(ff.RequestError, match=rf"\b{MOST + 1} tokens is longer than the context of {CTX}\b"):
        llm.generate("x" * MOST)
    assert encoded.take() == MOST


def test_b24_conversations_that_cannot_fit_are_not_looked_at(llm: ff.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = Counted(monkeypatch, Marks, "put", 1)
    half = "x" * (MOST // 2)
    n = 2 * len(half) + len("rolerolecontentcontentuseruser")
    chats: list[tuple[list[dict[str, Any]], dict[str, Any], int]] = [
        ([{"role": "user", "content": half}] * 2, {}, n),
        ([{"role": "user", "content": half}], {"tools": [{"role": "user", "content": half}]}, n),
        (
            [{"role": "user", "content": half}],
            {"template_variables": {"further": half}},
            n - len("rolecontentuser") + len("further"),
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": half}, {half: 1}]}],
            {},
            n - len("rolecontentuser") + len("typetexttext"),
        ),
    ]
    for messages, further, n_chars in chats:
        for call in (llm.chat, llm.stream_chat, llm.chat_ids):
            refused(lambda: call(messages, **further), n_chars)  # noqa: B023  (called at once)
    assert marked.take() == 0
    with pytest.raises(ff.RequestError, match=rf"tokens is longer than the context of {CTX}\b"):
        llm.chat([{"role": "user", "content": half}])
    assert marked.take() > len(half)


def test_b24_what_a_template_makes_too_long_is_not_encoded(llm: ff.LLM) -> None:
    """`encode_marked` and `encode` are the two ways on: neither is taken."""

    class Never:
        def encode(self, *_: Any, **__: Any) -> Any:
            raise AssertionError

    encoder = ChatEncoder(llm.tokenizer._inner)
    encoder._inner = Never()  # type: ignore[assignment]
    third = "<s>" * (MOST // 8)
    llm.tokenizer.__dict__["_chat"] = encoder
    try:
        refused(lambda: llm.chat([{"role": "user", "content": third, "twice": third}]), 3 * len(third) + len("null"))
    finally:
        del llm.tokenizer.__dict__["_chat"]


class Recorded:
    """A tokenizer of the library, and how it was asked."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, list[str]()

    def encode(self, text: str, **options: Any) -> Any:
        self.calls.append("encode")
        return self.inner.encode(text, **options)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.calls.append("encode_batch")
        return self.inner.encode_batch(texts, **options)


def test_other_threads_run_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    """The library lets go of the interpreter in `encode_batch` only."""
    KINDS["llama 3"].write(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    inner = tokenizer._inner
    recorded = tokenizer._inner = Recorded(inner)  # type: ignore[assignment]
    for n, way in ((LONG_CHARS, "encode"), (LONG_CHARS + 20, "encode_batch")):
        text = ("A word, and \u00e9 <|eot_id|> " * n)[:n]
        assert tokenizer.encode(text) == inner.encode(text).ids
        assert tokenizer.encode(text, False) == inner.encode(text, add_special_tokens=False).ids
        assert recorded.calls == [way] * 2  # type: ignore[attr-defined]
        recorded.calls.clear()  # type: ignore[attr-defined]
    encoder = ChatEncoder(inner)
    copy, stand_in, stand_in_id = encoder._without_specials
    again = Recorded(copy)
    encoder._inner = recorded
    encoder.__dict__["_without_specials"] = again, stand_in, stand_in_id
    for content, due in ((text, ["encode_batch"]), (text.replace("<|eot_id|>", "<|eot-id|>"), [])):
        ids = encoder.encode(
            ChatTemplate("{{ messages[0].content }}"),
            [{"role": "user", "content": content}],
            tools=None,
            add_generation_prompt=False,
            variables={},
        )
        assert inner.decode(ids, skip_special_tokens=False) == content
        assert (recorded.calls, again.calls) == (["encode_batch"], due)  # type: ignore[attr-defined]
        recorded.calls.clear()  # type: ignore[attr-defined]
        again.calls.clear()


# ---- odd texts

ODD = {"word": "a" * (1 << 20), "marks": "e" + "\u0301" * 10**6, "nul": "\0" * 100_000}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_b27_odd_texts_are_too_long_or_encoded_as_others(llm: ff.LLM, text: str, tmp_path: Path) -> None:
    refused(lambda: llm.generate(text), len(text))
    refused(lambda: llm.chat([{"role": "user", "content": text}]), len("rolecontentuser") + len(text))
    tokenizer = llm.tokenizer
    assert (
        b"".join(map(tokenizer.token_bytes, tokenizer.encode(text[:30], add_special_tokens=False)))
        == text[:30].encode()
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert ids[-1000:] == tokenizer.encode(text[-1000:], add_special_tokens=False)[-1000:]
    assert tokenizer.decode(ids) == text
    KINDS["qwen2"].write(tmp_path)  # composes characters, and has tokens of several
    ours, oracle = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    part = text[:100_000]
    ids = ours.encode(part)
    assert ids == oracle.encode(part)
    assert ours.decode(ids) == unicodedata.normalize("NFC", part)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\0\u0301", "e" + "\u0301" * 30, "a" * 80])
def test_b27_odd_texts_that_fit_are_prompts(llm: ff.LLM, text: str) -> None:
    ids = llm.generate(text, max_tokens=1).prompt_token_ids
    assert ids == llm.tokenizer.encode(text)
    assert llm.tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": text}]
    assert llm.tokenizer.decode(llm.chat(chat, max_tokens=1).prompt_token_ids) == f"{text}null"
