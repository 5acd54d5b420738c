"""Which requests run and which wait: first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque

from .errors import RETRY, ApiError


class Admission:
    """`n_places` requests run, `max_waiting` wait, further ones are refused. For the event loop's thread alone.

    A request that waits is a future in a line. Who has entered must leave, once.
    """

    def __init__(self, n_places: int, max_waiting: int) -> None:
        self._n_free, self._n_places, self._max_waiting = n_places, n_places, max_waiting
        self._line: deque[asyncio.Future[None]] = deque()
        self._refusal: ApiError | None = None

    @property
    def n_running(self) -> int:
        return self._n_places - self._n_free

    @property
    def n_waiting(self) -> int:
        return len(self._line)

    async def enter(self) -> None:
        """Returns when the caller may run. Cancelled, it has left the line. Raises ApiError."""
        if self._refusal is not None:
            raise self._refusal
        if self._n_free:
            self._n_free -= 1
            return
        if len(self._line) >= self._max_waiting:
            raise ApiError(
                429,
                f"{self._n_places} requests run and {len(self._line)} wait, which is all this server takes: "
                "ask again later",
                code="queue_full",
                headers=RETRY,
            )
        place = asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.leave()  # it was let in and cancelled at once
            elif place in self._line:
                self._line.remove(place)
            raise

    def leave(self) -> None:
        """Gives the place to the next one."""
        while self._line:
            place = self._line.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._n_free += 1

    def refuse(self, error: ApiError) -> None:
        """Turns away those who wait, and all who come."""
        self._refusal = error
        while self._line:
            place = self._line.popleft()
            if not place.done():
                place.set_exception(error)
