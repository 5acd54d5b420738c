"""LLM: a loaded model that answers requests. The pipeline from files to a kernel is `load`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Kernel, Want
from ..backends.cpu.topology import affinity
from ..backends.registry import load_kernel
from ..check import CheckedProgram, check
from ..formats import Format
from ..model import Model, load_model
from ..model.spec import ModelSpec
from ..program import Program, build
from ..program.ir import MAX_HEAD_ROWS
from . import request as requests
from .batch import Batch
from .defaults import read_defaults
from .forward import prompt_logits, run_prompt
from .generate import Stream, run_out
from .logprobs import Score, logprobs_of
from .plan import Plan, make_plan, weight_read_bytes
from .prompts import Prompt, Prompts
from .request import LIMITS, SamplingArguments, SamplingSettings
from .setup import Options, Setup, kv_read_bytes, require_memory, set_up
from .slots import Slots, Turns
from .stats import Output

if TYPE_CHECKING:
    from ..backends.packed import Progress
    from ..checkpoint import Tokenizer


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quant: str | None = None,
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
        quant=quant,
        kv_dtype=kv_dtype,
        exact=exact,
        ctx=ctx,
        streams=streams,
        threads=threads,
        prompt_chunk=prompt_chunk,
    )

    def require_room(spec: ModelSpec, stored: Format) -> None:
        setup = set_up(spec, stored, options)
        require_memory(build(spec, setup.target).memory, setup)

    loaded = load_model(model, revision=revision, offline=offline, before_download=require_room)
    setup = set_up(loaded.spec, loaded.stored_format, options, loaded.packed_formats)
    asked = read_defaults(loaded.generation_config)
    for warning in (*loaded.warnings, setup.threads.warning, _crowd(setup), asked.warning):
        if warning:
            warnings.warn(warning, stacklevel=2)
    return make_llm(loaded, setup, progress=progress)


def make_llm(loaded: Model, setup: Setup, *, progress: Progress | None = None, keep: bool = True) -> LLM:
    """The end of `load`. `keep`: weights packed now may be kept in the cache. Raises LoadError, DeviceError."""
    program = build(loaded.spec, setup.target)
    require_memory(program.memory, setup)
    checked = check(program)
    kernel = load_kernel(
        checked, loaded.weights, device=setup.device, threads=setup.threads, progress=progress, keep=keep
    )
    llm = LLM(loaded, setup, checked, kernel)
    _LOADED.add(llm)
    return llm


_LOADED: weakref.WeakSet[LLM] = weakref.WeakSet()  # those not closed


def _crowd(setup: Setup) -> str | None:
    """What to say of models loaded beside each other with more threads than there are CPUs."""
    others = sum(other.setup.target.n_workers for other in _LOADED if other.setup.device == setup.device == "cpu")
    if not others or others + setup.target.n_workers <= (n_cpus := len(affinity())):
        return None
    return (
        f"{others} threads of models loaded before and {setup.target.n_workers} of this one share {n_cpus} CPUs: at "
        "work together they are slower than in turn; load with fewer threads each, or close what is not needed"
    )


class LLM:
    """A loaded model. Made by `load`.

    May be used from several Python threads: every request holds one of the `streams` slots while it runs, and those
    that run share every forward (batch.py); requests that find no slot wait and get one in the order in which they
    came. A slot keeps its cache when a request ends, and a prompt that begins as the cached tokens do is computed from
    where they differ; the bits are those of a computation from the start. A request that waits keeps its thread: a pool
    (`asyncio.to_thread`) needs more threads than requests that may wait at once.
    """

    def __init__(self, model: Model, setup: Setup, checked: CheckedProgram, kernel: Kernel) -> None:
        self.name = model.name
        self.spec: ModelSpec = model.spec
        self.program: Program = checked.program
        self.setup = setup
        self.defaults = read_defaults(model.generation_config)
        self.kernel = kernel
        self._tokenizer = model.tokenizer
        self._checked = checked
        self.turns = Turns()  # taken before every use of `kernel`
        self._batch = Batch(kernel, self.turns, setup.prompt_chunk)
        self._slots = Slots(setup.target.streams, setup.target.ctx, LIMITS.slot_wait_s)
        self._prompts = Prompts(model.name, model.spec, setup.target.ctx, model.tokenizer)
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
        return self._prompts.tokenizer

    @property
    def plan(self) -> Plan:
        """Memory, phases and bytes per token of this model as loaded."""
        return make_plan(self.name, self.program, self.setup, self.defaults, isa=self.kernel.describe().get("isa"))

    @overload
    def generate(self, prompt: Prompt, **settings: Unpack[SamplingArguments]) -> Output: ...

    @overload
    def generate(self, prompt: list[str] | list[list[int]], **settings: Unpack[SamplingArguments]) -> list[Output]: ...

    def generate(
        self, prompt: Prompt | list[str] | list[list[int]], **settings: Unpack[SamplingArguments]
    ) -> Output | list[Output]:
        """Answers a prompt (text, or token ids taken literally), or a list of them, as many at once as slots are free.

        `settings` are the fields of SamplingSettings. Without a `seed` one is drawn for every prompt and returned. All
        prompts of a list are validated before the first one runs. Raises RequestError, NumericalError, DeviceError.
        """
        batch = requests.is_batch(prompt)
        prompts: Sequence[Prompt] = prompt if batch else [prompt]  # type: ignore[assignment,list-item]
        outputs = self.run_out([self.stream(p, **settings) for p in prompts])
        return outputs if batch else outputs[0]

    def run_out(self, streams: list[Stream]) -> list[Output]:
        """Takes all pieces of streams, of as many at once as slots are free. An error of one closes all."""
        return run_out(streams, self._slots.has_free)

    def stream(self, prompt: Prompt, **settings: Unpack[SamplingArguments]) -> Stream:
        """As `generate`, for one prompt, in pieces as they are made. Closing the iterator cancels."""
        return self.start(prompt, SamplingSettings(**settings))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **settings: Unpack[SamplingArguments],
    ) -> Output:
        """Answers a conversation by the model's chat template.

        `messages` are mappings with a role and content, `tools` descriptions of functions, `template_variables` more
        for the template to read, such as enable_thinking=False. Raises as `generate`.
        """
        stream = self.stream_chat(messages, tools=tools, template_variables=template_variables, **settings)
        return self.run_out([stream])[0]

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **settings: Unpack[SamplingArguments],
    ) -> Stream:
        """As `chat`, in pieces as they are made. Closing the iterator cancels."""
        asked = SamplingSettings(**settings)
        begin = perf_counter_ns()
        self.turns.check()
        return self._start(self._prompts.chat_ids(messages, tools, template_variables), asked, begin)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids that `chat` starts from. Raises RequestError."""
        ids: list[int] = self._prompts.chat_ids(messages, tools, template_variables).tolist()
        return ids

    def start(self, prompt: Prompt, settings: SamplingSettings, *, warm: bool = False) -> Stream:
        """`stream`, of settings that were checked before; with `warm` it has no pieces: asking for one computes the
        prompt. Raises RequestError for what this model cannot do.
        """
        begin = perf_counter_ns()
        self.turns.check()
        return self._start(self._prompts.ids(prompt), settings, begin, warm=warm)

    def _start(
        self, ids: NDArray[np.int32], settings: SamplingSettings, begin_ns: int, *, warm: bool = False
    ) -> Stream:
        ctx, has_text = self.setup.target.ctx, self._prompts.has_text
        request = requests.make_request(ids, settings, self.defaults, self.spec, ctx, has_text=has_text)
        return Stream(
            self._batch,
            self._slots,
            replace(request, max_tokens=0) if warm else request,
            tokenizer=self._tokenizer,
            step_bytes=self.step_bytes,
            encode_ns=perf_counter_ns() - begin_ns,
        )

    def warm(self, prompt: Prompt) -> int:
        """Computes a prompt into the cache, so that a request that begins with it starts sooner; gives how many of its
        tokens were there already. Raises as `generate`.
        """
        return self.run_out([self.start(prompt, SamplingSettings(), warm=True)])[0].cached_tokens

    def step_bytes(self, n_positions: int) -> int:
        """Weight and KV bytes read by a token of a slot with `n_positions`, itself included."""
        return self._weight_bytes + kv_read_bytes(self.spec, self.setup.target.kv_format, n_positions)

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """Logits after each position of a prompt: (n_tokens, vocab_size) float32.

        Raises RequestError, NumericalError, DeviceError.
        """
        self.turns.check()
        ids = self._prompts.ids(prompt)
        result = np.empty((len(ids), self.spec.vocab_size), np.float32)
        with closing(self._prompt_logits(ids, 0)) as parts:
            for begin, logits in parts:
                result[begin : begin + len(logits)] = logits
        return result

    def logit_parts(self, prompt: Prompt) -> Generator[tuple[int, NDArray[np.float32]], None, None]:
        """As `logits`, a few positions at a time: (first of them, logits). Close it where it is not run to its end."""
        self.turns.check()
        return self._prompt_logits(self._prompts.ids(prompt), 0)

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """How likely a continuation is: the log probability of each of its tokens, given all before it.

        Both may be text or token ids. Of two texts, space at the end of the prompt counts to the continuation, whose
        tokens are those that encode(prompt + continuation) has after as many as encode(prompt) has, as in
        lm-evaluation-harness. Penalties, bias and temperature play no part. Raises as `logits`.
        """
        self.turns.check()
        ids, n_prompt = self._prompts.pair(prompt, continuation)
        rest: list[int] = ids[n_prompt:].tolist()
        logprobs: list[float] = []
        is_greedy: list[bool] = []
        with closing(self._prompt_logits(ids[:-1], n_prompt - 1)) as parts:
            for token, row in zip(rest, (row for _, rows in parts for row in rows), strict=True):
                logprobs += logprobs_of(row, [token])
                is_greedy.append(int(row.argmax()) == token)
        return Score(rest, logprobs, is_greedy)

    def _prompt_logits(
        self, ids: NDArray[np.int32], first: int
    ) -> Generator[tuple[int, NDArray[np.float32]], None, None]:
        """(begin, logits after positions begin, begin + 1, ...), from position `first` to the last."""
        take, kernel, chunk = self.turns.take, self.kernel, self.setup.prompt_chunk
        with self._slots.taken(ids, first) as slot:
            assert slot is not None
            for begin in range(slot.n, first, chunk):
                end = min(begin + chunk, first)
                take(run_prompt, kernel, slot, ids, begin, end, Want.NOTHING)
            step = min(chunk, MAX_HEAD_ROWS)
            for begin in range(first, len(ids), step):
                yield begin, take(prompt_logits, kernel, slot, ids, begin, min(begin + step, len(ids)))

    def forget(self) -> None:
        """Empties the slots, for those who run `kernel` themselves: what they cached is not what requests cached."""
        self._slots.forget()

    def measured_gb_s(self) -> float | None:
        """Read bandwidth of the packed weights on this machine, measured once (at most about a second).

        None where they fit in the caches, or where the backend cannot measure.
        """
        self.turns.check()
        if self._measured is None and not self.fits_in_cache:
            self._measured = self.turns.take(self.kernel.probe_weights)
        return self._measured

    @property
    def fits_in_cache(self) -> bool:
        """Whether caches hold the packed weights, so that memory says little."""
        return self.kernel.fits_in_cache

    def close(self) -> None:
        """Frees threads and memory after the forward that may be running. A second call does nothing."""
        self._slots.close()
        _LOADED.discard(self)
        if self.turns.close():
            self.kernel.close()
