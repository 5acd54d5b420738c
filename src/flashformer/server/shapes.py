"""Answers in OpenAI's shapes: the types of what is made elsewhere, from which /openapi.json describes it."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

FinishReason = Literal["stop", "length"]
ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]


class ErrorDetail(TypedDict):
    message: str
    type: ErrorType
    param: str | None  # the field that is meant
    code: str | None


class Error(TypedDict):
    error: ErrorDetail


# ---- in every answer ----------------------------------------------------------------------------------------------


class PromptTokens(TypedDict):
    cached_tokens: int  # that were not computed again


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class Timings(TypedDict, total=False):
    """How fast an answer was made. A number that there is none of is left out; within a stream, all but speeds."""

    queue_ms: float
    cached_tokens: int
    cache_miss: str  # why not more of them
    max_tokens_clamped: bool  # the context left less room than max_tokens
    ttft_ms: float  # to the first token
    n_tokens: int
    tok_s: float
    p50_ms: float  # per token after the first
    p99_ms: float
    gb_s: float  # of weights and KV read, 1e9 bytes
    measured_gb_s: float  # what this machine reads


class Head(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


# ---- chat ---------------------------------------------------------------------------------------------------------


class ChatToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenChoice(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenChoice]
    refusal: None


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]  # with stream_options.include_usage: in the last chunk, null before it
    timings: NotRequired[Timings]


# ---- completions --------------------------------------------------------------------------------------------------


class TextLogprobs(TypedDict):
    """An entry per token in each list; null for the first token of an echoed prompt, which nothing predicts."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    timings: Timings


class TextChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextChunk(Head):
    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: NotRequired[Usage | None]
    timings: NotRequired[Timings]


# ---- what stands besides --------------------------------------------------------------------------------------------


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: NotRequired[int]  # positions of its context, once it is loaded


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Ready(TypedDict):
    status: Literal["ready"]


class Live(TypedDict):
    status: Literal["live"]
