"""Options that several commands share, each declared once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"


class Dtype(StrEnum):
    AUTO = "auto"
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"


class KvDtype(StrEnum):
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"


ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="demo, a folder, a hub id, or shape:NAME")]
DeviceOpt = Annotated[Device, typer.Option("--device", help="where to run")]
DtypeOpt = Annotated[Dtype, typer.Option("--dtype", help="format of the weights in memory; auto: as stored")]
ExactOpt = Annotated[bool, typer.Option("--exact", help="keep activations in fp32 at the input of products")]
KvDtypeOpt = Annotated[
    KvDtype | None, typer.Option("--kv-dtype", help="format of the KV cache; default bf16, f32 under f32")
]
CtxOpt = Annotated[
    int | None,
    typer.Option("--ctx", help="positions per slot; default: the least of the model's, 8192 and what fits"),
]
StreamsOpt = Annotated[int, typer.Option("--streams", help="slots for sequences, 1 to 16")]
ThreadsOpt = Annotated[
    int | None,
    typer.Option("--threads", help="default: cores within the quota"),
]
SeedOpt = Annotated[int | None, typer.Option("--seed", help="default: drawn and reported")]
RevisionOpt = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit of a hub id")]
OfflineOpt = Annotated[bool, typer.Option("--offline", help="use what is on this machine only")]
QuietOpt = Annotated[bool, typer.Option("--quiet", help="only results, warnings and errors")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print JSON")]
