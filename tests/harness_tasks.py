"""lm-evaluation-harness in tests: small tasks of their own, and a model whose tokenizer transformers reads alike."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import model_folder

os.environ.update(HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

CTX = 96
CHOICES = [chr(c) for c in range(33, 127)]
QUESTIONS = ["What is it?", "def f(x): ", "  spaces  ", "é and 日本", "", "<s>begun", "x" * 120, "Why, then?\n"]
TEXTS = ["A short text.", "z", "It is longer than the context. " * 9, "<s>With its own beginning", "日本語 🙂"]
SETTINGS: Mapping[str, dict[str, Any]] = {
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
ASKED = {
    "choice": QUESTIONS,
    "words": [text for text in QUESTIONS if text],
    "rolling": TEXTS,
    "answer": [text for text in QUESTIONS if text],
}


def harness_folder(path: Path, **overrides: Any) -> Path:
    """Random weights in f32."""
    folder = model_folder(path, seed=5, **overrides)
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def task_folder(
    folder: Path, settings: Mapping[str, dict[str, Any]] = SETTINGS, asked: Mapping[str, list[str]] = ASKED
) -> Path:
    """The tasks as the harness reads them, and their documents."""
    for name, task in settings.items():
        data = folder / f"{name}.jsonl"
        n_choices = len(task.get("doc_to_choice", [0]))
        rows = [{"text": text, "index": 7 * i % n_choices} for i, text in enumerate(asked[name])]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **task}))
    return folder


def evaluated(kind: str, tasks: Path, cache: Path, **arguments: Any) -> dict[str, Any]:
    """What the harness finds with a model of this kind; `cache`: a folder for its copies of the documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        found = simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=list(SETTINGS),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    assert found is not None
    return dict(found)


def responses(found: dict[str, Any], task: str) -> list[Any]:
    """One for every request, by document."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for (response,) in sample["resps"]]
