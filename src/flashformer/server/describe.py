"""/openapi.json: what is asked and answered here, described by the types and the limits that decide it.

In version 3.2 of OpenAPI, the first one that can say what the events of a stream are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from ..engine.request import LIMITS, RESERVED_VARIABLES
from ..version import __version__
from .options import MAX_BODY_BYTES, MAX_CHOICES, MAX_CONNECTIONS, MAX_HEADER_BYTES, MAX_PROMPTS, ServerOptions
from .schema import IGNORED, NEUTRAL, ChatBody, CompletionBody
from .shapes import ChatChunk, ChatCompletion, Error, Live, Model, ModelList, Ready, TextChunk, TextCompletion

if TYPE_CHECKING:
    from ..engine import LLM

Json = dict[str, Any]
JSON, EVENTS, PLAIN, HTML = "application/json", "text/event-stream", "text/plain", "text/html"

_ERRORS = {
    400: "A field is unknown, not supported or out of range, or the body is no JSON: `param` names the field",
    401: "No API key, or a wrong one",
    403: "The Host header names another machine",
    404: "No such model",
    408: "The body did not come in time",
    413: f"The body has more than {MAX_BODY_BYTES} bytes",
    415: f"The Content-Type is not {JSON}",
    429: "So many requests run and wait that no more are taken: ask again later",
    431: f"The headers have more than {MAX_HEADER_BYTES} bytes",
    500: "The model made a number that is none, or something failed, which is logged",
    503: "The model is being loaded, the server shuts down, or its memory for requests is full: ask again later",
    504: "The request took longer than this server allows",
}
_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
_ANYWHERE = (401, 403, 431, 500)
_WORK = (400, 404, 408, 413, 415, 429, 503, 504)
_SECURITY = {"key": {"type": "http", "scheme": "bearer"}, "password": {"type": "http", "scheme": "basic"}}
_NOTE = (
    "A field that is left out has the same default as in Python and on the command line. What is no HTTP, and requests "
    f"beyond {MAX_CONNECTIONS} connections, are told so in plain text, or cut off."
)


@dataclass(frozen=True)
class Operation:
    path: str
    says: str
    answers: Mapping[str, Any]  # media type -> type; of EVENTS, of the data of one; None: text
    errors: tuple[int, ...] = ()  # beside those that every path has
    body: type | None = None  # of a POST


_OPERATIONS = (
    Operation(
        "/v1/chat/completions", "Answer a conversation", {JSON: ChatCompletion, EVENTS: ChatChunk}, _WORK, ChatBody
    ),
    Operation("/v1/completions", "Continue a prompt", {JSON: TextCompletion, EVENTS: TextChunk}, _WORK, CompletionBody),
    Operation("/v1/models", "The model that is served", {JSON: ModelList}),
    Operation("/v1/models/{name}", "The same, by its name", {JSON: Model}, (404,)),
    Operation("/health", "200 when requests are answered: the model has made a token", {JSON: Ready}, (503,)),
    Operation("/live", "200 as long as the process runs", {JSON: Live}),
    Operation("/metrics", "Counters for Prometheus", {PLAIN: None}),
    Operation("/openapi.json", "This description", {JSON: dict[str, Any]}),
    Operation("/", "A page to chat with", {HTML: None}),
)


def openapi(options: ServerOptions, llm: LLM | None) -> Json:
    """`llm`: the model, whose limits are told, too, once it is loaded."""
    types = [Error, *(kind for one in _OPERATIONS for kind in (one.body, *one.answers.values()) if kind is not None)]
    references, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    of = dict(zip(types, references, strict=True))
    for body in (ChatBody, CompletionBody):
        _bound(schemas[body.__name__], _bounds(options, llm))
    _depend(schemas["ChatBody"], top_logprobs="logprobs", stream_options="stream")
    _depend(schemas["CompletionBody"], stream_options="stream")

    error = of[Error]
    unused = 401 if options.api_key is None else 403
    paths: Json = {}
    for one in _OPERATIONS:
        content = {media: _content(media, of.get(kind), error) for media, kind in one.answers.items()}
        errors = sorted({*_ANYWHERE, *one.errors} - {unused})
        bad = {str(status): {"$ref": f"#/components/responses/{_name(status)}"} for status in errors}
        said: Json = {"summary": one.says, "responses": {"200": {"description": "OK", "content": content}, **bad}}
        if "{name}" in one.path:
            known = {"type": "string", "enum": [options.model_name]}
            said["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": known}]
        if one.body is not None:
            said["requestBody"] = {"required": True, "content": {JSON: {"schema": of[one.body]}}}
        paths[one.path] = {"get" if one.body is None else "post": said}
    return {
        "openapi": "3.2.0",
        "info": {"title": "flashformer", "version": __version__, "description": _NOTE},
        "security": [{name: []} for name in _SECURITY] if options.api_key is not None else [],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {_name(status): _refusal(status, error) for status in _ERRORS if status != unused},
            "securitySchemes": _SECURITY if options.api_key is not None else {},
        },
    }


def _content(media: str, schema: Json | None, error: Json) -> Json:
    if media != EVENTS:
        return {"schema": schema or {"type": "string"}}
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": [schema, error]}}
    event = {"type": "object", "properties": {"data": {"anyOf": [data, {"const": "[DONE]"}]}}, "required": ["data"]}
    return {"itemSchema": event}


def _name(status: int) -> str:
    return HTTPStatus(status).phrase.replace(" ", "").replace("-", "")


def _refusal(status: int, error: Json) -> Json:
    said = {"description": _ERRORS[status], "content": {JSON: {"schema": error}}}
    if status not in _HEADERS:
        return said
    return {**said, "headers": {_HEADERS[status]: {"required": True, "schema": {"type": "string"}}}}


# ---- what a field may be ------------------------------------------------------------------------------------------


def _between(limits: tuple[float, float]) -> Json:
    return {"minimum": limits[0], "maximum": limits[1]}


def _bounds(options: ServerOptions, llm: LLM | None) -> dict[str, Json]:
    """Of each field, by the types that it may have, what else holds."""
    vocab_size = LIMITS.top_k[1] if llm is None else llm.spec.vocab_size
    names = {} if llm is None else {"enum": list(dict.fromkeys((options.model_name, llm.name)))}
    length = {} if llm is None else {"maxItems": llm.setup.target.ctx}
    token = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    tokens = {"type": "array", "items": token, "minItems": 1, **length}
    text = {"type": "string", "maxLength": LIMITS.prompt_chars}
    max_tokens = {"minimum": 0, "maximum": LIMITS.max_tokens[1]}
    stop = {"minLength": 1, "maxLength": LIMITS.stop_chars}
    logprobs = {"minimum": 0, "maximum": min(LIMITS.logprobs[1], vocab_size)}
    bias = {"type": "number", **_between(LIMITS.bias)}
    n_choices = MAX_CHOICES if llm is None else min(MAX_CHOICES, llm.setup.target.streams)
    return {
        "model": {"string": names},
        "messages": {"array": {"minItems": 1, "maxItems": LIMITS.messages}},
        "prompt": {
            "string": {"maxLength": LIMITS.prompt_chars},
            "array": {
                "items": {"anyOf": [token, text, tokens]},
                "minItems": 1,
                "anyOf": [{"items": {"type": "integer"}, **length},
                          {"items": {"type": ["string", "array"]}, "maxItems": MAX_PROMPTS}],
            },
        },
        "max_tokens": {"integer": max_tokens},
        "max_completion_tokens": {"integer": max_tokens},
        "n": {"integer": {"minimum": 1, "maximum": n_choices}},
        "temperature": {"number": {"anyOf": [{"const": 0}, _between(LIMITS.temperature)]}},
        "top_k": {"integer": {"minimum": 0, "maximum": vocab_size}},
        "top_p": {"number": _between(LIMITS.top_p)},
        "min_p": {"number": _between(LIMITS.min_p)},
        "repeat_penalty": {"number": _between(LIMITS.repeat_penalty)},
        "logit_bias": {
            "object": {
                "maxProperties": LIMITS.biases,
                "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                "additionalProperties": bias,
            }
        },
        "seed": {"integer": _between(LIMITS.seed)},
        "stop": {"string": stop, "array": {"maxItems": LIMITS.stops, "items": {"type": "string", **stop}}},
        "logprobs": {"integer": logprobs},
        "top_logprobs": {"integer": logprobs},
        "chat_template_kwargs": {
            "object": {
                "maxProperties": LIMITS.template_variables,
                "propertyNames": {"not": {"enum": list(RESERVED_VARIABLES)}},
            }
        },
    }  # fmt: skip


def _bound(schema: Json, bounds: Mapping[str, Json]) -> None:
    """Adds bounds to the fields of a body, and the fields that are no part of its type."""
    for name, known in schema["properties"].items():
        for kind in known.get("anyOf", [known]):
            kind.update(bounds.get(name, {}).get(kind.get("type"), {}))
    for name in sorted(IGNORED):
        schema["properties"][name] = {"description": "ignored: no answer depends on it"}
    for name, values in NEUTRAL.items():
        distinct = [value for i, value in enumerate(values) if value not in values[:i]]
        schema["properties"][name] = {"enum": distinct, "description": "anything else is not supported"}


def _depend(schema: Json, **pairs: str) -> None:
    """The first field of a pair may be given only where the second one is true."""
    schema["dependentSchemas"] = {
        first: {
            "anyOf": [
                {"properties": {first: {"type": "null"}}},
                {"properties": {second: {"const": True}}, "required": [second]},
            ]
        }
        for first, second in pairs.items()
    }
