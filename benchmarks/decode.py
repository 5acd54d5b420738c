"""Decode benchmarks of several models; appends one JSON line per test to benchmarks/results/decode.jsonl.

    python benchmarks/decode.py [MODEL ...] [-- OPTIONS OF flashformer bench]

Each line is what `flashformer bench --json` prints, with the machine and the time added.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from record import append

MODELS = ("demo", "shape:smollm2-135m", "shape:llama-3.2-1b")


def main() -> None:
    args = sys.argv[1:]
    split = args.index("--") if "--" in args else len(args)
    parser = argparse.ArgumentParser(usage="%(prog)s [MODEL ...] [-- OPTIONS OF flashformer bench]")
    parser.add_argument("models", metavar="MODEL", nargs="*", default=MODELS, help=f"default: {' '.join(MODELS)}")
    for model in parser.parse_args(args[:split]).models:
        command = [sys.executable, "-m", "flashformer.cli", "bench", model, "--json", *args[split + 1 :]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            append("decode", json.loads(line))


if __name__ == "__main__":
    main()
