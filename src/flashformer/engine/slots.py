"""Whose turn it is to run a forward, and which sequence owns which slot of the KV cache."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError, FlashformerError, RequestError

P = ParamSpec("P")
T = TypeVar("T")

LOOK_S = 0.05  # a thread in line looks at its place so often even if nobody wakes it
LOOK_AGAIN_S = 1.0  # a request that waits for a slot looks so often for one whose holder is gone
NESTED_S = 5.0  # a thread that holds all slots itself waits so long for another thread to go on with one of them


class Turns:
    """`take` is how the kernel is used: threads come to it one at a time, in the order in which they asked.

    `lock` is what keeps two of them apart (`with turns.lock: turns.check()` does too, out of order). It is a plain one
    and entered directly, because then an interrupt cannot come between taking it and the block that gives it back. A
    plain lock knows no order, so those who find it taken also stand in a line. The line protects nothing: a place
    that an interrupt left behind in it is passed over after a while.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._line: list[threading.Lock] = []  # a place is a lock that its thread waits for; changed under the GIL
        self._pid = os.getpid()
        self._closed = False

    def take(self, use: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `use` returns, run when all who asked before have had their turn. Raises DeviceError as `check`."""
        place = None
        try:
            if self._line or self.lock.locked():
                place = self._stand_in_line()
            with self.lock:
                if place is not None:
                    self._leave(place)
                self.check()
                return use(*args, **kwargs)
        finally:
            if place is not None:
                self._leave(place)
            if self._line:
                self._wake_first()

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
        if os.getpid() != self._pid:  # a fork may have copied the lock while it was held: nobody here gives it back
            first, self._closed = not self._closed, True
            return first
        with self.lock:
            first, self._closed = not self._closed, True
            return first

    @property
    def n_waiting(self) -> int:
        return len(self._line)

    def _stand_in_line(self) -> threading.Lock:
        """Returns when the caller is first and the lock is free. It keeps its place until it has the lock, so that
        whoever comes now stands behind it."""
        self.check()  # in a forked child the line would never move
        place = threading.Lock()
        place.acquire()
        stale = None
        try:
            self._line.append(place)
            while place in self._line and (self._line[0] is not place or self.lock.locked()):
                if place.acquire(timeout=LOOK_S):
                    continue
                with suppress(IndexError):
                    first, idle = self._line[0], not self.lock.locked()
                    if idle and first is stale and first is not place:
                        self._leave(first)  # its thread is gone
                    stale = first if idle else None
        except BaseException:
            self._leave(place)
            raise
        return place

    def _leave(self, place: threading.Lock) -> None:
        with suppress(ValueError):
            self._line.remove(place)

    def _wake_first(self) -> None:
        with suppress(IndexError, RuntimeError):  # gone meanwhile, or woken already
            self._line[0].release()


class _Lease:
    """Held by the frame of whoever holds a slot."""

    __slots__ = ("__weakref__",)


class Held:
    """The token ids that a slot holds: `ids[:n]` at positions 0 to n - 1."""

    __slots__ = ("ids", "n")

    def __init__(self, ids: NDArray[np.int32], n: int = 0) -> None:
        self.ids, self.n = ids, n


class Slot:
    """The KV cache of one sequence. What it holds is another object for whoever takes it next, so that a forward that
    was under way for the one before has nothing to write to."""

    __slots__ = ("held", "index", "lease", "miss", "n_slots", "owner", "used")

    def __init__(self, index: int, n_slots: int, ctx: int) -> None:
        self.index = index
        self.n_slots = n_slots
        self.held = Held(np.zeros(ctx, np.int32))
        self.miss: str | None = None  # why whoever took it found no more of its prompt
        self.owner: int | None = None  # thread that took it, or last went on with its sequence; None: free
        self.lease: weakref.ref[_Lease] | None = None  # dead: whoever took it is gone without a word
        self.used = 0  # grows with every release; 0: holds nothing worth keeping

    @property
    def ids(self) -> NDArray[np.int32]:
        return self.held.ids

    @property
    def n(self) -> int:
        return self.held.n

    @property
    def is_free(self) -> bool:
        return self.owner is None or (self.lease is not None and self.lease() is None)

    def shared(self, ids: NDArray[np.int32]) -> int:
        """How many tokens at the beginning of `ids` the cache holds."""
        n = min(self.n, len(ids))
        differ = np.flatnonzero(self.ids[:n] != ids[:n])
        return int(differ[0]) if len(differ) else n

    def forget(self) -> None:
        self.held.n = self.used = 0


class Slots:
    """A request holds one slot from its first forward until it ends, is closed or is garbage collected.

    A request that finds none free waits, at most `wait_s`; those that wait get one in the order in which they came.
    Where every slot is held by the asking thread itself, waiting could never end, so that is an error: at once in the
    main thread; after NESTED_S in others, because there the streams may be passed from thread to thread
    (`asyncio.to_thread`) and another may go on with one.
    """

    def __init__(self, n: int, ctx: int, wait_s: float) -> None:
        self._slots = [Slot(i, n, ctx) for i in range(n)]
        self._wait_s = wait_s
        self._pid = os.getpid()
        self._lock = threading.RLock()  # reentrant: a finalizer may release at any point
        self._changed = threading.Condition(self._lock)
        self._line: list[object] = []
        self._releases = 0
        self._closed = False

    @contextmanager
    def taken(
        self, ids: NDArray[np.int32], reusable: int, cancelled: Callable[[], bool] = lambda: False
    ) -> Generator[Slot | None, None, None]:
        """`acquire`, and `release` at the end. An error of the kernel makes the slot forget what it held."""
        lease = _Lease()
        slot = self.acquire(ids, reusable, cancelled, lease)
        try:
            yield slot
        except FlashformerError:
            if slot is not None:
                slot.forget()
            raise
        finally:
            if slot is not None:
                self.release(slot)

    def acquire(
        self,
        ids: NDArray[np.int32],
        reusable: int,
        cancelled: Callable[[], bool] = lambda: False,
        lease: _Lease | None = None,
    ) -> Slot | None:
        """A free slot for a prompt; its `n` first tokens, `reusable` at most, are in its cache already.

        The slot whose cached tokens share the longest prefix with the prompt, unless more of what it holds would be
        lost than is shared; then the least recently used. With a `lease` it is free again when nobody holds that any
        more: an interrupt may come before `release` can be called. None if `cancelled` becomes true (see `wake`).
        Raises RequestError if no slot can become free, DeviceError after close.
        """
        me, place, begin = threading.get_ident(), object(), time.monotonic()
        nested_since: float | None = None
        with self._lock:
            self._line.append(place)
            try:
                while True:
                    if self._closed:
                        raise DeviceError("the model is closed: load it again")
                    if cancelled():
                        return None
                    free = [slot for slot in self._slots if slot.is_free]
                    if free and self._line[0] is place:
                        break
                    now = time.monotonic()
                    nested = all(slot.owner == me for slot in self._slots)
                    nested_since = (nested_since or now) if nested else None
                    self._refuse_endless(now - begin, None if nested_since is None else now - nested_since)
                    left = self._wait_s - (now - begin)
                    self._changed.wait(max(0.0, min(left, NESTED_S / 10 if nested else LOOK_AGAIN_S)))
                shared = {slot.index: slot.shared(ids) for slot in self._slots}
                slot = _best(free, shared)
                slot.miss = _miss(self._slots, slot, shared, reusable)
                slot.held = Held(slot.ids.copy(), min(shared[slot.index], reusable))
                slot.lease, slot.owner = None if lease is None else weakref.ref(lease), me
                return slot
            finally:
                self._line.remove(place)
                self._changed.notify_all()

    def release(self, slot: Slot) -> None:
        with self._lock:
            self._releases += 1
            slot.owner, slot.lease, slot.used = None, None, self._releases if slot.n else 0
            self._changed.notify_all()

    def wake(self) -> None:
        """Makes those who wait look again whether they are cancelled."""
        with self._lock:
            self._changed.notify_all()

    def forget(self) -> None:
        """For those who write to the caches without taking a slot."""
        with self._lock:
            for slot in self._slots:
                slot.forget()

    def close(self) -> None:
        """Refuses all later requests and wakes those that wait."""
        if os.getpid() != self._pid:  # see Turns.close
            self._closed = True
            return
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    @property
    def n_waiting(self) -> int:
        return len(self._line)

    def has_free(self) -> bool:
        """Whether a request would get one at once, if nobody else comes first."""
        return not self._line and any(slot.is_free for slot in self._slots)

    def _refuse_endless(self, waited_s: float, nested_s: float | None) -> None:
        main = threading.current_thread() is threading.main_thread()
        if nested_s is not None and (main or nested_s >= NESTED_S):
            raise RequestError(
                f"all {len(self._slots)} slots are held by streams that this thread left open: "
                "finish or close one, or load with more streams"
            )
        if waited_s >= self._wait_s:
            raise RequestError(
                f"no slot became free within {self._wait_s:g} s ({len(self._slots)} in use): "
                "close streams that are no longer read, or load with more streams"
            )


def _best(free: list[Slot], shared: Mapping[int, int]) -> Slot:
    """`shared`: by the index of a slot, tokens of the prompt that it holds."""
    worthwhile = [slot for slot in free if 2 * shared[slot.index] > slot.n]
    return min(worthwhile or free, key=lambda slot: (-shared[slot.index] if worthwhile else 0, slot.used))


def _miss(slots: list[Slot], chosen: Slot, shared: Mapping[int, int], reusable: int) -> str | None:
    """Why a prompt finds no more of its tokens in the chosen slot; None where that holds all that it could use, or all
    of what the slot held is the prompt's beginning."""
    found = shared[chosen.index]
    if found >= reusable:
        return None
    best = max(slots, key=lambda slot: shared[slot.index])
    n = shared[best.index]
    if n > found:
        why = f"which keeps its {best.n} tokens for what they serve" if best.is_free else "which runs another request"
        return f"{n} tokens of the prompt are in slot {best.index}, {why}"
    if n == 0:
        return "no slot holds a beginning of the prompt"
    return None if found == chosen.n else f"the prompt differs from what was cached at token {found}"
