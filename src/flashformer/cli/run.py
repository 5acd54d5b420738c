"""flashformer run"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..engine import LLM, Output
from ..engine.stats import peak_rss_bytes, stats_line
from ..errors import RequestError
from ..model.random import PREFIX
from .options import JsonOpt, Machine, ModelArg, QuietOpt, Room, Sampling, grouped
from .output import note, write, write_json


@grouped
def run(
    model: ModelArg,
    sampling: Sampling,
    room: Room,
    machine: Machine,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="'-' or none reads stdin")] = None,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Continue PROMPT, streaming the text to stdout; one line of statistics goes to stderr."""
    if model.startswith(PREFIX):
        raise RequestError(f"{model} has random weights and no tokenizer: it is for plan, bench and Python")
    sampling.check()
    text = _read_stdin() if prompt is None or prompt == "-" else prompt
    llm = machine.load(model, ctx=room.ctx, streams=room.streams, quiet=quiet or as_json)
    with llm:
        with llm.stream(text, **sampling.arguments()) as stream:
            for piece in stream:
                if piece.text and not as_json:
                    write(piece.text)
        output = stream.output
        if as_json:
            write_json(report(llm, output))
        elif not quiet:
            note(("\n" if sys.stdout.isatty() else "") + _line(llm, output))


def _read_stdin() -> str:
    if sys.stdin.isatty():
        note("reading the prompt from the terminal; end it with Ctrl-D on an empty line")
    data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin: byte {error.start} is not UTF-8: give the prompt as UTF-8 text") from error


def _line(llm: LLM, output: Output) -> str:
    return stats_line(
        len(output.prompt_token_ids),
        output.timing,
        fits_in_cache=llm.fits_in_cache,
        measured_gb_s=llm.measured_gb_s(),
        peak_bytes=peak_rss_bytes(),
    )


def report(llm: LLM, output: Output) -> dict[str, object]:
    """An answer as --json prints it."""
    measured, timing = llm.measured_gb_s(), output.timing
    return {
        "model": llm.name,
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_token_ids": output.prompt_token_ids,
        "seed": output.seed,
        "finish_reason": output.finish_reason,
        "stop": output.stop,
        "cached_tokens": output.cached_tokens,
        "ttft_ms": timing.ttft_ms,
        "tok_s": timing.tok_s,
        "p50_ms": timing.p50_ms,
        "p99_ms": timing.p99_ms,
        "gb_per_s": timing.gb_s,
        "probe_gb_per_s": measured,
        "fraction": timing.gb_s / measured if measured and timing.gb_s else None,
        "fits_in_cache": llm.fits_in_cache,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": llm.setup.device,
        "threads": llm.setup.target.n_workers,
    }
