"""Fills the table of model families in README.md from `flashformer.model.families`; `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from figures import table

from flashformer.model.families import FAMILIES

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- families -->", "<!-- /families -->"


def families_table() -> str:
    rows = [(f.name, f"`{f.architecture}`", f.checkpoints, f.special) for f in FAMILIES.values()]
    return table(("family", "architecture in config.json", "checkpoints", "what is special"), rows)


def filled(text: str) -> str:
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{README.name}: the markers {BEGIN} and {END} must stand once each, in this order")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n{families_table()}\n{END}{text.partition(END)[2]}"


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit(__doc__)
    text = README.read_text(encoding="utf-8")
    new = filled(text)
    if new != text and sys.argv[1:]:
        raise SystemExit(f"{README.name} does not show the families there are: run python tools/families_table.py")
    if new != text:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
