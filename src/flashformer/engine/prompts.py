"""What a caller gives (text, token ids, a conversation) -> token ids of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..model.spec import ModelSpec
from . import request as requests
from .request import LIMITS

if TYPE_CHECKING:
    from ..checkpoint import Tokenizer

Ids = Sequence[int] | NDArray[np.integer]
Prompt = str | Ids


class Prompts:
    """Encodes for one loaded model. Everything raises RequestError."""

    def __init__(self, name: str, spec: ModelSpec, ctx: int, tokenizer: Tokenizer | None) -> None:
        self._name, self._spec, self._ctx, self._given = name, spec, ctx, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        if self._given is None:
            raise RequestError(f"{self._name} has no tokenizer: give prompts as lists of token ids")
        return self._given

    @property
    def has_text(self) -> bool:
        return self._given is not None

    def ids(self, prompt: Prompt) -> NDArray[np.int32]:
        """(n) int32. Text is encoded by the tokenizer's own rule; where that gives nothing, BOS alone is used."""
        return self._checked(self._encoded(prompt) if isinstance(prompt, str) else _listed("prompt", prompt))

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, variables: object
    ) -> NDArray[np.int32]:
        """(n) int32: the conversation in the model's chat template, and what invites the answer; nothing is added."""
        given = requests.template_variables(variables)
        if isinstance(messages, Sequence) and len(messages) > LIMITS.messages:
            raise RequestError(f"messages: {len(messages)}, at most {LIMITS.messages} are accepted")
        ids = self.tokenizer.chat_ids(
            messages, tools, given, check=lambda n: requests.require_chars("messages", n, self._ctx)
        )
        if not ids:
            raise RequestError("messages: the chat template made no text of them; expected some content")
        return self._checked(ids)

    def pair(self, prompt: Prompt, continuation: Prompt) -> tuple[NDArray[np.int32], int]:
        """((n) int32, n_prompt): token ids of both, and how many of them are the prompt's.

        Two texts are cut as lm-evaluation-harness cuts them: space at the end of the prompt goes to the continuation,
        and the continuation is what the encoding of both together has after the length of that of the prompt.
        """
        if isinstance(prompt, str) and isinstance(continuation, str):
            context = self.tokenizer.encode(self._text(prompt.rstrip()))
            first = self._begun(context)
            whole = self.tokenizer.encode(self._text(prompt + self._text(continuation)))
            rest: Sequence[int] | NDArray[np.integer] = whole[len(context) :]
        elif isinstance(continuation, str):
            first = list(_listed("prompt", prompt))
            rest = self.tokenizer.encode(self._text(continuation), add_special_tokens=False)
        else:
            first = self._encoded(prompt) if isinstance(prompt, str) else list(_listed("prompt", prompt))
            rest = _listed("continuation", continuation)
        if len(rest) == 0:
            raise RequestError("continuation: it adds no token to the prompt; expected at least one")
        if len(first) == 0:
            raise RequestError("prompt: empty list of token ids; at least one is needed, for example the BOS id")
        n = len(first) + len(rest)
        if n > self._ctx + 1:
            raise RequestError(
                f"prompt and continuation of {n} tokens: the context of {self._ctx} can score {self._ctx + 1} at most; "
                "shorten them, or load with a larger ctx"
            )
        return requests.token_ids([*first, *rest], self._spec.vocab_size, n), len(first)

    def _checked(self, ids: Ids) -> NDArray[np.int32]:
        return requests.token_ids(ids, self._spec.vocab_size, self._ctx)

    def _text(self, text: str) -> str:
        return requests.prompt_text(text, self._ctx)

    def _encoded(self, text: str) -> list[int]:
        return self._begun(self.tokenizer.encode(self._text(text)))

    def _begun(self, ids: list[int]) -> list[int]:
        if not ids and self._spec.bos_id is not None:
            ids = [self._spec.bos_id]
        if not ids:
            raise RequestError(f"empty prompt, and {self._name} has no BOS token to start from: give some text")
        return ids


def _listed(name: str, ids: object) -> Ids:
    if not isinstance(ids, list | tuple | np.ndarray):
        raise RequestError(f"{name} of type {type(ids).__name__}: expected text or a list of token ids")
    return ids
