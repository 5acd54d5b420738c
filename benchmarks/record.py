"""Results are JSON lines, each with the machine, the commit and the time it was measured at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from flashformer.bench import commit
from flashformer.cli.doctor import describe_machine

RESULTS = Path(__file__).parent / "results"
MACHINE = ("cpu", "isa", "llc_bytes", "physical_cores", "quota_cpus", "huge_pages")


def append(name: str, record: Mapping[str, object]) -> None:
    """Adds one line to results/NAME.jsonl and prints the record."""
    described = describe_machine()
    about = {
        "machine": {key: described[key] for key in MACHINE},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as results:
        results.write(json.dumps({"commit": commit(), **record, **about}) + "\n")
    print(json.dumps(record))
