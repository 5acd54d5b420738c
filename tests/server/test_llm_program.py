"""The command-line program `llm`, which knows our server as one of its models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from llm.cli import cli
from serving import NAME, PROMPT, load, running

import flashformer as ff

KEY = "sk-program"


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[ff.LLM]:
    with load(folder) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def url(llm: ff.LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(llm, tmp_path_factory.mktemp("at"), api_key=KEY) as here:
        yield f"{here.url}/v1"


@pytest.fixture(scope="module")
def home(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program keeps: its models, their keys, and the conversations."""
    folder = tmp_path_factory.mktemp("home")
    ours = {"model_name": NAME, "api_base": url, "api_key_name": "ours"}
    models = [{"model_id": "chat", **ours}, {"model_id": "text", "completion": True, **ours}]
    (folder / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    (folder / "keys.json").write_text(json.dumps({"ours": KEY}))
    return folder


def run(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, env={"LLM_USER_PATH": str(home)})


def said(home: Path, *arguments: str) -> str:
    """What it writes, without the last end of a line."""
    result = run(home, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout_bytes.decode().removesuffix("\n")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("how", [[], ["--no-stream"]])
def test_a_prompt(home: Path, llm: ff.LLM, how: list[str]) -> None:
    expected = llm.chat([{"role": "system", "content": "Be brief"}, user(PROMPT)], max_tokens=20)
    assert len(expected.text) > 10
    found = said(home, "prompt", "-m", "chat", "-s", "Be brief", "-o", "max_tokens", "20", *how, PROMPT)
    assert found == expected.text


def test_options(home: Path, llm: ff.LLM) -> None:
    settings = {"temperature": 1.5, "seed": 3, "max_tokens": 20, "top_p": 0.9}
    options = [text for name, value in settings.items() for text in ("-o", name, str(value))]
    found = said(home, "prompt", "-m", "chat", *options, PROMPT)
    assert found == llm.chat([user(PROMPT)], max_tokens=20, temperature=1.5, seed=3, top_p=0.9).text
    assert found != llm.chat([user(PROMPT)], max_tokens=20).text


def test_a_conversation_goes_on(home: Path, llm: ff.LLM) -> None:
    first = said(home, "prompt", "-m", "chat", "-o", "max_tokens", "10", PROMPT)
    messages = [user(PROMPT), {"role": "assistant", "content": first}, user("And then?")]
    assert first == llm.chat(messages[:1], max_tokens=10).text
    expected = llm.chat(messages, max_tokens=10).text
    assert said(home, "prompt", "-c", "-o", "max_tokens", "10", "And then?") == expected
    assert expected != llm.chat(messages[2:], max_tokens=10).text


def test_a_text_is_continued(home: Path, llm: ff.LLM) -> None:
    found = said(home, "prompt", "-m", "text", "-o", "max_tokens", "20", PROMPT)
    assert found == llm.generate(PROMPT, max_tokens=20).text


def test_a_refusal_is_shown(home: Path) -> None:
    result = run(home, "prompt", "-m", "chat", "-o", "presence_penalty", "1", PROMPT)
    assert result.exit_code == 1
    assert "presence_penalty=1.0: not supported" in result.output
    result = run(home, "prompt", "-m", "chat", "--key", "wrong", PROMPT)
    assert result.exit_code == 1
    assert "no API key, or a wrong one" in result.output


def test_as_a_process_that_reads_from_another(home: Path, llm: ff.LLM) -> None:
    command = [sys.executable, "-m", "llm", "-m", "chat", "-u", "-o", "max_tokens", "20"]
    env = {**os.environ, "LLM_USER_PATH": str(home)}
    done = subprocess.run(command, env=env, input=PROMPT.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    expected = llm.chat([user(PROMPT)], max_tokens=20)
    assert done.stdout.decode() == f"{expected.text}\n"
    n_prompt, n_new = len(expected.prompt_token_ids), len(expected.token_ids)
    assert f"{n_prompt} input, {n_new} output" in done.stderr.decode()
