"""/openapi.json is complete and true: schemathesis asks what it says can be asked, and compares the answers with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator
from serving import CHAT, CHATS, COMPLETIONS, NAME, PROMPT, Gate, Running, chat_folder, load, running

import flashformer as ff
from flashformer.server import ServerOptions
from flashformer.server.describe import openapi
from flashformer.server.errors import api_error
from flashformer.server.schema import read_chat, read_completion

KEY = "sk-described"
WORK = (CHATS, COMPLETIONS)
PATHS = {*WORK, "/v1/models", "/v1/models/{name}", "/health", "/live", "/metrics", "/openapi.json", "/"}
# JSON Schema cannot say how many tokens a text has, that names are ids below a number, nor that 1.0 is no integer here.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = [200, 400]
"""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ff.LLM]:
    """Of so short a context that every answer is short, whatever is asked."""
    with load(chat_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=96)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def gate(llm: ff.LLM) -> Gate:
    return Gate(llm)


@pytest.fixture(scope="module")
def here(llm: ff.LLM, gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(llm, tmp_path_factory.mktemp("at"), api_key=KEY) as server:
        server.client.headers["authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def described(here: Running) -> dict[str, Any]:
    """With every field of an answer refused that is not described."""
    found: dict[str, Any] = here.client.get("/openapi.json").json()
    for schema in found["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return found


def witness(here: Running, described: dict[str, Any], folder: Path, *options: str) -> dict[str, Any]:
    """Its report of a run in which all is as described."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    (folder / "openapi.json").write_text(json.dumps(described))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run", "openapi.json"]
    to = ["--url", here.url, "--header", f"Authorization: Bearer {KEY}", "--request-timeout", "60"]
    how = ["--checks", "all", "--generation-deterministic", "--no-color"]
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [*command, *to, *how, "--report-json-path", "report.json", *options],
        cwd=folder, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert (report["failures"], report["errors"]) == ([], [])
    assert report["operations"]["tested"] == len(PATHS)
    here.idle()
    answer = here.post(COMPLETIONS, prompt=PROMPT, max_tokens=3)
    assert answer.status_code == 200
    return report


def test_every_answer_is_as_described(here: Running, described: dict[str, Any], llm: ff.LLM, tmp_path: Path) -> None:
    report = witness(here, described, tmp_path, "--phases", "fuzzing", "--max-examples", "40")
    assert report["test_cases"]["generated"] > 100
    assert all(report["valid_rates"][f"POST {path}"]["fuzzing"]["accepted"] > 10 for path in WORK)
    assert all(slot.is_free for slot in llm._slots._slots)


@pytest.mark.long
@pytest.mark.parametrize("phase", ["coverage", "fuzzing"])
def test_every_answer_is_as_described_again_and_again(
    here: Running, described: dict[str, Any], tmp_path: Path, phase: str
) -> None:
    report = witness(here, described, tmp_path, "--phases", phase, "--max-examples", "300")
    assert report["test_cases"]["generated"] > 900
    assert all(report["valid_rates"][f"POST {path}"][phase]["accepted"] > 150 for path in WORK)


def validator(described: dict[str, Any], name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": described["components"]})


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "name"),
    [(CHATS, {"messages": CHAT, "logprobs": True, "top_logprobs": 2}, "ChatChunk"),
     (COMPLETIONS, {"prompt": PROMPT, "logprobs": 2, "echo": True}, "TextChunk")],
)  # fmt: skip
def test_every_event_is_as_described(
    here: Running, described: dict[str, Any], gate: Gate, path: str, body: dict[str, Any], name: str, usage: bool
) -> None:
    """Those that say how fast it is, and the one that says why a stream broke off, too."""
    options = {"stream_options": {"include_usage": usage}, "max_tokens": 40, "ignore_eos": True}
    chunk, error = validator(described, name), validator(described, "Error")
    *events, done = here.events(path, **body, **options)
    assert done == "[DONE]"
    for event in events:
        chunk.validate(event)
    assert sum("timings" in event for event in events) == 3  # after 17 and 33 tokens, and at the end
    assert not error.is_valid(events[0])
    gate.fail(ff.NumericalError("NaN in layer 3", 3), times=1)
    *_, last = here.events(path, **body, **options)
    error.validate(last)
    assert not chunk.is_valid(last)


def test_errors_are_as_described(here: Running, described: dict[str, Any]) -> None:
    error = validator(described, "Error")
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/v1/models", {"headers": {"authorization": "Bearer wrong"}}),
        ("GET", "/v1/models/other", {}),
        ("POST", CHATS, {"content": b"{}", "headers": {"content-type": "text/plain"}}),
        ("POST", CHATS, {"json": {}}),
        ("POST", COMPLETIONS, {"json": {"prompt": "a", "model": "other"}}),
    ]
    for method, path, request in requests:
        answer = here.client.request(method, path, **request)
        operation = described["paths"][path.replace("other", "{name}")][method.lower()]
        reference = operation["responses"][str(answer.status_code)]["$ref"].rpartition("/")[2]
        response = described["components"]["responses"][reference]
        assert answer.headers.keys() >= {name.lower() for name in response.get("headers", ())}
        error.validate(answer.json())


def test_all_paths_are_described(here: Running, described: dict[str, Any]) -> None:
    assert set(described["paths"]) == PATHS
    routes = {route.path.replace(":path", "") for route in here.server.config.app.routes}
    assert routes == PATHS


def test_keys_are_described_where_they_are_asked_for() -> None:
    guarded, free = (openapi(ServerOptions(model_name=NAME, api_key=key), None) for key in (KEY, None))
    assert [list(one) for one in guarded["security"]] == [["key"], ["password"]]
    assert set(guarded["components"]["securitySchemes"]) == {"key", "password"}
    assert free["security"] == []
    for found, asked, other in ((guarded, "401", "403"), (free, "403", "401")):
        for path in found["paths"].values():
            (operation,) = path.values()
            assert asked in operation["responses"]
            assert other not in operation["responses"]


def test_bounds_are_those_that_are_checked() -> None:
    """At a bound a value is read, and beyond it refused."""
    schemas = openapi(ServerOptions(model_name=NAME), None)["components"]["schemas"]
    n_bounds = 0
    bodies = ((read_chat, "ChatBody", {"messages": CHAT}), (read_completion, "CompletionBody", {"prompt": "a"}))
    for read, name, needed in bodies:
        fields = Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})
        for field, schema in schemas[name]["properties"].items():
            for value in values_at_bounds(schema):
                body = {**needed, field: value, **({"logprobs": True} if field == "top_logprobs" else {})}
                assert fields.is_valid(body) == is_read(read, body), body
                n_bounds += 1
    assert n_bounds > 100


def is_read(read: Any, body: dict[str, Any]) -> bool:
    try:
        read(json.dumps(body).encode())
    except Exception as error:
        if api_error(error).status != 400:
            raise
        return False
    return True


def values_at_bounds(schema: dict[str, Any]) -> Iterator[Any]:
    """Of numbers, texts, lists and objects of one field: the bounds, and what lies beyond."""
    for one in (schema, *schema.get("anyOf", ())):
        step = 1 if one.get("type") == "integer" else 1e-7
        for limits in (one, *one.get("anyOf", ())):
            if "minimum" in limits:
                yield from (limits["minimum"], limits["minimum"] - step, limits["maximum"], limits["maximum"] + 1)
        match one.get("type"):
            case "integer":
                yield from (1.5, True, "1")
            case "number":
                yield from (0, True, "1")
            case "string" if "minLength" in one:
                lengths = (one["minLength"], one["minLength"] - 1, one["maxLength"], one["maxLength"] + 1)
                yield from ("x" * n for n in lengths)
            case "array" if one.get("items", {}).get("type") == "string":
                yield from ([], ["x"] * one["maxItems"], ["x"] * (one["maxItems"] + 1), [""], [1])
            case "object" if "additionalProperties" in one and "propertyNames" in one:
                yield from ({str(i): 1 for i in range(n)} for n in (0, one["maxProperties"], one["maxProperties"] + 1))
                yield from ({"x": 1}, {"-1": 1}, {"1": 101}, {"1": -101}, {"1": "x"}, {"self": "x"})
    yield from (None, {"enum": 1}, [None])
    yield from schema.get("enum", ())
