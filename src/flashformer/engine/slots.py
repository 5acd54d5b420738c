"""Whose turn it is to run a forward, and which sequence owns which slot of the KV cache."""

from __future__ import annotations

import os
import threading
import time

from ..errors import DeviceError, RequestError


class Turns:
    """`with turns.lock: turns.check()` comes before every use of the kernel.

    The lock is a plain one and entered directly, because then an interrupt cannot come between taking it and
    the block that gives it back.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False

    def check(self) -> None:
        """Raises DeviceError where the kernel cannot be used: after close, and in a forked child."""
        if os.getpid() != self._pid:
            raise DeviceError(
                f"the model was loaded in process {self._pid}, and this is a forked child ({os.getpid()}), which has "
                "none of its threads: load it again here, or start processes with 'spawn'"
            )
        if self._closed:
            raise DeviceError("the model is closed: load it again")

    def close(self) -> bool:
        """Waits for the forward that runs and refuses all later ones. False if that was done before."""
        with self.lock:
            first, self._closed = not self._closed, True
            return first


class Slots:
    """A request holds one slot from its first forward until it ends, is closed or is garbage collected.

    A request that finds none free waits for another thread to give one back, for at most `wait_s`. Where every
    slot is held by the asking thread itself, waiting could never end, so that is an error at once.
    """

    def __init__(self, n: int, wait_s: float) -> None:
        self._owners: list[int | None] = [None] * n  # thread that holds the slot
        self._wait_s = wait_s
        self._changed = threading.Condition(threading.RLock())  # reentrant: a finalizer may release at any point
        self._closed = False

    def acquire(self) -> int:
        """A free slot. Raises RequestError if none can become free, DeviceError after close."""
        me, deadline = threading.get_ident(), time.monotonic() + self._wait_s
        with self._changed:
            while None not in self._owners:
                if self._closed:
                    break
                if all(owner == me for owner in self._owners):
                    raise RequestError(
                        f"all {len(self._owners)} slots are held by streams that this thread left open: "
                        "finish or close one, or load with more streams"
                    )
                if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    raise RequestError(
                        f"no slot became free within {self._wait_s:g} s ({len(self._owners)} in use): "
                        "close streams that are no longer read, or load with more streams"
                    )
            if self._closed:
                raise DeviceError("the model is closed: load it again")
            slot = self._owners.index(None)
            self._owners[slot] = me
            return slot

    def release(self, slot: int) -> None:
        with self._changed:
            self._owners[slot] = None
            self._changed.notify()

    def close(self) -> None:
        """Refuses all later requests and wakes those that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
