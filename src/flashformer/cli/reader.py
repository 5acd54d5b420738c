"""What people type into a chat: lines from a terminal or from a pipe, and messages made of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from ..errors import RequestError

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'

ReadLine = Callable[[str], str | None]  # prompt -> line without its end, None at the end of the input


def line_reader(quiet: bool) -> ReadLine:
    """With editing, history and pasting of many lines where both ends are a terminal.

    Otherwise prompts go to stderr, with the lines of a script, so that stderr shows the questions.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _terminal()
    return _silent if quiet else _prompted


def read_message(read_line: ReadLine) -> str | None:
    """One message, None at the end of the input. May raise what `read_line` raises.

    A line that ends in a backslash goes on in the next one. A line that begins with three double quotes begins a
    block, which ends where a line ends with three; if the first ones stood alone, where the last ones do, so that
    such a block can hold code with docstrings. The end of the input ends both.
    """
    line = read_line(PROMPT)
    if line is None:
        return None
    if line.startswith(QUOTES):
        return "\n".join(_block(line.removeprefix(QUOTES), read_line))
    lines: list[str] = []
    while line is not None and line.endswith("\\"):
        lines.append(line.removesuffix("\\"))
        line = read_line(MORE)
    return "\n".join(lines if line is None else [*lines, line])


def _block(line: str | None, read_line: ReadLine) -> Iterator[str]:
    """The lines of a block, of which `line` is what stands behind the first quotes."""
    alone = line == ""
    if alone:
        line = read_line(MORE)
    while line is not None:
        if alone and line == QUOTES:
            return
        if not alone and line.endswith(QUOTES):
            yield line.removesuffix(QUOTES)
            return
        yield line
        line = read_line(MORE)


def _terminal() -> ReadLine:
    try:
        import readline
    except ImportError:  # Python built without it: lines cannot be edited then
        pass
    else:
        readline.parse_and_bind("set enable-bracketed-paste on")

    def read(prompt: str) -> str | None:
        sys.stderr.flush()
        try:
            return input(prompt)
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise RequestError(f"the line is not {error.encoding.upper()} text: {error.reason}") from error

    return read


def _silent(_: str) -> str | None:
    data = sys.stdin.buffer.readline()
    try:
        return data.decode().removesuffix("\n").removesuffix("\r") if data else None
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin: byte {error.start} of a line is not UTF-8: give messages as UTF-8 text") from error


def _prompted(prompt: str) -> str | None:
    print(prompt, end="", file=sys.stderr, flush=True)
    line = _silent(prompt)
    if not sys.stdin.isatty():
        print("" if line is None else line, file=sys.stderr, flush=True)
    return line
