"""The fenced blocks of README.md, each with the way in which it is run.

    python tools/readme_blocks.py NAME      prints the `sh NAME` block, for .ci/run

The words after the opening fence say how: `python` and plain `sh` run in the environment of the tests, `python client`
beside a server, `sh NAME` is a command for a fresh checkout and runs in .ci/run, `text pipeline` lists folders of the
package. There is no other kind.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).resolve().parents[1] / "README.md"


class Block(NamedTuple):
    line: int
    language: str
    name: str
    code: str


def read_blocks(text: str) -> list[Block]:
    """Every fenced block of a Markdown text. Raises ValueError for a fence that is not closed."""
    blocks: list[Block] = []
    opened: tuple[int, str, str, int] | None = None  # line, language, name, backticks
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)\s*(.*)$", line)
        if fence and opened is None:
            opened, code = (number, fence[2], fence[3].strip(), len(fence[1])), []
        elif fence and opened and not fence[2] and len(fence[1]) >= opened[3]:
            blocks.append(Block(*opened[:3], "\n".join(code) + "\n"))
            opened = None
        elif opened:
            code.append(line)
    if opened:
        raise ValueError(f"the fence opened in line {opened[0]} is not closed")
    return blocks


def main() -> None:
    found = [b for b in read_blocks(README.read_text()) if b.language == "sh" and b.name == " ".join(sys.argv[1:])]
    if len(found) != 1:
        raise SystemExit(f"{README.name} has {len(found)} blocks `sh {' '.join(sys.argv[1:])}`, expected 1")
    print(found[0].code, end="")


if __name__ == "__main__":
    main()
