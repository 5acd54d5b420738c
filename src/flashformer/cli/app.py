"""The commands."""

from __future__ import annotations

import typer

from .bench import bench
from .chat import chat
from .doctor import doctor
from .output import Commands
from .plan import plan
from .quantize import quantize
from .run import run
from .serve import serve
from .trace import trace

app = typer.Typer(
    cls=Commands,
    help="The whole transformer forward pass as one native call per token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (run, chat, serve, bench, plan, trace, quantize, doctor):
    app.command()(command)
