"""`doctor --model`: every step of a load with its verdict, and an exit code that says whether the model runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import CONFIG, model_folder, random_weights
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

import flashformer as ff
from flashformer.cli.app import app
from flashformer.engine.diagnosis import MAX_REFUSALS, config_refusals

STEPS = ["files", "config", "tensors", "fit", "tokenizer", "chat template", "memory"]


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, args)])


def diagnosis(folder: str | Path, *args: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """Steps by name, and whether the model runs, with the exit code that goes with it."""
    result = call("--model", folder, "--json", *args)
    found = json.loads(result.stdout)["diagnosis"]
    assert result.exit_code == (0 if found["runs"] else 2)
    assert result.stderr == ""
    return {step["name"]: step for step in found["steps"]}, found["runs"]


def verdicts(steps: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: step["verdict"] for name, step in steps.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path)


def test_a_model_that_runs(folder: Path) -> None:
    steps, runs = diagnosis(folder)
    assert runs
    assert verdicts(steps) == dict.fromkeys(STEPS, "ok") | {"chat template": "not tried"}
    with ff.load(folder, device="reference") as llm:
        assert f"{llm.plan.memory['total_bytes'] / 2**30:.2f} GiB" in steps["memory"]["messages"][0]


def test_the_machine_comes_first_and_then_the_model(folder: Path) -> None:
    machine, whole = call().stdout.splitlines(), call("--model", folder).stdout.splitlines()
    names = [line.split()[0] for line in machine]
    assert [line.split()[0] for line in whole[: len(names)]] == names
    assert whole[len(names)] == ""
    assert [line[:14].rstrip() for line in whole[len(names) + 1 :]] == ["model", *STEPS, "runs"]
    assert whole[-1].split() == ["runs", "yes"]


@pytest.mark.parametrize("name", ["demo", "shape:llama-3.2-1b"])
def test_what_is_no_folder(name: str) -> None:
    steps, runs = diagnosis(name)
    assert runs
    assert set(verdicts(steps).values()) == {"ok"}


def test_a_model_that_is_not_there() -> None:
    steps, runs = diagnosis("/no/such/folder")
    assert not runs
    assert verdicts(steps) == {"files": "refused"}
    assert "/no/such/folder" in steps["files"]["messages"][0]
    text = call("--model", "/no/such/folder")
    assert text.exit_code == 2
    assert "runs           no" in text.stdout


def test_every_key_that_is_not_supported_is_named(tmp_path: Path) -> None:
    strange = {"alibi": True, "n_experts": 8, "rope_scaling": {"rope_type": "other"}, "hidden_act": "tanh"}
    steps, runs = diagnosis(model_folder(tmp_path, **strange))
    assert not runs
    messages = steps["config"]["messages"]
    assert len(messages) == len(strange)
    for key in strange:
        assert sum(key in message for message in messages) == 1, messages
    assert verdicts(steps) == {
        **{"files": "ok", "config": "refused", "tensors": "ok", "tokenizer": "ok"},
        **{"chat template": "not tried", "memory": "not tried"},
    }


def test_a_relation_that_fails_is_said_once() -> None:
    refusals = config_refusals({**CONFIG, "num_key_value_heads": 5}, {})
    assert len(refusals) == 1
    assert "num_key_value_heads" in refusals[0]
    assert config_refusals(CONFIG, {}) == []


def test_a_config_of_nothing_but_strange_keys_is_not_listed_for_ever() -> None:
    assert len(config_refusals({**CONFIG, **{f"strange_{i}": i for i in range(5000)}}, {})) == MAX_REFUSALS


def test_a14_an_unknown_architecture_suggests_doctor(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, architectures=["OtherForCausalLM"], model_type="other", auto_map={"A": "b.C"})
    with pytest.raises(ff.LoadError, match=r"'OtherForCausalLM'.*supported: .*LlamaForCausalLM.*doctor --model"):
        ff.load(folder, device="reference")
    steps, runs = diagnosis(folder)
    assert not runs
    assert len(steps["config"]["messages"]) == 1
    assert "'OtherForCausalLM'" in steps["config"]["messages"][0]


def test_tensors_that_do_not_fit(folder: Path) -> None:
    weights = random_weights(0)
    del weights["model.norm.weight"]
    save_file(weights | {"stranger": np.zeros(3, np.float32)}, folder / "model.safetensors")
    steps, runs = diagnosis(folder)
    assert not runs
    assert steps["fit"]["verdict"] == "refused"
    for name in ("model.norm.weight", "stranger"):
        assert name in steps["fit"]["messages"][0]
    assert (steps["tensors"]["verdict"], steps["memory"]["verdict"]) == ("ok", "not tried")


def test_files_that_are_damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "tokenizer.json").unlink()
    steps, runs = diagnosis(folder)
    assert not runs
    assert "Git LFS pointer" in steps["tensors"]["messages"][0]
    assert "tokenizer.json is missing" in steps["tokenizer"]["messages"][0]
    assert steps["config"]["verdict"] == "ok"


def test_a_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    steps, runs = diagnosis(model_folder(tmp_path, vocab_size=200))
    assert not runs
    assert "ids up to 257" in steps["tokenizer"]["messages"][0]
    assert "vocab_size = 200" in steps["tokenizer"]["messages"][0]


def test_a_chat_template_that_fails_stops_no_model(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no greetings') }}")
    steps, runs = diagnosis(folder)
    assert runs
    assert steps["chat template"]["verdict"] == "refused"
    assert "no greetings" in steps["chat template"]["messages"][0]


def test_memory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashformer.backends.cpu import topology

    monkeypatch.setattr(topology, "free_memory", lambda: topology.Limit(270_000, "a test"))
    steps, runs = diagnosis(model_folder(tmp_path))
    assert not runs
    assert "270,000 are free (a test)" in steps["memory"]["messages"][0]


def test_a_copy_without_weights_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id of which only the small files are cached."""
    repo, commit = tmp_path / "models--some--model", "0" * 40
    model_folder(repo / "snapshots" / commit, weights=False)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    steps, runs = diagnosis("some/model", "--offline")
    assert runs
    assert steps["tensors"] == {
        **{"name": "tensors", "verdict": "not tried"},
        "messages": ["not downloaded yet; `flashformer run` downloads them"],
    }
    assert (steps["format"]["verdict"], steps["memory"]["verdict"]) == ("ok", "ok")


def test_options_that_need_a_model() -> None:
    result = call("--offline")
    assert result.exit_code == 2
    assert "--model" in result.stderr
