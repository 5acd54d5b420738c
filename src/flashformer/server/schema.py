"""The bodies of the two requests: what OpenAI's names mean here, checked before anything runs.

A field is of one of four kinds: it does what it says (the Structs), it has no effect on an answer and is ignored
(IGNORED), it is accepted at values that ask for nothing (NEUTRAL), or it is unknown and refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from ..engine.request import (
    LIMITS,
    SamplingSettings,
    cut,
    integer,
    is_batch,
    shown,
    stop_strings,
    template_variables,
    unicode_text,
)
from ..errors import RequestError
from .errors import ApiError, invalid
from .options import MAX_CHOICES, MAX_PROMPTS

if TYPE_CHECKING:
    from ..engine import LLM
    from ..engine.prompts import Prompt

# Whose request it is, what it is filed under, how it is billed: nothing that an answer depends on.
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0, 0.0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0, 0.0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class StreamOptions(Struct, forbid_unknown_fields=True, frozen=True):
    """How a stream is sent."""

    include_usage: bool | None = None  # one more chunk, with the usage and no choices
    include_obfuscation: bool | None = None  # chunks are never padded


class TextPart(Struct, forbid_unknown_fields=True, frozen=True):
    """Text as a part of a message."""

    type: Literal["text"]
    text: str


class Message(Struct, forbid_unknown_fields=True, frozen=True):
    """A message. The parts of its content are joined with line ends."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    # What answers carry and clients send back with them, empty.
    refusal: None = None
    annotations: Annotated[list[str], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[str], Meta(max_length=0)] | None = None


class Body(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Fields of both requests. Bounds are those of SamplingSettings."""

    model: str | None = None
    max_tokens: int | None = None  # 0: the prompt is read into the cache and no token is made
    n: int | None = None  # choices for each prompt, with seed, seed + 1, ...
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # token id, as text -> added to its logit
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(Body, frozen=True, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None  # another name of max_tokens
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


class CompletionBody(Body, frozen=True, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[int | str | list[int]]  # text, token ids, or a list of either
    echo: bool | None = None
    logprobs: int | None = None


# Of a body: more would hold up everybody else while it is read.
MAX_DEPTH = 32
MAX_NUMBERS = 1 << 20  # MAX_PROMPTS of 65,536 token ids
MAX_PARTS = 1 << 16  # strings, lists, objects, and numbers that are no integers

BODIES = (ChatBody, CompletionBody)
B = TypeVar("B", bound=Body)


@dataclass(frozen=True)
class Ask:
    """A checked request: what to run, and how to answer."""

    chat: bool
    model: str | None
    prompts: Callable[[LLM], list[Prompt]]  # raises RequestError
    settings: SamplingSettings
    n: int  # choices for each prompt
    warm: bool  # no token is wanted
    stream: bool
    include_usage: bool
    echo: bool = False


def read_chat(data: bytes) -> Ask:
    """Raises RequestError, ApiError."""
    body = _read(data, ChatBody)
    messages, variables = _messages(body.messages), template_variables(body.chat_template_kwargs)
    for name, value in variables.items():
        unicode_text("chat_template_kwargs", name)
        if isinstance(value, str):
            unicode_text(f"chat_template_kwargs[{shown(name)}]", value)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs: it counts only with logprobs=true: give that too", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("max_tokens and max_completion_tokens: two names of one number, and they differ", "max_tokens")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Ask(
        chat=True,
        prompts=lambda llm: [llm.chat_ids(messages, template_variables=variables)],
        **_common(body, max_tokens, logprobs),
    )


def read_completion(data: bytes) -> Ask:
    """Raises RequestError, ApiError."""
    body = _read(data, CompletionBody)
    given: Any = body.prompt
    prompts = given if is_batch(given) else [given]
    if len(prompts) > MAX_PROMPTS:
        raise invalid(f"prompt: {len(prompts)} prompts, at most {MAX_PROMPTS} are accepted", "prompt")
    for prompt in prompts:
        if isinstance(prompt, str):
            unicode_text("prompt", prompt)
    return Ask(
        chat=False,
        prompts=lambda llm: prompts,
        echo=bool(body.echo),
        **_common(body, body.max_tokens, body.logprobs),
    )


def _common(body: Body, max_tokens: int | None, logprobs: int | None) -> dict[str, Any]:
    """What both kinds of request say in the same words, as fields of Ask."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options: they count only with stream=true: give that too", "stream_options")
    settings = SamplingSettings(
        max_tokens=max_tokens or (None if max_tokens is None else 1),
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repeat_penalty=body.repeat_penalty,
        logit_bias=None if body.logit_bias is None else _bias(body.logit_bias),
        seed=body.seed,
        stop=None if body.stop is None else stop_strings(body.stop) or None,
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
    )
    return {
        "model": body.model,
        "settings": settings,
        "n": 1 if body.n is None else integer("n", body.n, (1, MAX_CHOICES)),
        "warm": max_tokens == 0,
        "stream": bool(body.stream),
        "include_usage": bool(body.stream_options and body.stream_options.include_usage),
    }


def _messages(messages: list[Message]) -> list[dict[str, str]]:
    if not messages:
        raise invalid("messages: there are none; expected at least one", "messages")
    if len(messages) > LIMITS.messages:
        raise invalid(f"messages: {len(messages)}, at most {LIMITS.messages} are accepted", "messages")
    given = []
    for i, message in enumerate(messages):
        content = message.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        fields = {"role": message.role, "content": unicode_text(f"messages[{i}].content", text)}
        if message.name is not None:
            fields["name"] = unicode_text(f"messages[{i}].name", message.name)
        given.append(fields)
    return given


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    """JSON has only text for names."""
    if len(given) > LIMITS.biases:
        raise invalid(f"logit_bias of {len(given)} tokens: at most {LIMITS.biases} are accepted", "logit_bias")
    for name in given:
        if not re.fullmatch(r"[0-9]{1,10}", name):
            raise invalid(f"logit_bias: name {shown(name)}: expected a token id in decimal digits", "logit_bias")
    bias = {int(name): value for name, value in given.items()}
    if len(bias) < len(given):
        raise invalid("logit_bias: a token id stands in it twice, with and without leading zeros", "logit_bias")
    return bias


def _read(data: bytes, kind: type[B]) -> B:
    known: dict[str, Any] = {}
    for name, value in read_object(data).items():
        if name in NEUTRAL:
            _require_neutral(name, value)
        elif name not in IGNORED:
            known[name] = value
    try:
        return msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except UnicodeError:
        raise RequestError("the body has a lone surrogate in a name: it is not valid Unicode text") from None


def read_object(data: bytes) -> dict[str, Any]:
    """JSON that is an object, with no name twice in any object of it. Raises RequestError."""
    _require_bounded(data)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is {shown(value)}: expected an object with the fields of the request")
    return value


def _require_bounded(data: bytes) -> None:
    """Counts, without reading it, what stands in JSON outside of its strings. Raises RequestError.

    Where the body is not JSON, it is right up to the first mistake, at which the parser stops.
    """
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"")  # then every quote begins or ends a string
    n_parts = bare.count(b'"') // 2
    if n_parts <= MAX_PARTS:
        signs = b"".join(bare.split(b'"')[::2]).translate(_SIGNS, _NO_SIGNS)
        brackets = signs.translate(None, b",.")[: 2 * MAX_PARTS]
        if max(accumulate(map(_DEEPER.__getitem__, brackets)), default=0) > MAX_DEPTH:
            raise RequestError(f"the body is nested too deep: at most {MAX_DEPTH} lists and objects in each other")
        n_parts += signs.count(b"[") + signs.count(b".")
        n_values = signs.count(b",")
        if n_values > MAX_NUMBERS:
            raise RequestError(f"the body has {n_values} values: at most {MAX_NUMBERS} are accepted")
    if n_parts > MAX_PARTS:
        raise RequestError(
            f"the body has {n_parts} strings, lists, objects and fractions: at most {MAX_PARTS} are accepted"
        )


_SIGNS = bytes.maketrans(b"{}eE", b"[]..")
_NO_SIGNS = bytes(sorted(set(range(256)) - set(b"[]{},.eE")))
_DEEPER = {ord("["): 1, ord("]"): -1}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RequestError(f"the body has the name {shown(twice)} twice in one object: leave one out")
    return found


def _no_number(name: str) -> None:
    raise RequestError(f"the body has {name}, which is no number in JSON")


def _require_neutral(name: str, value: object) -> None:
    if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
        expected = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[name] if neutral is not None)
        said = f"expected {expected}, or leave it out" if expected else "leave it out"
        raise invalid(f"{name}={shown(value)}: not supported; {said}", name, code="unsupported_parameter")


def _refusal(message: str) -> ApiError:
    """msgspec's words in our order: the field first."""
    what, _, path = message.partition(" - at `$")
    field = cut(path.rstrip("`").removeprefix("."))
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        name = cut(f"{field}.{unknown[1]}" if field else unknown[1])
        return invalid(f"{name}: no such field; leave it out", name, code="unknown_parameter")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        name = f"{field}.{missing[1]}" if field else missing[1]
        return invalid(f"{name}: missing; it is required", name, code="missing_required_parameter")
    return invalid(f"{field or 'body'}: {what[:1].lower()}{cut(what[1:])}", field or None)
