"""flashformer chat"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..checkpoint.files import member, read_json
from ..checkpoint.resolve import resolve
from ..checkpoint.template import read_templates
from ..errors import RequestError
from ..model.random import PREFIX
from .conversation import Conversation
from .options import JsonOpt, Machine, ModelArg, QuietOpt, Room, Sampling, grouped
from .output import USER_ERRORS, faint, note
from .reader import ReadLine, line_reader, read_message


@grouped
def chat(
    model: ModelArg,
    sampling: Sampling,
    room: Room,
    machine: Machine,
    system: Annotated[str | None, typer.Option("--system", help="told to the model before the first message")] = None,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Talk with MODEL through its chat template. Messages come from the terminal, or one per line from stdin.

    /help lists the commands. Ctrl-C stops an answer; at the prompt, twice Ctrl-C or Ctrl-D leaves.
    """
    if model.startswith(PREFIX):
        raise RequestError(f"{model} has random weights and no chat template: it is for plan, bench and Python")
    sampling.check()
    _require_template(model, machine)
    with machine.load(model, ctx=room.ctx, streams=room.streams, quiet=quiet or as_json) as llm:
        conversation = Conversation(llm, sampling, system, quiet=quiet, as_json=as_json)
        if not sys.stdin.isatty():
            _follow(conversation, line_reader(quiet))
            return
        if not quiet:
            faint(f"{llm.name}, {llm.setup.target.ctx} positions. /help lists the commands, Ctrl-D leaves.")
        _talk(conversation, line_reader(quiet))


def _require_template(model: str, machine: Machine) -> None:
    """Refuses a model without a chat template before its weights are downloaded and read. Raises LoadError."""
    folder = resolve(model, revision=machine.revision, offline=machine.offline)
    config = member(folder, "tokenizer_config.json")
    templates = read_templates(folder, read_json(config) if config else {}, str(config or folder))
    if templates.source(tools=False) is None:
        raise RequestError(templates.missing())


def _follow(conversation: Conversation, read_line: ReadLine) -> None:
    """A script: the first error or interrupt ends it."""
    while not conversation.leaving and (text := read_message(read_line)) is not None:
        if conversation.take(text):
            raise KeyboardInterrupt


def _talk(conversation: Conversation, read_line: ReadLine) -> None:
    """A terminal: errors are shown and it goes on. Two interrupts with no line between them leave."""
    interrupts = 0
    while not conversation.leaving:
        try:
            text = read_message(read_line)
            if text is None:
                note("")
                return
            interrupts = 0
            interrupts = conversation.take(text)
        except KeyboardInterrupt:
            note("")
            interrupts += 1
            if interrupts > 1:
                raise typer.Exit(130) from None
            note("Ctrl-C again or Ctrl-D leaves")
        except USER_ERRORS as error:
            note(str(error))
