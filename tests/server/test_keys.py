"""Who may ask: rows D65 and D67 of the faults."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import CHATS, COMPLETIONS, NAME, Running, load, running

import flashformer as ff
from flashformer.server import ServerOptions, guard

KEY = "s3cret-key"
EVERYWHERE = [
    *[("GET", path) for path in ("/", "/health", "/live", "/metrics", "/v1/models", "/openapi.json", "/nowhere")],
    *[("OPTIONS", CHATS), ("POST", CHATS), ("POST", COMPLETIONS), ("HEAD", "/live")],
]


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with load(folder) as llm, running(llm, tmp_path_factory.mktemp("at"), api_key=KEY) as server:
        yield server


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, "Basic !", basic("x")]
)
def test_d65_without_the_key_there_is_nothing(guarded: Running, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    for method, path in EVERYWHERE:
        answer = guarded.client.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert "www-authenticate" in answer.headers
        assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer  {KEY}", basic(KEY)])
def test_d65_with_the_key_there_is_everything(guarded: Running, given: str) -> None:
    for method, path in EVERYWHERE:
        assert guarded.client.request(method, path, headers={"authorization": given}).status_code != 401


def test_d65_the_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, guarded: Running) -> None:
    compared: list[tuple[int, int]] = []
    compare = guard.hmac.compare_digest
    monkeypatch.setattr(
        guard.hmac, "compare_digest", lambda a, b: (compared.append((len(a), len(b))), compare(a, b))[1]
    )
    for key in ("y", "x", KEY, "x" * 1000):
        guarded.client.get("/live", headers={"authorization": f"Bearer {key}"})
    assert compared == [(32, 32)] * 4


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "a\nb"])
def test_d65_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(ff.RequestError, match="API key"):
        ServerOptions(model_name=NAME, api_key=key)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *[
            (name, 200)
            for name in ("localhost", "localhost:8000", "127.0.0.1:80", "127.9.9.9", "[::1]:8000", "a.localhost")
        ],
        *[
            (name, 403)
            for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "", "[::2]")
        ],
        ("Mine.example", 200),
    ],
)
def test_d67_another_name_is_refused(llm: ff.LLM, tmp_path: Path, name: str, status: int) -> None:
    with running(llm, tmp_path, any_host=False, host="mine.example") as here:
        assert here.client.get("/live", headers={"host": name}).status_code == status


def test_d67_no_other_site_may_read(here: Running) -> None:
    origin: dict[str, Any] = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    for method, path in EVERYWHERE:
        answer = here.client.request(method, path, headers=origin)
        assert not [name for name in answer.headers if name.startswith("access-control")]
