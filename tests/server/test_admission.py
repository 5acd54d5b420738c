"""Who runs and who waits."""

from __future__ import annotations

import asyncio
import random

import pytest

from flashformer.server.admission import Admission
from flashformer.server.errors import ApiError


def test_first_come_first_served() -> None:
    async def scene() -> None:
        admission, order = Admission(2, 8), list[int]()

        async def one(i: int) -> None:
            await admission.enter()
            order.append(i)

        tasks = [asyncio.create_task(one(i)) for i in range(7)]
        await asyncio.sleep(0)
        assert (admission.n_running, admission.n_waiting, order) == (2, 5, [0, 1])
        for n in range(3, 8):
            admission.leave()
            await asyncio.sleep(0)
            assert order == list(range(n))
            assert (admission.n_running, admission.n_waiting) == (2, 7 - n)
        await asyncio.gather(*tasks)
        admission.leave()
        admission.leave()
        assert (admission.n_running, admission.n_waiting) == (0, 0)

    asyncio.run(scene())


def test_d60_what_is_too_much_is_refused() -> None:
    async def scene() -> None:
        admission = Admission(1, 1)
        await admission.enter()
        waiting = asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="1 requests run and 1 wait") as found:
            await admission.enter()
        assert found.value.status == 429
        assert found.value.headers["retry-after"] == "1"
        admission.leave()
        await waiting
        assert (admission.n_running, admission.n_waiting) == (1, 0)

    asyncio.run(scene())


def test_whoever_waits_is_turned_away_at_a_shutdown() -> None:
    async def scene() -> None:
        admission, refusal = Admission(1, 4), ApiError(503, "no")
        await admission.enter()
        waiting = [asyncio.create_task(admission.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        admission.refuse(refusal)
        assert await asyncio.gather(*waiting, return_exceptions=True) == [refusal] * 3
        admission.leave()
        with pytest.raises(ApiError, match="no"):
            await admission.enter()
        assert (admission.n_running, admission.n_waiting) == (0, 0)

    asyncio.run(scene())


@pytest.mark.parametrize("seed", range(20))
def test_d58_cancelled_anywhere_no_place_is_lost(seed: int) -> None:
    async def scene() -> None:
        rng, admission, running = random.Random(seed), Admission(3, 50), 0

        async def one() -> None:
            nonlocal running
            await admission.enter()
            running += 1
            assert running <= 3
            try:
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                running -= 1
                admission.leave()

        tasks = [asyncio.create_task(one()) for _ in range(50)]
        for _ in range(60):
            if rng.random() < 0.5:
                rng.choice(tasks).cancel()
            if rng.random() < 0.5:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (admission.n_running, admission.n_waiting) == (0, 0)

    asyncio.run(scene())
