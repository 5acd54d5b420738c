"""A bar on stderr while a model loads."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

PATIENCE_S = 0.3  # a load that is over by then shows nothing


@contextmanager
def loading_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """What `load` takes as `progress`: a bar that goes away when it is done, None unless stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with ExitStack() as stack:
        update: Callable[[str, int, int], None] | None = None
        begin = time.monotonic()

        def show(what: str, done: int, total: int) -> None:
            nonlocal update
            if update is None and time.monotonic() - begin < PATIENCE_S:
                return
            if update is None:
                update = _bar(stack)
            update(what, done, total)

        yield show


def _bar(stack: ExitStack) -> Callable[[str, int, int], None]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    tasks: dict[str, int] = {}

    def update(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = int(bar.add_task(what, total=total))
        bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

    return update
