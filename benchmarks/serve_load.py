"""Clients of all manners on a `flashformer serve` of this machine: what they get, and what they leave behind.

    python benchmarks/serve_load.py [MODEL] [--clients 1,8,64,1000] [--requests N] [--budget-s S]

In every stage so many clients at once send requests of a few kinds, each on a connection of its own: 10 percent read
slowly, 30 percent hang up while they wait, while their prompt is read, or while they are answered, streaming or not,
and the rest behave; who is refused waits as long as the server says. Before, between and after the stages the server's
memory and file descriptors are read when nothing runs, and all kinds are asked again, alone. Appends one line per stage
to benchmarks/results/serve_load.jsonl; times are of those who stay and read at once.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
from random import Random

from record import append
from wire.load import Stage, asks, first_answers, run_stage
from wire.process import Served

from flashformer.engine.stats import percentile

SPARE_FILES = 100
SETTLE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="demo", help="one with a chat template; default: %(default)s")
    add("--clients", default="1,8,64,1000", help="of each stage; default: %(default)s")
    add("--requests", type=int, default=4, help="per client and stage, and at least 100 in all; default: %(default)s")
    add("--budget-s", type=float, default=60.0, help="no further requests of a stage after it; default: %(default)g")
    add("--tokens", type=int, default=64, help="of an answer; default: %(default)s")
    add("--streams", type=int, default=4)
    add("--max-waiting", type=int, default=64)
    add("--threads", type=int, help="of the engine; default: cores within the quota")
    add("--seed", type=int, default=0)
    add("--dry-run", action="store_true", help="prints and records nothing")
    args = parser.parse_args()
    stages = [int(n) for n in args.clients.split(",")]
    allow_files(max(stages) + SPARE_FILES)
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    options = ["--streams", str(args.streams), "--max-waiting", str(args.max_waiting), *threads]
    known, draw = asks(args.tokens), Random(args.seed)
    with Served(args.model, *options) as server:
        expected = asyncio.run(first_answers(server.address, known))
        first_mib = server.rss_mib()
        for n_clients in stages:
            before = server.settle(SETTLE_S)
            mib, n_files = server.rss_mib(), server.n_files()
            stage = asyncio.run(
                run_stage(
                    server.address,
                    known,
                    expected,
                    draw,
                    n_clients=n_clients,
                    n_requests=max(100, args.requests * n_clients),
                    budget_s=args.budget_s,
                )
            )
            after = server.settle(SETTLE_S)
            record = {
                "model": args.model,
                "streams": args.streams,
                "max_waiting": args.max_waiting,
                "clients": n_clients,
                **described(stage),
                "tokens_per_s": (after["generation_tokens_total"] - before["generation_tokens_total"]) / stage.seconds,
                "rss_mib": {"at_first": first_mib, "before": mib, "after": server.rss_mib()},
                "files": {"before": n_files, "after": server.n_files()},
                "threads": server.n_threads(),
                "running": after["num_requests_running"],
                "waiting": after["num_requests_waiting"],
                "kv_cache_usage_perc": after["kv_cache_usage_perc"],
                "answers_as_before": asyncio.run(first_answers(server.address, known)) == expected,
            }
            print(record) if args.dry_run else append("serve_load", record)


def described(stage: Stage) -> dict[str, object]:
    return {
        "seconds": stage.seconds,
        "requests": stage.outcomes.total(),
        "outcomes": dict(stage.outcomes.most_common()),
        "wrong_answers": stage.n_differing,
        "ttft_ms": shares(stage.first_s),
        "between_tokens_ms": shares(stage.between_s),
        "mean_between_tokens_ms": shares(stage.mean_s),
    }


def shares(seconds: list[float]) -> dict[str, float] | None:
    """In ms; None where there was none."""
    ordered = sorted(seconds)
    return {f"p{n}": 1e3 * percentile(ordered, n / 100) for n in (50, 99)} if ordered else None


def allow_files(n: int) -> None:
    """For this process and those that it starts, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < n:
        resource.setrlimit(resource.RLIMIT_NOFILE, (n if hard == resource.RLIM_INFINITY else min(n, hard), hard))


if __name__ == "__main__":
    main()
