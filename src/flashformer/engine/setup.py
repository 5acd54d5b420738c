"""Arguments of a load -> the Target that a Program is built for, with the reason for every choice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..backends.cpu import topology
from ..backends.registry import PROMPT_CHUNK, choose_gpu, prompt_chunk, require_device
from ..checkpoint import PackedFormats
from ..errors import LoadError, RequestError
from ..formats import F32, FORMATS, QUANT_NAMES, QUANTS, Format, find_quant
from ..model.spec import ModelSpec, RopeKind
from ..program.ir import KEY_CHUNK, MAX_HEAD_ROWS, Layout, Memory, Target
from ..program.memory import plan_memory
from .request import LIMITS, flag, integer

if TYPE_CHECKING:
    from ..backends.cuda.driver import GpuInfo

DEFAULT_CTX = 8192
MOST_BUFFERS = 1 / 64  # of the free memory, for the larger chunks of prompts
HEAD_QUANT = QUANTS["int8-g128"]  # of lm_head where the layers have fewer bits: there an error is an error of a token

_OTHER = "leave it out to run them as they are, or quantize the original again"


@dataclass(frozen=True)
class Options:
    """How to load a model. None and "auto" mean: choose, and say why in the plan. Raises RequestError."""

    device: str = "auto"
    dtype: str = "auto"  # format of the weights in memory that are not quantized
    quant: str | None = None  # format of the matrices, see formats.QUANTS and QUANT_NAMES; "none": as `dtype`
    kv_dtype: str | None = None
    exact: bool = False  # activations stay fp32 at the input of products
    ctx: int | None = None  # positions per slot
    streams: int = 1  # slots
    threads: int | None = None
    prompt_chunk: int | None = None  # rows of a prompt per forward

    def __post_init__(self) -> None:
        _name("dtype", self.dtype, ("auto", *FORMATS))
        if self.quant is not None:
            _name("quant", self.quant, ("none", *QUANT_NAMES, *QUANTS))
        if self.kv_dtype is not None:
            _name("kv_dtype", self.kv_dtype, tuple(FORMATS))
        flag("exact", self.exact)
        integer("streams", self.streams, LIMITS.streams)
        if self.threads is not None:
            integer("threads", self.threads, LIMITS.threads)
        if self.prompt_chunk is not None:
            integer("prompt_chunk", self.prompt_chunk, LIMITS.prompt_chunk)


@dataclass(frozen=True)
class Setup:
    """A Target and why it is as it is."""

    device: str
    target: Target
    prompt_chunk: int
    threads: topology.Threads  # of this machine; the workers of the CPU kernel
    ctx_why: str
    free: topology.Limit | None  # memory free when this was decided
    gpu: GpuInfo | None = None  # that it runs on

    @property
    def workers_why(self) -> str:
        """Why there are so many workers."""
        return f"one for each multiprocessor of {self.gpu.summary}" if self.gpu else self.threads.why


def set_up(spec: ModelSpec, stored: Format, options: Options, packed: PackedFormats | None = None) -> Setup:
    """Chooses device, threads, formats and context; formats only where the weights are not `packed` already.

    Raises RequestError, LoadError, DeviceError.
    """
    require_device(options.device)
    formats = _formats(stored, options) if packed is None else _packed_formats(packed, options)
    allowed = options.device if packed is None or options.device != "auto" else "cpu"  # lanes, as it was packed
    gpu = choose_gpu(allowed, spec, lambda found: _set_up(spec, formats, options, "cuda", found).target)
    device = "cuda" if gpu else "cpu" if options.device == "auto" else options.device
    return _set_up(spec, formats, options, device, gpu)


def _set_up(spec: ModelSpec, formats: PackedFormats, options: Options, device: str, gpu: GpuInfo | None) -> Setup:
    threads = topology.choose_threads(options.threads)
    weight_format = formats.weights
    kv_format = FORMATS[options.kv_dtype or ("f32" if weight_format is F32 else "bf16")]
    free = topology.Limit(gpu.memory_bytes, gpu.facts.name) if gpu else topology.free_memory()
    ctx, ctx_why = _context(spec, options, kv_format, free)
    by_length = sorted({rope.kind.value for rope in spec.ropes if rope.kind in RopeKind.of_length()})
    if by_length:
        ctx_why += f"; {', '.join(by_length)} rotation as for a sequence of this length, whatever a prompt has"
    target = Target(
        n_workers=gpu.facts.n_sm if gpu else threads.n,
        weight_format=weight_format,
        kv_format=kv_format,
        rows=MAX_HEAD_ROWS,
        streams=options.streams,
        ctx=ctx,
        exact=options.exact,
        body_quant=formats.body_quant,
        head_quant=formats.head_quant,
        layout=Layout.FRAGMENTS if gpu else Layout.LANES,
    )
    chunk = options.prompt_chunk or _prompt_chunk(spec, target, device, free)
    target = replace(target, rows=max(chunk, MAX_HEAD_ROWS))
    return Setup(device, target, chunk, threads, ctx_why, free, gpu)


def _prompt_chunk(spec: ModelSpec, target: Target, device: str, free: topology.Limit | None) -> int:
    """Rows of a prompt per forward: more than the usual ones only where their buffers stay small."""
    chunk = prompt_chunk(target, device)
    if chunk == PROMPT_CHUNK[device]:
        return chunk
    buffers = plan_memory(spec, replace(target, rows=chunk), 0).buffers_bytes
    small = free is None or buffers <= free.value * MOST_BUFFERS
    return chunk if small else PROMPT_CHUNK[device]


def _formats(stored: Format, options: Options) -> PackedFormats:
    body = find_quant(options.quant or "none")
    head = HEAD_QUANT if body is not None and body.bits < 8 else body
    return PackedFormats(stored if options.dtype == "auto" else FORMATS[options.dtype], body, head)


def _packed_formats(packed: PackedFormats, options: Options) -> PackedFormats:
    """Raises LoadError if others are asked for than there are."""
    asked = _formats(packed.weights, options)
    if asked.weights is not packed.weights:
        raise LoadError(f"dtype={options.dtype!r}: found weights packed with {packed.weights.name}; {_OTHER}")
    if options.quant is not None and asked.body_quant is not packed.body_quant:
        found = packed.body_quant.name if packed.body_quant else "none"
        raise LoadError(f"quant={options.quant!r}: found weights packed as {found}; {_OTHER}")
    return packed


def kv_read_bytes(spec: ModelSpec, kv_format: Format, n_positions: int) -> int:
    """Bytes of the cache that a token reads of a slot with `n_positions`, itself included, in all layers.

    Layers with a window read no more of them than that. One position is what the cache holds of it.
    """
    groups = Counter((layer.kv_width, layer.window or n_positions) for layer in spec.layers)
    seen = sum(count * width * min(window, n_positions) for (width, window), count in groups.items())
    return 2 * seen * kv_format.element_bytes


def require_memory(memory: Memory, setup: Setup) -> None:
    """Refuses a load that cannot fit, before it allocates. Raises LoadError."""
    if setup.free is None or memory.total_bytes <= setup.free.value:
        return
    raise LoadError(
        f"the model needs {memory.total_bytes:,} bytes (weights {memory.weights_bytes:,}, KV cache "
        f"{memory.kv_bytes:,}, buffers {memory.buffers_bytes:,}), but {int(setup.free.value):,} are free "
        f"({setup.free.source}): lower ctx or streams, or free memory"
    )


def _name(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def _context(spec: ModelSpec, options: Options, kv_format: Format, free: topology.Limit | None) -> tuple[int, str]:
    most = spec.max_positions
    if options.ctx is not None:
        return integer("ctx", options.ctx, (1, most)), f"asked for; the model allows {most}"
    choices = [(most, "the model's maximum"), (DEFAULT_CTX, "the default limit")]
    if free is not None:
        fits = int(free.value) // 4 // (kv_read_bytes(spec, kv_format, 1) * options.streams)
        fits -= fits % KEY_CHUNK
        choices.append((fits, f"what a quarter of the free {free.value / 2**30:.1f} GiB holds ({free.source})"))
    ctx, why = min(choices)
    if ctx < 1:
        raise LoadError(f"no memory for {KEY_CHUNK} positions of context in {why}: give ctx, or lower streams")
    return ctx, why
