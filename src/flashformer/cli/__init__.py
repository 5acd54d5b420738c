"""The `flashformer` command. Parsing and printing only; everything else is the library."""

from __future__ import annotations


def main() -> None:
    """Entry point. Exit codes: 0 fine, 1 our bug, 2 the user's input or more than this machine has, 130 interrupted."""
    try:
        from .app import app

        app(prog_name="flashformer")
    except KeyboardInterrupt:  # outside a command, where typer does not see it
        raise SystemExit(130) from None
