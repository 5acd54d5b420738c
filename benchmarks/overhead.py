"""Time of a token outside the forward: the loop, detokenisation and the stream around it.

    python benchmarks/overhead.py [MODEL] [-n TOKENS] [-r REPEATS]

The median over repeats, and the spread, of (time of all tokens after the first - time inside forward) per token;
one JSON line is appended to benchmarks/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter_ns

from record import append

import flashformer as ff


class Clock:
    """Stands in for the kernel's forward and counts the time inside it."""

    def __init__(self, forward) -> None:
        self.forward = forward
        self.ns = 0

    def __call__(self, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        begin = perf_counter_ns()
        self.forward(n_rows, again)
        self.ns += perf_counter_ns() - begin


def outside_us(llm: ff.LLM, clock: Clock, n: int) -> float:
    """Microseconds per token outside the forward, over n tokens after the first."""
    with llm.stream("def ", max_tokens=n + 1, ignore_eos=True) as stream:
        next(stream)
        inside, begin = clock.ns, perf_counter_ns()
        made = sum(piece.token_id is not None for piece in stream)
        total = perf_counter_ns() - begin
    return (total - (clock.ns - inside)) / made / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("-r", type=int, default=9)
    args = parser.parse_args()
    with ff.load(args.model) as llm:
        clock = Clock(llm.kernel.forward)
        llm.kernel.forward = clock  # type: ignore[method-assign]
        outside_us(llm, clock, 16)
        found = [outside_us(llm, clock, args.n) for _ in range(args.r)]
    record = {"model": args.model, "tokens": args.n, "repeats": args.r}
    append("overhead", record | {"outside_us": median(found), "min_us": min(found), "max_us": max(found)})


if __name__ == "__main__":
    main()
