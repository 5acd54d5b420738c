"""Three minutes for this folder: of tests with many cases every fifth runs by default, with --long all of them."""

from __future__ import annotations

from collections import Counter

import pytest

MANY_CASES = ("test_attend.py", "test_products.py", "test_sample.py", "test_orders.py")
ONE_OF = 5


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        if item.path.name not in MANY_CASES or item.path.parent.name != "gpu_on_host":
            continue
        function = item.nodeid.split("[")[0]
        if seen[function] % ONE_OF:
            item.add_marker(pytest.mark.long)
        seen[function] += 1
