"""What stands before every request: who may ask, under which name, how much, and how slowly."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import CLOSE, RETRY, ApiError, invalid
from .options import MAX_BODIES_BYTES, MAX_BODY_BYTES, MAX_HEADER_BYTES, UNCOUNTED_BODY_BYTES, ServerOptions

T = TypeVar("T")


class Guard:
    """Middleware: asks for the API key on every path, known or not; without a key, for a name of this machine.

    A page of another site can make a browser send requests here under a name of its own that resolves to this machine.
    The key may also be the password of HTTP's Basic scheme, which browsers ask their users for.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options
        self._key = None if options.api_key is None else _digest(options.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))) is not None:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        if sum(len(name) + len(value) for name, value in request.headers.raw) > MAX_HEADER_BYTES:
            return ApiError(
                431, f"headers of more than {MAX_HEADER_BYTES} bytes", code="headers_too_large", headers=CLOSE
            )
        if self._key is not None:
            given = _credentials(request.headers.get("authorization", ""))
            if hmac.compare_digest(_digest(given), self._key):
                return None
            scheme = "Basic" if request.scope["path"] == "/" else "Bearer"
            headers = {"www-authenticate": f'{scheme} realm="flashformer"', **CLOSE}
            message = "no API key, or a wrong one: send it as `Authorization: Bearer KEY`"
            return ApiError(401, message, code="invalid_api_key", headers=headers)
        name = _host_name(request.headers.get("host", ""))
        if self._options.any_host or is_loopback(name) or name == self._options.host:
            return None
        message = "the Host header names another machine: use a loopback address, or start the server with an API key"
        return ApiError(403, message, code="host_not_allowed", headers=CLOSE)


def _digest(key: bytes) -> bytes:
    """Of one length, so that comparing says nothing of the key's."""
    return hashlib.sha256(key).digest()


def _credentials(header: str) -> bytes:
    scheme, _, rest = header.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return rest.strip().encode() if scheme.lower() == "bearer" else b""


def _host_name(header: str) -> str:
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if ":" in name else name


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine and no network. Names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class ClientGone(Exception):  # noqa: N818  (nobody is left to be told of an error)
    """The client closed its connection."""


class Bodies:
    """The bodies of all requests that were not answered, whose sum is bounded.

    The first UNCOUNTED_BODY_BYTES of each do not count: large ones that come slowly lock out no small one.
    """

    def __init__(self) -> None:
        self._n_bytes = 0

    @contextmanager
    def account(self) -> Iterator[Account]:
        """Gives back at the end what was added inside."""
        account = Account(self)
        try:
            yield account
        finally:
            self._n_bytes -= account.n_counted

    def add(self, n_bytes: int) -> None:
        if self._n_bytes + n_bytes > MAX_BODIES_BYTES:
            message = "the requests on their way fill the memory set aside for them: ask again later"
            raise ApiError(503, message, code="busy", headers={**RETRY, **CLOSE})
        self._n_bytes += n_bytes


class Account:
    """The part of one request."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self._n_bytes, self.n_counted = bodies, 0, 0

    def add(self, n_bytes: int) -> None:
        """Raises ApiError."""
        total = self._n_bytes + n_bytes
        if total > MAX_BODY_BYTES:
            message = f"the body is larger than {MAX_BODY_BYTES} bytes, the most that is accepted"
            raise ApiError(413, message, code="body_too_large", headers=CLOSE)
        n_counted = max(total - UNCOUNTED_BODY_BYTES, 0)
        self._bodies.add(n_counted - self.n_counted)
        self._n_bytes, self.n_counted = total, n_counted


async def read_body(request: Request, account: Account, options: ServerOptions) -> bytes:
    """The body, which must be JSON by its header. Raises ApiError, ClientGone."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type {kind or 'is missing'}: expected application/json"
        raise ApiError(415, message, code="unsupported_media_type", headers=CLOSE)
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdecimal():
        raise invalid("Content-Length is no number")
    if int(length[:20]) > MAX_BODY_BYTES:
        account.add(MAX_BODY_BYTES + 1)
    parts, more = [], True
    try:
        async with asyncio.timeout(options.body_s):
            while more:
                event = await request.receive()
                if event["type"] == "http.disconnect":
                    raise ClientGone
                part = event.get("body", b"")
                account.add(len(part))
                parts.append(part)
                more = event.get("more_body", False)
    except TimeoutError:
        message = f"the body did not come within {options.body_s:g} s"
        raise ApiError(408, message, code="timeout", headers=CLOSE) from None
    return b"".join(parts)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first. Raises ClientGone, and as `work`."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for other in (task, watch):
            other.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
