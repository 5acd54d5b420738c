"""The package's read-bandwidth probe beside the stand-alone benchmarks/probe.c, taking turns.

    python benchmarks/probe.py [-r TURNS] [--threads N]

Compiles the C program with $CC, prints the ratio of the package's probe to it, and appends one JSON line to
benchmarks/results/probe.jsonl. Expected: at least 0.97.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median

from record import append

from flashformer.backends.cpu.bandwidth import ReadProbe
from flashformer.backends.cpu.topology import choose_threads

HERE = Path(__file__).parent
TURN_S = 2.4  # three rounds of the C program: a true median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", type=int, default=11)
    parser.add_argument("--threads", type=int, default=choose_threads().n)
    args = parser.parse_args()
    probe = ReadProbe(args.threads)
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        subprocess.run([os.environ.get("CC", "cc"), "-O3", "-pthread", HERE / "probe.c", "-o", program], check=True)
        for _ in range(args.r):
            ours.append(probe.gb_s(TURN_S))
            done = subprocess.run(
                [program, str(args.threads), str(TURN_S)], stdout=subprocess.PIPE, text=True, check=True
            )
            theirs.append(float(done.stdout.split()[0]))
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    record = {
        "probe_gb_per_s": median(ours),
        "stand_alone_gb_per_s": median(theirs),
        "ratio": median(pairs),
        "ratio_min": min(pairs),
        "ratio_max": max(pairs),
        "threads": args.threads,
        "turns": args.r,
    }
    append("probe", record)


if __name__ == "__main__":
    main()
