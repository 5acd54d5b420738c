"""What stands behind the routes: the model, who may use it now, and the requests on their way.

A request goes: body read (guard) -> checked (schema) -> waits its turn (admission) -> a thread makes its answer (work)
-> bytes cross to the loop (bridge) -> response. Whatever ends it, `_over` closes its bridge, which ends its sequence.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine import LLM
from ..engine.request import shown
from ..errors import RequestError
from ..log import log
from ..version import __version__
from .admission import Admission
from .answers import ChatAnswer, CompletionAnswer, error_event
from .bridge import Bridge, Gone
from .errors import CLOSE, RETRY, ApiError, api_error, invalid
from .guard import Bodies, ClientGone, read_body, unless_gone
from .metrics import Live, Metrics
from .options import ServerOptions
from .schema import Ask
from .tokens import Vocabulary
from .work import Work

GRACE_S = 2.0  # in which answers that are ended at a shutdown may say so
NOBODY = 499  # the status for a client that has gone: it never sees it


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    BROKEN = "broken"


_SAYS = {
    State.LOADING: "the model is being loaded",
    State.DRAINING: "the server is shutting down",
    State.BROKEN: "the engine has failed and the server ends",
}


@dataclass(frozen=True)
class Loaded:
    """A model that has made a token."""

    llm: LLM
    measured_gb_s: float | None
    vocabulary: Vocabulary
    admission: Admission
    pool: ThreadPoolExecutor

    @property
    def fingerprint(self) -> str:
        """Of what decides the bits of an answer beside the request."""
        setup, isa = self.llm.setup, self.llm.kernel.describe().get("isa")
        return "-".join(map(str, (f"flashformer-{__version__}", setup.device, *([isa] if isa else []))))


class Service:
    """One per application. Everything but `_load` and `_run` is for the loop's thread."""

    def __init__(self, source: LLM | Callable[[], LLM], options: ServerOptions) -> None:
        """`source`: a model, which its owner closes, or what loads one, which is called in a thread."""
        self.options = options
        self.state = State.LOADING
        self.loaded: Loaded | None = None
        self.failure: BaseException | None = None  # why the state is BROKEN
        self._has_ended = False
        self.when_broken: Callable[[], None] = lambda: None
        self._source = source
        self._jobs: dict[Bridge, Work] = {}
        self._bodies = Bodies()
        self.metrics = Metrics(
            options.model_name,
            Live(
                running=lambda: self.loaded.admission.n_running if self.loaded else 0,
                waiting=lambda: self.loaded.admission.n_waiting if self.loaded else 0,
                kv_share=self._kv_share,
                gb_s=lambda: max((work.gb_s for work in self._jobs.values()), default=0.0),
                measured_gb_s=lambda: (self.loaded.measured_gb_s if self.loaded else None) or 0.0,
            ),
        )

    # ---- from begin to end ----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Loads in a thread; requests are refused until that is done."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._load, name="flashformer-load", daemon=True).start()

    def _load(self) -> None:
        try:
            llm = self._source if isinstance(self._source, LLM) else self._source()
            make_token(llm)
            if self._owns_model:
                llm.forget()  # the prompt of that token
            n = llm.setup.target.streams
            admission = Admission(n, self.options.max_waiting)
            pool = ThreadPoolExecutor(n, "flashformer-request")
            loaded = Loaded(llm, llm.measured_gb_s(), Vocabulary(llm), admission, pool)
        except BaseException as error:
            self._tell(self._break, error)
        else:
            if not self._tell(self._open, loaded):
                self._close(loaded)

    @property
    def _owns_model(self) -> bool:
        return not isinstance(self._source, LLM)

    def _tell(self, use: Callable[..., object], *args: Any) -> bool:
        """Calls in the loop's thread, from any; False where the loop is no more."""
        try:
            self._loop.call_soon_threadsafe(use, *args)
        except RuntimeError:
            return False
        return True

    def _open(self, loaded: Loaded) -> None:
        if self._has_ended:
            threading.Thread(target=self._close, args=[loaded]).start()
            return
        self.loaded = loaded
        target = loaded.llm.setup.target
        if self.state is State.LOADING:
            self.state = State.READY
            log.info(f"{self.options.model_name} is ready: {target.streams} streams of {target.ctx} positions")

    def _break(self, error: BaseException) -> None:
        self.state = State.BROKEN
        if self.failure is None:
            self.failure = error
            self.when_broken()

    async def drain(self) -> None:
        """Takes nothing new, lets what runs come to its end for a while, then ends it with an error."""
        self._close_doors()
        if not await self._is_idle(self.options.shutdown_s):
            self.abort()
            await self._is_idle(GRACE_S)

    def _close_doors(self) -> None:
        if self.state is not State.BROKEN:
            self.state = State.DRAINING
        if self.loaded is not None:
            self.loaded.admission.refuse(self._refusal())

    async def _is_idle(self, within_s: float) -> bool:
        end = self._loop.time() + within_s
        while self._jobs and self._loop.time() < end:
            await asyncio.sleep(0.02)
        return not self._jobs

    def abort(self) -> None:
        """Takes nothing new, and ends every answer with an error, within one forward each."""
        self._close_doors()
        for bridge in list(self._jobs):
            bridge.fail(self._refusal())

    async def end(self) -> None:
        self._has_ended = True
        self.abort()
        if self.loaded is not None:
            await asyncio.to_thread(self._close, self.loaded)

    def _close(self, loaded: Loaded) -> None:
        loaded.pool.shutdown()
        if self._owns_model:
            loaded.llm.close()

    # ---- one request ----------------------------------------------------------------------------------------

    async def answer(self, request: Request, read: Callable[[bytes], Ask]) -> Response:
        """What goes wrong is an answer, too."""
        with ExitStack() as held:
            try:
                self.require_ready(close=True)
                account = held.enter_context(self._bodies.account())
                ask = read(await read_body(request, account, self.options))
                loaded = self.require_ready()
                self._require_possible(ask, loaded.llm)
                deadline = self._loop.time() + self.options.request_s
                bridge = Bridge(self._loop, self.options.buffer_bytes)
                self._jobs[bridge] = self._work(ask, loaded)
                held.callback(self._over, bridge)
                if not ask.stream:
                    whole = await unless_gone(request.receive, self._whole(loaded, bridge, deadline))
                    return Response(whole, media_type="application/json")
                await unless_gone(request.receive, self._begun(loaded, bridge, deadline))
                return Events(self._events(bridge, deadline), held.pop_all(), self.options, deadline)
            except ClientGone:
                return Response(status_code=NOBODY)
            except Exception as error:
                return api_error(error).response()

    def require_ready(self, *, close: bool = False) -> Loaded:
        """Raises ApiError. `close`: the body of the request was not read."""
        if self.state is not State.READY or self.loaded is None:
            raise self._refusal(close=close)
        return self.loaded

    def _refusal(self, *, close: bool = False) -> ApiError:
        headers = {**RETRY, **(CLOSE if close else {})}
        return ApiError(503, _SAYS[self.state], code=self.state.value, headers=headers)

    def _require_possible(self, ask: Ask, llm: LLM) -> None:
        names = dict.fromkeys((self.options.model_name, llm.name))
        if ask.model is not None and ask.model not in names:
            message = (
                f"model {shown(ask.model)}: not served here; expected {self.options.model_name!r}, or leave it out"
            )
            raise ApiError(404, message, code="model_not_found", param="model")
        if ask.n > llm.setup.target.streams:
            raise invalid(f"n={ask.n}: there are {llm.setup.target.streams} streams, and no more choices", "n")

    def _work(self, ask: Ask, loaded: Loaded) -> Work:
        kind = ChatAnswer if ask.chat else CompletionAnswer
        name, usage = self.options.model_name, ask.include_usage
        answer = kind(name, loaded.fingerprint, loaded.vocabulary, include_usage=usage)
        return Work(loaded.llm, ask, answer, self.metrics, loaded.measured_gb_s, perf_counter())

    def _over(self, bridge: Bridge) -> None:
        del self._jobs[bridge]
        bridge.close()

    async def _whole(self, loaded: Loaded, bridge: Bridge, deadline: float) -> bytes:
        await self._start(loaded, bridge, deadline)
        return b"".join([part async for part in self._parts(bridge, deadline)])

    async def _begun(self, loaded: Loaded, bridge: Bridge, deadline: float) -> None:
        await self._start(loaded, bridge, deadline)
        await bridge.begun(deadline)

    async def _start(self, loaded: Loaded, bridge: Bridge, deadline: float) -> None:
        async with asyncio.timeout_at(deadline):
            await loaded.admission.enter()
        try:
            loaded.pool.submit(self._run, loaded, bridge, self._jobs[bridge])
        except BaseException:
            loaded.admission.leave()
            raise

    def _run(self, loaded: Loaded, bridge: Bridge, work: Work) -> None:
        """In a thread of the pool. The place is free before the client has the end of its answer and asks again."""
        last, failure = b"", None
        try:
            last = work.run(bridge)
        except Gone:
            pass
        except BaseException as error:
            failure = error
        self._tell(loaded.admission.leave)
        bridge.end(failure, last)
        if failure is not None and not isinstance(failure, RequestError):
            self._look_after(loaded.llm)

    def _look_after(self, llm: LLM) -> None:
        """After an error that no request explains: whether the engine still makes tokens."""
        try:
            make_token(llm)
        except BaseException as error:
            self._tell(self._break, error)

    async def _parts(self, bridge: Bridge, deadline: float) -> AsyncIterator[bytes]:
        while part := await bridge.take(deadline):
            yield part

    async def _events(self, bridge: Bridge, deadline: float) -> AsyncIterator[bytes]:
        try:
            async for events in self._parts(bridge, deadline):
                yield events
        except Exception as error:
            yield error_event(api_error(error))

    def _kv_share(self) -> float:
        if self.loaded is None:
            return 0.0
        target = self.loaded.llm.setup.target
        return sum(work.n_positions for work in self._jobs.values()) / (target.streams * target.ctx)


class Events(EventSourceResponse):
    """A stream of events. A client that takes nothing for a while is cut off; `held` is let go at the end."""

    def __init__(self, events: AsyncIterator[bytes], held: ExitStack, options: ServerOptions, deadline: float) -> None:
        super().__init__(events, ping=options.ping_s, sep="\n", send_timeout=options.stall_s)
        self._held = held
        self._end = deadline + 2 * options.stall_s  # of the last bytes, which have no limit of their own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                async with asyncio.timeout_at(self._end):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                if abort := scope.get("state", {}).get("abort"):
                    abort()  # closing in order would wait until the client has taken what was sent
                    await asyncio.sleep(0)  # until the connection knows


def make_token(llm: LLM) -> None:
    """Raises what the engine raises where it makes none."""
    llm.generate([llm.spec.bos_id or 0], max_tokens=1)
