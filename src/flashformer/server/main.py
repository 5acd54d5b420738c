"""Running the application: sockets, connections, signals."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from ..engine import LLM
from ..engine.request import integer
from ..errors import RequestError
from ..log import log
from .app import make_app
from .connection import Connection
from .guard import is_loopback
from .options import MAX_CONNECTIONS, MAX_HEADER_BYTES, ServerOptions
from .service import Service

KEEP_ALIVE_S = 30
OTHER_FILES = 256  # beside connections
CLOSING_S = 2  # in which connections must close when all requests are answered


@dataclass(frozen=True)
class Listen:
    """Where: an address, or a UNIX socket, which only its owner may use. Port 0 is any that is free."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None

    def __post_init__(self) -> None:
        integer("port", self.port, (0, 65535))
        if self.uds == "":  # to the system: a name of its own choice, which everybody may use
            raise RequestError("--uds: the path is empty")


def serve(
    source: LLM | Callable[[], LLM], options: ServerOptions, listen: Listen, *, ending: Callable[[], None] | None = None
) -> int:
    """Serves until a signal comes; gives the signal. For the main thread.

    The first SIGTERM or SIGINT lets running requests come to their end for options.shutdown_s, the second ends all at
    once. `ending` is called when nothing is waited for but connections that close and threads that end. Raises
    RequestError for an address that cannot be used, and what loading or the engine failed with.
    """
    options = replace(options, any_host=listen.uds is not None, host=listen.host.lower())
    _allow_files(MAX_CONNECTIONS + OTHER_FILES)
    with _sockets(listen, options) as sockets:
        app = make_app(source, options)
        service: Service = app.state.service
        server = Server(_config(app), service, ending)
        asyncio.run(server.serve(sockets=sockets))
    if service.failure is not None:
        raise service.failure
    return server.signals[0] if server.signals else 0


def _allow_files(n: int) -> None:
    """That many may be open, as far as the system lets this process decide: many shells set 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n if hard == resource.RLIM_INFINITY else min(n, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _most_connections() -> int:
    """Of which each is a file, beside others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MAX_CONNECTIONS + OTHER_FILES:
        return MAX_CONNECTIONS
    most = max(soft - OTHER_FILES, soft // 2)
    log.warning(f"at most {most} connections, because only {soft} files may be open: raise `ulimit -n`")
    return most


def _config(app: Any) -> uvicorn.Config:
    connection = partial(Connection, stall_s=app.state.service.options.stall_s, most=_most_connections())
    return uvicorn.Config(
        app,
        http=connection,  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSING_S,
    )


class Server(uvicorn.Server):
    """Keeps answering while requests come to their end: probes must hear of a shutdown, not be refused."""

    def __init__(self, config: uvicorn.Config, service: Service, ending: Callable[[], None] | None = None) -> None:
        super().__init__(config)
        self.signals: list[int] = []
        self._service, self._ending = service, ending
        self._draining: asyncio.Task[None] | None = None
        service.when_broken = self._leave

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signals.append(sig)
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._draining is None:
            log.info(
                f"{signal.Signals(self.signals[0]).name}: running requests come to their end; again to end at once"
            )
            self._draining = self._loop.create_task(self._drain())
        else:
            self._service.abort()
            self.force_exit = True
            self._leave()

    async def _drain(self) -> None:
        try:
            await self._service.drain()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._ending is not None and not self.should_exit:
            self._ending()
        self.should_exit = True


@contextmanager
def _sockets(listen: Listen, options: ServerOptions) -> Iterator[list[socket.socket]]:
    """Open for connections, which are answered once the server runs. Raises RequestError."""
    opened = [_unix_socket(listen.uds)] if listen.uds is not None else _inet_sockets(listen, options)
    try:
        yield opened
    finally:
        for one in opened:
            one.close()
        if listen.uds is not None:
            with suppress(OSError):
                os.unlink(listen.uds)


def _inet_sockets(listen: Listen, options: ServerOptions) -> list[socket.socket]:
    """One for every address of the host."""
    try:
        found = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # the second for a name that no DNS could hold
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"--host {listen.host}: no such address: {reason}") from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    if options.api_key is None and not all(is_loopback(str(address[0])) for _, address in addresses):
        raise RequestError(
            f"--host {listen.host}: others could use this server without a key: give --api-key or FLASHFORMER_API_KEY, "
            "or listen on 127.0.0.1"
        )
    try:
        opened = _listening(addresses, listen.port)
    except OSError as error:
        raise RequestError(
            f"{listen.host}:{listen.port}: cannot listen there: {error.strerror}; choose another --host or --port"
        ) from None
    port = opened[0].getsockname()[1]
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    log.info(f"{options.model_name} at http://{host}:{port}")
    return opened


def _listening(addresses: Sequence[tuple[int, Any]], port: int) -> list[socket.socket]:
    """All at one port, at every address that this machine has: `localhost` is often an IPv6 address, too, which a
    machine without IPv6 lacks. Raises OSError where there is none, and where one cannot be used.
    """
    opened: list[socket.socket] = []
    absent = OSError()
    with ExitStack() as stack:
        for family, address in addresses:
            try:
                one = stack.enter_context(socket.create_server((address[0], port, *address[2:]), family=family))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
            else:
                opened.append(one)
                port = one.getsockname()[1]
        if not opened:
            raise absent
        stack.pop_all()
    return opened


def _unix_socket(path: str) -> socket.socket:
    """Only its owner may connect. What a process that was killed left behind is replaced."""
    _clear(path)
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        one.bind(path)
        one.listen()
    except OSError as error:
        one.close()
        raise RequestError(f"--uds {path}: cannot listen there: {error.strerror or error}") from None
    finally:
        os.umask(mask)
    log.info(f"listening at {path}")
    return one


def _clear(path: str) -> None:
    """Removes a socket that nobody listens at. Raises RequestError where something else is there."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise RequestError(f"--uds {path}: there is a file that is no socket: choose another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except OSError as error:
        raise RequestError(f"--uds {path}: cannot be used: {error.strerror or error}") from None
    raise RequestError(f"--uds {path}: another server listens there: choose another path")
