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
import yaml
from folders import model_folder

os.environ.update(HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import flashformer as ff
from flashformer.compat.lm_eval import HarnessModel

ROOT = Path(__file__).parents[2]
CTX = 96
CHOICES = [chr(c) for c in range(33, 127)]
QUESTIONS = ["What is it?", "def f(x): ", "  spaces  ", "é and 日本", "", "<s>begun", "x" * 120, "Why, then?\n"]
TEXTS = ["A short text.", "z", "It is longer than the context. " * 9, "<s>With its own beginning", "日本語 🙂"]
SETTINGS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": CHOICES,
        "target_delimiter": "",
        "doc_to_target": "{{index}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "words": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["several words", "one", "日本 "],
        "doc_to_target": 2,
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n", "never", "not", "nor", "neither", "7"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in f32 whose tokenizer transformers reads alike."""
    folder = model_folder(tmp_path_factory.mktemp("model"), seed=5)
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, settings in SETTINGS.items():
        texts = [text for text in (TEXTS if name == "rolling" else QUESTIONS) if text or name != "answer"]
        if name == "words":
            texts = [text for text in texts if text]
        data = folder / f"{name}.jsonl"
        rows = [{"text": text, "index": 7 * i % len(CHOICES)} for i, text in enumerate(texts)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **settings}))
    return folder


def evaluated(model: str, folder: Path, tasks: Path, **arguments: Any) -> dict[str, Any]:
    found = simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder), **arguments},
        tasks=list(SETTINGS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    return dict(found)


@pytest.fixture(scope="module")
def both(folder: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield [
            evaluated("hf", folder, tasks, dtype="float32", device="cpu", max_length=CTX),
            evaluated("flashformer", folder, tasks, dtype="float32", threads=1),
        ]


def responses(found: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for (response,) in sample["resps"]]


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
