"""What a terminal shows while a model is fetched and loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub, repo
from folders import model_folder
from terminal import Terminal, screen


@pytest.mark.parametrize(("option", "shows"), [((), True), (("--quiet",), False), (("--json",), False)], ids=str)
def test_downloads_have_bars_on_a_terminal(tmp_path: Path, option: tuple[str, ...], shows: bool) -> None:
    files = {path.name: path.read_bytes() for path in model_folder(tmp_path / "model").iterdir()}
    command = [sys.executable, "-m", "flashformer.cli", "run", "owner/model", "hi", "-n", "2", *option]
    with FakeHub({"owner/model": repo(files)}).running() as hub:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        with Terminal(command, {**env, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}) as terminal:
            assert terminal.end() == 0
    assert "model.safetensors" in hub.files()
    assert ("100%" in screen(terminal.raw)) == shows


def test_colours_and_moves_of_the_cursor_are_understood() -> None:
    code = "import sys; print('a\\033[1mb\\033[0mc\\rX', file=sys.stderr); print('1\\n2\\033[A\\033[2Kz')"
    with Terminal([sys.executable, "-c", code], os.environ) as terminal:
        assert terminal.end() == 0
    assert screen(terminal.raw) == "Xbc\n z\n2\n"
