"""Requests over connections of their own, and when every part of an answer came."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SLOW_BYTES, SLOW_S = 8192, 0.01  # a slow reader takes so much at a time and pauses after it


@dataclass(frozen=True)
class Address:
    """Of a server on this machine: a UNIX socket where there is a path, else a port."""

    path: str | None = None
    port: int = 0

    async def connect(self, *, slow: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """`slow`: with as small a buffer as there can be."""
        one = socket.socket(socket.AF_INET if self.path is None else socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            one.setblocking(False)
            if slow:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BYTES)
            target: Any = ("127.0.0.1", self.port) if self.path is None else self.path
            await asyncio.get_running_loop().sock_connect(one, target)
            return await asyncio.open_connection(sock=one, limit=SLOW_BYTES if slow else 1 << 16)
        except BaseException:
            one.close()
            raise


@dataclass
class Call:
    """A request and what has come of it. Times are perf_counter's."""

    path: str
    body: Mapping[str, Any]
    sent_s: float = 0.0
    status: int = 0  # 0: there was no answer
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[tuple[float, bytes]] = field(default_factory=list)  # of the answer's body, as they came
    is_complete: bool = False

    async def run(self, address: Address, *, slow: bool = False, enough: int | None = None) -> None:
        """To the end of the answer, or until `enough` parts of it have come. Cancelled, it hangs up.

        Raises OSError and EOFError (an IncompleteReadError) where the server hangs up.
        """
        data = json.dumps(self.body).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        self.sent_s = perf_counter()
        reader, writer = await address.connect(slow=slow)
        trickle = None
        if slow:
            reader, source = asyncio.StreamReader(), reader
            trickle = asyncio.create_task(_trickle(source, reader))
        try:
            writer.write(head.encode() + data)
            self.status = int((await reader.readuntil(b"\r\n")).split()[1])
            while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
                name, _, value = line.decode("latin-1").partition(":")
                self.headers[name.lower()] = value.strip()
            async for part in self._read(reader):
                self.parts.append((perf_counter(), part))
                if len(self.parts) == enough:
                    return
            self.is_complete = True
        finally:
            writer.transport.abort()
            if trickle is not None:
                trickle.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        if "content-length" in self.headers:
            yield await reader.readexactly(int(self.headers["content-length"]))
            return
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]

    # ---- what it says -------------------------------------------------------------------------------------------

    def events(self) -> list[tuple[float, Any]]:
        """Of a stream: when each came, and its data, [DONE] left out."""
        found = [(at, one) for at, part in self.parts for one in part.split(b"\n\n")]
        data = [(at, one.removeprefix(b"data: ")) for at, one in found if one.startswith(b"data: ")]
        return [(at, json.loads(one)) for at, one in data if one != b"[DONE]"]

    def token_times(self) -> list[float]:
        """When the events with tokens came, of a stream."""
        return [at for at, event in self.events() for choice in event.get("choices", ()) if _has_token(choice)]

    def text(self) -> str | None:
        """Of a complete answer; None where an error broke it off."""
        if not self.body.get("stream"):
            bodies = [json.loads(part) for _, part in self.parts]
        else:
            bodies = [event for _, event in self.events()]
        if any("error" in body for body in bodies):
            return None
        return "".join(_text(choice) for body in bodies for choice in body["choices"])


def _text(choice: Mapping[str, Any]) -> str:
    said = choice.get("message") or choice.get("delta") or {}
    return str(choice.get("text") or said.get("content") or "")


def _has_token(choice: Mapping[str, Any]) -> bool:
    return choice["finish_reason"] is None and "role" not in choice.get("delta", ())


async def _trickle(source: asyncio.StreamReader, sink: asyncio.StreamReader) -> None:
    with suppress(OSError):
        while data := await source.read(SLOW_BYTES):
            sink.feed_data(data)
            await asyncio.sleep(SLOW_S)
    sink.feed_eof()


async def finished(address: Address, call: Call) -> Call:
    """Run to its end. Raises RuntimeError for an answer that is no success."""
    await call.run(address)
    if call.status != 200:
        raise RuntimeError(f"{call.status} for {call.path}: {b''.join(part for _, part in call.parts)!r}")
    return call


async def answered(address: Address, path: str, body: Mapping[str, Any]) -> Call:
    """As `finished`."""
    return await finished(address, Call(path, body))
