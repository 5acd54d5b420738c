"""From a thread to the loop: order, bounds, and every way to end."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable

import pytest
from threads import joined, started, until

from flashformer.server.bridge import Bridge, Gone

SIZE = 4
FAR = 1e9


def thread(bridge: Bridge, work: Callable[[], object]) -> list[threading.Thread]:
    """As the pool's threads: whatever happens, the bridge hears of the end."""

    def run() -> None:
        try:
            work()
        except Gone:
            bridge.end()
        except Exception as error:
            bridge.end(error)
        else:
            bridge.end()

    return started(run)


async def all_of(bridge: Bridge) -> bytes:
    found = b""
    while taken := await bridge.take(FAR):
        found += taken
    return found


@pytest.mark.parametrize("seed", range(10))
def test_everything_arrives_in_order(seed: int) -> None:
    pieces = [f"{i};".encode() for i in range(200)]

    async def scene() -> bytes:
        bridge, rng = Bridge(asyncio.get_running_loop(), SIZE), random.Random(seed)

        def work() -> None:
            for piece in pieces:
                bridge.put(piece)
                if rng.random() < 0.1:
                    time.sleep(0.001)

        threads, found = thread(bridge, work), b""
        while taken := await bridge.take(FAR):
            found += taken
            if rng.random() < 0.1:
                await asyncio.sleep(0.001)
        joined(threads)
        assert await bridge.take(FAR) == b""
        return found

    assert asyncio.run(scene()) == b"".join(pieces)


def test_d59_who_is_not_read_stands_still() -> None:
    async def scene() -> None:
        bridge, n_put = Bridge(asyncio.get_running_loop(), SIZE), 0

        def work() -> None:
            nonlocal n_put
            while True:
                bridge.put(b"x")
                n_put += 1

        threads = thread(bridge, work)
        await asyncio.to_thread(until, lambda: n_put == SIZE)
        await asyncio.sleep(0.05)
        assert n_put == SIZE
        assert await bridge.take(FAR) == b"x" * SIZE
        await asyncio.to_thread(until, lambda: n_put == 2 * SIZE)
        bridge.close()
        await asyncio.to_thread(joined, threads)
        assert n_put == 2 * SIZE

    asyncio.run(scene())


def test_close_cancels_what_the_thread_does() -> None:
    async def scene() -> None:
        bridge, entered, cancelled = Bridge(asyncio.get_running_loop(), SIZE), threading.Event(), threading.Event()

        def work() -> None:
            with bridge.cancelling(cancelled.set):
                entered.set()
                assert cancelled.wait(60)
                bridge.put(b"x")

        threads = thread(bridge, work)
        await asyncio.to_thread(entered.wait)
        assert not cancelled.is_set()
        bridge.close()
        await asyncio.to_thread(joined, threads)
        assert cancelled.is_set()
        assert await bridge.take(FAR) == b""
        with pytest.raises(Gone), bridge.cancelling(lambda: None):
            pass

    asyncio.run(scene())


def test_an_error_comes_after_what_was_made() -> None:
    async def scene() -> None:
        bridge = Bridge(asyncio.get_running_loop(), SIZE)

        def work() -> None:
            bridge.begin()
            bridge.put(b"x")
            raise KeyError("here")

        joined(thread(bridge, work))
        await bridge.begun(FAR)
        assert await bridge.take(FAR) == b"x"
        with pytest.raises(KeyError, match="here"):
            await bridge.take(FAR)

    asyncio.run(scene())


def test_an_error_before_the_beginning_is_no_beginning() -> None:
    async def scene() -> None:
        bridge = Bridge(asyncio.get_running_loop(), SIZE)

        def work() -> None:
            raise KeyError("here")

        threads = thread(bridge, work)
        with pytest.raises(KeyError, match="here"):
            await bridge.begun(FAR)
        joined(threads)

    asyncio.run(scene())


def test_fail_ends_both_sides() -> None:
    async def scene() -> None:
        bridge = Bridge(asyncio.get_running_loop(), SIZE)

        def work() -> None:
            while True:
                bridge.put(b"x")

        threads = thread(bridge, work)
        assert await bridge.take(FAR)
        bridge.fail(KeyError("enough"))
        await asyncio.to_thread(joined, threads)
        with pytest.raises(KeyError, match="enough"):
            await all_of(bridge)

    asyncio.run(scene())


def test_waiting_has_an_end() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        bridge = Bridge(loop, SIZE)
        with pytest.raises(TimeoutError):
            await bridge.take(loop.time() + 0.01)
        with pytest.raises(TimeoutError):
            await bridge.begun(loop.time() + 0.01)
        bridge.put(b"there")
        with pytest.raises(TimeoutError):
            await bridge.take(loop.time())
        assert await bridge.take(loop.time() + 60) == b"there"

    asyncio.run(scene())


def test_the_last_piece_needs_no_room() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        bridge = Bridge(loop, 1)
        bridge.put(b"full")
        bridge.end(None, b"last")
        assert await bridge.take(loop.time() + 60) == b"fulllast"
        assert await bridge.take(loop.time() + 60) == b""

    asyncio.run(scene())
