"""What `flashformer trace` costs: decode with the times of every phase and worker noted, against decode without.

    python benchmarks/trace_cost.py [MODEL ...] [-n TOKENS] [-p PAIRS]

Both take turns forward by forward in one loaded model, each first in every second turn. A pair is the ratio of the
medians of `-n` forwards of each; the median over pairs, and the spread, are appended to
benchmarks/results/trace_cost.jsonl.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter_ns

import numpy as np
from record import append

import flashformer as ff
from flashformer.backends.base import Want
from flashformer.bench.decode import TOKEN_SEED, WARM_UP, fill

MODELS = ("demo", "shape:smollm2-135m", "shape:llama-3.2-1b")
LEAST_PAIRS = 9
DEPTH = 128  # positions cached before the measured token


def forward_ns(llm: ff.LLM, traced: bool) -> int:
    kernel = llm.kernel
    (kernel.keep_times if traced else kernel.forget_times)()
    begin = perf_counter_ns()
    kernel.forward(1)
    return perf_counter_ns() - begin


def pair(llm: ff.LLM, n: int) -> dict[bool, float]:
    """Traced or not -> median ns of n forwards."""
    ns: dict[bool, list[int]] = {False: [], True: []}
    for turn in range(n):
        for traced in (turn % 2 == 0, turn % 2 == 1):
            ns[traced].append(forward_ns(llm, traced))
    return {traced: median(times) for traced, times in ns.items()}


def measure(model: str, n: int, n_pairs: int) -> dict[str, object]:
    with ff.load(model, ctx=2 * DEPTH) as llm, llm.turns.lock:
        ids = np.random.default_rng(TOKEN_SEED).integers(0, llm.spec.vocab_size, DEPTH + 1, np.int32)
        fill(llm, 0, ids[:DEPTH])
        rows = llm.kernel.rows
        rows.token[0], rows.slot[0], rows.pos[0], rows.want[0] = ids[DEPTH], 0, DEPTH, Want.TOKEN
        rows.temperature[0] = rows.adjust_begin[0] = rows.adjust_end[0] = 0
        pair(llm, WARM_UP)
        pairs = [pair(llm, n) for _ in range(n_pairs)]
        threads, phases = llm.setup.target.n_workers, len(llm.program.phases)
    ratios = [p[True] / p[False] for p in pairs]
    return {
        "model": model,
        "threads": threads,
        "phases": phases,
        "depth": DEPTH,
        "tokens": n,
        "pairs": n_pairs,
        "ms_per_token": median(p[False] for p in pairs) / 1e6,
        "ratio": median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS)
    parser.add_argument("-n", type=int, default=40)
    parser.add_argument("-p", type=int, default=15, help=f"at least {LEAST_PAIRS}")
    args = parser.parse_args()
    if args.n < 1 or args.p < LEAST_PAIRS:
        parser.error(f"expected -n of at least 1 and -p of at least {LEAST_PAIRS}, found {args.n} and {args.p}")
    for model in args.models:
        append("trace_cost", measure(model, args.n, args.p))


if __name__ == "__main__":
    main()
