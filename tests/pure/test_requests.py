"""What a request may ask and what it may not, over the reference backend.

Its last bits depend on how many rows are computed together; exact ones are in tests/backend/test_requests.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
from folders import BOS, VOCAB_SIZE, model_folder

import flashformer as ff
from flashformer.backends.base import Want
from flashformer.engine.request import LIMITS, SamplingArguments

CTX = folders.CONFIG["max_position_embeddings"]
PROMPT = "def f(x):"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and loop.length == 1 %}{{ raise_exception('only a system') }}"
    "{% endif %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% if add_generation_prompt %}{{ opening | default('assistant:') }}{% endif %}"
)
USER = {"role": "user", "content": "hi"}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_folder(tmp_path_factory.mktemp("model"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": TEMPLATE}))
    return folder


def load(folder: Path, **options: Any) -> ff.LLM:
    return ff.load(folder, device="reference", threads=2, **options)


@pytest.fixture(scope="module")
def llm(folder: Path):
    with load(folder, streams=2) as loaded:
        yield loaded


def encoded(text: str) -> list[int]:
    return folders.byte_tokenizer().encode(text).ids


# ---- prompts ------------------------------------------------------------------------------------------


def test_b23_empty_text_is_bos_or_an_error(llm: ff.LLM, tmp_path: Path) -> None:
    assert llm.generate("", max_tokens=2).prompt_token_ids == [BOS]
    with load(model_folder(tmp_path / "bos", add_bos=False)) as no_rule:
        assert no_rule.generate("", max_tokens=2).prompt_token_ids == [BOS]
    none = model_folder(tmp_path / "none", add_bos=False)
    config = json.loads((none / "config.json").read_text())
    (none / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
    with load(none) as no_bos:
        for call in (no_bos.generate, no_bos.logits, lambda prompt: no_bos.score(prompt, "a")):
            with pytest.raises(ff.RequestError, match="BOS"):
                call("")
        assert len(no_bos.generate(" \n\t", max_tokens=2).prompt_token_ids) == 3


def test_b23_whitespace_is_text(llm: ff.LLM) -> None:
    assert llm.generate(" \n\t\u3000", max_tokens=2).prompt_token_ids == encoded(" \n\t\u3000")


def test_b23_conversations_without_a_question(llm: ff.LLM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ff.RequestError, match="messages: empty"):
        llm.chat([])
    with pytest.raises(ff.RequestError, match="only a system"):
        llm.chat([{"role": "system", "content": "be brief"}])
    empty = llm.chat([{"role": "user", "content": ""}, {"role": "user", "content": " "}], max_tokens=2)
    assert empty.prompt_token_ids[1:] == [*encoded("user: \n")[1:], BOS, *encoded("user:  \nassistant:")[1:]]
    with pytest.raises(ff.RequestError, match="chat template"), load(model_folder(tmp_path)) as plain:
        plain.chat([USER])
    silent = model_folder(tmp_path / "silent")
    (silent / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{# nothing #}"}))
    with load(silent) as nothing, pytest.raises(ff.RequestError, match="no text"):
        nothing.chat([USER])


def test_b24_prompt_longer_than_the_context_names_both_numbers(llm: ff.LLM) -> None:
    for call in (llm.generate, llm.logits):
        with pytest.raises(ff.RequestError, match=rf"\b{CTX + 1}\b.*\b{CTX}\b"):
            call([3] * (CTX + 1))
        with pytest.raises(ff.RequestError, match=rf"\b{CTX + 10}\b.*\b{CTX}\b"):
            call("x" * (CTX + 9))
    with pytest.raises(ff.RequestError, match=rf"\b{CTX + 2}\b.*\b{CTX}\b"):
        llm.score([3] * CTX, [3, 3])
    with pytest.raises(ff.RequestError, match=rf"\b\d{{3}}\b.*\b{CTX}\b"):
        llm.chat([{"role": "user", "content": "x" * CTX}])
    with pytest.raises(ff.RequestError, match="no room"):
        llm.generate([3] * CTX)
    assert llm.logits([3] * CTX).shape == (CTX, VOCAB_SIZE)


def test_b25_prompt_and_new_tokens_beyond_the_context_are_clamped(llm: ff.LLM) -> None:
    out = llm.generate([3] * (CTX - 4), max_tokens=50, ignore_eos=True)
    assert (len(out.token_ids), out.finish_reason) == (4, "length")
    penalized = llm.generate([3] * (CTX - 4), max_tokens=50, repeat_penalty=1.1, ignore_eos=True)
    assert len(penalized.token_ids) == 4


BAD_IDS = [[True], [1.0], [2**40], [-1], [VOCAB_SIZE], [1, None], ["a", 1], [np.float32(1)], np.ones((2, 2), int)]


@pytest.mark.parametrize("ids", BAD_IDS, ids=repr)
def test_b26_token_ids_that_are_none(llm: ff.LLM, ids: Any) -> None:
    scores = (lambda ids: llm.score(ids, [3]), lambda ids: llm.score([3], ids))
    for call in (llm.generate, llm.stream, llm.logits, *scores):
        with pytest.raises(ff.RequestError):
            call(ids)


@pytest.mark.parametrize("prompt", [None, 5, [], (), {"a": 1}, b"bytes", "\ud800", [[]], [["a"]]], ids=repr)
def test_prompts_of_no_kind_are_refused(llm: ff.LLM, prompt: Any) -> None:
    for call in (llm.generate, lambda prompt: llm.score(prompt, "a"), lambda prompt: llm.score("a", prompt)):
        with pytest.raises(ff.RequestError):
            call(prompt)


def test_text_is_refused_above_its_limit(llm: ff.LLM) -> None:
    with pytest.raises(ff.RequestError, match=str(LIMITS.prompt_chars)):
        llm.generate("x" * (LIMITS.prompt_chars + 1))


# ---- settings -----------------------------------------------------------------------------------------

BAD_SETTINGS: list[dict[str, Any]] = [
    *({"max_tokens": v} for v in (0, -1, 2**40, 1 << 20_000, 1.5, True)),
    *({"temperature": v} for v in (NAN, INF, -1, 1e9, 1e-30, "1", True)),
    *({"top_k": v} for v in (-5, VOCAB_SIZE + 1, 2**40, 1.0, True)),
    *({"top_p": v} for v in (0, -1, 2, NAN, 1e-30, "1", True)),
    *({"min_p": v} for v in (-0.1, 2, NAN, True)),
    *({"repeat_penalty": v} for v in (0, -1, NAN, INF, 1e9, 1 << 20_000, 0.01)),
    *({"seed": v} for v in (-1, 2**64, 1.0)),
    *({"stop": v} for v in ("", ["a", ""], ["a"] * 5, ["x"] * 500_000, "x" * 257, "x" * (1 << 20), 5, [5], "\ud800")),
    *({"logprobs": v} for v in (-1, 21, VOCAB_SIZE, 1.0, True)),
    *({"logit_bias": v} for v in ([1], {VOCAB_SIZE: 1}, {-1: 1}, {"1": 1}, {1.0: 1}, {True: 1}, {1: None})),
    *({"logit_bias": {1: v}} for v in (NAN, INF, 101, -100.5, "1", True)),
    {"logit_bias": dict.fromkeys(range(100_000), 1)},
    *({"ignore_eos": v} for v in (1, None, "yes")),
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=lambda s: next(iter(s)))
def test_b28_b29_b30_settings_out_of_range_are_refused(llm: ff.LLM, settings: dict[str, Any]) -> None:
    for call in (llm.generate, llm.stream, lambda prompt, **given: llm.chat([USER], **given)):
        with pytest.raises(ff.RequestError, match=next(iter(settings))) as refused:
            call("a", **settings)
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["top_q", "stops", "speculate", "max_token", "n"])
def test_unknown_arguments_are_errors(llm: ff.LLM, name: str) -> None:
    for call in (llm.generate, llm.stream, lambda prompt, **given: llm.chat([USER], **given)):
        with pytest.raises(TypeError, match=name):
            call("a", **{name: 1})


def test_keyword_arguments_are_the_fields_of_the_settings() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(ff.SamplingSettings)}
    assert fields == {name: hint.__forward_arg__ for name, hint in SamplingArguments.__annotations__.items()}


EXTREMES: list[dict[str, Any]] = [
    {"temperature": LIMITS.temperature[0]},
    {"temperature": LIMITS.temperature[1]},
    {"temperature": LIMITS.temperature[0], "repeat_penalty": 0.1, "logit_bias": {5: 100, 6: -100}},
    {"temperature": 1, "top_p": LIMITS.top_p[0], "min_p": 1, "top_k": 1},
    {"temperature": 100.0, "top_p": 1.0, "min_p": 0, "top_k": VOCAB_SIZE},
    {"repeat_penalty": 10.0},
    {"temperature": 1, "min_p": 1.0},
]


@pytest.mark.parametrize("settings", EXTREMES, ids=repr)
def test_b30_extremes_in_range_give_tokens(llm: ff.LLM, settings: dict[str, Any]) -> None:
    out = llm.generate(PROMPT, max_tokens=6, seed=3, logprobs=2, ignore_eos=True, **settings)
    assert len(out.token_ids) == 6
    assert out.logprobs is not None
    assert np.isfinite([entry.logprob for entry in out.logprobs]).all()


def test_b30_one_candidate_left_is_the_greedy_one(llm: ff.LLM) -> None:
    greedy = llm.generate(PROMPT, max_tokens=8, ignore_eos=True).token_ids
    for only in ({"top_k": 1}, {"top_p": LIMITS.top_p[0]}, {"min_p": 1.0}, {"temperature": LIMITS.temperature[0]}):
        out = llm.generate(PROMPT, max_tokens=8, seed=3, ignore_eos=True, **{"temperature": 1.0} | only)
        assert out.token_ids == greedy, only


def test_logit_bias_is_added(llm: ff.LLM) -> None:
    forced = llm.generate(PROMPT, max_tokens=5, logit_bias={77: 100}, ignore_eos=True)
    assert forced.token_ids == [77] * 5
    greedy = llm.generate(PROMPT, max_tokens=1, ignore_eos=True).token_ids[0]
    logits = llm.logits(PROMPT)[-1]
    second = int(np.argsort(-logits)[1])
    assert llm.generate(PROMPT, max_tokens=1, logit_bias={greedy: -100}, ignore_eos=True).token_ids == [second]
    gap = float(logits[greedy] - logits[second])
    for part, expected in ((0.9, greedy), (1.1, second)):
        out = llm.generate(PROMPT, max_tokens=1, logit_bias={second: part * gap}, ignore_eos=True)
        assert out.token_ids == [expected]


def test_penalty_and_bias_of_the_same_token(llm: ff.LLM) -> None:
    """Penalty first, then the bias, from the definition in float64."""
    bias, penalty = {2: 1.5, 77: 3.0, encoded(PROMPT)[3]: -2.0}, 1.4
    out = llm.generate(PROMPT, max_tokens=10, repeat_penalty=penalty, logit_bias=bias, ignore_eos=True)
    ids = list(out.prompt_token_ids)
    for token in out.token_ids:
        scores = llm.logits(ids)[-1].astype(np.float64)
        for seen in set(ids):
            scores[seen] = scores[seen] / penalty if scores[seen] > 0 else scores[seen] * penalty
        for biased, value in bias.items():
            scores[biased] += value
        assert token == scores.argmax()
        ids.append(token)


def test_b37_bias_against_every_token_changes_nothing(tmp_path: Path) -> None:
    with load(model_folder(tmp_path / "tiny")) as llm:
        all_off = dict.fromkeys(range(VOCAB_SIZE), -100.0)
        greedy = llm.generate(PROMPT, max_tokens=8, ignore_eos=True)
        out = llm.generate(PROMPT, max_tokens=8, ignore_eos=True, logit_bias=all_off, logprobs=1)
        assert out.token_ids == greedy.token_ids
        for settings in ({"temperature": 1.0, "top_k": 5}, {"temperature": 100.0}, {"repeat_penalty": 10.0}):
            drawn = llm.generate(PROMPT, max_tokens=8, seed=2, logit_bias=all_off, ignore_eos=True, **settings)
            assert len(drawn.token_ids) == 8
            assert all(0 <= token < VOCAB_SIZE for token in drawn.token_ids)


# ---- log probabilities --------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 4, "repeat_penalty": 1.2, "top_k": 40}], ids=str)
def test_logprobs_are_of_the_model_itself(llm: ff.LLM, settings: dict[str, Any]) -> None:
    out = llm.generate(PROMPT, max_tokens=8, logprobs=5, ignore_eos=True, **settings)
    stream = llm.stream(PROMPT, max_tokens=8, logprobs=5, ignore_eos=True, **settings)
    assert [piece.logprobs for piece in stream if piece.token_id is not None] == out.logprobs
    without = llm.generate(PROMPT, max_tokens=8, ignore_eos=True, **settings)
    assert (without.token_ids, without.logprobs) == (out.token_ids, None)
    all_ids = out.prompt_token_ids + out.token_ids
    expected = log_softmax(llm.logits(all_ids[:-1]))[len(out.prompt_token_ids) - 1 :]
    assert out.logprobs is not None
    for entry, token, row in zip(out.logprobs, out.token_ids, expected, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        order = np.lexsort((np.arange(VOCAB_SIZE), -row))[:5]
        assert [i for i, _ in entry.top] == order.tolist()
        assert [value for _, value in entry.top] == pytest.approx(row[order].tolist(), abs=1e-4)


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_logits_are_stored_only_for_logprobs(llm: ff.LLM, logprobs: int | None) -> None:
    forward, wants = llm.kernel.forward, list[list[int]]()

    def watched(n_rows: int, again: tuple[int, ...] | None = None) -> None:
        wants.append(llm.kernel.rows.want[:n_rows].tolist())
        forward(n_rows, again)

    llm.forget()
    llm.kernel.forward = watched  # type: ignore[method-assign]
    try:
        llm.generate([5, 6, 7], max_tokens=3, logprobs=logprobs, ignore_eos=True)
    finally:
        del llm.kernel.forward
    want = Want.TOKEN if logprobs is None else Want.LOGITS
    assert wants == [[Want.NOTHING, Want.NOTHING, want], [want], [want]]


def test_logprobs_zero_is_of_the_chosen_token_alone(llm: ff.LLM) -> None:
    out = llm.generate(PROMPT, max_tokens=3, logprobs=0, ignore_eos=True)
    assert out.logprobs is not None
    assert [(entry.token_id, entry.top) for entry in out.logprobs] == [(token, []) for token in out.token_ids]


# ---- scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 64])
def test_score_is_the_log_softmax_of_the_logits(folder: Path, chunk: int) -> None:
    rng = np.random.default_rng(2)
    with load(folder, prompt_chunk=chunk) as llm:
        for n_prompt, n_rest in ((1, 1), (1, 40), (30, 17), (CTX - 5, 6)):
            ids = rng.integers(0, VOCAB_SIZE, n_prompt + n_rest).tolist()
            ids[-1] = int(llm.logits(ids[:-1])[-1].argmax())
            score = llm.score(ids[:n_prompt], ids[n_prompt:])
            logits = llm.logits(ids[:-1])[n_prompt - 1 :]
            expected = log_softmax(logits)[np.arange(n_rest), ids[n_prompt:]]
            assert score.token_ids == ids[n_prompt:]
            assert score.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
            assert score.is_greedy == [bool(row.argmax() == i) for row, i in zip(logits, ids[n_prompt:], strict=True)]
            assert score.is_greedy[-1]
            assert score.total == pytest.approx(expected.sum(), abs=1e-4)


def test_score_of_texts(llm: ff.LLM) -> None:
    by_ids = llm.score(encoded("a cat"), encoded(" sat")[1:])
    assert llm.score("a cat", " sat") == llm.score("a cat ", "sat") == by_ids  # space goes to the continuation
    assert llm.score(encoded("a cat"), " sat") == llm.score("a cat", encoded(" sat")[1:]) == by_ids
    assert llm.score("", "sat") == llm.score([BOS], encoded("sat")[1:])
    with pytest.raises(ff.RequestError, match="no token"):
        llm.score("a cat", "")


# ---- chats --------------------------------------------------------------------------------------------


def test_chat_answers_what_the_template_makes(llm: ff.LLM) -> None:
    messages = [{"role": "system", "content": "brief"}, USER]
    ids = llm.tokenizer.encode_chat(messages)
    out = llm.chat(messages, max_tokens=6, ignore_eos=True)
    assert out.prompt_token_ids == ids == llm.chat_ids(messages)
    assert out.token_ids == llm.generate(ids, max_tokens=6, ignore_eos=True).token_ids
    stream = llm.stream_chat(messages, max_tokens=6, ignore_eos=True)
    assert "".join(piece.text for piece in stream) == out.text == stream.output.text
    with_tools = llm.chat(messages, tools=[{"name": "f"}], template_variables={"opening": "bot:"}, max_tokens=1)
    assert with_tools.prompt_token_ids == ids[: -len("assistant:")] + encoded("[1 tools]bot:")[1:]


BAD_CHATS: list[tuple[Any, dict[str, Any]]] = [
    ("hi", {}),
    ([5], {}),
    ([{"content": "x"}], {}),
    ([USER] * (LIMITS.messages + 1), {}),
    ([USER], {"tools": "f"}),
    ([USER], {"template_variables": [1]}),
    ([USER], {"template_variables": {"messages": "x"}}),
    ([USER], {"template_variables": {"add_generation_prompt": False}}),
    ([USER], {"template_variables": {"x": [1]}}),
    ([USER], {"template_variables": {5: 1}}),
    ([USER], {"template_variables": {f"x{i}": i for i in range(17)}}),
]


@pytest.mark.parametrize(("messages", "given"), BAD_CHATS, ids=lambda v: repr(v)[:50])
def test_bad_chats_are_refused(llm: ff.LLM, messages: Any, given: dict[str, Any]) -> None:
    for call in (llm.chat, llm.stream_chat, llm.chat_ids):
        with pytest.raises(ff.RequestError):
            call(messages, **given)
