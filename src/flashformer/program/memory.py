"""Everything allocated at load: buffers between phases, KV cache, scratch, rope table. Nothing is allocated later."""

from __future__ import annotations

from ..model.spec import LayerSpec, ModelSpec, RopeSpec
from .ir import KEY_CHUNK, LANES, MAX_HEAD_ROWS, Buffer, Layout, Memory, Space, Target
from .lower import padded
from .ops import n_chunks, qkv_width
from .split import tile_vectors

MOST_K_MULTIPLE = 128  # of the formats: inputs of products are padded to whole groups in place
SCORE_ROWS = 16  # (row, head) pairs that attention takes at once, at most
VALUES_TOGETHER = 32  # positions whose values a matrix unit reads at once
FRAGMENT_DIM = 32  # elements of a head that a pair of matrix instructions takes


def ctx_padded(target: Target) -> int:
    """Keys are stored in blocks of 16 positions, values read in blocks of 32; in fragments, values in chunks."""
    block = VALUES_TOGETHER if target.layout is Layout.LANES else KEY_CHUNK
    return -(-target.ctx // block) * block


def head_dim_padded(layer: LayerSpec, layout: Layout) -> int:
    """Values are stored in whole vectors; in fragments, keys too."""
    width = LANES if layout is Layout.LANES else FRAGMENT_DIM
    return -(-layer.head_dim // width) * width


def layer_kv_elements(layer: LayerSpec, target: Target) -> tuple[int, int]:
    """Of keys and of values.

    Lanes: (streams, n_kv_heads, chunks), of a chunk keys (256/16, head_dim, 16), then values (256, head_dim padded);
    the last chunk ends with ctx. Fragments: (streams, n_kv_heads, ctx, head_dim padded), and behind all of these
    (streams, n_kv_heads, chunks, head_dim padded, 256).
    """
    lanes, padded_dim = target.layout is Layout.LANES, head_dim_padded(layer, target.layout)
    positions = target.streams * layer.n_kv_heads * ctx_padded(target)
    keys = positions * (layer.head_dim if lanes else padded_dim)
    return keys, padded(keys + positions * padded_dim) - keys


def input_stride(spec: ModelSpec) -> int:
    """Elements between rows of a product's input: room for whole groups of any format, and no power of two, so that
    rows fall into different cache sets.
    """
    longest = max([spec.d_model, *(max(la.q_width, la.d_ff) for la in spec.layers)])
    return -(-longest // MOST_K_MULTIPLE) * MOST_K_MULTIPLE + 2 * LANES


def group_stride(spec: ModelSpec) -> int:
    """Groups of the longest input of a product, where they are the smallest: 32 elements."""
    return -(-input_stride(spec) // 32)


def scratch_bytes(spec: ModelSpec, target: Target) -> int:
    """Private to a worker: the input of a product (rows, k), tile sums (rows, 64), scores (SCORE_ROWS, 256), a row of
    the residual with its fold (d_model), rotated heads (SCORE_ROWS, head_dim), factors of folds and of norms over all
    heads (rows, 2), scales and sums of groups of quantized inputs (rows, group_stride, 2); all f32 or i32.
    """
    if target.layout is Layout.FRAGMENTS:
        return 0  # in shared memory
    heads = SCORE_ROWS * max(head_dim_padded(la, target.layout) for la in spec.layers)
    per_row = target.rows * (input_stride(spec) + 4 * LANES + 2 + 2 * group_stride(spec))
    return -(-4 * (per_row + SCORE_ROWS * KEY_CHUNK + padded(spec.d_model) + heads) // 64) * 64


def branches(spec: ModelSpec) -> tuple[Space, ...]:
    """The buffers of branches whose norm comes after them, where there are such."""
    return (Space.ATTENTION_OUT, Space.FFN_OUT) if any(la.post_norm for la in spec.layers) else ()


def merges(spec: ModelSpec, target: Target) -> tuple[tuple[Space, tuple[int, int], int], ...]:
    """The counters of attention where it merges its chunks itself."""
    if target.layout is Layout.LANES:
        return ()
    return ((Space.MERGES, (target.streams, max(la.n_kv_heads for la in spec.layers)), 4),)


def rope_offsets(spec: ModelSpec, ctx: int) -> tuple[dict[RopeSpec, int], int]:
    """Bytes from the start of the rope region to each table, (ctx, 2, rotary_dim / 2) f32, and the region's size."""
    offsets, end = {}, 0
    for rope in spec.ropes:
        offsets[rope] = end
        end += -(-ctx * rope.rotary_dim * 4 // 64) * 64
    return offsets, end


def plan_memory(spec: ModelSpec, target: Target, weights_bytes: int) -> Memory:
    layers, rows, chunks = spec.layers, target.rows, n_chunks(target.ctx)
    heads = max(la.n_heads for la in layers)
    head_dim = max(head_dim_padded(la, target.layout) for la in layers)
    head_vectors = tile_vectors(spec.vocab_size)  # or less; tiles of fragments are smaller too
    vocab = -(-spec.vocab_size // (head_vectors * LANES)) * head_vectors * LANES
    shapes: list[tuple[Space, tuple[int, ...], int]] = [
        (Space.RESIDUAL, (rows, padded(spec.d_model)), 4),
        *((space, (rows, padded(spec.d_model)), 4) for space in branches(spec)),
        (Space.QKV, (rows, padded(max(qkv_width(la) for la in layers))), 4),
        (Space.PARTIAL, (rows * heads * chunks, head_dim + 2), 4),
        (Space.HIDDEN, (rows, padded(max(la.d_ff for la in layers))), 4),
        (Space.LOGITS, (MAX_HEAD_ROWS, vocab), 4),
        (Space.CANDIDATES, (target.n_workers, MAX_HEAD_ROWS), 8),
        (Space.TOKENS, (MAX_HEAD_ROWS,), 4),
        *merges(spec, target),
    ]
    buffers: list[Buffer] = []
    end = 0
    for space, shape, element_bytes in shapes:
        buffers.append(Buffer(space, shape, element_bytes, end))
        end += -(-buffers[-1].n_bytes // 64) * 64
    _, rope = rope_offsets(spec, target.ctx)
    scratch = scratch_bytes(spec, target)
    return Memory(
        weights_bytes=weights_bytes,
        kv_bytes=sum(sum(layer_kv_elements(la, target)) for la in layers) * target.kv_format.element_bytes,
        buffers=tuple(buffers),
        scratch_bytes=scratch,
        rope_bytes=rope,
        buffers_bytes=end + rope + scratch * target.n_workers,
    )
