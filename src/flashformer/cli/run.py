"""flashformer run"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..engine import LLM, Output, load
from ..engine import request as requests
from ..engine.request import DEFAULT_MAX_TOKENS
from ..engine.stats import peak_rss_bytes, stats_line
from ..errors import RequestError
from ..model.random import PREFIX
from .options import (
    CtxOpt,
    Device,
    DeviceOpt,
    Dtype,
    DtypeOpt,
    ExactOpt,
    JsonOpt,
    KvDtypeOpt,
    ModelArg,
    OfflineOpt,
    QuietOpt,
    RevisionOpt,
    SeedOpt,
    StreamsOpt,
    ThreadsOpt,
)
from .output import note, write, write_json


def run(
    model: ModelArg,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="'-' or none reads stdin")] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="most new tokens")] = DEFAULT_MAX_TOKENS,
    temp: Annotated[
        float | None, typer.Option("--temp", help="0: greedy; default from generation_config.json, else 0")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on past the end of the text")] = False,
    device: DeviceOpt = Device.AUTO,
    dtype: DtypeOpt = Dtype.AUTO,
    exact: ExactOpt = False,
    kv_dtype: KvDtypeOpt = None,
    ctx: CtxOpt = None,
    streams: StreamsOpt = 1,
    threads: ThreadsOpt = None,
    seed: SeedOpt = None,
    revision: RevisionOpt = None,
    offline: OfflineOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Continue PROMPT, streaming the text to stdout; one line of statistics goes to stderr."""
    if model.startswith(PREFIX):
        raise RequestError(f"{model} has random weights and no tokenizer: it is for plan, bench and Python")
    requests.integer("max_tokens", max_tokens, requests.LIMITS.max_tokens)
    temp = None if temp is None else requests.temperature(temp)
    seed = requests.seed(seed)
    text = _read_stdin() if prompt is None or prompt == "-" else prompt
    llm = load(
        model,
        device=device.value,
        dtype=dtype.value,
        exact=exact,
        kv_dtype=kv_dtype.value if kv_dtype else None,
        ctx=ctx,
        streams=streams,
        threads=threads,
        revision=revision,
        offline=offline,
    )
    with llm:
        with llm.stream(text, max_tokens=max_tokens, temperature=temp, seed=seed, ignore_eos=ignore_eos) as stream:
            for piece in stream:
                if piece.text and not as_json:
                    write(piece.text)
        output = stream.output
        if as_json:
            write_json(_report(llm, output))
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


def _report(llm: LLM, output: Output) -> dict[str, object]:
    measured, timing = llm.measured_gb_s(), output.timing
    return {
        "model": llm.name,
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_token_ids": output.prompt_token_ids,
        "seed": output.seed,
        "finish_reason": output.finish_reason,
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
