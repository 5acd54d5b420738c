"""A process that holds one engine and does what lines of JSON on stdin ask; one line of JSON answers each.

    python serve.py ENGINE      ENGINE: a module beside this one with a class `Engine`

Only NumPy and the engine's own package are needed. What the engine prints goes to stderr. Times are in ns and are taken
here, around the call that gives the next token to the caller: Python, and where the engine gives logits the search for
the largest, are included for every engine alike.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from time import perf_counter_ns
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

TOKEN_SEED = 1
WHOLE = 16  # tokens that the check of logits gives at once; the rest come one by one


class EngineLike(Protocol):
    wants_logits: bool  # whether last_logits will be asked for; set before a run

    def load(self, **options: Any) -> dict[str, Any]:
        """Loads a model; gives what is to be known of it: version, weight_bytes (None: not known), format."""

    def prompt(self, ids: NDArray[np.int32]) -> int:
        """Empties the cache and runs a prompt; gives the token after it."""

    def step(self, token: int) -> int:
        """Runs one more token; gives the one after it."""

    def rewind(self, n: int) -> bool:
        """Back to `n` cached positions; False where the engine cannot, and the prompt must be run again."""

    def last_logits(self) -> NDArray[np.float32]:
        """(vocab_size,) of the last position that ran."""


class Server:
    def __init__(self, name: str) -> None:
        self.engine: EngineLike = import_module(name).Engine()
        self.vocab_size = 0
        self.depth = -1  # positions that the prompt of `decode` cached, -1: something else did

    def load(self, vocab_size: int, **options: Any) -> dict[str, Any]:
        self.vocab_size = vocab_size
        return self.engine.load(**options)

    def logits(self, n: int, path: str) -> dict[str, Any]:
        """Saves the logits after token WHOLE and after every later one of `n`."""
        self.depth, self.engine.wants_logits = -1, True
        ids = self._tokens(n)
        self.engine.prompt(ids[:WHOLE])
        rows = [self.engine.last_logits().copy()]
        for token in ids[WHOLE:].tolist():
            self.engine.step(token)
            rows.append(self.engine.last_logits().copy())
        self.engine.wants_logits = False
        np.save(path, np.array(rows, np.float32))
        return {"rows": len(rows)}

    def decode(self, depth: int, n: int) -> dict[str, Any]:
        """`n` greedy tokens after `depth` cached positions."""
        ids = self._tokens(depth + 1)
        if self.depth != depth or not self.engine.rewind(depth):
            self.engine.prompt(ids[:depth])
        self.depth = depth
        token, tokens = int(ids[depth]), []
        begin = perf_counter_ns()
        for _ in range(n):
            token = self.engine.step(token)
            tokens.append(token)
        return {"ns": perf_counter_ns() - begin, "tokens": tokens}

    def prefill(self, n: int) -> dict[str, Any]:
        """A prompt of `n` tokens up to the token after it."""
        self.depth = -1
        ids = self._tokens(n)
        begin = perf_counter_ns()
        token = self.engine.prompt(ids)
        return {"ns": perf_counter_ns() - begin, "tokens": [token]}

    def quantize(self, **options: Any) -> dict[str, Any]:
        self.engine.quantize(**options)  # type: ignore[attr-defined]  # llama.cpp's alone
        return {}

    def _tokens(self, n: int) -> NDArray[np.int32]:
        return np.random.default_rng(TOKEN_SEED).integers(0, self.vocab_size, n, np.int32)


def serve(name: str, answers: TextIO) -> None:
    server = Server(name)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(server, asked.pop("do"))(**asked)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], answers)


if __name__ == "__main__":
    main()
