"""From the thread that makes an answer to the event loop that sends it, and back again when it is to stop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Gone(Exception):  # noqa: N818  (no error: nobody wants the answer any more)
    """Raised in the thread when whoever took the answer has closed the bridge."""


class Bridge:
    """Holds `n_bytes` that were put and not taken, and the piece that goes beyond: then the thread waits, and so does
    its sequence.

    `begin`, `put`, `check`, `cancelling` and `end` are for one thread; `begun`, `take`, `close` and `fail` for the
    loop's. After `close` the thread ends within one forward; the loop hears of every end of the thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, n_bytes: int) -> None:
        self._loop = loop
        self._room = threading.Condition()  # guards all that follows but `_changed`
        self._left = n_bytes
        self._pieces: deque[bytes] = deque()
        self._cancel: Callable[[], None] | None = None
        self._closed = self._has_begun = self._has_ended = False
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    # ---- the thread -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Says that the request was accepted: what goes wrong from now on is part of the answer."""
        self._has_begun = True
        self._wake()

    def put(self, piece: bytes) -> None:
        """Waits for room. Raises Gone."""
        with self._room:
            self._room.wait_for(lambda: self._closed or self._left > 0)
            self.check()
            self._pieces.append(piece)
            self._left -= len(piece)
        self._wake()

    def check(self) -> None:
        """Raises Gone."""
        if self._closed:
            raise Gone

    @contextmanager
    def cancelling(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Inside, `close` calls `cancel`, in its own thread. Raises Gone."""
        with self._room:
            self.check()
            self._cancel = cancel
        try:
            yield
        finally:
            with self._room:
                self._cancel = None

    def end(self, error: BaseException | None = None, last: bytes = b"") -> None:
        """Nothing follows but these bytes, for which there is always room, and this error, if there is one."""
        with self._room:
            if last and not self._closed:
                self._pieces.append(last)
            self._error = self._error or error
            self._has_ended = True
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it whoever took the answer
            self._loop.call_soon_threadsafe(self._changed.set)

    # ---- the loop -------------------------------------------------------------------------------------------

    async def begun(self, deadline: float) -> None:
        """Returns when the request was accepted. Raises what ended it before that, and TimeoutError at `deadline`."""
        await self._until(lambda: self._has_begun or self._has_ended, deadline)
        if not self._has_begun and self._error is not None:
            raise self._error

    async def take(self, deadline: float) -> bytes:
        """All pieces since the last call, at least one, as one; b"" at the end.

        Raises what the thread ended with or `fail` was given, and TimeoutError at `deadline`, in the loop's time.
        """
        if self._loop.time() >= deadline:
            raise TimeoutError
        await self._until(lambda: self._has_ended or bool(self._pieces), deadline)
        with self._room:
            taken = b"".join(self._pieces)
            self._pieces.clear()
            self._left += len(taken)
            self._room.notify()
        if not taken and self._error is not None:
            raise self._error
        return taken

    async def _until(self, condition: Callable[[], bool], deadline: float) -> None:
        while not (self._closed or condition()):
            self._changed.clear()
            if condition():  # became true between the two; what comes later sets the event again
                return
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()

    def close(self) -> None:
        """Nobody takes any more. The sequence ends within one forward. May be called again."""
        with self._room:
            if self._closed:
                return
            self._closed, cancel = True, self._cancel
            self._room.notify()
        self._changed.set()
        if cancel is not None:
            cancel()

    def fail(self, error: BaseException) -> None:
        """Ends the answer here: `take` gives what there is, then raises `error`."""
        with self._room:
            if not self._has_ended:
                self._error = error
        self.close()
