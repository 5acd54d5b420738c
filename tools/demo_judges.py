"""What a sample of the demo model is judged by. Pure functions of text and token ids."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LOOP_LONGEST_BLOCK = 32  # tokens
LOOP_REPEATS = 3
LOOP_SHORTEST_TAIL = 48  # tokens
_LAYOUT = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_OPEN_AT_END = ("multi-line", "triple-quoted")  # what tokenize says when the text ends inside a bracket or string
_STATEMENTS = frozenset(
    ["assert", "break", "class", "continue", "def", "del", "global", "pass", "raise", "return", "try", "while", "with"]
)


def as_module(prompt: str, completion: str) -> str:
    """Prompt and completion as a file of their own: an indented prompt is put under an `if`."""
    return ("if True:\n" if prompt.startswith(" ") else "") + prompt + completion


class _Line(NamedTuple):
    """A logical line: its first row (from 0), its indentation and its first word."""

    row: int
    indent: int
    word: str


def _logical_lines(source: str) -> tuple[list[_Line], bool]:
    """Every logical line, and whether the last is finished: only there may a bracket or a string be open.

    Raises IndentationError for a dedent to nowhere, SyntaxError where an open bracket swallows statements.
    """
    rows = source.splitlines()
    lines: list[_Line] = []
    fresh, last_row = True, 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NEWLINE:
                fresh = True
            elif fresh and token.type not in _LAYOUT:
                lines.append(_Line(token.start[0] - 1, token.start[1], token.string))
                fresh = False
            elif token.string in _STATEMENTS and token.start[0] > last_row and token.type == tokenize.NAME:
                raise SyntaxError(f"`{token.string}` inside an open bracket")
            last_row = token.end[0]
    except tokenize.TokenError as error:
        message, (row, _) = error.args[:2]
        if not any(kind in message for kind in _OPEN_AT_END) and row < len(rows):
            raise SyntaxError(message) from error
        if fresh:
            row = min(row, len(rows)) - 1
            lines.append(_Line(row, len(rows[row]) - len(rows[row].lstrip()), ""))
        return lines, False
    return lines, source.endswith("\n")


def indents_consistently(prompt: str, completion: str) -> bool:
    """Whether every dedent of the sample returns to an indentation in use, as Python's tokenizer sees it."""
    try:
        _logical_lines(as_module(prompt, completion))
    except SyntaxError as error:  # TabError is an IndentationError
        return not isinstance(error, IndentationError)
    return True


def without_last_statement(source: str) -> str:
    """`source` without a last logical line that has no end; a header left bare gets `pass`, an open `try` `finally`.

    Decorators that lose what they decorate go too. Raises as `_logical_lines` does.
    """
    lines, finished = _logical_lines(source)
    kept = lines if finished else lines[:-1]
    while kept and kept[-1].word == "@":
        kept = kept[:-1]
    if not kept:
        return ""
    rows = source.splitlines()
    if len(kept) < len(lines):
        rows = rows[: lines[len(kept)].row]
    ends = []
    indent = kept[-1].indent
    if _is_header(rows, kept[-1].row):
        indent += 1
        ends.append(" " * indent + "pass")
    for line in reversed(kept):
        if line.indent < indent:
            indent = line.indent
            clauses = [other.word for other in kept if other.row > line.row and other.indent == indent]
            if line.word == "try" and not set(clauses) & {"except", "finally"}:
                ends.append(" " * indent + "finally: pass")
    return "\n".join([*rows, *ends, ""])


def _is_header(rows: Sequence[str], first_row: int) -> bool:
    """Whether the logical line that begins at `first_row` and ends with the text opens a block."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(rows[first_row:]).lstrip() + "\n").readline)
    last = ""
    try:
        for token in tokens:
            if token.type == tokenize.NEWLINE:
                break
            if token.type not in _LAYOUT:
                last = token.string
    except tokenize.TokenError:  # a bracket closed that was never opened, or the like: no Python either way
        return False
    return last == ":"


def parses(prompt: str, completion: str) -> bool:
    """Whether the sample is Python: as it stands, or without its unfinished last statement.

    What is left must hold text that the model wrote: a sample that is one unfinished statement does not parse.
    """
    source = as_module(prompt, completion)
    if _is_python(source):
        return True
    try:
        rest = without_last_statement(source)
    except SyntaxError:
        return False
    least = len(as_module(prompt, "").rstrip())
    return len(rest.rstrip()) > least and _is_python(rest)


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def loops(ids: Sequence[int]) -> bool:
    """Whether a run ends in a loop.

    It does if for some p from 1 to 32 its last max(48, 3 p) tokens have period p: the end of the run is one
    block of at most 32 tokens over and over, three times at least.
    """
    for period in range(1, LOOP_LONGEST_BLOCK + 1):
        n = max(LOOP_SHORTEST_TAIL, LOOP_REPEATS * period)
        tail = ids[-n:]
        if len(ids) >= n and tail[period:] == tail[:-period]:
            return True
    return False


_BASE = 0x9E3779B97F4A7C15 | 1
_BASE_INVERSE = pow(_BASE, -1, 2**64)


def _window_hashes(data: bytes, length: int) -> NDArray[np.uint64]:
    """A polynomial hash modulo 2^64 of every window of `length` bytes."""
    if len(data) < length:
        return np.zeros(0, np.uint64)
    n = len(data)
    values = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)

    def powers(base: int) -> NDArray[np.uint64]:
        factors = np.full(n, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors)

    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers(_BASE), dtype=np.uint64)])
    hashes: NDArray[np.uint64] = (sums[length:] - sums[:-length]) * powers(_BASE_INVERSE)[: n - length + 1]
    return hashes


def longest_copy(samples: Iterable[str], texts: Iterable[str]) -> str:
    """The longest string that stands in a sample and in one of the texts, found by bisecting its length."""
    written = [s.encode() for s in samples]
    sources = [t.encode() for t in texts]

    def common(length: int) -> bytes | None:
        wanted = np.unique(np.concatenate([_window_hashes(s, length) for s in written] or [np.zeros(0, np.uint64)]))
        if not len(wanted):
            return None
        for source in sources:
            hashes = _window_hashes(source, length)
            place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            for at in np.flatnonzero(wanted[place] == hashes):
                window = source[at : at + length]
                if any(window in s for s in written):
                    return window
        return None

    best, low, high = b"", 0, max(map(len, written), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        found = common(middle)
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle
    return best.decode(errors="replace")
