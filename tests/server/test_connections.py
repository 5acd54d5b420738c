"""Connections: what is no request, clients that take nothing, keep silent, or are too many: B31 and D58 to D61."""

from __future__ import annotations

import json
import re
import resource
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from serving import COMPLETIONS, LONG, NAME, PROMPT, Gate, Running, connect, head, received, running, sent
from threads import until
from uvicorn.server import ServerState

import flashformer as ff
from flashformer.server import ServerOptions, connection, main, make_app
from flashformer.server.options import MAX_HEADER_BYTES

LARGE = {"prompt": "x", "max_tokens": 480, "logprobs": 20, "ignore_eos": True}  # its answer: more than a socket holds


def cut_off(client: socket.socket) -> bytes:
    """All that came until the server closed, in whatever manner."""
    found = b""
    with suppress(ConnectionResetError):
        while data := client.recv(1 << 16):
            found += data
    return found


def length_in(start: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", start)
    assert found
    return int(found[1])


def first_of(client: socket.socket) -> bytes:
    """The first line of an answer, or nothing where it was cut off."""
    try:
        return client.recv(1 << 16).partition(b"\r\n")[0]
    except ConnectionResetError:
        return b""


def error_in(answer: bytes) -> tuple[int, str | None]:
    start, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in start.lower()
    return int(start.split()[1]), json.loads(body)["error"]["code"]


# ---- what is no request, and what comes after one ---------------------------------------------------------------


def test_b31_a_head_that_is_too_large_is_refused(here: Running) -> None:
    """Whether it ends or not."""
    start = b"GET /live HTTP/1.1\r\nHost: x\r\nX-Long: "
    for n_bytes, end in product((MAX_HEADER_BYTES, 1 << 20), (b"", b"\r\n\r\n")):
        with connect(here) as client:
            with suppress(OSError):  # it has closed
                client.sendall(start + b"x" * n_bytes + end)
            assert error_in(received(client, b"}}")) == (431, "headers_too_large")


def test_b31_what_is_no_request_is_refused(here: Running) -> None:
    for data, status in (
        (b"no HTTP\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nHost: x\r\nContent-Length: no\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (head(COMPLETIONS, None, "Transfer-Encoding: chunked") + b"no length\r\n", 400),
    ):
        with connect(here) as client:
            client.sendall(data)
            found = cut_off(client)
        assert error_in(found)[0] == status
        assert found.count(b"HTTP/1.1") == 1
        until(lambda: not here.server.server_state.tasks)


def test_d58_gone_after_sending_more(here: Running, gate: Gate) -> None:
    data = json.dumps(LONG).encode()
    for end, more in product(("keep-alive", "close"), (b"\r\n", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")):
        gate.shut()
        with connect(here) as client:
            client.sendall(head(COMPLETIONS, len(data), f"Connection: {end}") + data)
            until(lambda: here.n_running == 1)
            client.sendall(more)
        until(lambda: here.n_jobs == 0)
        gate.open()
        here.idle()


def test_d58_who_sends_much_more_is_cut_off(here: Running, gate: Gate) -> None:
    gate.shut()
    with sent(here, COMPLETIONS, **LONG) as client:
        until(lambda: here.n_running == 1)
        client.sendall(b"GET /" + b"x" * (MAX_HEADER_BYTES + 1))
        assert cut_off(client) == b""
    until(lambda: here.n_jobs == 0)
    gate.open()
    here.idle()


def test_requests_that_are_sent_ahead_are_answered_in_order(here: Running) -> None:
    with connect(here) as client:
        data = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
        request = head(COMPLETIONS, len(data)) + data
        client.sendall(request + b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n" + head("/none", 0, "Connection: close"))
        found = received(client)
    assert re.findall(rb"HTTP/1.1 (\d+) ", found) == [b"200", b"200", b"404"]
    assert found.index(b"text_completion") < found.index(b'"live"')


def test_what_follows_a_last_request_is_ignored(here: Running, gate: Gate) -> None:
    gate.shut()
    data = json.dumps({"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True}).encode()
    with connect(here) as client:
        client.sendall(head(COMPLETIONS, len(data), "Connection: close") + data)
        until(lambda: here.n_running == 1)
        (other,) = here.server.server_state.connections
        client.sendall(b"no HTTP\r\n\r\n")
        until(lambda: other.conn.trailing_data[0] != b"")
        gate.open()
        assert received(client).startswith(b"HTTP/1.1 200 ")


# ---- D59: clients that take nothing -------------------------------------------------------------------------------


def test_d59_an_answer_that_nobody_takes_is_dropped(llm: ff.LLM, tmp_path: Path) -> None:
    with running(llm, tmp_path, stall_s=0.5) as here:
        data = json.dumps(LARGE).encode()
        clients = [connect(here) for _ in range(3)]
        for client, more in zip(clients, ((), ("Connection: close",), ()), strict=True):
            client.sendall(head(COMPLETIONS, len(data), *more) + data)
        clients[2].recv(1, socket.MSG_PEEK)
        clients[2].shutdown(socket.SHUT_WR)
        until(lambda: not here.server.server_state.connections)
        for client in clients:
            with client:
                start, _, body = cut_off(client).partition(b"\r\n\r\n")
                assert len(body) < length_in(start)


def test_d59_a_small_answer_that_nobody_takes_is_dropped(llm: ff.LLM, tmp_path: Path) -> None:
    """Of which so little is left that nobody would be told to pause."""
    with running(llm, tmp_path, stall_s=0.5) as here, connect(here) as client:
        until(lambda: bool(here.server.server_state.connections))
        (other,) = here.server.server_state.connections
        other.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        until(lambda: not here.server.server_state.connections)
        start, _, body = cut_off(client).partition(b"\r\n\r\n")
        assert len(body) < length_in(start) < 1 << 16


def test_d59_a_place_is_not_held_behind_an_answer_that_nobody_takes(llm: ff.LLM, tmp_path: Path) -> None:
    with running(llm, tmp_path, stall_s=0.5, buffer_bytes=4096) as here, connect(here) as client:
        for body in (LARGE, {**LONG, "stream": True}):
            data = json.dumps(body).encode()
            client.sendall(head(COMPLETIONS, len(data)) + data)
        until(lambda: here.metric("request_success_total", finished_reason="abort") == 1)
        here.idle()
        assert here.metric("request_success_total", finished_reason="length") == 1


def test_d59_who_takes_slowly_is_not_cut_off() -> None:
    """Of a connection on a stage: its buffer and its clock are the test's."""
    left, timers, aborted = [0], list[tuple[float, Callable[[], None]]](), []
    loop = SimpleNamespace(
        call_later=lambda delay, call, *args: (
            timers.append((delay, lambda: call(*args))) or SimpleNamespace(cancel=timers.clear)
        )
    )
    transport = SimpleNamespace(
        get_extra_info=lambda name: None,
        get_write_buffer_size=lambda: left[0],
        set_write_buffer_limits=lambda high: None,
        abort=lambda: aborted.append(True),
    )
    config = uvicorn.Config(app=lambda: None, log_config=None)
    one = connection.Connection(
        stall_s=7.0, most=1, config=config, server_state=ServerState(), app_state={}, _loop=loop
    )
    one.connection_made(transport)
    timers.clear()
    left[0] = 1000
    one.pause_writing()
    for n_bytes in (999, 500, 1):
        left[0] = n_bytes
        ((delay, expire),) = timers
        assert delay == 7.0
        timers.clear()
        expire()
        assert not aborted
    one.resume_writing()
    assert not timers
    left[0] = 5
    one.pause_writing()
    timers.pop()[1]()
    assert aborted


# ---- D61: clients that keep silent, and many ----------------------------------------------------------------------


def test_d61_who_sends_no_request_is_cut_off(llm: ff.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_S", 2.0)
    with running(llm, tmp_path) as here:
        silent, slow, second = connect(here), connect(here), connect(here)
        second.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert received(second, b'"live"}').startswith(b"HTTP/1.1 200 ")
        for one in (slow, second):
            one.sendall(b"GET /live HTTP/1.1\r\nHo")
        begin = time.monotonic()
        for one in (silent, slow, second):
            with one:
                assert cut_off(one) == b""
        assert time.monotonic() - begin < 20


def test_d61_there_are_only_so_many_connections(llm: ff.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one that there may be is served like the others."""
    monkeypatch.setattr(main, "MAX_CONNECTIONS", 8)
    with running(llm, tmp_path) as here, ExitStack() as stack:
        clients = [stack.enter_context(connect(here)) for _ in range(20)]
        for client in clients:
            with suppress(OSError):  # it has been cut off
                client.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = [first_of(client) for client in clients]
        assert answers.count(b"") == 12
        assert answers.count(b"HTTP/1.1 200 OK") == 8
        assert len(here.server.server_state.connections) == 8
        stack.close()
        until(lambda: not here.server.server_state.connections)
        assert here.client.get("/live").status_code == 200


@pytest.mark.parametrize(
    ("soft", "most"),
    [(resource.RLIM_INFINITY, 2048), (1 << 20, 2048), (2304, 2048), (2303, 2047), (1024, 768), (256, 128), (20, 10)],
)
def test_d61_connections_leave_files_for_all_else(monkeypatch: pytest.MonkeyPatch, soft: int, most: int) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (soft, resource.RLIM_INFINITY))
    config = main._config(make_app(ff.LLM, ServerOptions(model_name=NAME)))
    assert config.http.keywords["most"] == most


@pytest.mark.parametrize(
    ("soft", "hard", "then"),
    [
        (1024, 4096, (2304, 4096)),
        (1024, resource.RLIM_INFINITY, (2304, resource.RLIM_INFINITY)),
        (1024, 2000, (2000, 2000)),
        (1024, 1024, None),
        (4096, 4096, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_d61_a_limit_of_files_is_only_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, then: tuple[int, int] | None
) -> None:
    then_set: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: then_set.append(limits))
    main._allow_files(2304)
    assert then_set == ([] if then is None else [then])
