"""flashformer trace"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..bench import trace_forward
from ..bench.trace import WAIT
from ..engine.request import LIMITS, integer
from ..errors import RequestError
from ..model.outline import read_outline
from ..program.ir import KEY_CHUNK
from .options import Machine, ModelArg, QuietOpt, grouped
from .output import note, write


@grouped
def trace(
    model: ModelArg,
    machine: Machine,
    out: Annotated[Path, typer.Option("-o", "--out", help="file for Perfetto (ui.perfetto.dev), JSON")],
    html: Annotated[Path | None, typer.Option("--html", help="file for a picture, too")] = None,
    depth: Annotated[int, typer.Option("--depth", help="positions cached before the token")] = 0,
    rows: Annotated[int, typer.Option("--rows", help="slots that get a token")] = 1,
    quiet: QuietOpt = False,
) -> None:
    """Where the time of one forward goes: every phase and every wait of every worker."""
    for path in (out, html):
        if path is not None and not path.parent.is_dir():
            raise RequestError(f"{path}: there is no folder {path.parent}: make it first")
    integer("depth", depth, (0, 1 << 30))
    integer("rows", rows, LIMITS.streams)
    outline = read_outline(model, revision=machine.revision, offline=machine.offline)
    most = outline.spec.max_positions
    if depth >= most:
        raise RequestError(f"--depth {depth}: the model has {most} positions, one of which is the token's")
    need = min(-(-(max(depth, 1) + 1) // KEY_CHUNK) * KEY_CHUNK, most)
    with machine.load(model, ctx=need, streams=rows, quiet=quiet) as llm:
        found = trace_forward(llm, depth=depth, rows=rows)
        title = f"{llm.name}, {rows} rows at {depth} positions, {llm.setup.target.n_workers} workers"
    _write(out, json.dumps(found.chrome()))
    if html is not None:
        _write(html, found.html(title))
    write(f"{title}: {found.wall_ns / 1e6:.3f} ms, {100 * found.accounted:.1f}% of it accounted for\n")
    workers_ns = found.wall_ns * found.program.target.n_workers
    for name, (share, n_bytes) in sorted(found.totals().items(), key=lambda item: -item[1][0]):
        speed = f"{n_bytes / (share * workers_ns) * found.program.target.n_workers:7.1f} GB/s" if n_bytes else ""
        write(f"  {name:8} {100 * share:5.1f}%  {speed}\n")
    if not quiet:
        note(f"{out}: open it at https://ui.perfetto.dev; {WAIT} is time between a worker's phases")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror}") from error
