"""One connection of a client that keeps silent, takes nothing, sends too much ahead, or is one too many."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import CLOSE, ApiError
from .options import MAX_HEADER_BYTES

HEADERS_S = 10.0  # in which the head of a request must have come in


class Connection(H11Protocol):
    """Cut off where no request comes for HEADERS_S, nothing that was sent is taken for `stall_s`, or there are `most`.

    Requests find in their scope's state how to cut it off without waiting for what was sent to be taken.
    """

    _head_due: asyncio.TimerHandle | None = None
    _less_due: asyncio.TimerHandle | None = None

    def __init__(self, *, stall_s: float, most: int, **given: Any) -> None:
        super().__init__(**given)
        self._stall_s, self._most = stall_s, most

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        transport.set_write_buffer_limits(0)  # writing pauses whenever something is left to be sent
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_due, self._less_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _has_whole_request(self) -> bool:
        return self._has_request and not self.cycle.more_body

    # ---- a client that keeps silent ---------------------------------------------------------------------------

    def _expect_head(self) -> None:
        """Sets a time for the head of a request, unless there is one, or a time for it."""
        if self._has_request and self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None
        elif not self._has_request and self._head_due is None:
            self._head_due = self.loop.call_later(HEADERS_S, self._give_up)

    def _give_up(self) -> None:
        self._head_due = None
        if not self._has_request:
            self.transport.abort()

    # ---- a client that takes nothing --------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_less()

    def resume_writing(self) -> None:
        if self._less_due is not None:
            self._less_due.cancel()
        super().resume_writing()

    def _expect_less(self) -> None:
        """Sets a time in which some of what is left must be taken, whoever waits for that: often nobody does."""
        n_bytes = self.transport.get_write_buffer_size()
        self._less_due = self.loop.call_later(self._stall_s, self._require_less_than, n_bytes)

    def _require_less_than(self, n_bytes: int) -> None:
        if self.transport.get_write_buffer_size() < n_bytes:
            self._expect_less()
        else:
            self.transport.abort()

    # ---- what comes after a request, or is none ---------------------------------------------------------------

    def handle_events(self) -> None:
        """Reads on where something follows a request: else nobody would see its client leave."""
        super().handle_events()
        if self._has_whole_request:
            self.flow.resume_reading()
            if len(self.conn.trailing_data[0]) > MAX_HEADER_BYTES:
                self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Called while h11's error is handled, which knows the status. What follows a last request is ignored."""
        if self._has_whole_request:
            return
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        refusal = (
            ApiError(status, f"headers of more than {MAX_HEADER_BYTES} bytes", code="headers_too_large", headers=CLOSE)
            if status == 431
            else ApiError(status, f"no HTTP request: {error}", headers=CLOSE)
        ).response()
        events = (
            h11.Response(status_code=status, headers=refusal.raw_headers),
            h11.Data(data=bytes(refusal.body)),
            h11.EndOfMessage(),
        )
        try:
            data = b"".join(self.conn.send(event) or b"" for event in events)
        except h11.LocalProtocolError:  # an answer has begun
            self.transport.abort()
        else:
            self.transport.write(data)
            self.transport.close()
