"""Errors as OpenAI writes them down: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import ContextError, DeviceError, NumericalError, RequestError
from ..log import log
from .shapes import Error, ErrorType

CLOSE = {"connection": "close"}  # where the body of the request was not read: what follows is no request
RETRY = {"retry-after": "1"}

_TYPES: Mapping[int, ErrorType] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal, with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> Error:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        said = self.message.encode("utf-8", "backslashreplace").decode()  # a name in it may have a lone surrogate
        return {"error": {"message": said, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(msgspec.json.encode(self.body), self.status, self.headers, "application/json")


def invalid(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an error. One that is no error of ours on purpose is logged, and told in general."""
    match error:
        case ApiError():
            return error
        case ContextError():
            return invalid(str(error), _subject(str(error)), code="context_length_exceeded")
        case RequestError():
            return invalid(str(error), _subject(str(error)))
        case NumericalError():
            return ApiError(500, str(error), code="numerical_error")
        case DeviceError():
            return ApiError(503, str(error), code="device_error", headers=RETRY)
        case asyncio.TimeoutError():
            return ApiError(504, "the request took longer than this server allows and was ended", code="timeout")
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers={**(error.headers or {}), **CLOSE})
    log.error("a request failed", exc_info=error)
    return ApiError(500, "an internal error, which is logged: please report it", code="internal_error")


def _subject(message: str) -> str | None:
    """The name of the field that a message begins with."""
    found = re.match(r"([a-z]+(?:_[a-z]+)*)(?=[=:\[]| of \d| of type )", message)
    return found[1] if found else None
