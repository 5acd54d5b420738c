"""How a server begins and ends: rows D62 and D64 of the faults."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from serving import COMPLETIONS, LONG, NAME, PROMPT, Gate, Running, load, read_events, received, running, sent, stop
from threads import until

import flashformer as ff
from flashformer.server.service import State


def test_d62_a_shutdown_lets_what_runs_end(llm: ff.LLM, here: Running, gate: Gate) -> None:
    expected = llm.generate(PROMPT, max_tokens=20, ignore_eos=True).text
    gate.shut()
    body = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, "stream": True}
    with here.client.stream("POST", COMPLETIONS, json=body) as response:
        blocker = sent(here, COMPLETIONS, **{**LONG, "max_tokens": 3})
        until(lambda: here.n_running == 2)
        waiting = sent(here, COMPLETIONS, **LONG, stream=True)
        until(lambda: here.n_waiting == 1)
        stop(here)
        until(lambda: here.service.state is State.DRAINING)
        assert received(waiting, b"}}").startswith(b"HTTP/1.1 503 ")
        assert here.client.get("/health").status_code == 503
        assert here.client.get("/live").status_code == 200
        late = here.post(COMPLETIONS, prompt=PROMPT)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert late.headers["retry-after"] == "1"
        gate.open()
        *events, end = read_events(response)
        assert end == "[DONE]"
        assert "".join(choice["text"] for event in events for choice in event["choices"]) == expected
        assert received(blocker, b"}").startswith(b"HTTP/1.1 200 ")
    until(lambda: here.server._loop.is_closed())


def test_d62_what_does_not_end_in_time_is_ended_with_an_error(llm: ff.LLM, gate: Gate, tmp_path: Path) -> None:
    with running(llm, tmp_path, shutdown_s=0.2) as here:
        gate.shut()
        with here.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as response:
            whole = sent(here, COMPLETIONS, **LONG)
            until(lambda: here.n_running == 2)
            stop(here)
            *_, last = read_events(response)
            assert last["error"]["code"] == "draining"
            assert received(whole, b"}}").startswith(b"HTTP/1.1 503 ")
        gate.open()
        until(lambda: here.server._loop.is_closed())


def test_d62_the_second_signal_ends_at_once(llm: ff.LLM, gate: Gate, tmp_path: Path) -> None:
    with running(llm, tmp_path, shutdown_s=600) as here:
        gate.shut()
        client = sent(here, COMPLETIONS, **LONG, stream=True)
        until(lambda: here.n_running == 1)
        stop(here)
        until(lambda: here.service.state is State.DRAINING)
        stop(here)
        until(lambda: here.server.force_exit)
        assert b'"code":"draining"' in received(client), "what broke off does not look complete"
        gate.let(1)  # the forward that runs; there is no other
        until(lambda: here.server._loop.is_closed())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ff.DeviceError("worker 1 waited for worker 0 in vain"), 503, "device_error"),
        (ff.NumericalError("NaN in layer 3", 3), 500, "numerical_error"),
    ],
)
def test_d64_an_engine_that_fails_ends_the_server(
    llm: ff.LLM, gate: Gate, tmp_path: Path, error: Exception, status: int, code: str
) -> None:
    with running(llm, tmp_path) as here:
        gate.fail(error)
        answer = here.post(COMPLETIONS, prompt=PROMPT)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
        until(lambda: here.service.state is State.BROKEN)
        until(lambda: here.server._loop.is_closed())
        assert here.service.failure is error


def test_d62_what_is_ended_at_once_says_so(llm: ff.LLM, gate: Gate, tmp_path: Path) -> None:
    """Also where the end comes before the first signal was seen to."""
    with running(llm, tmp_path) as here:
        gate.shut()
        client = sent(here, COMPLETIONS, **LONG, stream=True)
        until(lambda: here.n_running == 1)
        here.server._loop.call_soon_threadsafe(here.service.abort)
        assert b'"code":"draining"' in received(client, b"}}")
        assert here.post(COMPLETIONS, prompt=PROMPT).json()["error"]["code"] == "draining"
        gate.open()


def test_d64_an_error_that_passes_does_not(llm: ff.LLM, here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, fuse = llm.tokenizer.stream, [1]
    monkeypatch.setattr(llm.tokenizer, "stream", lambda: stream() if not fuse else fuse.pop() / 0)
    answer = here.post(COMPLETIONS, prompt=PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "division" not in answer.text
    assert here.post(COMPLETIONS, prompt=PROMPT, max_tokens=1).status_code == 200
    assert here.client.get("/health").status_code == 200


def test_health_waits_for_a_token(folder: Path, tmp_path: Path) -> None:
    loading = threading.Event()

    def source() -> ff.LLM:
        loading.wait(60)
        made.append(load(folder))
        return made[0]

    made: list[ff.LLM] = []
    with running(source, tmp_path, wait=False) as here:
        assert here.client.get("/live").status_code == 200
        health = here.client.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "loading")
        assert here.post(COMPLETIONS, prompt=PROMPT).status_code == 503
        assert here.client.get("/v1/models").json()["data"][0]["id"] == NAME
        assert here.metric("num_requests_running") == 0
        loading.set()
        until(lambda: here.service.state is State.READY)
        assert here.client.get("/health").status_code == 200
    with pytest.raises(ff.DeviceError, match="closed"):
        made[0].generate("a")


def test_a_model_that_comes_after_the_end_is_closed(folder: Path, tmp_path: Path) -> None:
    loading, made = threading.Event(), []

    def source() -> ff.LLM:
        loading.wait(60)
        made.append(load(folder))
        return made[0]

    with running(source, tmp_path, wait=False):
        pass
    loading.set()
    until(lambda: bool(made) and made[0].turns._closed)


def test_a_model_that_is_lent_keeps_what_it_holds(llm: ff.LLM, tmp_path: Path) -> None:
    n = len(llm.generate(PROMPT, max_tokens=1).prompt_token_ids)
    with running(llm, tmp_path) as here:
        usage = here.post(COMPLETIONS, prompt=PROMPT, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == n - 1
    assert llm.generate(PROMPT, max_tokens=1).token_ids


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    def source() -> ff.LLM:
        raise ff.LoadError("no weights")

    with running(source, tmp_path) as here:
        until(lambda: here.server._loop.is_closed())
        assert isinstance(here.service.failure, ff.LoadError)
