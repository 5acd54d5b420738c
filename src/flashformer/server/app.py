"""The application: routes, and what surrounds them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from importlib import resources
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..engine import LLM
from ..errors import FlashformerError
from .describe import openapi
from .errors import ApiError, api_error
from .guard import Guard
from .metrics import CONTENT_TYPE
from .options import ServerOptions
from .schema import read_chat, read_completion
from .service import Service
from .shapes import Live, Model, ModelList, Ready


def make_app(source: LLM | Callable[[], LLM], options: ServerOptions) -> Starlette:
    """An application that serves one model, of which `app.state.service` is the Service.

    `source`: a model, which its owner closes after the application has ended, or what loads one, which is called in a
    thread when the application begins and closed with it.
    """
    service, began = Service(source, options), int(time.time())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.begin()
        try:
            with suppress(asyncio.CancelledError):  # ended at once
                yield
        finally:
            await service.end()

    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, read_chat)

    async def completions(request: Request) -> Response:
        return await service.answer(request, read_completion)

    def model() -> Model:
        given: Model = {"id": options.model_name, "object": "model", "created": began, "owned_by": "flashformer"}
        return {**given, "max_model_len": service.loaded.llm.setup.target.ctx} if service.loaded else given

    async def models(_: Request) -> Response:
        return _json(ModelList(object="list", data=[model()]))

    async def one_model(request: Request) -> Response:
        if request.path_params["name"] != options.model_name:
            message = f"only {options.model_name!r} is served here"
            raise ApiError(404, message, code="model_not_found", param="model")
        return _json(model())

    async def health(_: Request) -> Response:
        service.require_ready()
        return _json(Ready(status="ready"))

    async def live(_: Request) -> Response:
        return _json(Live(status="live"))

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def description(_: Request) -> Response:
        return _json(openapi(options, service.loaded.llm if service.loaded else None))

    app = Starlette(
        routes=[
            Route("/", _page),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
            Route("/live", live),
            Route("/metrics", metrics),
            Route("/openapi.json", description),
        ],
        middleware=[Middleware(Guard, options=options)],
        exception_handlers={kind: _refused for kind in (ApiError, FlashformerError, TimeoutError, HTTPException)}
        | {Exception: _refused},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def _json(value: Mapping[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    return api_error(error).response()


async def _page(_: Request) -> Response:
    data, policy = _page_file()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(data, headers=headers, media_type="text/html")


@lru_cache(1)
def _page_file() -> tuple[bytes, str]:
    """The page, and the policy that lets a browser run what stands in it and load nothing from elsewhere."""
    data = resources.files(__package__).joinpath("page.html").read_bytes()
    allowed = {}
    for element in (b"script", b"style"):
        pattern = b"<%b[^>]*>(.*?)</%b>" % (element, element)
        digests = [hashlib.sha256(text).digest() for text in re.findall(pattern, data, re.DOTALL)]
        allowed[element] = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"
    return data, (
        f"default-src 'none'; script-src {allowed[b'script']}; style-src {allowed[b'style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
