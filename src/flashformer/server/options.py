"""What a server is told when it starts, with every limit of a request that is not the engine's."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.request import integer, real
from ..errors import RequestError

MAX_CONNECTIONS = 2048
MAX_HEADER_BYTES = 32 << 10
MAX_BODY_BYTES = 8 << 20
MAX_BODIES_BYTES = 64 << 20  # of all requests that were not answered
UNCOUNTED_BODY_BYTES = 64 << 10  # of each, in that sum
MAX_PROMPTS = 16  # of a request
MAX_CHOICES = 8  # for a prompt, and no more than there are streams


@dataclass(frozen=True)
class ServerOptions:
    """Raises RequestError."""

    model_name: str  # in /v1/models, in answers, and in `model` of requests
    api_key: str | None = None  # asked for on every path
    any_host: bool = False  # requests may name any host although no key is asked for: on a UNIX socket
    host: str | None = None  # further name under which requests may ask for the server
    max_waiting: int = 64  # requests that wait for a slot; further ones are refused with 429
    request_s: float = 600.0  # from the end of its body, waiting included, until an answer is cut off
    body_s: float = 30.0  # in which a request must have come in
    stall_s: float = 30.0  # a client that takes nothing for so long is cut off
    ping_s: float = 15.0  # between comments in a stream that has nothing else to say
    shutdown_s: float = 30.0  # that running requests get after SIGTERM
    buffer_bytes: int = 64 << 10  # of a stream that were not sent yet, beyond which its sequence stands still

    def __post_init__(self) -> None:
        if not self.model_name:
            raise RequestError("the name of the model is empty: give --served-model-name some text")
        key = self.api_key
        if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
            raise RequestError("the API key must be printable ASCII without spaces, and not empty")
        integer("max_waiting", self.max_waiting, (0, 4096))
        integer("buffer_bytes", self.buffer_bytes, (1, 1 << 20))
        real("shutdown_timeout", self.shutdown_s, (0.0, 3600.0))
        for name in ("request_s", "body_s", "stall_s", "ping_s"):
            real(name, getattr(self, name), (0.001, 3600.0))
