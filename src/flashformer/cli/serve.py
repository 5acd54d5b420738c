"""flashformer serve"""

from __future__ import annotations

import faulthandler
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import env
from ..errors import RequestError
from .options import Machine, ModelArg, QuietOpt, Room, StreamsOpt, grouped

END_S = 10.0  # in which all threads must end when nothing is to be answered any more
STDERR = 2


@dataclass(frozen=True)
class Places(Room):
    """As many requests run at once as there are streams."""

    streams: StreamsOpt = 4


@grouped
def serve(
    model: ModelArg,
    machine: Machine,
    room: Places,
    host: Annotated[
        str | None,
        typer.Option("--host", help="address; one that others reach needs an API key", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="0: any that is free", show_default="8000")] = None,
    uds: Annotated[str | None, typer.Option("--uds", metavar="PATH", help="UNIX socket instead of an address")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="asked of every request; default: FLASHFORMER_API_KEY")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", metavar="NAME", help="default: MODEL, of a folder its name")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", help="requests that may wait for a stream; others get 429")
    ] = 64,
    shutdown_timeout: Annotated[
        float, typer.Option("--shutdown-timeout", help="seconds that requests get to end after SIGTERM or Ctrl-C")
    ] = 30.0,
    quiet: QuietOpt = False,
) -> None:
    """Answer requests over HTTP with OpenAI's names; a page to chat with is at /.

    The first SIGTERM or Ctrl-C lets running requests come to their end, the second ends them.
    """
    try:
        from .. import server
    except ModuleNotFoundError as error:
        raise RequestError(
            f"the server needs {error.name}, which is not installed: pip install 'flashformer[serve]'"
        ) from error
    address: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if uds is not None and address:
        raise RequestError(f"--uds {uds} is instead of an address: leave out --{' and --'.join(address)}")
    listen = server.Listen(uds=uds, **address)
    machine.options(room.ctx, room.streams)  # refused before anything listens
    options = server.ServerOptions(
        model_name=served_model_name or _name(model),
        api_key=env.api_key() if api_key is None else api_key,
        max_waiting=max_waiting,
        shutdown_s=shutdown_timeout,
    )
    ended_by = server.serve(
        lambda: machine.load(model, ctx=room.ctx, streams=room.streams, quiet=quiet),
        options,
        listen,
        ending=_end_soon,
    )
    if ended_by == signal.SIGINT:
        raise typer.Exit(130)


def _end_soon() -> None:
    """If a thread does not end, the process ends all the same, with 1, and says on stderr where each thread stands."""
    faulthandler.dump_traceback_later(END_S, exit=True, file=STDERR)


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model
