"""Requests over the CPU kernel: the same bits alone, mixed, cached and cut up; errors that leave the model usable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
from folders import VOCAB_SIZE, model_folder
from safetensors.numpy import save_file
from threads import joined, started

import flashformer as ff
from flashformer.backends.sampling import choose

PROMPT = "def f(x):"
DRAWN: dict[str, Any] = {"temperature": 1.2, "seed": 9, "logprobs": 3, "ignore_eos": True}
BAD_TOKEN = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: Any) -> ff.LLM:
    return ff.load(folder, **{"device": "cpu", "threads": 2} | options)


def facts(out: ff.Output) -> tuple[object, ...]:
    """All of an answer but its times and where its slot came from."""
    return out.text, out.token_ids, out.seed, out.finish_reason, out.stop, out.logprobs


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_cached_prefixes_do_not_change_a_bit(folder: Path, dtype: str, chunk: int) -> None:
    rng = np.random.default_rng(chunk)
    with load(folder, dtype=dtype, prompt_chunk=chunk) as llm, load(folder, dtype=dtype) as fresh:
        ids, cached = rng.integers(0, VOCAB_SIZE, 20).tolist(), []
        for keep in (0, 20, 5, 19, 1, 13):
            ids = ids[:keep] + rng.integers(0, VOCAB_SIZE, 30 - keep).tolist()
            out = llm.generate(ids, max_tokens=6, repeat_penalty=1.1, **DRAWN)
            fresh.forget()
            plain = fresh.generate(ids, max_tokens=6, repeat_penalty=1.1, **DRAWN)
            assert (out.cached_tokens, plain.cached_tokens) == (keep, 0)
            assert facts(out) == facts(plain)
            score = llm.score(ids[:25], ids[25:])
            fresh.forget()
            assert score == fresh.score(ids[:25], ids[25:])
            cached.append(out.cached_tokens)
        assert max(cached) == 20


def test_logprobs_and_scores_are_the_bits_of_the_logits(folder: Path) -> None:
    with load(folder) as llm:
        out = llm.generate(PROMPT, max_tokens=12, repeat_penalty=1.3, top_k=50, **DRAWN)
        ids = out.prompt_token_ids + out.token_ids
        wide = llm.logits(ids)[len(out.prompt_token_ids) - 1 : -1].astype(np.float64)
        shifted = wide - wide.max(-1, keepdims=True)
        expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        assert out.logprobs is not None
        found = [entry.logprob for entry in out.logprobs]
        assert found == expected[np.arange(12), out.token_ids].astype(np.float32).tolist()
        assert llm.score(PROMPT, out.token_ids).logprobs == found


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_tokens_are_those_of_the_definition(folder: Path, logprobs: int | None) -> None:
    """Every setting at once, against the definition of sampling, whether or not logits are wanted besides."""
    penalty, bias = 1.3, {3: 2.0, 77: -4.0, 201: 5.0}
    with load(folder) as llm:
        out = llm.generate(
            PROMPT,
            max_tokens=40,
            temperature=1.4,
            top_k=60,
            top_p=0.95,
            min_p=0.01,
            repeat_penalty=penalty,
            logit_bias=bias,
            seed=5,
            logprobs=logprobs,
            ignore_eos=True,
        )
        ids = list(out.prompt_token_ids)
        logits = llm.logits(ids + out.token_ids)[len(ids) - 1 :]
        rows = llm.kernel.rows
        rows.temperature[0], rows.top_k[0], rows.top_p[0], rows.min_p[0] = 1.4, 60, 0.95, 0.01
        rows.seed[0], rows.choice[0], rows.adjust_begin[0] = 5, 0, 0
        for token, row in zip(out.token_ids, logits, strict=False):
            adjusted = sorted(set(ids) | set(bias))
            n = rows.adjust_end[0] = len(adjusted)
            rows.pos[0] = len(ids) - 1
            rows.adjust_token[:n] = adjusted
            rows.adjust_penalty[:n] = [penalty if i in ids else 1 for i in adjusted]
            rows.adjust_bias[:n] = [bias.get(i, 0) for i in adjusted]
            assert token == choose(rows, 0, row)
            ids.append(token)
    assert len(set(out.token_ids)) > 15
    assert 201 in out.token_ids[:-1]  # penalized and biased from then on


def test_b38_the_same_request_a_thousand_times_alone_and_mixed(folder: Path) -> None:
    asked = {"max_tokens": 5, "top_p": 0.95, "repeat_penalty": 1.1} | DRAWN
    others: list[dict[str, Any]] = [
        {"prompt": "another", "max_tokens": 3},
        {"prompt": [5] * 30, "max_tokens": 2, "temperature": 0.7, "logit_bias": {5: 3.0}},
        {"prompt": PROMPT + " return", "max_tokens": 4, "logprobs": 1, "repeat_penalty": 1.5},
    ]
    with load(folder, streams=3, threads=1, prompt_chunk=4) as llm:
        expected = facts(llm.generate(PROMPT, **asked))
        assert [facts(llm.generate(PROMPT, **asked)) for _ in range(500)] == [expected] * 500
        found: list[tuple[object, ...]] = []
        done = [False]

        def same() -> None:
            for i in range(125):
                found.append(facts(llm.generate(PROMPT, **asked | {"stop": None if i % 2 else ["\0\0never"]})))

        def other(seed: int) -> None:
            rng = np.random.default_rng(seed)
            while not done[0]:
                stream = llm.stream(**others[rng.integers(len(others))])
                for piece in stream:
                    if piece.token_id is not None and rng.random() < 0.2:
                        break
                stream.close()

        mixing = started(lambda: other(1), lambda: other(2))
        joined(started(same, same, same, same))
        done[0] = True
        joined(mixing)
    assert found == [expected] * 500


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sound until it meets BAD_TOKEN, whose embedding is too large to be normed."""
    folder = model_folder(tmp_path_factory.mktemp("bad"), tie_word_embeddings=False)
    tensors = folders.random_weights(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.embed_tokens.weight"][BAD_TOKEN] = 1e30
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


@pytest.fixture(params=["cpu", "reference"])
def fragile(overflowing: Path, request: pytest.FixtureRequest) -> Iterator[ff.LLM]:
    with load(overflowing, device=request.param, prompt_chunk=4) as llm:
        yield llm


def test_b36_numbers_that_are_not_finite_are_an_error_with_a_layer(fragile: ff.LLM) -> None:
    expected = fragile.generate(PROMPT, max_tokens=5, ignore_eos=True)
    calls = (
        fragile.generate,
        fragile.logits,
        lambda ids: fragile.score([3], ids),
        lambda ids: list(fragile.stream(ids)),
    )
    for call in calls:
        with pytest.raises(ff.NumericalError, match="NaN or Inf") as raised:
            call([*expected.prompt_token_ids, BAD_TOKEN, 3])
        assert raised.value.layer == -1
        after = fragile.generate(PROMPT, max_tokens=5, ignore_eos=True)
        assert (after.token_ids, after.cached_tokens) == (expected.token_ids, 0)  # the slot held nothing any more


def test_b36_in_the_middle_of_an_answer_no_token_is_made_of_it(fragile: ff.LLM) -> None:
    stream = fragile.stream(PROMPT, max_tokens=5, logit_bias={BAD_TOKEN: 100.0}, logprobs=2)
    assert next(stream).token_id == BAD_TOKEN
    with pytest.raises(ff.NumericalError):
        next(stream)
    assert list(stream) == []
    assert stream.output.token_ids == [BAD_TOKEN]
    assert len(fragile.generate(PROMPT, max_tokens=5, ignore_eos=True).token_ids) == 5


def test_b36_logits_that_are_not_finite(overflowing: Path, tmp_path: Path) -> None:
    tensors = folders.random_weights(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][5] = 3e38
    bad = model_folder(tmp_path / "logits", tie_word_embeddings=False)
    save_file(tensors, str(bad / "model.safetensors"))
    for device in ("cpu", "reference"):
        with load(bad, device=device) as llm:
            for settings in ({}, DRAWN, {"temperature": 1.0, "top_k": 3}, {"repeat_penalty": 2.0}):
                with pytest.raises(ff.NumericalError) as raised:
                    llm.generate(PROMPT, max_tokens=3, **settings)
                assert raised.value.layer == llm.spec.n_layers
