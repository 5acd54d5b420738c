"""LLM: a loaded model that answers requests. The pipeline from files to a kernel is `load`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Kernel, Want
from ..backends.registry import load_kernel
from ..check import CheckedProgram, check
from ..errors import RequestError
from ..model import Model, load_model
from ..model.spec import ModelSpec
from ..program import Program, build
from ..program.ir import MAX_HEAD_ROWS
from . import request as requests
from .generate import Stream
from .plan import Plan, make_plan, weight_read_bytes
from .request import LIMITS, Request
from .setup import Options, Setup, kv_read_bytes, require_memory, set_up
from .slots import Slots, Turns
from .stats import Output

if TYPE_CHECKING:
    from ..backends.packed import Progress
    from ..checkpoint import Tokenizer

Ids = Sequence[int] | NDArray[np.integer]
Prompt = str | Ids


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kv_dtype: str | None = None,
    exact: bool = False,
    ctx: int | None = None,
    streams: int = 1,
    threads: int | None = None,
    prompt_chunk: int | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> LLM:
    """Loads `demo`, a folder, a hub id or `shape:NAME` and makes it ready to run.

    Everything is allocated here: packed weights, the KV cache of `streams` slots of `ctx` positions, buffers.
    `progress(what, done_bytes, total_bytes)` is called while weights are packed, in this thread.
    Raises LoadError for a model that cannot be used or does not fit, RequestError for an argument out of its
    range, DeviceError where this machine cannot run the kernel.
    """
    options = Options(
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        exact=exact,
        ctx=ctx,
        streams=streams,
        threads=threads,
        prompt_chunk=prompt_chunk,
    )
    loaded = load_model(model, revision=revision, offline=offline)
    setup = set_up(loaded.spec, loaded.stored_format, options)
    for warning in (setup.threads.warning, requests.defaults(loaded.generation_config).warning):
        if warning:
            warnings.warn(warning, stacklevel=2)
    program = build(loaded.spec, setup.target)
    require_memory(program.memory, setup)
    checked = check(program)
    kernel = load_kernel(checked, loaded.weights, device=setup.device, threads=setup.threads, progress=progress)
    return LLM(loaded, setup, checked, kernel)


class LLM:
    """A loaded model. Made by `load`.

    May be used from several Python threads: forwards take turns, and every request holds one of the `streams`
    slots while it runs; a request that finds none waits for one.
    """

    def __init__(self, model: Model, setup: Setup, checked: CheckedProgram, kernel: Kernel) -> None:
        self.name = model.name
        self.spec: ModelSpec = model.spec
        self.program: Program = checked.program
        self.setup = setup
        self.defaults = requests.defaults(model.generation_config)
        self.kernel = kernel
        self._tokenizer = model.tokenizer
        self._checked = checked
        self.turns = Turns()  # taken before every use of `kernel`
        self._slots = Slots(setup.target.streams, LIMITS.slot_wait_s)
        self._measured: float | None = None
        self._weight_bytes = weight_read_bytes(self.program)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        target = self.setup.target
        return (
            f"LLM({self.name!r}, device={self.setup.device!r}, dtype={target.weight_format.name!r}, ctx={target.ctx}, "
            f"streams={target.streams}, threads={target.n_workers})"
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError where the model has none."""
        if self._tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer: give prompts as lists of token ids")
        return self._tokenizer

    @property
    def plan(self) -> Plan:
        """Memory, phases and bytes per token of this model as loaded."""
        return make_plan(self.name, self.program, self.setup, self.defaults, isa=self.kernel.describe().get("isa"))

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> list[Output]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Output | list[Output]:
        """Answers a prompt (text, or token ids taken literally), or each of a list of prompts in turn.

        `max_tokens` is 256 unless given, at most what the context leaves; `temperature` is that of
        generation_config.json if it samples, else 0 (greedy); without a `seed` one is drawn for every prompt and
        returned. All prompts of a list are validated before the first one runs.
        Raises RequestError, NumericalError, DeviceError.
        """
        batch = requests.is_batch(prompt)
        prompts: Sequence[Prompt] = prompt if batch else [prompt]  # type: ignore[assignment,list-item]
        streams = [
            self.stream(p, max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
            for p in prompts
        ]
        outputs = []
        for stream in streams:
            with stream:
                for _ in stream:
                    pass
            outputs.append(stream.output)
        return outputs if batch else outputs[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> Stream:
        """As `generate`, for one prompt, in pieces as they are made. Closing the iterator cancels."""
        begin = perf_counter_ns()
        self.turns.check()
        ctx = self.setup.target.ctx
        ids = self._prompt_ids(prompt)
        request = Request(
            ids=ids,
            max_tokens=requests.clamp_tokens(max_tokens, len(ids), ctx),
            temperature=self.defaults.temperature if temperature is None else requests.temperature(temperature),
            seed=requests.seed(seed),
            stop_ids=frozenset() if requests.flag("ignore_eos", ignore_eos) else frozenset(self.spec.eos_ids),
        )
        return Stream(
            self.kernel,
            self.turns,
            self._slots,
            request,
            chunk=self.setup.prompt_chunk,
            tokenizer=self._tokenizer,
            step_bytes=self.step_bytes,
            encode_ns=perf_counter_ns() - begin,
        )

    def step_bytes(self, n_positions: int) -> int:
        """Weight and KV bytes read by a token of a slot with `n_positions`, itself included."""
        return self._weight_bytes + kv_read_bytes(self.spec, self.setup.target.kv_format, n_positions)

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """Logits after each position of a prompt: (n_tokens, vocab_size) float32.

        Raises RequestError, NumericalError, DeviceError.
        """
        self.turns.check()
        ids = self._prompt_ids(prompt)
        if len(ids) > self.setup.target.ctx:
            raise RequestError(requests.too_long(len(ids), self.setup.target.ctx))
        chunk = min(self.setup.prompt_chunk, MAX_HEAD_ROWS)
        result = np.empty((len(ids), self.spec.vocab_size), np.float32)
        rows = self.kernel.rows
        slot = self._slots.acquire()
        try:
            for begin in range(0, len(ids), chunk):
                end = min(begin + chunk, len(ids))
                n = end - begin
                with self.turns.lock:
                    self.turns.check()
                    rows.token[:n] = ids[begin:end]
                    rows.slot[:n] = slot
                    rows.pos[:n] = np.arange(begin, end)
                    rows.want[:n] = Want.LOGITS
                    rows.temperature[:n] = 0
                    self.kernel.forward(n)
                    result[begin:end] = self.kernel.logits[:n]
        finally:
            self._slots.release(slot)
        return result

    def measured_gb_s(self) -> float | None:
        """Read bandwidth of the packed weights on this machine, measured once (at most about a second).

        None where they fit in the caches, or where the backend cannot measure.
        """
        self.turns.check()
        if self._measured is None and not self.fits_in_cache:
            with self.turns.lock:
                self.turns.check()
                self._measured = self.kernel.probe_weights()
        return self._measured

    @property
    def fits_in_cache(self) -> bool:
        """Whether the packed weights are smaller than four last-level caches, so that memory says little."""
        from ..backends.cpu.topology import caches_hold

        return caches_hold(self.program.packed_bytes)

    def close(self) -> None:
        """Frees threads and memory after the forward that may be running. A second call does nothing."""
        self._slots.close()
        if self.turns.close():
            self.kernel.close()

    def _prompt_ids(self, prompt: Prompt) -> NDArray[np.int32]:
        """(n) int32. Text is encoded by the tokenizer's own rule; where that gives nothing, BOS alone is used."""
        ctx, vocab_size = self.setup.target.ctx, self.spec.vocab_size
        if not isinstance(prompt, str):
            if not isinstance(prompt, list | tuple | np.ndarray):
                raise RequestError(f"prompt of type {type(prompt).__name__}: expected text or a list of token ids")
            return requests.token_ids(prompt, vocab_size, ctx)
        ids = self.tokenizer.encode(requests.prompt_text(prompt))
        if not ids and self.spec.bos_id is not None:
            ids = [self.spec.bos_id]
        if not ids:
            raise RequestError(f"empty prompt, and {self.name} has no BOS token to start from: give some text")
        return requests.token_ids(ids, vocab_size, ctx)
