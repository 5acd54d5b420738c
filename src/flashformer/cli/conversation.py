"""A conversation with a model, its answers, and the commands that change it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..engine import LLM, Output
from ..engine.stats import peak_rss_bytes
from ..errors import FlashformerError, RequestError
from .options import Sampling
from .output import faint, note, write, write_json
from .run import report

Message = dict[str, str]


class Conversation:
    """`turns`: user and assistant, alternating, an answer last. A turn that fails leaves them as they were."""

    def __init__(
        self, llm: LLM, sampling: Sampling, system: str | None, *, quiet: bool = False, as_json: bool = False
    ) -> None:
        self.turns: list[Message] = []
        self.leaving = False
        self._llm = llm
        self._sampling = sampling
        self._system = system or None
        self._quiet, self._as_json = quiet, as_json
        self._attempt = 0  # answers to the last message before this one
        self._outputs: list[Output] = []

    @property
    def messages(self) -> list[Message]:
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        return first + self.turns

    def take(self, text: str) -> bool:
        """Obeys a command, or answers a message; True where the answer was interrupted. Raises RequestError."""
        if not text.strip():
            return False
        if not text.startswith("/") or "\n" in text:
            self._attempt = 0
            return self._answer([*self.turns, {"role": "user", "content": text}])
        name, _, argument = text.partition(" ")
        command, argument = COMMANDS.get(ALIASES.get(name, name)), argument.strip()
        if command is None:
            raise RequestError(f"{name}: no such command; /help lists them. To say this, put a space in front of it")
        if argument and not command.argument:
            raise RequestError(f"{name} takes nothing after it, found {argument!r}")
        return bool(command.obey(self, argument))

    def _answer(self, turns: list[Message]) -> bool:
        """Streams the answer to `turns`, which end with the user's."""
        before, self.turns = self.turns, turns
        try:
            output = self._generate()
        except BaseException:
            self.turns = before
            raise
        self.turns = [*turns, {"role": "assistant", "content": output.text}]
        self._outputs.append(output)
        if self._as_json:
            write_json(report(self._llm, output))
        else:
            if not output.text.endswith("\n"):
                write("\n")
            if not self._quiet:
                faint(self._line(output))
        return output.finish_reason == "cancelled"

    def _generate(self) -> Output:
        arguments, seed = self._sampling.arguments(), self._sampling.seed
        if seed is not None:
            arguments["seed"] = (seed + self._attempt) % 2**64
        try:
            stream = self._llm.stream_chat(self.messages, **arguments)
        except RequestError:
            self._require_room()
            raise
        try:
            with stream, _interrupts(stream.close):
                for piece in stream:
                    if piece.text and not self._as_json:
                        write(piece.text)
        except FlashformerError:
            if stream.output.text and not self._as_json:
                write("\n")  # the message begins a line
            raise
        return stream.output

    def _require_room(self) -> None:
        n, ctx = len(self._llm.tokenizer.encode_chat(self.messages)), self._llm.setup.target.ctx
        if n >= ctx:
            larger = ", or start with a larger --ctx" if ctx < self._llm.spec.max_positions else ""
            raise RequestError(
                f"the context is full: with this message the conversation has {n} tokens, and {ctx} positions leave "
                f"no room for an answer. The message was not added; /clear begins a new conversation{larger}"
            )

    def _line(self, output: Output) -> str:
        timing, n_prompt, ctx = output.timing, len(output.prompt_token_ids), self._llm.setup.target.ctx
        parts = [f"prompt {n_prompt} tok ({output.cached_tokens} cached) {timing.ttft_ms:.0f} ms"]
        parts.append(f"{timing.n_tokens} tok" + (f" {timing.tok_s:.1f} tok/s" if timing.tok_s else ""))
        measured = self._llm.measured_gb_s()
        if timing.gb_s and measured:
            parts.append(f"{timing.gb_s:.1f} GB/s = {100 * timing.gb_s / measured:.0f}% of measured {measured:.1f}")
        used = n_prompt + timing.n_tokens
        parts.append(f"context {used} of {ctx}")
        if output.finish_reason == "cancelled":
            parts.append("interrupted")
        elif output.finish_reason == "length":
            parts.append("context full" if used >= ctx else f"cut at -n {self._sampling.max_tokens}")
        return " | ".join(parts)

    def _help(self, _: str) -> None:
        width = max(len(f"{name} {command.argument}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            note(f"  {f'{name} {command.argument}':{width}}  {command.says}")
        note('  A \\ at the end of a line continues the message; """ begins and ends one of many lines.')
        note("  Ctrl-C stops an answer, Ctrl-D leaves.")

    def _clear(self, _: str) -> None:
        self.turns = []

    def _set_system(self, text: str) -> None:
        self._system = text or None

    def _retry(self, _: str) -> bool:
        if not self.turns:
            raise RequestError("/retry: there is no answer yet")
        self._attempt += 1
        return self._answer(self.turns[:-1])

    def _save(self, name: str) -> None:
        if not name:
            raise RequestError("/save needs the name of a file")
        text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
        try:
            path = Path(name).expanduser()
            with path.open("x", encoding="utf-8") as file:
                try:
                    file.write(text)
                    file.flush()
                except OSError:
                    path.unlink()
                    raise
        except FileExistsError as error:
            raise RequestError(f"/save {name}: the file exists; give another name") from error
        except (OSError, RuntimeError) as error:
            raise RequestError(f"/save {name}: {getattr(error, 'strerror', error)}") from error

    def _stats(self, _: str) -> None:
        outputs, target = self._outputs, self._llm.setup.target
        new = sum(o.timing.n_tokens for o in outputs)
        steps = [(o.timing.n_tokens - 1, o.timing.tok_s) for o in outputs if o.timing.tok_s]
        seconds = sum(n / speed for n, speed in steps)
        speed = f" at {sum(n for n, _ in steps) / seconds:.1f} tok/s" if seconds else ""
        prompt, cached = sum(len(o.prompt_token_ids) for o in outputs), sum(o.cached_tokens for o in outputs)
        note(f"  {self._llm.name} on {self._llm.setup.device}, {target.n_workers} threads, {target.ctx} positions")
        note(f"  {len(outputs)} answers: {new} tokens{speed}; prompts {prompt} tokens, {cached} of them cached")
        note(f"  peak {peak_rss_bytes() / 2**30:.2f} GiB")

    def _leave(self, _: str) -> None:
        self.leaving = True


class Command(NamedTuple):
    """`argument`: how /help shows what follows the name; empty where nothing may."""

    argument: str
    says: str
    obey: Callable[[Conversation, str], bool | None]


COMMANDS = {
    "/help": Command("", "this list", Conversation._help),
    "/clear": Command("", "begin a new conversation; the system message stays", Conversation._clear),
    "/system": Command("TEXT", "set the system message; without TEXT there is none", Conversation._set_system),
    "/retry": Command("", "answer the last message again, with another seed", Conversation._retry),
    "/save": Command("FILE", "write the messages to a new file, as JSON", Conversation._save),
    "/stats": Command("", "tokens and speed since the start", Conversation._stats),
    "/exit": Command("", "leave; /bye and /quit do the same", Conversation._leave),
}
ALIASES = {"/bye": "/exit", "/quit": "/exit"}


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`. Only the main thread gets signals; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
