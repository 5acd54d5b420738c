"""Options that several commands share, each declared once; groups of them are dataclasses (`grouped`)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from ..engine import LLM, Options, load
from ..engine.request import DEFAULT_MAX_TOKENS, SamplingArguments, SamplingSettings
from ..formats import QUANT_NAMES
from ..log import log
from .progress import loading_bar

QUANT_HELP = f"none, {', '.join(QUANT_NAMES)}, or with a group such as int4-g128"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    AUTO = "auto"
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"


class KvDtype(StrEnum):
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"


def _hush(quiet: bool) -> bool:
    """No notes and no progress of downloads; warnings stay."""
    if quiet:
        log.setLevel(logging.WARNING)
    return quiet


ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="demo, a folder, a hub id, or shape:NAME")]
RevisionOpt = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit of a hub id")]
OfflineOpt = Annotated[bool, typer.Option("--offline", help="use what is on this machine only")]
ThreadsOpt = Annotated[int | None, typer.Option("--threads", help="default: cores within the quota")]
StreamsOpt = Annotated[int, typer.Option("--streams", help="slots for sequences, 1 to 16")]
QuietOpt = Annotated[
    bool, typer.Option("--quiet", help="only results, warnings and errors", callback=_hush, is_eager=True)
]
JsonOpt = Annotated[bool, typer.Option("--json", help="print JSON", callback=_hush, is_eager=True)]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, whose parameters that are dataclasses become an option for each of their fields."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}
    members = {name: tuple(f.name for f in fields(group)) for name, group in groups.items()}

    @wraps(command)
    def flat(**given: Any) -> None:
        made = {n: group(**{member: given.pop(member) for member in members[n]}) for n, group in groups.items()}
        command(**given, **made)

    flattened: list[inspect.Parameter] = []
    for parameter in parameters:
        if parameter.name not in groups:
            flattened.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(parameter.annotation, include_extras=True)
        flattened.extend(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(parameter.annotation)
        )
    flat.__signature__ = inspect.Signature(flattened)  # type: ignore[attr-defined]
    flat.__annotations__ = {}
    return flat


@dataclass(frozen=True)
class Machine:
    """Where a model comes from and how it runs."""

    device: Annotated[Device, typer.Option("--device", help="where to run")] = Device.AUTO
    dtype: Annotated[Dtype, typer.Option("--dtype", help="format of the weights in memory; auto: as stored")] = (
        Dtype.AUTO
    )
    quant: Annotated[
        str | None,
        typer.Option("--quant", help=f"{QUANT_HELP}; default: none, or what the weights are packed in"),
    ] = None
    exact: Annotated[bool, typer.Option("--exact", help="keep activations in fp32 at the input of products")] = False
    kv_dtype: Annotated[
        KvDtype | None, typer.Option("--kv-dtype", help="format of the KV cache; default bf16, f32 under f32")
    ] = None
    threads: ThreadsOpt = None
    revision: RevisionOpt = None
    offline: OfflineOpt = False

    def options(self, ctx: int | None, streams: int) -> Options:
        """Raises RequestError."""
        return Options(
            device=self.device.value,
            dtype=self.dtype.value,
            quant=self.quant,
            exact=self.exact,
            kv_dtype=self.kv_dtype.value if self.kv_dtype else None,
            ctx=ctx,
            streams=streams,
            threads=self.threads,
        )

    def load(self, model: str, *, ctx: int | None, streams: int, quiet: bool) -> LLM:
        """The model, with a bar on a terminal while it loads. Raises what `flashformer.load` raises."""
        options = asdict(self.options(ctx, streams))
        with loading_bar(quiet) as progress:
            return load(model, **options, revision=self.revision, offline=self.offline, progress=progress)


@dataclass(frozen=True)
class Room:
    """What the KV cache holds."""

    ctx: Annotated[
        int | None,
        typer.Option("--ctx", help="positions per slot; default: the least of the model's, 8192 and what fits"),
    ] = None
    streams: StreamsOpt = 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when an answer ends. Defaults: generation_config.json, else greedy."""

    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="most new tokens")] = DEFAULT_MAX_TOKENS
    temp: Annotated[
        float | None, typer.Option("--temp", help="0: greedy; default from generation_config.json, else 0")
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", help="choose among the k likeliest tokens; 0: all")] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="choose among the likeliest that make up p together; 1: all")
    ] = None
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="leave out tokens below this share of the likeliest; 0: none")
    ] = None
    repeat_penalty: Annotated[
        float | None, typer.Option("--repeat-penalty", help="above 1: less of what the text has already; 1: none")
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="end before this text; repeatable"),
    ] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on past the end of the text")] = False
    seed: Annotated[int | None, typer.Option("--seed", help="default: drawn and reported")] = None

    def arguments(self) -> SamplingArguments:
        """As `LLM.stream` and `LLM.stream_chat` take them."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temp,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "stop": self.stop or None,
            "ignore_eos": self.ignore_eos,
            "seed": self.seed,
        }

    def check(self) -> None:
        """Refuses before a model is loaded what no model accepts. Raises RequestError."""
        SamplingSettings(**self.arguments())
