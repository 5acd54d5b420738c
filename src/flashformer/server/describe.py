"""/openapi.json: the requests as they are checked, described by the types that check them."""

from __future__ import annotations

from typing import Any

import msgspec

from ..version import __version__
from .schema import BODIES, IGNORED, NEUTRAL

_GET = {
    "/v1/models": "The model that is served",
    "/health": "200 when requests are answered: the model is loaded and has made a token; else 503",
    "/live": "200 as long as the process runs",
    "/metrics": "Counters for Prometheus",
}
_POST = {"/v1/chat/completions": "Answer a conversation", "/v1/completions": "Continue a prompt"}


def openapi() -> dict[str, Any]:
    references, components = msgspec.json.schema_components(BODIES, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {path: {"get": {"summary": says, "responses": _ok()}} for path, says in _GET.items()}
    for (path, says), reference in zip(_POST.items(), references, strict=True):
        content = {"application/json": {"schema": reference}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"summary": says, "requestBody": body, "responses": _ok(), "description": _note()}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "flashformer", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _ok() -> dict[str, Any]:
    return {"200": {"description": "OK"}, "default": {"description": "an error, in OpenAI's shape"}}


def _note() -> str:
    ignored, neutral = (", ".join(sorted(names)) for names in (IGNORED, NEUTRAL))
    return f"Ignored, for no answer depends on them: {ignored}. Accepted at values that ask for nothing: {neutral}."
