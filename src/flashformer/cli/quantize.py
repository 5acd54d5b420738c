"""flashformer quantize"""

from __future__ import annotations

from typing import Annotated

import typer

from ..engine import QuantizeReport, quantize_model
from .options import QUANT_HELP, Dtype, JsonOpt, ModelArg, OfflineOpt, QuietOpt, RevisionOpt, ThreadsOpt
from .output import write, write_json
from .plan import size
from .progress import loading_bar


def quantize(
    model: ModelArg,
    out: Annotated[str, typer.Argument(metavar="OUT", help="a new folder, which is a MODEL afterwards")],
    quant: Annotated[str, typer.Option("--quant", help=f"{QUANT_HELP}; none packs only")] = "int8",
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="format of what is not quantized; auto: as stored")
    ] = Dtype.AUTO,
    threads: ThreadsOpt = None,
    revision: RevisionOpt = None,
    offline: OfflineOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Quantize MODEL once, into a folder that is only read from then on; prints how far it is from the original."""
    with loading_bar(quiet or as_json) as progress:
        found = quantize_model(
            model,
            out,
            quant=quant,
            dtype=dtype.value,
            threads=threads,
            revision=revision,
            offline=offline,
            progress=progress,
        )
    if as_json:
        write_json(found.to_json())
    else:
        write(render(found))


def render(found: QuantizeReport) -> str:
    """The report as text."""
    error = found.divergence
    layers, head = (found.dtype if name == "none" else name for name in (found.quant, found.head_quant))
    lines = {
        "model": f"{found.model}, in {found.out}",
        "weights": f"layers {layers}, head {head}, the rest {found.dtype}",
        "size": f"{size(found.bytes_before)} before, {size(found.bytes_after)} after",
        "KL": f"{error.kl:.3g} nats in the mean, {error.kl_p99:.3g} at the 99th percentile",
        "top-1": f"{100 * error.top1:.2f}% of the likeliest tokens agree",
        "text": f"{found.text}, {error.n_tokens} tokens, against the model as it is stored",
    }
    return "".join(f"{name:10} {value}\n" for name, value in lines.items())
