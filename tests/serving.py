"""A server in a thread of the test, at a UNIX socket and a port, and a model whose forwards the test can hold back."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from folders import model_folder
from prometheus_client.parser import text_string_to_metric_families
from threads import BOUND_S, until

import flashformer as ff
from flashformer.server import ServerOptions, main, make_app
from flashformer.server.service import Service, State

NAME = "tiny"
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
PROMPT = "def f(x):"
CHAT = [{"role": "user", "content": PROMPT}]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}


def chat_folder(path: Path, **overrides: Any) -> Path:
    """Random weights, byte tokens, 512 positions, and a chat template."""
    folder = model_folder(path, **{"max_position_embeddings": 512, **overrides})
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def load(folder: Path, streams: int = 2) -> ff.LLM:
    return ff.load(folder, device="cpu", dtype="f32", threads=1, streams=streams)


class Gate:
    """Stands before every forward of a model. Shut, it lets through as many as it is told to."""

    def __init__(self, llm: ff.LLM) -> None:
        self._forward, self._permits, self._is_open = llm.kernel.forward, threading.Semaphore(0), True
        self.n_rows: list[int] = []  # of the forwards that were run
        self.n_asked = 0
        self._errors: list[Exception] = []  # raised instead of running
        llm.kernel.forward = self  # type: ignore[method-assign,assignment]

    def __call__(self, n_rows: int, *again: Any) -> None:
        self.n_asked += 1
        if not self._is_open:
            assert self._permits.acquire(timeout=BOUND_S)
        if self._errors:
            raise self._errors.pop()
        self.n_rows.append(n_rows)
        self._forward(n_rows, *again)

    def shut(self) -> None:
        self._permits, self._is_open = threading.Semaphore(0), False

    def fail(self, error: Exception, times: int = 1000) -> None:
        self._errors = [error] * times

    def let(self, n: int) -> None:
        self._permits.release(n)

    def open(self) -> None:
        self._is_open = True
        self._permits.release(64)  # for who waits now


class Running:
    """A server, how it stands, and a client of it."""

    def __init__(self, server: main.Server, service: Service, path: Path, port: int) -> None:
        self.server, self.service, self.path, self.url = server, service, path, f"http://127.0.0.1:{port}"
        self.client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server", timeout=60)

    @property
    def n_running(self) -> int:
        return 0 if self.service.loaded is None else self.service.loaded.admission.n_running

    @property
    def n_waiting(self) -> int:
        return 0 if self.service.loaded is None else self.service.loaded.admission.n_waiting

    @property
    def n_jobs(self) -> int:
        return len(self.service._jobs)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def events(self, path: str, **body: Any) -> list[Any]:
        """The data of all events of a stream, of which [DONE] is left as it is."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            response.read() if response.status_code != 200 else None
            assert response.status_code == 200, response.text
            return list(read_events(response))

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series of /metrics."""
        wanted = {"model_name": NAME, **labels}
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        (found,) = [s.value for s in samples if s.name == f"flashformer:{name}" and s.labels == wanted]
        return float(found)

    def idle(self) -> None:
        until(lambda: self.n_jobs == self.n_running == self.n_waiting == 0)


def read_events(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


@contextmanager
def running(
    source: ff.LLM | Callable[[], ff.LLM], folder: Path, *, wait: bool = True, **options: Any
) -> Iterator[Running]:
    """At a socket in `folder`, and at any free port. `wait`: until it is ready."""
    path = folder / "socket"
    app = make_app(source, ServerOptions(**{"model_name": NAME, "any_host": True, **options}))
    server = main.Server(main._config(app), app.state.service)
    sockets = [main._unix_socket(str(path)), socket.create_server(("127.0.0.1", 0))]
    here = Running(server, app.state.service, path, sockets[1].getsockname()[1])
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)))
    thread.start()
    try:
        until(lambda: server.started)
        until(lambda: not wait or here.service.state in (State.READY, State.BROKEN))
        yield here
    finally:
        here.client.close()
        for _ in range(2):
            stop(here)
        thread.join(BOUND_S)
        for one in sockets:
            one.close()
        path.unlink()
        assert not thread.is_alive()


def stop(here: Running) -> None:
    """As a signal does."""
    with suppress(RuntimeError):  # it has ended
        here.server.handle_exit(signal.SIGTERM, None)


# ---- requests byte by byte ----------------------------------------------------------------------------------------


def connect(here: Running) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(BOUND_S)
    client.connect(str(here.path))
    return client


def head(path: str, n_bytes: int | None, *more: str) -> bytes:
    """Of a POST with a JSON body."""
    length = [] if n_bytes is None else [f"Content-Length: {n_bytes}"]
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *length, *more, "", ""]
    return "\r\n".join(lines).encode()


def sent(here: Running, path: str, **body: Any) -> socket.socket:
    """A connection on which this was asked, and nothing read."""
    client, data = connect(here), json.dumps(body).encode()
    client.sendall(head(path, len(data)) + data)
    return client


def received(client: socket.socket, until_text: bytes | None = None) -> bytes:
    """All until the server closes, or until this text, which must come."""
    found = b""
    while until_text is None or until_text not in found:
        data = client.recv(1 << 16)
        if not data:
            assert until_text is None, found
            return found
        found += data
    return found
