"""Records docs/chat.md: a chat with the demo model, typed into a pseudo-terminal and shown as it stood there.

    python tools/record_chat.py           writes the page
    python tools/record_chat.py --print   prints the terminal only, with its times

What was typed and answered is kept, times and speeds are not: they are this machine's.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from terminal import CTRL_C, CTRL_D, Terminal, screen

PAGE = Path(__file__).resolve().parents[1] / "docs" / "chat.md"
BEGIN, END = "<!-- recorded: written by tools/record_chat.py, begin -->", "<!-- recorded: end -->"
PROMPT, MORE, STATS = ">>> ", "... ", " | context "
ARGUMENTS = ("chat", "demo", "--stop", "\n\n", "--temp", "0.5", "--seed", "3")

# (what to wait for, what to type then)
STEPS = (
    (PROMPT, "def is_even(n):\n"),
    (STATS, ""),
    (PROMPT, "/retry\n"),
    (STATS, ""),
    (PROMPT, '"""\n'),
    (MORE, "class Stack:\n"),
    (MORE, '    """A stack of items."""\n'),
    (MORE, '"""\n'),
    ("self.", CTRL_C),
    (STATS, ""),
    (PROMPT, "def first(items): \\\n"),
    (MORE, "    # the first item\n"),
    (STATS, ""),
    (PROMPT, "/stats\n"),
    (PROMPT, "/help\n"),
    (PROMPT, CTRL_C),
    (PROMPT, CTRL_D),
)

# The demo model answers faster than a person reads, let alone types Ctrl-C.
SLOWED = """
import time
from flashformer.backends.cpu.kernel import CpuKernel
from flashformer.cli import main
forward = CpuKernel.forward
def slowly(kernel, *arguments):
    time.sleep(0.03)
    forward(kernel, *arguments)
CpuKernel.forward = slowly
main()
"""


def record(arguments: Sequence[str], steps: Sequence[tuple[str, str]]) -> tuple[bytes, int]:
    """What the terminal got, and the exit code. Raises TimeoutError."""
    with Terminal([sys.executable, "-c", SLOWED, *arguments], os.environ, n_columns=100) as terminal:
        for awaited, keys in steps:
            terminal.wait_for(awaited)
            terminal.type(keys)
        code = terminal.end()
    return terminal.raw, code


def typed(arguments: Sequence[str]) -> str:
    """The command as a person types it to bash."""
    words = (f"$'{a}'".replace("\n", "\\n") if "\n" in a else shlex.quote(a) for a in arguments)
    return f"$ flashformer {' '.join(words)}\n"


def without_times(text: str) -> str:
    return re.sub(r"\b\d+(\.\d+)? (ms|tok/s|GiB)\b", r"... \2", text)


def main() -> None:
    if sys.argv[1:] not in ([], ["--print"]):
        raise SystemExit(__doc__)
    raw, code = record(ARGUMENTS, STEPS)
    shown = typed(ARGUMENTS) + screen(raw)
    if code or sys.argv[1:]:
        print(shown, end="")
        raise SystemExit(code)
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n\n````text\n{without_times(shown)}````\n\n{after}")


if __name__ == "__main__":
    main()
