"""A tiny model, its gate, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Gate, Running, chat_folder, load, running

import flashformer as ff


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(folder: Path) -> Iterator[ff.LLM]:
    with load(folder) as loaded:
        yield loaded


@pytest.fixture
def gate(llm: ff.LLM) -> Iterator[Gate]:
    found = Gate(llm)
    yield found
    found.open()


@pytest.fixture
def here(llm: ff.LLM, gate: Gate, tmp_path: Path) -> Iterator[Running]:
    with running(llm, tmp_path) as server:
        yield server
        gate.open()
