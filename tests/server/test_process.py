"""`flashformer serve` as a process: where it listens, how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from threads import until

import flashformer as ff
from flashformer.server import Listen, ServerOptions, main
from flashformer.server.options import MAX_CONNECTIONS

LONG = {
    "messages": [{"role": "user", "content": "def f"}],
    "max_tokens": 100_000,
    "ignore_eos": True,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 20,
}  # much to send, so that it stands still where nobody reads


@contextmanager
def serving(
    *options: str, model: str = "demo", program: tuple[str, ...] = ("-m", "flashformer.cli"), **env: str
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *program, "serve", model, "--threads", "1", "--ctx", "512", *options]
    environment = {**os.environ, "FLASHFORMER_API_KEY": "", **env}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str], says: str) -> re.Match[str]:
    """The first line on stderr that says this, which must come."""
    assert process.stderr is not None
    seen = []
    for text in process.stderr:
        seen.append(text)
        if found := re.search(says, text):
            return found
    raise AssertionError("".join(seen))


def at(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x", timeout=60)


def test_it_answers_at_the_address_that_it_names() -> None:
    with serving("--port", "0", "--served-model-name", "mine") as process:
        address = line(process, r"mine at (http://127\.0\.0\.1:\d+)")[1]
        line(process, "mine is ready: 4 streams of 512 positions")
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "def f", "max_tokens": 4, "model": "mine"})
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_d62_sigterm_drains_and_the_second_ends(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("--uds", str(path)) as process:
        line(process, "is ready")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with at(path) as client, client.stream("POST", "/v1/chat/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            line(process, "SIGTERM")
            with at(path) as other:
                until(lambda: other.get("/health").status_code == 503)
                assert other.get("/live").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert not path.exists()


def test_d62_after_the_timeout_streams_end_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("--uds", str(path), "--shutdown-timeout", "0.1") as process:
        line(process, "is ready")
        with at(path) as client, client.stream("POST", "/v1/chat/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            line(process, "SIGTERM")
            time.sleep(0.5)
            *_, last = [text for text in lines if text]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        assert process.wait(60) == 0


NEVER = """
import sys, threading
from {module} import {name}
from flashformer.cli import main, serve

def never(*_):
    print("never ends", file=sys.stderr, flush=True)
    threading.Event().wait()

serve.END_S = 0.5
{name}.{method} = never
main()
"""


def test_d62_a_model_that_does_not_close_does_not_keep_the_process(tmp_path: Path) -> None:
    never = NEVER.format(module="flashformer.engine", name="LLM", method="close")
    with serving("--uds", str(tmp_path / "s"), program=("-c", never)) as process:
        line(process, "is ready")
        process.send_signal(signal.SIGTERM)
        line(process, "never ends")
        assert process.wait(60) == 1
        line(process, "in never")  # a traceback


def test_d62_the_second_signal_ends_although_an_answer_does_not(tmp_path: Path) -> None:
    never = NEVER.format(module="flashformer.server.work", name="Work", method="run")
    path = tmp_path / "s"
    with serving("--uds", str(path), program=("-c", never)) as process, socket.socket(socket.AF_UNIX) as client:
        line(process, "is ready")
        client.connect(str(path))
        data = json.dumps(LONG).encode()
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
        )
        line(process, "never ends")
        process.send_signal(signal.SIGTERM)
        line(process, "again to end at once")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1


def test_d63_what_a_killed_server_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("--uds", str(path)) as process:
        line(process, "is ready")
        with serving("--uds", str(path)) as second:
            assert second.wait(60) == 2
            line(second, "another server listens there")
        process.kill()
        process.wait(60)
    assert path.exists()
    with serving("--uds", str(path)) as process, at(path) as client:
        line(process, "is ready")
        assert client.get("/health").status_code == 200
    path.unlink()
    path.write_text("kept")
    with serving("--uds", str(path)) as process:
        assert process.wait(60) == 2
    assert path.read_text() == "kept"


def test_d65_the_key_may_come_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("--uds", str(path), FLASHFORMER_API_KEY="k") as process, at(path) as client:
        line(process, "is ready")
        assert client.get("/health").status_code == 401
        assert client.get("/health", headers={"authorization": "Bearer k"}).status_code == 200


def test_d61_a_low_limit_of_files_is_raised_for_connections(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with serving("--uds", str(tmp_path / "s")) as process:
            line(process, "is ready")
            soft, _ = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert soft > MAX_CONNECTIONS or soft == before[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--host", "0.0.0.0"), "--api-key or FLASHFORMER_API_KEY"),
        (("--host", "::"), "--api-key or FLASHFORMER_API_KEY"),
        (("--host", "no.such.host.invalid"), "no such address"),
        (("--host", "a" * 64 + ".example"), "no such address"),
        (("--host", "a..example"), "no such address"),
        (("--uds", "s"), "instead of an address: leave out --port"),
        (("--uds", "s", "--host", "127.0.0.1"), "leave out --host and --port"),
        (("--port", "70000"), "port=70000"),
        (("--max-waiting", "-1"), "max_waiting=-1"),
        (("--shutdown-timeout", "nan"), "shutdown_timeout"),
        (("--streams", "17"), "streams"),
        (("--api-key", "two words"), "API key"),
    ],
)
def test_d66_what_cannot_be_served_is_said(options: tuple[str, ...], says: str) -> None:
    with serving("--port", "0", *options) as process:
        line(process, f"{says}|is ready")
        assert process.wait(60) == 2


def test_a_model_that_is_none_is_the_users_error(tmp_path: Path) -> None:
    with serving("--port", "0", model=str(tmp_path / "none"), HF_HUB_OFFLINE="1") as process:
        line(process, "LoadError|RequestError")
        assert process.wait(60) == 2


@pytest.mark.parametrize("code", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_an_address_that_this_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As ::1 for localhost where there is no IPv6."""
    create = socket.create_server
    missing, other = {"::1"}, [(socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", 0))]

    def create_server(address: tuple[str, int], **further: Any) -> socket.socket:
        if address[0] in missing:
            raise OSError(code, os.strerror(code))
        return create(address, **further)

    found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in other]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_server", create_server)
    options = ServerOptions(model_name="x")
    with main._sockets(Listen("localhost", 0), options) as (one,):
        assert one.getsockname()[0] == "127.0.0.1"
    missing.add("127.0.0.1")
    with pytest.raises(ff.RequestError, match=os.strerror(code)), main._sockets(Listen("localhost", 0), options):
        pass


def test_an_address_that_is_taken_is_refused_whatever_others_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        addresses = [("127.0.0.2", port), ("127.0.0.1", port)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        options = ServerOptions(model_name="x")
        with pytest.raises(ff.RequestError, match="cannot listen"), main._sockets(Listen("localhost", port), options):
            pass
        socket.create_server(("127.0.0.2", port)).close()  # was let go


def test_d66_a_path_that_is_none_is_refused() -> None:
    with pytest.raises(ff.RequestError, match="path is empty"):
        Listen(uds="")
