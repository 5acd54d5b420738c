"""What HTTP costs, what streams gain together, and what prompts of others cost those who are being answered.

    python benchmarks/serve_speed.py [MODEL] [--quant none,int4] [--tests start,one,together,prompts] [OPTIONS]

    start      from the start of `flashformer serve demo` until a first request is answered
    one        time between the tokens of one stream through HTTP, and in this process (`llm.stream`), in turns
    together   tokens per second of --streams streams through HTTP, and of one, in turns
    prompts    time between the tokens of one stream and of three, alone and while prompts of 512 tokens arrive, one
               after another; and how long these take until their first token

Token ids in, events out; arrival times are taken where the bytes are read. A probe of read bandwidth stands before and
after every turn. Ratios are medians of those within a round. Appends a line per test to
benchmarks/results/serve_speed.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from statistics import fmean, median
from time import perf_counter, sleep
from typing import Any, TypeVar

from engines.pairs import spread
from engines.turns import PAUSE_S, PROBE_S
from record import append
from wire.client import COMPLETIONS, Address, Call, answered, finished
from wire.process import Served

import flashformer as ff
from flashformer.backends.cpu.bandwidth import ReadProbe
from flashformer.backends.cpu.topology import choose_threads
from flashformer.engine.stats import percentile

TESTS = "start,one,together,prompts"
PROMPT_TOKENS = 16  # of those that are timed
N_STARTS, COMPANY = 9, (1, 3)
LOOK_S = 0.01

T = TypeVar("T")


@dataclass
class Probed:
    """Takes turns with the probe."""

    probe: ReadProbe
    gb_s: list[float] = field(default_factory=list)

    def turn(self, run: Callable[[], T]) -> tuple[T, float]:
        """What `run` gives, and the mean of the probes before and after it."""
        before = self._read() if not self.gb_s else self.gb_s[-1]
        found = run()
        sleep(PAUSE_S)
        return found, (before + self._read()) / 2

    def _read(self) -> float:
        self.gb_s.append(self.probe.gb_s(PROBE_S))
        return self.gb_s[-1]


@dataclass(frozen=True)
class Bench:
    """A model twice: behind HTTP and in this process."""

    address: Address
    llm: ff.LLM
    probe: ReadProbe
    args: argparse.Namespace
    draw: Random

    def prompt(self, n: int = PROMPT_TOKENS) -> list[int]:
        return [self.draw.randrange(min(30_000, self.llm.spec.vocab_size)) for _ in range(n)]

    def rounds(self) -> Iterator[int]:
        """At most --rounds, and none after the budget; at least one."""
        end = perf_counter() + self.args.budget_s
        for number in range(self.args.rounds):
            if number and perf_counter() > end:
                return
            yield number

    def call(self, prompt: list[int]) -> Call:
        asked = {"max_tokens": self.args.tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        return Call(COMPLETIONS, {"prompt": prompt, **asked})

    def over_http(self, prompts: list[list[int]]) -> list[list[float]]:
        """When the tokens of each came."""
        return asyncio.run(self._over_http(prompts))

    async def _over_http(self, prompts: list[list[int]]) -> list[list[float]]:
        calls = await asyncio.gather(*(finished(self.address, self.call(prompt)) for prompt in prompts))
        return [call.token_times() for call in calls]

    def in_process(self, prompt: list[int]) -> list[float]:
        settings: dict[str, Any] = {"max_tokens": self.args.tokens, "ignore_eos": True, "temperature": 0}
        return [perf_counter() for piece in self.llm.stream(prompt, **settings) if piece.token_id is not None]

    def crowded(self, prompts: list[list[int]]) -> tuple[list[list[float]], list[float]]:
        """Gaps between tokens of each from when all have begun, while other prompts arrive; seconds that these took."""
        return asyncio.run(self._crowded(prompts))

    async def _crowded(self, prompts: list[list[int]]) -> tuple[list[list[float]], list[float]]:
        calls = [self.call(prompt) for prompt in prompts]
        decoding = asyncio.gather(*(finished(self.address, call) for call in calls))
        while not all(call.parts for call in calls):
            await asyncio.sleep(LOOK_S)
        begin, took = perf_counter(), []
        while not decoding.done():
            asked = {"prompt": self.prompt(self.args.prompt_tokens), "max_tokens": 1, "ignore_eos": True}
            arriving = asyncio.create_task(answered(self.address, COMPLETIONS, asked))
            await asyncio.wait({arriving, decoding}, return_when=asyncio.FIRST_COMPLETED)
            if arriving.done():
                took.append(arriving.result().parts[0][0] - arriving.result().sent_s)
            else:
                arriving.cancel()
                await asyncio.gather(arriving, return_exceptions=True)
        await decoding
        return [gaps(call.token_times(), begin) for call in calls], took


def gaps(times: list[float], begin: float = 0.0) -> list[float]:
    return [b - a for a, b in pairwise(times) if a >= begin]


def rate(streams: list[list[float]]) -> float:
    """Tokens per second of all streams together, while all of them are being answered."""
    begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    return sum(begin < at <= end for times in streams for at in times) / (end - begin)


def one(bench: Bench) -> dict[str, object]:
    probed, prompt = Probed(bench.probe), bench.prompt()
    ways = {"http": lambda: bench.over_http([prompt])[0], "in_process": lambda: bench.in_process(prompt)}
    for run in ways.values():
        run()
    ms: dict[str, list[float]] = {way: [] for way in ways}
    fractions: dict[str, list[float]] = {way: [] for way in ways}
    step_bytes = bench.llm.step_bytes(PROMPT_TOKENS + bench.args.tokens // 2)
    for number in bench.rounds():
        for way in sorted(ways, reverse=number % 2 == 1):
            times, gb_s = probed.turn(ways[way])
            ms[way].append(1e3 * median(gaps(times)))
            fractions[way].append(step_bytes / fmean(gaps(times)) / 1e9 / gb_s)
    ratios = [a / b for a, b in zip(ms["http"], ms["in_process"], strict=True)]
    return {
        "http_over_in_process": spread(ratios).to_json(),
        **{f"{way}_ms": spread(found).to_json() for way, found in ms.items()},
        **{f"{way}_fraction": median(found) for way, found in fractions.items()},
        "rounds": len(ratios),
        "probe_gb_per_s": spread(probed.gb_s).to_json(),
    }


def together(bench: Bench) -> dict[str, object]:
    probed, n = Probed(bench.probe), bench.args.streams
    given = [bench.prompt() for _ in range(n)]
    bench.over_http(given)
    rates: dict[int, list[float]] = {1: [], n: []}
    for number in bench.rounds():
        for n_streams in sorted(rates, reverse=number % 2 == 1):
            times, _ = probed.turn(lambda n_streams=n_streams: bench.over_http(given[:n_streams]))
            rates[n_streams].append(rate(times))
    ratios = [many / alone for alone, many in zip(rates[1], rates[n], strict=True)]
    return {
        "times_one_stream": spread(ratios).to_json(),
        "tokens_per_s_of_one": spread(rates[1]).to_json(),
        "tokens_per_s": spread(rates[n]).to_json(),
        "rounds": len(ratios),
        "probe_gb_per_s": spread(probed.gb_s).to_json(),
    }


def prompts(bench: Bench) -> list[dict[str, object]]:
    """One record for each number of streams."""
    records = []
    for n_streams in COMPANY:
        probed = Probed(bench.probe)
        texts = [bench.prompt() for _ in range(n_streams)]
        bench.over_http(texts)
        alone: list[list[float]] = []
        crowded: list[list[float]] = []
        first_s: list[float] = []
        for _ in bench.rounds():
            times, _ = probed.turn(lambda texts=texts: bench.over_http(texts))
            alone.append([gap for one in times for gap in gaps(one)])
            (found, took), _ = probed.turn(lambda texts=texts: bench.crowded(texts))
            crowded.append([gap for one in found for gap in one])
            first_s += took
        records.append(
            {
                "decoding": n_streams,
                "prompt_tokens": bench.args.prompt_tokens,
                "alone": between(alone),
                "crowded": between(crowded),
                "crowded_p50_over_alone": median(map(median, crowded)) / median(map(median, alone)),
                "prompts": len(first_s),
                "prompt_ttft_ms": spread([1e3 * s for s in first_s]).to_json() if first_s else None,
                "rounds": len(alone),
                "probe_gb_per_s": spread(probed.gb_s).to_json(),
            }
        )
    return records


def between(rounds: list[list[float]]) -> dict[str, object]:
    """Time between tokens: of all rounds together, and the ratio of p99 to p50 within each."""
    every = sorted(1e3 * gap for found in rounds for gap in found)
    ratios = [percentile(sorted(found), 0.99) / median(found) for found in rounds]
    return {
        "p50_ms": percentile(every, 0.5),
        "p99_ms": percentile(every, 0.99),
        "max_ms": every[-1],
        "p99_over_p50": spread(ratios).to_json(),
        "gaps": len(every),
    }


def start(args: argparse.Namespace) -> dict[str, object]:
    ready: list[float] = []
    answer: list[float] = []
    for _ in range(args.starts):
        begin = perf_counter()
        with Served("demo") as server:
            ready.append(perf_counter() - begin)
            asyncio.run(answered(server.address, COMPLETIONS, {"prompt": "def ", "max_tokens": 1}))
            answer.append(perf_counter() - begin)
    return {"answered_s": spread(answer).to_json(), "ready_s": spread(ready).to_json(), "starts": len(answer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="shape:llama-3.2-1b", help="default: %(default)s")
    add("--quant", default="none,int4", help="default: %(default)s")
    add("--tests", default=TESTS, help="default: %(default)s")
    add("--tokens", type=int, default=128, help="of an answer; default: %(default)s")
    add("--prompt-tokens", type=int, default=512, help="of those that arrive; default: %(default)s")
    add("--streams", type=int, default=8, help="of the server; default: %(default)s")
    add("--ctx", type=int, default=1024)
    add("--threads", type=int, default=choose_threads().n)
    add("--rounds", type=int, default=9)
    add("--starts", type=int, default=N_STARTS)
    add("--budget-s", type=float, default=float("inf"), help="of a test; it ends with whole rounds, at least one")
    add("--dry-run", action="store_true", help="prints and records nothing")
    args = parser.parse_args()
    tests = args.tests.split(",")
    if unknown := set(tests) - set(TESTS.split(",")):
        parser.error(f"--tests {','.join(sorted(unknown))}: expected some of {TESTS}")

    def keep(test: str, about: dict[str, object], record: dict[str, object]) -> None:
        whole = {"test": test, **about, **record}
        print(whole, flush=True) if args.dry_run else append("serve_speed", whole)

    if "start" in tests:
        keep("start", {"model": "demo"}, start(args))
    if set(tests) == {"start"}:
        return
    probe = ReadProbe(args.threads)
    common = {"ctx": args.ctx, "threads": args.threads}
    given = [text for name, value in common.items() for text in (f"--{name}", str(value))]
    for quant in args.quant.split(","):
        about = {"model": args.model, "quant": quant, **common, "streams": args.streams, "tokens": args.tokens}
        with (
            Served(args.model, *given, "--quant", quant, "--streams", str(args.streams)) as server,
            ff.load(args.model, quant=quant, **common) as llm,
        ):
            bench = Bench(server.address, llm, probe, args, Random(0))
            if "one" in tests:
                keep("one", about, one(bench))
            if "together" in tests:
                keep("together", about, together(bench))
            if "prompts" in tests:
                for record in prompts(bench):
                    keep("prompts", about, record)


if __name__ == "__main__":
    main()
