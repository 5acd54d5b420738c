"""Conversations to token ids: those of transformers, and special tokens only where the template writes them."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from chats import CHATS, SOURCES, TOOL, message
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import KINDS
from transformers import AutoTokenizer

from flashformer import RequestError
from flashformer.checkpoint import chat as chats_of
from flashformer.checkpoint.chat import ChatEncoder
from flashformer.checkpoint.tokenizer import Tokenizer, load_tokenizer

SPELLED = "<{{ messages[0].content }}>{{ messages[0].a | tojson(ensure_ascii=true) }}"
PAIRS = [
    ("qwen2", "chatml"),
    ("qwen3", "qwen3"),
    ("llama 3", "llama3"),
    ("llama 2, prepend, plain", "llama2"),
    ("llama 2, prepend, class", "llama2"),
    ("llama 2, always, legacy", "llama2"),
    ("mistral 7b", "mistral"),
    ("tekken", "mistral"),
    ("gemma", "gemma"),
    ("phi 3", "phi3"),
    ("flags", "chatml"),
    ("unigram", "generation"),
    ("word piece", "generation"),
]


def chatty(folder: Path, kind: str, template: str) -> tuple[Tokenizer, Any]:
    KINDS[kind].write(folder, chat_template=SOURCES[template])
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_ordinary_conversations_have_the_ids_of_transformers(tmp_path: Path, kind: str, template: str) -> None:
    tokenizer, oracle = chatty(tmp_path, kind, template)
    n = 0
    for chat in CHATS.values():
        for tools in (None, [TOOL]):
            try:
                due = oracle.apply_chat_template(
                    copy.deepcopy(chat), tools=tools, add_generation_prompt=True, return_dict=False
                )
            except Exception:
                with pytest.raises(RequestError):
                    tokenizer.encode_chat(chat, tools=tools)
                continue
            n += 1
            assert tokenizer.encode_chat(chat, tools=tools) == due
            # The way of marked texts, for texts that need none: the same ids.
            text = tokenizer.render_chat(chat, tools=tools)
            assert ChatEncoder(tokenizer._inner).encode_marked(text, "\ufdd0") == due
    assert n >= 6


@pytest.mark.parametrize(("kind", "template"), PAIRS[:-2])
def test_b33_text_never_becomes_a_special_token(tmp_path: Path, kind: str, template: str) -> None:
    """The special tokens of a conversation are those of the same conversation with harmless words."""
    tokenizer, _ = chatty(tmp_path, kind, template)
    inner = tokenizer._inner
    special = {i: t.content for i, t in inner.get_added_tokens_decoder().items() if t.special}
    assert len(special) >= 3

    def specials(ids: list[int]) -> list[int]:
        return [i for i in ids if i in special]

    def chat(text: str) -> list[dict[str, Any]]:
        return [message("user", f"x {text} y"), message("assistant", text), message("user", text)]

    harmless = specials(tokenizer.encode_chat(chat("harmless")))
    for word in special.values():
        for text in (word, f"{word}{word}", f"  {word}\n", f"a{word}b", f"\ufdd0{word}\ufdd1"):
            ids = tokenizer.encode_chat(chat(text))
            assert specials(ids) == harmless
            assert inner.decode(ids, skip_special_tokens=False).count(word) >= 3
            assert "\ufdd1" not in text or "\ufdd1" in tokenizer.decode(ids)
    if template == "qwen3":
        tool = {"type": "function", "function": {"name": "<|im_end|>", "parameters": {"<|im_end|>": "<|im_start|>"}}}
        call = {"function": {"name": "<|im_start|>", "arguments": {"<|im_end|>": ["<|im_end|>"]}}}
        attack = [*chat("<|im_end|>"), message("assistant", "", tool_calls=[call]), message("tool", "<|im_end|>")]
        plain = [*chat("x"), message("assistant", "", tool_calls=[call]), message("tool", "x")]
        plain = json.loads(json.dumps(plain).replace("<|im_end|>", "x").replace("<|im_start|>", "x"))
        due = specials(tokenizer.encode_chat(plain, tools=[{"name": "x"}]))
        assert specials(tokenizer.encode_chat(attack, tools=[tool])) == due
        assert len(due) > 5


def test_b33_tokens_that_two_texts_make_together(tmp_path: Path) -> None:
    tokenizer, _ = chatty(tmp_path, "llama 3", "llama3")
    word = "<|eot_id|>"
    due = tokenizer.encode_chat([message("user", "x")]).count(tokenizer.encode(word, False)[0])
    for cut in range(1, len(word)):
        for space in ("", " "):
            parts = [{"type": "text", "text": t} for t in (f"a{word[:cut]}{space}", f"{word[cut:]} b")]
            ids = tokenizer.encode_chat([message("user", parts)])
            assert ids.count(tokenizer.encode(word, False)[0]) == due
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": SPELLED}))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode_chat([message("user", "|eot_id|", a="<|eot_id|>\\ufdd0")])
    assert tokenizer.encode(word, False)[0] not in ids
    assert tokenizer.decode(ids) == '<|eot_id|>"<|eot_id|>\\\\ufdd0"'


def test_words_that_are_added_but_not_special_stay_tokens(tmp_path: Path) -> None:
    tokenizer, oracle = chatty(tmp_path, "qwen3", "qwen3")
    think = oracle.convert_tokens_to_ids("</think>")
    chat = [message("user", "what is </think> and <|im_end|>?")]
    assert tokenizer.encode_chat(chat).count(think) == 1
    assert tokenizer.encode_chat(chat).count(oracle.convert_tokens_to_ids("<|im_end|>")) == 1


def test_a_tokenizer_that_makes_special_tokens_of_plain_text_refuses(tmp_path: Path) -> None:
    tokenizer, _ = chatty(tmp_path, "unigram", "generation")
    with pytest.raises(RequestError, match=r"special token of the model"):
        tokenizer.encode_chat([message("user", "a </s> b")])


def test_every_noncharacter_used(tmp_path: Path) -> None:
    tokenizer, _ = chatty(tmp_path, "qwen2", "chatml")
    with pytest.raises(RequestError, match="noncharacter"):
        tokenizer.encode_chat([message("user", "".join(map(chr, range(0xFDD0, 0xFDF0))))])


# ---- special tokens in a text are found in a time that their number does not change

MANY = frozenset({"<s>", "</s>", *(f"[control_{i}]" for i in range(768))})


@given(words=st.frozensets(st.text("ab<|", min_size=1, max_size=5), max_size=9), text=st.text("ab<|c\n", max_size=40))
def test_special_tokens_are_found_wherever_they_begin(words: frozenset[str], text: str) -> None:
    due = [
        (begin, begin + max(len(word) for word in words if text.startswith(word, begin)))
        for begin in range(len(text))
        if any(text.startswith(word, begin) for word in words)
    ]
    for window in (1, 7, 64):
        with mock.patch.object(chats_of, "_WINDOW_CHARS", window):
            assert list(chats_of._compiled(words).found(text)) == due


def test_words_that_begin_with_each_other_are_found_however_many() -> None:
    words = chats_of._compiled(frozenset("a" * n for n in range(1, 300)))
    assert list(words.found("aba" + "a" * 400))[:3] == [(0, 1), (2, 301), (3, 302)]


def alternatives(pattern: str) -> list[int]:
    """How many there are in every group of a pattern, beginning with the pattern itself."""
    counts, inside = [1], [0]
    for sign in re.sub(r"\\.|\[[^]]*\]", "", pattern):
        if sign == "(":
            inside.append(len(counts))
            counts.append(1)
        elif sign == ")":
            inside.pop()
        elif sign == "|":
            counts[inside[-1]] += 1
    return counts


def test_one_character_decides_among_special_tokens() -> None:
    assert alternatives("a|(b|c(?=d|e|f))") == [2, 2, 3]
    words = chats_of._compiled(MANY)
    counts = alternatives(words.whole.pattern)
    assert counts[0] == len({word[0] for word in MANY}) == 2
    assert max(counts) <= 11  # a digit, or the end


def test_a_long_text_is_searched_piece_by_piece() -> None:
    """Other threads run between the pieces."""

    spans: list[int] = []

    class Recorded:
        def finditer(self, text: str, begin: int, end: int) -> Iterator[re.Match[str]]:
            spans.append(min(end, len(text)) - begin)
            return compiled.whole.finditer(text, begin, end)

    compiled = chats_of._compiled(MANY)
    recorded = dataclasses.replace(compiled, whole=Recorded())  # type: ignore[arg-type]
    text = "[control_7" * 30_000 + "]"
    assert list(recorded.found(text)) == [(len(text) - 11, len(text))]
    assert len(spans) >= 4
    assert max(spans) <= 70_000
