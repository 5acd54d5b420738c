"""The account of one rendering of a template: time, size and number of what it makes, stated before it is made."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

TIME_S = 0.25
MAX_BITS = 4096  # of an integer
MAX_DEPTH = 64  # of nested lists and mappings
MAX_ARGUMENT = 100_000  # an integer given to a filter or a method: a width, a count, a precision
MAX_INDENT = 16  # of tojson
TRAFFIC_BYTES = 128 << 20  # that all intermediate results of a rendering may have together


class LimitError(Exception):
    """A template asked for more than it may have."""


class _Collections:
    """Processor time that the garbage collector took. It runs in whatever thread allocates, one at a time, and in a
    large process it can take longer than a template may.
    """

    def __init__(self) -> None:
        self.spent = self._began = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, _: object) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self.spent += max(0.0, time.thread_time() - self._began)


collections = _Collections()


def _own_time() -> float:
    """Processor time of this thread in s, the garbage collector's left out."""
    return time.thread_time() - collections.spent


class Account:
    """What one rendering may use: `size` characters or elements in one value, TIME_S of time, TRAFFIC_BYTES."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.traffic = max(TRAFFIC_BYTES, 32 * size)
        self._wall_end = time.perf_counter() + TIME_S
        self._cpu_end = _own_time() + TIME_S

    def tick(self) -> None:
        # The processor time of this thread decides, so that a busy machine refuses nobody; asking for it is slow.
        if time.perf_counter() > self._wall_end and _own_time() > self._cpu_end:
            raise LimitError(f"it ran for more than {TIME_S * 1000:.0f} ms")

    def spend(self, n: int, element_bytes: int = 1) -> None:
        """Takes account of a value of `n` characters or elements before it is made."""
        self.tick()
        if n > self.size:
            raise LimitError(f"it makes a value of {n} characters or elements, at most {self.size} are allowed")
        self.traffic -= n * element_bytes
        if self.traffic < 0:
            raise LimitError("its intermediate values use too much memory")

    def weigh(self, value: Any) -> int:
        """Characters and elements in nested data, shared parts counted as often as they appear."""
        total, pending = 0, [(value, 0)]
        while pending:
            item, depth = pending.pop()
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, list | tuple | dict | KeysView | ValuesView | ItemsView):
                if depth == MAX_DEPTH:
                    raise LimitError(f"it nests lists more than {MAX_DEPTH} deep")
                parts = [*item.keys(), *item.values()] if isinstance(item, dict) else list(item)
                total += 2 + 4 * len(parts)
                pending.extend((part, depth + 1) for part in parts)
            else:
                total += 8
            if total > 16 * self.size:
                raise LimitError(f"it compares or writes nested data of more than {16 * self.size} characters")
        return total


_ACCOUNT: ContextVar[Account | None] = ContextVar("_ACCOUNT", default=None)


@contextmanager
def accounted(size: int) -> Iterator[Account]:
    """The account of the renderings in this block."""
    account = Account(size)
    token = _ACCOUNT.set(account)
    try:
        yield account
    finally:
        _ACCOUNT.reset(token)


def current() -> Account:
    account = _ACCOUNT.get()
    assert account is not None, "nothing of a template runs outside `accounted`"
    return account


def size_of(value: Any) -> int:
    """Length of the text of a value, at most; nested data is weighed."""
    if isinstance(value, str):
        return len(value)
    return current().weigh(value)


def small(value: Any) -> Any:
    """`value` after weighing it, if it is nested data."""
    if not isinstance(value, str | int | float | None):
        current().weigh(value)
    return value


# ---- operators


def _plus(left: Any, right: Any) -> None:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        current().spend(len(left) + len(right), 8 if isinstance(left, list | tuple) else 4)


def _times(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(count, int):
            current().spend(len(value) * max(0, count), 8)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
        raise LimitError("its numbers grow beyond all use")


def _power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
        raise LimitError("its numbers grow beyond all use")


_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*")
_DIGITS = re.compile(r"\d+")


def _percent(left: Any, right: Any) -> None:
    """Of text, `%` formats: every place may hold all of the arguments, padded to its width."""
    if not isinstance(left, str):
        return
    places = _PERCENT.findall(left)
    widths = [digits for place in places for digits in _DIGITS.findall(place.rsplit(")", 1)[-1])]
    if any("*" in place for place in places) or any(len(w) > 4 for w in widths):
        raise LimitError("it formats text with a width that it computes, or one above 9999")
    current().spend(len(left) + sum(map(int, widths)) + len(places) * size_of(right), 4)


_BRACES = re.compile(r"\{[^{}]*\}")
_NESTED_BRACES = re.compile(r"\{[^{}]*\{")


def braces(text: str, args: Any) -> None:
    """The same for the method `format`."""
    plain = text.replace("{{", "").replace("}}", "")
    places = _BRACES.findall(plain)
    widths = [digits for place in places for digits in _DIGITS.findall(place)]
    if _NESTED_BRACES.search(plain) or any(len(w) > 4 for w in widths):
        raise LimitError("it formats text with a width that it computes, or one above 9999")
    current().spend(len(text) + sum(map(int, widths)) + len(places) * size_of(args), 4)


OPERATORS: Final[Mapping[str, Callable[[Any, Any], None]]] = {
    "+": _plus,
    "*": _times,
    "**": _power,
    "%": _percent,
}

# ---- methods and filters: what they make of (value, arguments), where that can be larger than value


def _argument(args: Mapping[int | str, Any], index: int, name: str, default: Any) -> Any:
    return args.get(name, args.get(index, default))


def _grown_by_replace(value: Any, args: Mapping[int | str, Any]) -> int:
    old, new = str(_argument(args, 0, "old", "")), str(_argument(args, 1, "new", ""))
    text = str(value)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _grown_by_join(value: Any, args: Mapping[int | str, Any]) -> int:
    return size_of(value) + len(value) * len(str(_argument(args, 0, "d", "")))


def _grown_by_sum(value: Any, args: Mapping[int | str, Any]) -> int:
    """Of lists, every step copies what came before."""
    return len(value) * size_of(value) if isinstance(_argument(args, 1, "start", 0), list | tuple) else 0


def _grown_by_indent(value: Any, args: Mapping[int | str, Any]) -> int:
    width = _argument(args, 0, "width", 4)
    text = str(value)
    return len(text) + (1 + len(text.splitlines())) * (width if isinstance(width, int) else len(str(width)))


def _grown_by_tabs(value: str, args: Mapping[int | str, Any]) -> int:
    return len(value) + value.count("\t") * abs(int(_argument(args, 0, "tabsize", 8)))


def _grown_by_width(value: Any, args: Mapping[int | str, Any]) -> int:
    return size_of(value) + max((a for a in args.values() if isinstance(a, int)), default=80)


def _grown_by_fill(value: Any, args: Mapping[int | str, Any]) -> int:
    return len(value) + 2 * max((a for a in args.values() if isinstance(a, int)), default=0)


def _grown_by_format(value: Any, args: Mapping[int | str, Any]) -> int:
    _percent(str(value), list(args.values()))
    return 0


Growth = Callable[[Any, Mapping[int | str, Any]], int]
METHODS: Final[Mapping[str, Growth]] = {
    "center": _grown_by_width,
    "expandtabs": _grown_by_tabs,
    "join": lambda value, args: _grown_by_join(_argument(args, 0, "", []), {0: value}),
    "ljust": _grown_by_width,
    "replace": _grown_by_replace,
    "rjust": _grown_by_width,
    "zfill": _grown_by_width,
}
FILTERS: Final[Mapping[str, Growth]] = {
    "replace": _grown_by_replace,
    "join": _grown_by_join,
    "indent": _grown_by_indent,
    "center": _grown_by_width,
    "format": _grown_by_format,
    "sum": _grown_by_sum,
    "truncate": lambda value, args: size_of(value) + sum(size_of(a) for a in args.values()),
    "batch": _grown_by_fill,
    "slice": _grown_by_fill,
}


def numbered(args: tuple[Any, ...], kwargs: Mapping[str, Any], unlimited: bool = False) -> dict[int | str, Any]:
    """Arguments by position and by name. Unless `unlimited`, integers among them are bounded."""
    values: dict[int | str, Any] = dict(enumerate(args))
    values.update(kwargs)
    if not unlimited and any(isinstance(a, int) and abs(a) > MAX_ARGUMENT for a in values.values()):
        raise LimitError(f"it gives a filter or a method a number above {MAX_ARGUMENT}")
    return values


def bound_layout(value: Any, indent: Any, separators: Any) -> None:
    """Refuses layouts of `tojson` that are much longer than what they lay out."""
    for part in (indent, *(separators or ())):
        if (part if isinstance(part, int) else len(str(part or ""))) > MAX_INDENT:
            raise LimitError(f"it lays out JSON with indents or separators above {MAX_INDENT}")
    if indent is not None:
        current().spend(current().weigh(value))
