"""What a stage writes: one JSON document, kept up to date on disk, so that what a killed stage found is not lost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")

SCHEMA = 1
FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int, "stage": int, "name": str, "complete": bool, "stopped": str, "seconds": float, "about": dict,
    "checks": list, "speeds": list, "results": dict, "skipped": list,
}  # fmt: skip
CHECK_FIELDS = {"name": str, "passed": bool, "detail": str}
SPEED_FIELDS = {"name": str, "value": float, "unit": str, "check": str, "shown": bool, "detail": dict}


class OutOfTimeError(Exception):
    """A stage reached its deadline; the text says where."""


class Clock:
    """The time of one stage."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def require(self, what: str, seconds: float = 0.0) -> None:
        """Before a piece of work that takes about so long. Raises OutOfTimeError."""
        if self.left_s <= seconds:
            raise OutOfTimeError(what)


class Record:
    """The document of a stage. A speed is taken only beside a check that passed.

    A stage is done unit by unit; `first` is the first unit of this process, which goes on with the document where that
    is not 0.
    """

    def __init__(self, number: int, name: str, path: Path, first: int = 0) -> None:
        self._begin = time.monotonic()
        self._path = path
        self._first = first
        self._document: dict[str, Any] = {
            "schema": SCHEMA, "stage": number, "name": name, "complete": False, "stopped": "", "seconds": 0.0,
            "about": {}, "checks": [], "speeds": [], "results": {}, "skipped": [],
        }  # fmt: skip
        if first:
            self._document |= json.loads(path.read_text()) | {"complete": False, "stopped": ""}
            self._begin -= self._document["seconds"]

    @property
    def number(self) -> int:
        return int(self._document["stage"])

    @property
    def facts(self) -> dict[str, Any]:
        """What `about` was told so far."""
        return dict(self._document["about"])

    def about(self, **facts: Any) -> None:
        """Machine, versions, clocks."""
        self._document["about"] |= facts
        self.save()

    def left(self, items: Sequence[T]) -> Sequence[T]:
        """The units of the stage that this process is to do."""
        return items[self._first :]

    def units(self, items: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
        """Those that are left, one after another; the document says which one is under way."""
        for i, item in enumerate(self.left(items), self._first):
            self.about(unit=i, now=name(item))
            yield item

    def now(self, what: str) -> None:
        """What is about to run on the GPU: all that is known if this process has to be killed."""
        self.about(now=what)

    def check(self, name: str, passed: bool, detail: str = "") -> bool:
        self._document["checks"].append({"name": name, "passed": bool(passed), "detail": detail})
        self.save()
        return bool(passed)

    def passed(self, name: str) -> bool:
        """Whether there is a check of that name and every one of them passed."""
        found = [c["passed"] for c in self._document["checks"] if c["name"] == name]
        return bool(found) and all(found)

    def speed(self, name: str, value: float, unit: str, *, check: str, shown: bool = False, **detail: Any) -> bool:
        """`check` is the name of the one that the same code passed in this run; without it nothing is written."""
        if not self.passed(check):
            self.skip(f"speed of {name}: the check {check!r} has not passed")
            return False
        self._document["speeds"].append(
            {"name": name, "value": float(value), "unit": unit, "check": check, "shown": shown, "detail": detail}
        )
        self.save()
        return True

    def result(self, name: str, value: Any) -> None:
        """What is neither a check nor a speed."""
        self._document["results"][name] = value
        self.save()

    def skip(self, what: str) -> None:
        """Says what was not done, and why."""
        self._document["skipped"].append(what)
        self.save()

    def stop(self, why: str) -> None:
        """The stage ends before its end."""
        self._document["stopped"] = why
        self.save()

    def finish(self) -> None:
        self._document["complete"] = True
        self.save()

    def document(self) -> dict[str, Any]:
        return {**self._document, "seconds": time.monotonic() - self._begin}

    def save(self) -> None:
        """Whole or not at all."""
        aside = self._path.with_suffix(".part")
        aside.write_text(json.dumps(self.document(), indent=1))
        os.replace(aside, self._path)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least, most."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a document, nothing if it is as it should be."""
    found = [f"field {name}" for name in document.keys() ^ FIELDS.keys()]
    for name, kind in FIELDS.items():
        if name in document and not isinstance(document[name], kind):
            found.append(f"{name} is {document[name]!r}")
    for part, fields in (("checks", CHECK_FIELDS), ("speeds", SPEED_FIELDS)):
        for entry in document.get(part, []):
            if entry.keys() != fields.keys() or not all(isinstance(entry[n], kind) for n, kind in fields.items()):
                found.append(f"{part}: {entry!r}")
    passed: dict[str, bool] = {}
    for check in document.get("checks", []):
        passed[check["name"]] = passed.get(check["name"], True) and check.get("passed") is True
    found += [
        f"speed {s['name']} without a passed check {s['check']}"
        for s in document.get("speeds", [])
        if not passed.get(s["check"])
    ]
    if document.get("complete") and document.get("stopped"):
        found.append("complete and stopped")
    return found
