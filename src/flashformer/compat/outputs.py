"""Answers in vLLM's shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..engine import Output, TokenLogprobs


@dataclass(frozen=True)
class Logprob:
    """Of the model's distribution before penalties and temperature."""

    logprob: float  # natural logarithm
    rank: int | None = None  # 1: the likeliest; None: not among the tokens that were asked for
    decoded_token: str | None = None  # None where the model has no tokenizer


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to one prompt."""

    index: int  # which of the `n` answers
    text: str
    token_ids: list[int]  # the token that ended the text included
    cumulative_logprob: float | None  # where log probabilities were asked for
    logprobs: list[dict[int, Logprob]] | None  # per token: the chosen one first, then the likeliest
    finish_reason: str  # "stop" | "length" | "cancelled"
    stop_reason: str | None  # the stop string that ended the text; None: the model did, or the length

    def finished(self) -> bool:
        return True


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int  # of the prompt, for the first answer
    finished: bool = True
    prompt_logprobs: None = None


def completion(index: int, output: Output, decode: Callable[[int], str | None]) -> CompletionOutput:
    tokens = output.logprobs
    return CompletionOutput(
        index=index,
        text=output.text,
        token_ids=output.token_ids,
        cumulative_logprob=None if tokens is None else math.fsum(token.logprob for token in tokens),
        logprobs=None if tokens is None else [_logprobs(token, decode) for token in tokens],
        finish_reason=output.finish_reason,
        stop_reason=output.stop,
    )


def _logprobs(token: TokenLogprobs, decode: Callable[[int], str | None]) -> dict[int, Logprob]:
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
    found = {token.token_id: token.logprob} | dict(token.top)
    return {i: Logprob(p, ranks.get(i), decode(i)) for i, p in found.items()}
