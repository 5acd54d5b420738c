"""Clients that send too much, go away, do not read, or are too many: rows B31, B36 and D58 to D61 of the faults."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import httpx
import pytest
from serving import (
    CHAT,
    CHATS,
    COMPLETIONS,
    LONG,
    NAME,
    PROMPT,
    Gate,
    Running,
    connect,
    head,
    load,
    received,
    running,
    sent,
)
from threads import until

import flashformer as ff
from flashformer.server import ServerOptions, make_app
from flashformer.server.service import State

ENDLESS = {**LONG, "stream": True}


# ---- B: what is sent --------------------------------------------------------------------------------------------


def test_b31_a_body_that_is_too_large_is_refused_before_it_is_read(here: Running) -> None:
    with connect(here) as client:
        client.sendall(head(COMPLETIONS, 1 << 30))
        assert received(client).startswith(b"HTTP/1.1 413 ")
    with connect(here) as client:
        client.sendall(head(COMPLETIONS, None, "Transfer-Encoding: chunked"))
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        n_sent = 0
        try:
            while n_sent < 64:
                client.sendall(chunk)
                n_sent += 1
        except OSError:  # it has closed
            pass
        assert 8 <= n_sent < 32
    assert here.post(COMPLETIONS, prompt=PROMPT, max_tokens=1).status_code == 200


def test_b31_a_body_that_does_not_come_is_not_waited_for(llm: ff.LLM, tmp_path: Path) -> None:
    with running(llm, tmp_path, body_s=0.2) as here, connect(here) as client:
        client.sendall(head(COMPLETIONS, 100) + b'{"prompt"')
        assert received(client).startswith(b"HTTP/1.1 408 ")


def test_b31_the_memory_of_all_bodies_is_bounded(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.server.guard.MAX_BODIES_BYTES", 1000)
    monkeypatch.setattr("flashformer.server.guard.UNCOUNTED_BODY_BYTES", 0)
    with connect(here) as client:
        client.sendall(head(COMPLETIONS, 900) + b" " * 800)
        until(lambda: here.service._bodies._n_bytes == 800)
        answer = here.client.post(COMPLETIONS, content=b" " * 300, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
        assert answer.headers["retry-after"] == "1"
    until(lambda: here.service._bodies._n_bytes == 0)
    assert here.post(COMPLETIONS, prompt=PROMPT, max_tokens=1).status_code == 200
    until(lambda: here.service._bodies._n_bytes == 0)


def test_b31_slow_uploads_lock_nobody_out(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.server.guard.MAX_BODIES_BYTES", 1000)
    monkeypatch.setattr("flashformer.server.guard.UNCOUNTED_BODY_BYTES", 500)
    with connect(here) as one, connect(here) as other:
        for client in (one, other):
            client.sendall(head(COMPLETIONS, 1001) + b" " * 1000)
        until(lambda: here.service._bodies._n_bytes == 1000)
        data = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
        for n_bytes, status in ((500, 200), (501, 503)):
            headers = {"content-type": "application/json"}
            answer = here.client.post(COMPLETIONS, content=data.ljust(n_bytes), headers=headers)
            assert answer.status_code == status
        until(lambda: here.service._bodies._n_bytes == 1000)
    until(lambda: here.service._bodies._n_bytes == 0)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_b31_another_content_type_is_refused(here: Running, kind: str | None) -> None:
    """So that a page of another site cannot send requests that a browser calls simple."""
    headers = {} if kind is None else {"content-type": kind}
    answer = here.client.post(COMPLETIONS, content=json.dumps({"prompt": "a"}), headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


def test_paths_and_methods_that_are_none(here: Running) -> None:
    for method, path, status in (("GET", "/v2", 404), ("GET", CHATS, 405), ("OPTIONS", CHATS, 405), ("PUT", "/", 405)):
        answer = here.client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_b36_a_number_that_is_none_is_an_error(here: Running, gate: Gate) -> None:
    gate.fail(ff.NumericalError("NaN in layer 3", 3), times=1)
    answer = here.post(CHATS, messages=CHAT)
    assert answer.status_code == 500
    assert (answer.json()["error"]["code"], answer.json()["error"]["message"]) == ("numerical_error", "NaN in layer 3")
    here.idle()
    gate.fail(ff.NumericalError("NaN in layer 3", 3), times=1)
    *_, last = here.events(CHATS, messages=CHAT)
    assert last["error"]["code"] == "numerical_error"
    assert here.post(CHATS, messages=CHAT, max_tokens=1).status_code == 200
    assert here.client.get("/health").status_code == 200
    here.idle()


# ---- D58: clients that go away ------------------------------------------------------------------------------------


def test_d58_gone_while_waiting(here: Running, gate: Gate) -> None:
    gate.shut()
    running_ = [sent(here, COMPLETIONS, **ENDLESS) for _ in range(2)]
    until(lambda: here.n_running == 2)
    waiting = [sent(here, COMPLETIONS, **LONG, stream=i % 2 == 0) for i in range(4)]
    until(lambda: here.n_waiting == 4)
    for client in waiting[:3]:
        client.close()
    until(lambda: here.n_waiting == 1)
    until(lambda: here.n_jobs == 3)
    for client in (*running_, waiting[3]):
        client.close()
    gate.open()
    here.idle()
    assert here.metric("request_success_total", finished_reason="length") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["prefill", "decode", "warm"])
def test_d58_gone_while_running(llm: ff.LLM, here: Running, gate: Gate, stream: bool, when: str) -> None:
    """The slot is free within one forward, and who else is on the way gets what it would get."""
    chunk = llm.setup.prompt_chunk
    expected = llm.generate("other", max_tokens=40, ignore_eos=True).text
    gate.shut()
    first = len(gate.n_rows)
    prompt = [5] * (3 * chunk + 1) if 3 * chunk < 400 else [5] * 300
    body = {"prompt": [5] if when == "decode" else prompt, "max_tokens": 200, "ignore_eos": True, "stream": stream}
    body |= {"max_tokens": 0} if when == "warm" else {}
    leaving = sent(here, COMPLETIONS, **body)
    until(lambda: gate.n_asked > 0 and here.n_running == 1)
    if when == "decode":
        gate.let(5)
        until(lambda: len(gate.n_rows) == first + 5)
    asked = gate.n_asked
    leaving.close()
    until(lambda: here.n_jobs == 0)
    gate.let(1)
    here.idle()
    assert gate.n_asked <= asked + 1
    assert all(slot.is_free for slot in llm._slots._slots)
    gate.open()
    text = here.post(COMPLETIONS, prompt="other", max_tokens=40, ignore_eos=True).json()["choices"][0]["text"]
    assert text == expected
    assert here.metric("request_success_total", finished_reason="abort") == 1


def test_d58_others_are_untouched(llm: ff.LLM, here: Running) -> None:
    expected = llm.generate("other", max_tokens=120, ignore_eos=True).text
    done, texts = threading.Event(), []

    def stay() -> None:
        while not done.is_set():
            events = here.events(COMPLETIONS, prompt="other", max_tokens=120, ignore_eos=True)
            texts.append("".join(choice["text"] for event in events[:-1] for choice in event["choices"]))

    staying = threading.Thread(target=stay)
    staying.start()
    for n in range(12):
        client = sent(here, COMPLETIONS, **ENDLESS)
        if n % 3:
            client.recv(200 * n)
        client.close()
    done.set()
    staying.join(60)
    assert texts
    assert set(texts) == {expected}
    here.idle()


# ---- D59: clients that do not read --------------------------------------------------------------------------------


def test_d59_who_reads_nothing_is_paused_then_cut_off(llm: ff.LLM, gate: Gate, tmp_path: Path) -> None:
    with running(llm, tmp_path, stall_s=0.5, buffer_bytes=4096) as here:
        body = {"prompt": "x", "max_tokens": 480, "logprobs": 20, "ignore_eos": True, "stream": True}
        slow = sent(here, COMPLETIONS, **body)
        until(lambda: here.n_running == 1)
        text = here.post(COMPLETIONS, prompt=PROMPT, max_tokens=30, ignore_eos=True).json()["choices"][0]["text"]
        assert text == llm.generate(PROMPT, max_tokens=30, ignore_eos=True).text
        here.idle()
        assert here.metric("request_success_total", finished_reason="abort") == 1
        assert here.metric("generation_tokens_total") < 480 + 30
        until(lambda: len(here.server.server_state.connections) <= 1)
        slow.close()


def test_a_request_that_takes_too_long_is_ended(llm: ff.LLM, gate: Gate, tmp_path: Path) -> None:
    with running(llm, tmp_path, request_s=0.5) as here:
        gate.shut()
        with sent(here, COMPLETIONS, **ENDLESS) as client:
            until(lambda: here.n_running == 1)
            answers = [here.post(COMPLETIONS, **LONG), here.post(COMPLETIONS, **LONG)]  # one runs, one waits
            assert [answer.status_code for answer in answers] == [504, 504]
            assert answers[0].json()["error"]["code"] == "timeout"
            assert b'"code":"timeout"' in received(client, b"timeout")
        gate.open()
        here.idle()


# ---- D60, D61: many --------------------------------------------------------------------------------------------


def test_d60_a_thousand_at_once(folder: Path) -> None:
    async def scene() -> None:
        with load(folder, streams=4) as llm:
            gate, options = Gate(llm), ServerOptions(model_name=NAME, max_waiting=64)
            app = make_app(llm, options)
            service = app.state.service
            transport = httpx.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client,
            ):
                while service.state is not State.READY:
                    await asyncio.sleep(0.01)
                gate.shut()
                body = {"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True}
                tasks = [asyncio.create_task(client.post(COMPLETIONS, json=body)) for _ in range(1000)]
                for n_refused, done in enumerate(asyncio.as_completed(tasks), 1):
                    answer = await done
                    assert answer.status_code == 429
                    assert answer.headers["retry-after"] == "1"
                    assert answer.json()["error"]["type"] == "rate_limit_error"
                    if n_refused == 1000 - 68:
                        break
                admission = service.loaded.admission
                assert (admission.n_running, admission.n_waiting) == (4, 64)
                gate.open()
                answers = [answer for answer in await asyncio.gather(*tasks) if answer.status_code == 200]
                assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
                assert len(answers) == 68
                while service._jobs or admission.n_running:
                    await asyncio.sleep(0.01)

    asyncio.run(scene())
