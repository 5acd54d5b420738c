"""Starting threads in tests, and waiting for them and for what they do, with a bound."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BOUND_S = 60


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def started(*targets: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(BOUND_S)
        assert not thread.is_alive()
