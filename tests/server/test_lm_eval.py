"""lm-evaluation-harness over HTTP gives what it gives over the engine in its own process, request by request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import ASKED, CHOICES, CTX, QUESTIONS, SETTINGS, evaluated, harness_folder, responses, task_folder
from serving import NAME, load, running

import flashformer as ff
import flashformer.compat.lm_eval  # makes its model known to the harness

KEY = "sk-harness"
WAYS: dict[str, dict[str, Any]] = {
    "ids": {},
    "texts": {"tokenized_requests": False},
    "lists of texts": {"tokenized_requests": False, "batch_size": 3},
    "lists of ids, several at once": {"num_concurrent": 4, "batch_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No BOS by the tokenizer's rule: over HTTP the harness adds none to ids, and the server would to texts."""
    return harness_folder(tmp_path_factory.mktemp("model"), add_bos=False)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[ff.LLM]:
    with load(folder) as loaded:
        assert loaded.setup.target.ctx == CTX
        yield loaded


@pytest.fixture(scope="module")
def tasks(llm: ff.LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer choices, the likeliest among them, no more stop strings than a request may have, and nothing to cut."""
    prompts = [(llm.tokenizer.encode(text) or [llm.spec.bos_id or 0])[-CTX + 2 :] for text in QUESTIONS]
    likeliest = {llm.generate(prompt, max_tokens=1).text for prompt in prompts}
    settings = {name: dict(task) for name, task in SETTINGS.items()}
    settings["choice"]["doc_to_choice"] = sorted({*CHOICES[::9], *likeliest & set(CHOICES)})
    settings["answer"]["generation_kwargs"] = {"until": ["\n", "never", "7"], "max_gen_toks": 24}
    asked = {**ASKED, "answer": [text for text in ASKED["answer"] if len(text) < 40]}
    return task_folder(tmp_path_factory.mktemp("tasks"), settings, asked)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def expected(folder: Path, tasks: Path, cache: Path) -> dict[str, Any]:
    """With a context of two less: over HTTP one position is left for a new token, and the last one is read, too."""
    return evaluated(
        "flashformer", tasks, cache, pretrained=str(folder), dtype="float32", threads=1, max_length=CTX - 2
    )


@pytest.fixture(scope="module")
def url(llm: ff.LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(llm, tmp_path_factory.mktemp("at"), api_key=KEY) as here:
        yield f"{here.url}/v1/completions"


@pytest.mark.parametrize("way", WAYS)
def test_the_harness_finds_the_same(
    url: str,
    folder: Path,
    tasks: Path,
    cache: Path,
    expected: dict[str, Any],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = evaluated(
        "local-completions", tasks, cache,
        model=NAME, tokenizer=str(folder), base_url=url, max_length=CTX, max_retries=1, **WAYS[way],
    )  # fmt: skip
    for task in ("choice", "words"):
        totals, greedy = zip(*responses(found, task), strict=True)
        expected_totals, expected_greedy = zip(*responses(expected, task), strict=True)
        assert totals == pytest.approx(expected_totals, abs=1e-5)
        assert greedy == expected_greedy
    assert responses(found, "rolling") == pytest.approx(responses(expected, "rolling"), abs=1e-4)
    assert responses(found, "answer") == responses(expected, "answer")
    for task, metrics in expected["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers
        assert {name: found["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


def test_what_is_expected_has_all_that_can_differ(expected: dict[str, Any]) -> None:
    choices, rolling, answers = (responses(expected, task) for task in ("choice", "rolling", "answer"))
    assert {greedy for _, greedy in choices} == {False, True}
    assert len({round(total, 3) for total, _ in choices}) > len(choices) // 2
    assert len(set(rolling)) == len(rolling) == len(ASKED["rolling"])
    assert len(set(answers)) > 3
