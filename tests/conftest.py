"""Options and budgets for all tests: --long runs the long ones, and no test may run for ever."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

# Set before numpy, torch and tokenizers are imported anywhere: tests share the machine with each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import beside
import pytest
from hypothesis import HealthCheck, settings

BUDGET_S, LONG_BUDGET_S = 240, 800

# A job that a shell starts in the background ignores Ctrl-C, and so would every process that a test starts and stops.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked long")
    parser.addoption("--alone", action="store_true", help="no second process runs tests beside this one")
    parser.addoption("--outcomes", help="the file for what tests become; given to the second process")


def pytest_configure(config: pytest.Config) -> None:
    plugin = beside.plugin(config)
    if plugin is not None:
        config.pluginmanager.register(plugin, "beside")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def _with_budget(item: pytest.Item) -> Iterator[None]:
    """Fails the test when its budget is spent. A hang in native code ends through faulthandler_timeout instead."""
    budget = LONG_BUDGET_S if item.get_closest_marker("long") else BUDGET_S

    def expire(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"{item.nodeid} took longer than its {budget} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(budget)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _with_budget(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _with_budget(item))
