"""Where output goes: results to stdout as UTF-8, everything else to stderr; and what an error becomes."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import FlashformerError, LoadError, NumericalError, RequestError, UnavailableError
from ..log import log

USER_ERRORS = (LoadError, RequestError, NumericalError, UnavailableError)  # exit 2; any other FlashformerError is 1


def write(text: str) -> None:
    """Writes to stdout at once, whatever the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def write_json(value: Mapping[str, object]) -> None:
    """One line."""
    write(json.dumps(value, ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def faint(text: str) -> None:
    """One line on stderr, dim on a terminal that can show it."""
    if not sys.stderr.isatty():
        note(text)
        return
    from rich.console import Console

    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text, style="dim")


def warn(text: object) -> None:
    """One line on stderr, also under --quiet."""
    note(f"warning: {text}")


def _show_warning(message: object, *_: Any, **__: Any) -> None:
    warn(message)


class _Lines(logging.Handler):
    """The package's log as lines on stderr, and with an error what raised it."""

    def emit(self, record: logging.LogRecord) -> None:
        (warn if record.levelno >= logging.WARNING else note)(self.format(record))


@contextmanager
def _shown() -> Iterator[None]:
    """Warnings and the package's log go to stderr; its level is put back at the end."""
    level, lines = log.level, _Lines()
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            yield
    finally:
        log.removeHandler(lines)
        log.setLevel(level)


class Commands(TyperGroup):
    """Turns exceptions of commands into one message and an exit code. Warnings and the log are lines of their own.

    Interrupts become 130 in typer.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            with _shown():
                return super().invoke(ctx)
        except FlashformerError as error:
            note(f"flashformer: {type(error).__name__}: {error}")
            raise typer.Exit(2 if isinstance(error, USER_ERRORS) else 1) from error
        except BrokenPipeError as error:
            # Whoever read our output has gone, which is no fault; the interpreter's last flush must not fail either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
