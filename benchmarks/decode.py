"""Decode benchmarks of several models; appends one JSON line per test to benchmarks/results/decode.jsonl.

    python benchmarks/decode.py [MODEL ...] [-- OPTIONS OF flashformer bench]

Each line is what `flashformer bench --json` prints, with the machine and the time added.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from flashformer.cli.doctor import describe_machine

RESULTS = Path(__file__).parent / "results" / "decode.jsonl"
MODELS = ("shape:smollm2-135m", "shape:qwen2.5-0.5b", "shape:llama-3.2-1b")
MACHINE = ("cpu", "isa", "llc_bytes", "physical_cores", "quota_cpus", "huge_pages")


def main() -> None:
    args = sys.argv[1:]
    split = args.index("--") if "--" in args else len(args)
    models, options = args[:split] or MODELS, args[split + 1 :]
    described = describe_machine()
    machine = {key: described[key] for key in MACHINE}
    RESULTS.parent.mkdir(exist_ok=True)
    for model in models:
        command = [sys.executable, "-m", "flashformer.cli", "bench", model, "--json", *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        with RESULTS.open("a") as results:
            for line in done.stdout.splitlines():
                now = datetime.now(UTC).isoformat(timespec="seconds")
                results.write(json.dumps(json.loads(line) | {"machine": machine, "time": now}) + "\n")
                print(line)


if __name__ == "__main__":
    main()
