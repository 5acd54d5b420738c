"""lm-evaluation-harness over flashformer gives the numbers that it gives over transformers, request by request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import CTX, SETTINGS, TEXTS, evaluated, harness_folder, responses, task_folder

import flashformer as ff
from flashformer.compat.lm_eval import HarnessModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_folder(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def both(folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cache, model = tmp_path_factory.mktemp("datasets"), str(folder)
    return [
        evaluated("hf", tasks, cache, pretrained=model, dtype="float32", device="cpu", max_length=CTX),
        evaluated("flashformer", tasks, cache, pretrained=model, dtype="float32", threads=1),
    ]


@pytest.mark.parametrize("task", ["choice", "words"])
def test_log_probabilities_of_continuations_are_those_of_transformers(both: list[dict[str, Any]], task: str) -> None:
    expected, found = (responses(each, task) for each in both)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(total, 3) for total, _ in expected}) > len(expected) // 2
    if task == "choice":
        assert {greedy for _, greedy in expected} == {False, True}


def test_log_probabilities_of_texts_longer_than_the_context_are_those_of_transformers(
    both: list[dict[str, Any]],
) -> None:
    expected, found = (responses(each, "rolling") for each in both)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-4)
    assert len(set(expected)) == len(TEXTS)
    assert max(map(len, TEXTS)) > 2 * CTX


def test_generated_texts_are_those_of_transformers(both: list[dict[str, Any]]) -> None:
    expected, found = (responses(each, "answer") for each in both)
    assert found == expected
    assert len(set(expected)) > 3
    assert len({len(text) for text in expected}) > 1, "no stop string was met"


def test_metrics_are_those_of_transformers(both: list[dict[str, Any]]) -> None:
    expected, found = (each["results"] for each in both)
    assert set(found) == set(SETTINGS)
    for task, metrics in expected.items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers
        assert {name: found[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


def test_the_harness_command_line_knows_the_model(folder: Path, tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flashformer.compat.lm_eval", "--model", "flashformer"]
    arguments = ["--model_args", f"pretrained={folder},dtype=float32,threads=1", "--tasks", "words"]
    output = ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--limit", "3"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, *arguments, *output], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|words|" in done.stdout
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["words"]["sample_len"] == 3


def test_the_entry_point_names_the_class() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert list(groups["lm_eval.models"]) == ["flashformer"]
    assert EntryPoint("flashformer", groups["lm_eval.models"]["flashformer"], "lm_eval.models").load() is HarnessModel


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[HarnessModel]:
    made = HarnessModel(str(folder), max_length=40, max_gen_toks=8, threads=1, batch_size="auto")
    yield made
    made.llm.close()


class Asked:
    """As the harness hands over a request."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def test_sampling_settings_of_a_task_are_passed_on(model: HarnessModel) -> None:
    def sampled(**settings: Any) -> str:
        [text] = model.generate_until([Asked("def f", {"until": [], "do_sample": True, **settings})], disable_tqdm=True)
        return text

    ids = model.tok_encode("def f")
    expected = model.llm.generate(ids, max_tokens=8, temperature=1.5, top_k=40, seed=2).token_ids
    assert sampled(temperature=1.5, top_k=40, seed=2) == model.llm.tokenizer.decode(expected)
    assert sampled(seed=2) == model.llm.tokenizer.decode(
        model.llm.generate(ids, max_tokens=8, temperature=1.0, seed=2).token_ids
    )
    assert len({sampled(seed=seed) for seed in range(4)}) == 4


def test_what_is_not_supported_is_refused_by_name(model: HarnessModel, folder: Path) -> None:
    with pytest.raises(ff.RequestError, match="length_penalty"):
        model.generate_until([Asked("a", {"length_penalty": 2.0})], disable_tqdm=True)
    with pytest.raises(ff.RequestError, match="max_gen_toks"):
        model.generate_until([Asked("a", {"max_gen_toks": 40})], disable_tqdm=True)
    with pytest.raises(ff.RequestError, match="41 tokens"):
        model._loglikelihood_tokens([(None, [2], [3] * 41)])
    with pytest.raises(ff.RequestError, match="begun beforehand"):
        model.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=False)
    with pytest.raises(ff.RequestError, match="chat template"):
        model.apply_chat_template([{"role": "user", "content": "a"}])
    for name, value in {"parallelize": True, "batch_size": 8, "trust_remote_code": True, "dtype": "int7"}.items():
        with pytest.raises(ff.RequestError, match=name):
            HarnessModel(str(folder), **{name: value})
