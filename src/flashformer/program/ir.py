"""The Program: pure data that every backend executes and `check` proves. Nothing here computes.

    phases  what all workers do between two hand-offs, in order; `head_begin` cuts off lm_head and sample
    spans   which units of a phase a worker is dealt; it executes these, unless units change hands (ops.is_shared)
    waits   how many arrivals must have been counted before a worker starts a phase
    tapes   the byte ranges of the packed weights that a worker reads, in order
    memory  the buffers, their shapes and sizes

The weights are one region: packed tiles in phase order, then the embedding rows unless tied, then fp32 vectors.

Every worker arrives once at the end of every phase, whether its span is empty or not. Arrivals of all workers
are counted in one number that starts at 0 in every forward; `waits[w]` is compared with it. The forward is
over when all `n_workers * n_phases` arrivals are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..formats import Format
from ..model.spec import ModelSpec
from . import fragments

LANES = 16  # outputs in a vector
KEY_CHUNK = 256  # absolute key positions per attention chunk
MAX_HEAD_ROWS = 16  # rows of one forward that may want a token or logits


class Layout(StrEnum):
    """How matrices, keys and values lie in memory, by what reads them."""

    LANES = "lanes"  # CPU vectors: a lane owns an output (pack.py)
    FRAGMENTS = "fragments"  # tensor cores (fragments.py)


class Op(StrEnum):
    EMBED = "embed"
    QKV = "qkv"
    ATTEND = "attend"
    O_PROJ = "o_proj"
    GATE_UP = "gate_up"
    DOWN = "down"
    LM_HEAD = "lm_head"
    SAMPLE = "sample"


class Space(StrEnum):
    """What phases hand to each other; ops.py says in which coordinate. Row widths are padded (memory.py)."""

    RESIDUAL = "residual"  # (rows, d_model) f32
    QKV = "qkv"  # (rows, (n_heads + 2 n_kv_heads) * head_dim) f32, as projected
    KV = "kv"  # (layers, streams, n_kv_heads, ctx, head_dim) rotated keys and values in the KV format
    PARTIAL = "partial"  # (rows, n_heads, chunks, head_dim) f32 weighted values of one chunk, max and sum behind
    ATTENTION_OUT = "attention_out"  # (rows, d_model) f32 output of an attention whose norm is still to come
    HIDDEN = "hidden"  # (rows, d_ff) f32
    FFN_OUT = "ffn_out"  # (rows, d_model) f32 output of a feed-forward whose norm is still to come
    LOGITS = "logits"  # (MAX_HEAD_ROWS, vocab_size) f32
    CANDIDATES = "candidates"  # (workers, MAX_HEAD_ROWS) best score f32 and its token id i32
    TOKENS = "tokens"  # (MAX_HEAD_ROWS) i32, the result
    MERGES = "merges"  # (streams, n_kv_heads) i32 chunks that are done; of layouts in which attention merges them


@dataclass(frozen=True)
class Span:
    """Units begin, begin + step, ... below end. Products use step 1, so that a worker reads one byte range."""

    begin: int
    end: int
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.begin, self.end, self.step))


class Order(StrEnum):
    """How packed outputs follow from the rows of the stacked sources."""

    PLAIN = "plain"
    ALTERNATE = "alternate"  # some rows of the first source, as many of the second, ... (PackedMatrix.alternate)


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix as tiles of `vectors * 16` outputs with all of k, in the order in which a worker reads it.

    Packed output o (0 <= o < n_tiles * vectors * 16) is source row `row_map(matrix)[o]` of the vertically
    stacked sources, or padding where that is -1 (see pack.py).
    """

    roles: tuple[str, ...]  # tensors stacked to form it, e.g. ("layers.0.q", "layers.0.k", "layers.0.v")
    n_out: int  # rows of the stacked sources
    k: int  # elements per row
    format: Format
    vectors: int  # vectors of 16 outputs per tile
    n_tiles: int
    offset: int  # bytes from the start of the packed weights, a multiple of 64
    order: Order = Order.PLAIN
    layout: Layout = Layout.LANES

    @property
    def alternate(self) -> int:
        """Rows of one source beside as many of the next."""
        return LANES if self.layout is Layout.LANES else fragments.ALTERNATE_WIDTH

    @property
    def tile_outputs(self) -> int:
        return self.vectors * LANES

    @property
    def k_padded(self) -> int:
        multiple = self.format.k_multiple if self.layout is Layout.LANES else fragments.unit_k(self.format)
        return -(-self.k // multiple) * multiple

    @property
    def item_bytes(self) -> tuple[int, ...]:
        """Of each slice of a tile. A matrix is all tiles of the first slice, then of the next, ..."""
        if self.layout is Layout.LANES:
            return (self.k_padded // self.format.k_multiple * self.format.group_bytes(self.vectors),)
        return tuple(fragments.item_bytes(*ends, self.format) for ends in fragments.slices(self.k, self.format))

    @property
    def tile_bytes(self) -> int:
        return sum(self.item_bytes)

    def ranges(self, begin: int, end: int) -> tuple[tuple[int, int], ...]:
        """Bytes [begin, end) of tiles [begin, end) in every slice, from the start of the packed weights."""
        found, at = [], self.offset
        for size in self.item_bytes:
            found.append((at + begin * size, at + end * size))
            at += self.n_tiles * size
        return tuple(found)

    @property
    def n_bytes(self) -> int:
        return self.n_tiles * self.tile_bytes


@dataclass(frozen=True)
class Vector:
    """fp32 values behind the packed tiles: a norm's weight, or biases stacked and in packed output order."""

    roles: tuple[str, ...]
    length: int  # floats, padded with zeros to a multiple of 64
    offset: int  # bytes from the start of the weights


@dataclass(frozen=True)
class Fold:
    """A branch that belongs to the residual but is not in it yet: scale * rms_norm(buffer).

    Its norm needs the whole branch, which many workers made. So the phase after it that reads the residual folds the
    branch in for itself, and the phase after that, when all have read, adds it to the residual.
    """

    space: Space  # ATTENTION_OUT or FFN_OUT
    norm: Vector
    norm_eps: float
    scale: float


@dataclass(frozen=True)
class Phase:
    op: Op
    layer: int  # -1 outside the layers
    n_units: int  # tiles of a product; units as defined in ops.py otherwise
    matrix: PackedMatrix | None = None  # None: the phase reads no tile
    norm: Vector | None = None  # weight of the RMS norm at the input, and its epsilon
    norm_eps: float = 0.0
    bias: Vector | None = None
    scale: float = 1.0  # of the result, bias included
    fold: Fold | None = None  # what the residual that this phase reads or adds to still lacks
    to: Space = Space.RESIDUAL  # where o_proj and down put their result; added to the residual, stored elsewhere
    q_norm: Vector | None = None  # of attend; eps is norm_eps
    k_norm: Vector | None = None
    spans: tuple[Span, ...] = ()  # (n_workers); empty until the phase is split
    waits: tuple[int, ...] = ()  # (n_workers) arrivals

    @property
    def vectors(self) -> dict[str, Vector]:
        """The vectors that the phase reads, by what they are to it. A fold's norm serves two phases."""
        named = {"norm": self.norm, "bias": self.bias, "q_norm": self.q_norm, "k_norm": self.k_norm}
        named["fold"] = self.fold.norm if self.fold else None
        return {name: vector for name, vector in named.items() if vector is not None}


@dataclass(frozen=True)
class Buffer:
    """A shared buffer of activations or state. `offset` counts from the start of the arena that holds it."""

    space: Space
    shape: tuple[int, ...]
    element_bytes: int
    offset: int

    @property
    def n_bytes(self) -> int:
        n = self.element_bytes
        for d in self.shape:
            n *= d
        return n


@dataclass(frozen=True)
class TapeItem:
    """One byte range of the packed weights, read once per forward by the worker whose tape it is on, or by others that
    take over tiles of it."""

    phase: int
    begin: int
    end: int


@dataclass(frozen=True)
class Target:
    """What a Program is made for."""

    n_workers: int
    weight_format: Format  # of what is not quantized
    kv_format: Format
    rows: int  # most rows of one forward (prompt_chunk, at least MAX_HEAD_ROWS)
    streams: int
    ctx: int  # positions per slot
    exact: bool = False  # activations stay fp32 at the input of products
    body_quant: Format | None = None  # of the matrices of the layers
    head_quant: Format | None = None  # of lm_head, and so of a tied embedding
    layout: Layout = Layout.LANES

    @property
    def body_format(self) -> Format:
        return self.body_quant or self.weight_format

    @property
    def head_format(self) -> Format:
        return self.head_quant or self.weight_format


@dataclass(frozen=True)
class Memory:
    """Bytes allocated at load; nothing is allocated later."""

    weights_bytes: int  # packed tiles, embedding rows if not tied, norms and biases
    kv_bytes: int
    buffers: tuple[Buffer, ...]
    scratch_bytes: int  # private to one worker
    rope_bytes: int
    buffers_bytes: int  # buffers + scratch of all workers + rope table

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.buffers_bytes


@dataclass(frozen=True)
class Program:
    spec: ModelSpec
    target: Target
    phases: tuple[Phase, ...]
    head_begin: int  # phases[:head_begin] is the forward in which no row wants anything
    tapes: tuple[tuple[TapeItem, ...], ...]  # (n_workers), whole forward; items of phases >= head_begin come last
    packed_bytes: int  # tiles of all phases, at the start of the weights
    embed_offset: int  # byte offset in the weights of the embedding rows; -1: tied, gathered from lm_head's tiles
    memory: Memory

    def final_wait(self, n_phases: int) -> int:
        """Arrivals after which a forward of the first `n_phases` phases is over."""
        return self.target.n_workers * n_phases
