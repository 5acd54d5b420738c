"""flashformer beside llama.cpp, transformers and OpenVINO: one checkpoint, engines taking turns within one run.

    python benchmarks/compare_engines.py --llama-python PATH [--openvino-python PATH] [OPTIONS]

For every model, format and test each engine has one turn in every round, with a probe of read bandwidth before and
after it, all with the same number of threads; a ratio is the median of the ratios within rounds. Before it is timed an
engine must give the logits of our f32 run on a prompt of 32 tokens, within what its format loses; otherwise its speed
is left out. Appends one line per model, format and test to benchmarks/results/engines.jsonl and prints a table.
docs/measuring.md says how the peers are installed and what is compared with what.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from engines.arms import HEADS, QUANTS, Arm, Peers, checkpoint, is_alike, make_arms, reference
from engines.child import Child, EngineError
from engines.pairs import MOST_LOST, Closeness, compare, spread, within
from engines.turns import Test, Turns, faster, take_turns
from numpy.typing import NDArray
from record import append

from flashformer.backends.cpu.bandwidth import ReadProbe
from flashformer.engine.setup import kv_read_bytes
from flashformer.formats import FORMATS
from flashformer.model import read_spec

CHECKED_TOKENS = 32
SPINNING = 0.02  # CPUs; an engine that keeps more busy when it is not its turn disturbs the others
MODELS = "smollm2-135m,qwen2.5-0.5b,llama-3.2-1b"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Running:
    """An engine that has a model loaded and is right. `facts`: weight_bytes, weights, version and the like."""

    arm: Arm
    child: Child
    facts: Mapping[str, Any]
    closeness: Closeness


@contextmanager
def started(arm: Arm, folder: Path, args: argparse.Namespace) -> Iterator[tuple[Child, dict[str, Any]]]:
    """The process of an engine with its model loaded, and what is known of it. Raises EngineError."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    child = Child(arm.python, arm.engine, arm.environment, args.work / f"{arm.name.replace(' ', '-')}.log")
    try:
        loaded = child("load", vocab_size=vocab_size, threads=args.threads, ctx=args.ctx, **arm.options)
        yield child, {**loaded, **arm.facts}
    finally:
        child.close()


def logits(child: Child, work: Path) -> NDArray[np.float32]:
    path = work / "logits.npy"
    child("logits", n=CHECKED_TOKENS, path=str(path))
    found: NDArray[np.float32] = np.load(path)
    path.unlink()
    return found


def right(
    arms: list[Arm],
    fmt: str,
    folder: Path,
    known: NDArray[np.float32],
    stack: ExitStack,
    args: argparse.Namespace,
    left_out: dict[str, str],
) -> list[Running]:
    """Those that give the reference's logits, loaded. `left_out` gets the others, and why."""
    running = []
    for arm in arms:
        try:
            child, facts = stack.enter_context(started(arm, folder, args))
            closeness = compare(logits(child, args.work), known)
        except EngineError as failed:
            left_out[arm.name] = str(failed).partition("\n")[0]
            say(f"{arm.name} is left out: {failed}")
            continue
        shown = f"KL {closeness.kl:.2e}, {closeness.lost:.2%} lost, cosine {closeness.cosine:.5f}, "
        say(f"  {arm.name}: {shown}top-1 {closeness.top1:.0%}")
        if closeness.lost <= MOST_LOST[fmt]:
            running.append(Running(arm, child, facts, closeness))
        else:
            left_out[arm.name] = f"wrong: {shown}at most {MOST_LOST[fmt]:.0%} may be lost"
            say(f"{arm.name} is left out: {left_out[arm.name]}")
    return running


def describe(one: Running, turns: Turns, test: Test, kv_position_bytes: int) -> dict[str, object]:
    """The record of an engine in one test. Speeds are tokens per second, of a prompt too."""
    rates = turns.rates(test.n)
    kv_bytes = int(kv_position_bytes * test.mean_kv)
    per_token = one.facts["weight_bytes"] + kv_bytes
    bandwidth = {
        "kv_bytes": kv_bytes,
        "gb_per_s": per_token * spread(rates).median / 1e9,
        "fraction": turns.fraction(per_token * test.n),
    }
    return {
        "peer": one.arm.peer,
        **one.facts,
        "tokens_per_s": spread(rates).to_json(),
        "seconds": spread(turns.seconds).to_json(),
        **(bandwidth if test.kind == "decode" else {}),
        "logits": one.closeness.to_json(),
        "same_tokens_every_round": turns.repeats,
        "cpus_kept_busy_off_turn": round(turns.off_share, 4),
        **one.child.memory_mib(),
    }


def compared(running: list[Running], turns: Mapping[str, Turns], fmt: str) -> list[dict[str, object]]:
    """Ours with each peer, with the faster of its ways. `matched`: the pair that is alike, which tables show."""
    pairs: list[dict[str, object]] = []
    for peer in dict.fromkeys(one.arm.peer for one in running if one.arm.peer):
        ways = [one for one in running if one.arm.peer == peer]
        best = min(ways, key=lambda one: spread(turns[one.arm.name].seconds).median)
        for ours in (one for one in running if one.arm.peer is None):
            bytes_of = ours.facts["weight_bytes"], best.facts["weight_bytes"]
            pairs.append(
                {
                    "ours": ours.arm.name,
                    "theirs": best.arm.name,
                    "peer": peer,
                    "matched": is_alike(ours.arm, peer, fmt),
                    "times_as_fast": faster(turns[ours.arm.name], turns[best.arm.name]).to_json(),
                    "bytes_per_token": bytes_of[0] / bytes_of[1],
                    "bytes_within_2_percent": within(*bytes_of),
                }
            )
    return pairs


def measure(model: str, fmt: str, args: argparse.Namespace, probe: ReadProbe, shares: Iterator[float]) -> None:
    """All tests of a model in a format; `shares` gives the time at which each test is to end."""
    folder = checkpoint(model, args.work)
    spec = read_spec(json.loads((folder / "config.json").read_text()))
    peers = Peers(args.llama_python, args.openvino_python, not args.no_transformers)
    arms, left_out = make_arms(folder, fmt, args.work, peers, args.llama_head, args.threads)
    say(f"{folder.name} {fmt}: logits of {CHECKED_TOKENS} tokens, beside flashformer in f32")
    with started(reference(folder), folder, args) as (child, _):
        known = logits(child, args.work)
    with ExitStack() as stack:
        running = right(arms, fmt, folder, known, stack, args, left_out)
        for test in args.planned:
            children = {one.arm.name: one.child for one in running}
            turns, probes = take_turns(children, test, probe, args.rounds, next(shares), say)
            kv_bytes = kv_read_bytes(spec, FORMATS["f16"], 1)
            described = {one.arm.name: describe(one, turns[one.arm.name], test, kv_bytes) for one in running}
            for name, found in turns.items():
                if found.off_share > SPINNING:
                    say(f"{name} kept {found.off_share:.2f} CPUs busy while it was not its turn")
                if not found.repeats:
                    say(f"{name} did not give the same tokens in every round")
            record: dict[str, object] = {
                "model": folder.name,
                "format": fmt,
                "test": test.kind,
                "depth": test.depth,
                "tokens": test.n,
                "threads": args.threads,
                "rounds": len(next(iter(turns.values())).seconds),
                "probe_gb_per_s": spread(probes).to_json(),
                "engines": described,
                "pairs": compared(running, turns, fmt),
                "left_out": left_out,
            }
            if not args.dry_run:
                append("engines", record)
            print(table(record), flush=True)


def table(record: Mapping[str, Any]) -> str:
    what = f"{record['depth']} cached" if record["test"] == "decode" else f"first of {record['tokens']}"
    probe = record["probe_gb_per_s"]
    lines = [
        f"\n### {record['model']} {record['format']}, {record['test']}, {what}, {record['rounds']} rounds, "
        f"{record['threads']} threads, probe {probe['median']:.1f} GB/s ({probe['min']:.1f} to {probe['max']:.1f})\n",
        "| engine | tokens/s (min, max) | s | weight MB per token | GB/s | of measured | off turn | huge MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, e in record["engines"].items():
        speed, read = e["tokens_per_s"], f"{e['gb_per_s']:.1f} | {e['fraction']:.0%}" if "gb_per_s" in e else " | "
        lines.append(
            f"| {name} | {speed['median']:.1f} ({speed['min']:.1f}, {speed['max']:.1f}) | "
            f"{e['seconds']['median']:.3f} | {e['weight_bytes'] / 1e6:.1f} | {read} | "
            f"{e['cpus_kept_busy_off_turn']:.3f} | {e['huge_mib']} |"
        )
    lines += ["", "| pair | times as fast (min, max) | bytes per token |", "| --- | --- | --- |"]
    for pair in record["pairs"]:
        ratio, mark = pair["times_as_fast"], "" if pair["matched"] else " (not alike)"
        lines.append(
            f"| {pair['ours']} / {pair['theirs']}{mark} | {ratio['median']:.2f} ({ratio['min']:.2f}, "
            f"{ratio['max']:.2f}) | {pair['bytes_per_token']:.3f} |"
        )
    return "\n".join(lines)


def shares_of(n_tests: int, budget_s: float) -> Iterator[float]:
    """When each test is to end: what is left of the time when it begins is shared by it and those after it."""
    end = perf_counter() + budget_s
    for left in range(n_tests, 0, -1):
        now = perf_counter()
        yield now + max(0.0, end - now) / left


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", default=MODELS, help="folders, or shapes of random weights, with commas between")
    add("--formats", default=",".join(QUANTS), help="of %(default)s")
    add("--tests", default="decode,prefill", help="of %(default)s")
    add("--depth", default="32,1024", help="cached positions of decode")
    add("-p", "--prompt-tokens", type=int, default=512, help="of prefill")
    add("--tokens", type=int, default=32, help="decoded in a turn")
    add("--rounds", type=int, default=9)
    add("--threads", type=int, default=2)
    add("--budget-s", type=float, default=float("inf"), help="adds no round after its share of this time; at least one")
    add("--llama-python", help="interpreter that has llama-cpp-python")
    add("--llama-head", choices=HEADS, default="q8_0", help="type of the head beside 4 bits")
    add("--openvino-python", help="interpreter that has openvino; optimum-intel to export what --work lacks")
    add("--no-transformers", action="store_true")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "flashformer-engines", help="converted models")
    add("--dry-run", action="store_true", help="records nothing")
    args = parser.parse_args()
    prefill = [Test("prefill", 0, args.prompt_tokens)]
    decode = [Test("decode", int(depth), args.tokens) for depth in args.depth.split(",")]
    tests = {"decode": decode, "prefill": prefill}
    args.planned = [test for kind in args.tests.split(",") for test in tests[kind]]
    args.ctx = -(-max(test.positions for test in args.planned) // 256) * 256
    return args


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    probe = ReadProbe(args.threads)
    cells = [(model, fmt) for model in args.models.split(",") for fmt in args.formats.split(",")]
    shares = shares_of(len(cells) * len(args.planned), args.budget_s)
    failed = 0
    for model, fmt in cells:
        try:
            measure(model, fmt, args, probe, shares)
        except EngineError as error:
            failed += 1
            say(f"{model} {fmt} ends here: {error}")
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
