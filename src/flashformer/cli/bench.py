"""flashformer bench"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import typer

from ..backends.cpu.bandwidth import ReadProbe
from ..bench import BenchOptions, BenchResult, bench_decode, bench_prefill, commit
from ..bench.decode import FAULT, Probe, WeightsProbe
from ..engine import LLM
from ..errors import DeviceError, RequestError
from ..model.outline import read_outline
from .options import JsonOpt, Machine, ModelArg, QuietOpt, grouped
from .output import note, warn, write_json

PROMPT_TOKENS = 512
PIPE_WIDTH = 120  # columns of the table where there is no terminal to ask


@grouped
def bench(
    model: ModelArg,
    machine: Machine,
    prompt_tokens: Annotated[
        int | None, typer.Option("-p", "--prompt-tokens", help="of a prompt; 0: no such test; default 512")
    ] = None,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", help="tokens per slot and repeat")] = 64,
    rows: Annotated[str, typer.Option("--rows", help="slots decoded at once, one test each")] = "1,2,4,8",
    depth: Annotated[int, typer.Option("--depth", help="positions cached before the first token")] = 0,
    repeat: Annotated[int, typer.Option("-r", "--repeat", help="repeats, which must agree")] = 5,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """The speed of a prompt; decode speed beside this machine's read bandwidth, measured in turns in the same run."""
    asked = PROMPT_TOKENS if prompt_tokens is None else prompt_tokens
    options = BenchOptions(asked, new_tokens, _rows(rows), depth, repeat)
    outline = read_outline(model, revision=machine.revision, offline=machine.offline)
    if prompt_tokens is None:  # a shorter model is measured as far as it goes
        options = replace(options, prompt_tokens=min(asked, outline.spec.max_positions))
    ctx = options.ctx(outline.spec.max_positions)
    llm = machine.load(model, ctx=ctx, streams=max(options.rows), quiet=quiet or as_json)
    results = []
    with llm:
        probe, source = _probe(llm), commit()
        if options.prompt_tokens:
            results.append(bench_prefill(llm, options, source))
            if as_json:
                write_json(results[-1].to_json())
        for n in options.rows:
            results.append(bench_decode(llm, options, n, probe, source))
            if as_json:
                write_json(results[-1].to_json())
            _report_faults(results[-1], llm.fits_in_cache)
        fits_in_cache = llm.fits_in_cache
    if not as_json:
        _table(results, fits_in_cache)


def _rows(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--rows {text}: expected numbers from 1 to 16 with commas between, like 1,2,4,8") from None


def _probe(llm: LLM) -> Probe | None:
    """Of the memory that the kernel reads."""
    if llm.setup.gpu:
        return None if llm.fits_in_cache else WeightsProbe(llm)
    try:
        return ReadProbe(llm.setup.target.n_workers)
    except DeviceError as error:
        warn(f"no bandwidth is measured: {error}")
        return None


def _report_faults(result: BenchResult, fits_in_cache: bool) -> None:
    if result.fraction is None or result.fraction <= FAULT:
        return
    if fits_in_cache:
        note(f"rows {result.rows}: the weights fit in cache, so the fraction of memory bandwidth says nothing")
    else:
        note(
            f"rows {result.rows}: fraction {result.fraction:.3f} is above {FAULT}: a fault of the probe, "
            "do not use this number; measure again on a quiet machine"
        )


def _share(fraction: float | None, fits_in_cache: bool) -> str:
    return "in cache" if fits_in_cache else "-" if fraction is None else f"{100 * fraction:.0f}%"


def _table(results: list[BenchResult], fits_in_cache: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    first = results[0]
    table = Table(title=f"{first.model} on {first.device}, {first.threads} threads, {first.commit}")
    for heading in ("test", "rows", "depth", "tok/s", "ms per token (min to max)", "GB/s", "probe GB/s", "fraction"):
        table.add_column(heading, justify="left" if heading == "test" else "right")
    for r in results:
        ms = r.ms_per_token
        table.add_row(
            r.test,
            str(r.rows),
            str(r.depth),
            f"{r.tokens_per_s:.1f}",
            f"{ms['median']:.3f} ({ms['min']:.3f} to {ms['max']:.3f})",
            "-" if r.gb_per_s is None else f"{r.gb_per_s:.1f}",
            "-" if r.probe_gb_per_s is None else f"{r.probe_gb_per_s:.1f}",
            "-" if r.gb_per_s is None else _share(r.fraction, fits_in_cache),
        )
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
