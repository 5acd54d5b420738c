"""ModelSpec -> the phases of a forward, with their matrices and vectors placed in the weights, not yet split."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import Format
from ..model.spec import LayerSpec, ModelSpec
from .ir import MAX_HEAD_ROWS, Op, Order, PackedMatrix, Target, Vector
from .ops import EMBED_BLOCK, attend_units
from .split import tile_count, tile_vectors

VECTOR_PAD = 64  # floats; every row of activations is padded to this too


@dataclass(frozen=True)
class Lowered:
    """A phase before its units are dealt."""

    op: Op
    layer: int
    n_units: int
    matrix: PackedMatrix | None = None
    norm: Vector | None = None
    norm_eps: float = 0.0
    bias: Vector | None = None


@dataclass(frozen=True)
class Layout:
    """The whole weights region."""

    phases: tuple[Lowered, ...]
    packed_bytes: int
    embed_offset: int
    weights_bytes: int


def padded(n: int) -> int:
    return -(-n // VECTOR_PAD) * VECTOR_PAD


class _Placer:
    """Hands out offsets: matrices first, in phase order; vectors after the embedding, once that is known."""

    def __init__(self, fmt: Format) -> None:
        self.format = fmt
        self.end = 0

    def matrix(
        self,
        roles: tuple[str, ...],
        n_out: int,
        k: int,
        *,
        order: Order = Order.PLAIN,
        head_dim: int = 0,
        paired: int = 0,
    ) -> PackedMatrix:
        if order is Order.ALTERNATE:  # both halves padded to whole vectors
            vectors = tile_vectors(n_out, even=True)
            n_tiles = tile_count(2 * tile_count(n_out // 2, 1) * 16, vectors)
        else:
            vectors = tile_vectors(n_out)
            n_tiles = tile_count(n_out, vectors)
        placed = PackedMatrix(roles, n_out, k, self.format, vectors, n_tiles, self.end, order, head_dim, paired)
        self.end += placed.n_bytes
        return placed

    def vector(self, roles: tuple[str, ...], n: int) -> Vector:
        placed = Vector(roles, padded(n), self.end)
        self.end += placed.length * 4
        return placed


def lower(spec: ModelSpec, target: Target) -> Layout:
    place = _Placer(target.weight_format)
    matrices = [_layer_matrices(place, spec, i, layer) for i, layer in enumerate(spec.layers)]
    head = place.matrix(("embed",) if spec.tied else ("lm_head",), spec.vocab_size, spec.d_model)
    packed_bytes = place.end
    embed_offset = -1
    if not spec.tied:
        embed_offset = packed_bytes
        row_bytes = spec.vocab_size * spec.d_model * target.weight_format.element_bytes
        place.end += -(-row_bytes // 64) * 64

    phases = [Lowered(Op.EMBED, -1, -(-spec.d_model // EMBED_BLOCK))]
    for i, layer in enumerate(spec.layers):
        at = f"layers.{i}."
        qkv, o_proj, gate_up, down = matrices[i]

        def bias(matrix: PackedMatrix, present: bool) -> Vector | None:
            roles = tuple(f"{role}_bias" for role in matrix.roles)
            return place.vector(roles, matrix.n_tiles * matrix.tile_outputs) if present else None

        attn_norm, ffn_norm = (
            place.vector((at + "attn_norm",), spec.d_model),
            place.vector((at + "ffn_norm",), spec.d_model),
        )
        eps = layer.norm_eps
        phases += [
            Lowered(Op.QKV, i, qkv.n_tiles, qkv, attn_norm, eps, bias(qkv, layer.qkv_bias)),
            Lowered(Op.ATTEND, i, attend_units(layer, target)),
            Lowered(Op.O_PROJ, i, o_proj.n_tiles, o_proj, bias=bias(o_proj, layer.o_bias)),
            Lowered(Op.GATE_UP, i, gate_up.n_tiles, gate_up, ffn_norm, eps, bias(gate_up, layer.mlp_bias)),
            Lowered(Op.DOWN, i, down.n_tiles, down, bias=bias(down, layer.mlp_bias)),
        ]
    final_norm = place.vector(("final_norm",), spec.d_model)
    phases.append(Lowered(Op.LM_HEAD, -1, head.n_tiles, head, final_norm, spec.final_norm_eps))
    phases.append(Lowered(Op.SAMPLE, -1, MAX_HEAD_ROWS))
    return Layout(tuple(phases), packed_bytes, embed_offset, place.end)


def _layer_matrices(place: _Placer, spec: ModelSpec, i: int, layer: LayerSpec) -> tuple[PackedMatrix, ...]:
    at, d = f"layers.{i}.", spec.d_model
    rotated = layer.q_width + layer.kv_width
    return (
        place.matrix(
            (at + "q", at + "k", at + "v"),
            rotated + layer.kv_width,
            d,
            order=Order.PAIRS,
            head_dim=layer.head_dim,
            paired=rotated,
        ),
        place.matrix((at + "o",), d, layer.q_width),
        place.matrix((at + "gate", at + "up"), 2 * layer.d_ff, d, order=Order.ALTERNATE),
        place.matrix((at + "down",), d, layer.d_ff),
    )
