"""A program in a pseudo-terminal, and what a person sees there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence

PAUSE_S = 0.1
CTRL_C, CTRL_D, PASTE, PASTED = "\x03", "\x04", "\x1b[200~", "\x1b[201~"

# Makes stdin the controlling terminal, so that keys become signals, and becomes the program.
_ADOPT = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
_ESCAPE = re.compile(r"\x1b\[([?]?[\d;]*)([A-Za-z])")


class Terminal:
    """`raw`: all that the program wrote to the terminal."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], *, n_columns: int = 120, wait_s: float = 60
    ) -> None:
        self._end, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, n_columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ADOPT, *command],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**env, "TERM": "xterm-256color"},
        )
        os.close(inner)
        self._wait_s = wait_s
        self._seen = 0
        self.raw = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._end)

    def wait_for(self, text: str) -> None:
        """Reads until `text` has come since the last such call. Raises TimeoutError."""
        due = time.monotonic() + self._wait_s
        while (at := self.raw.find(text.encode(), self._seen)) < 0:
            if not self._read(due):
                raise TimeoutError(f"{text!r} did not come; the terminal shows:\n{screen(self.raw)}")
        self._seen = at + len(text.encode())

    def type(self, text: str) -> None:
        """After a moment, as people do: readline sees a signal that comes while it begins only with the next key."""
        time.sleep(PAUSE_S)
        os.write(self._end, text.encode())

    def end(self) -> int:
        """Reads on until the program ends; its exit code."""
        due = time.monotonic() + self._wait_s
        while self._read(due):
            pass
        return self._process.wait(self._wait_s)

    def _read(self, due: float) -> bool:
        """Whether anything came before `due` or the end."""
        ready, _, _ = select.select([self._end], [], [], max(0.0, due - time.monotonic()))
        try:
            data = os.read(self._end, 1 << 16) if ready else b""
        except OSError:  # the program is gone
            data = b""
        self.raw += data
        return bool(data)


def screen(raw: bytes) -> str:
    """The lines that stand on the terminal, those scrolled away included. Colours are left out."""
    lines: list[list[str]] = [[]]
    row = column = at = 0
    text = raw.decode(errors="replace")
    while at < len(text):
        char = text[at]
        if escape := _ESCAPE.match(text, at):
            at = escape.end()
            count = int(escape[1]) if escape[1].isdecimal() else 0
            if escape[2] == "A":
                row = max(0, row - (count or 1))
            elif escape[2] == "C":
                column += count or 1
            elif escape[2] == "D":
                column = max(0, column - (count or 1))
            elif escape[2] == "K":
                lines[row] = [] if count == 2 else lines[row][:column]
            continue
        at += 1
        if char == "\n":
            row += 1
            if row == len(lines):
                lines.append([])
        elif char == "\r":
            column = 0
        elif char == "\b":
            column = max(0, column - 1)
        elif char.isprintable():
            line = lines[row]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = char
            column += 1
    return "\n".join("".join(line).rstrip() for line in lines).strip("\n") + "\n"
