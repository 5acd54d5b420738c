"""ModelSpec -> the phases of a forward, with their matrices and vectors placed in the weights, not yet split."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..formats import Format
from ..model.spec import LayerSpec, ModelSpec, QkNorm
from .ir import MAX_HEAD_ROWS, Fold, Layout, Op, Order, PackedMatrix, Phase, Space, Target, Vector
from .ops import EMBED_BLOCK, attend_units, qkv_width
from .split import head_vectors, tile_count, tile_vectors

VECTOR_PAD = 64  # floats; every row of activations is padded to this too


@dataclass(frozen=True)
class Lowered:
    """The whole weights region."""

    phases: tuple[Phase, ...]  # not yet split
    packed_bytes: int
    embed_offset: int
    weights_bytes: int


def padded(n: int) -> int:
    return -(-n // VECTOR_PAD) * VECTOR_PAD


class _Placer:
    """Hands out offsets: matrices first, in phase order; vectors after the embedding, once that is known."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.end = 0

    def matrix(
        self, roles: tuple[str, ...], n_out: int, k: int, fmt: Format, order: Order = Order.PLAIN, *, head: bool = False
    ) -> PackedMatrix:
        alternate, lanes = order is Order.ALTERNATE, self.layout is Layout.LANES
        vectors = 1
        if lanes:
            vectors = head_vectors(n_out, k, fmt) if head else tile_vectors(n_out, even=alternate)
        placed = PackedMatrix(roles, n_out, k, fmt, vectors, 0, self.end, order, self.layout)
        if alternate:  # both halves padded to whole runs
            n_out = 2 * -(-n_out // 2 // placed.alternate) * placed.alternate
        placed = replace(placed, n_tiles=tile_count(n_out, vectors))
        self.end += -(-placed.n_bytes // 64) * 64
        return placed

    def vector(self, roles: tuple[str, ...], n: int) -> Vector:
        placed = Vector(roles, padded(n), self.end)
        self.end += placed.length * 4
        return placed


def lower(spec: ModelSpec, target: Target) -> Lowered:
    place = _Placer(target.layout)
    matrices = [_layer_matrices(place, spec, i, layer, target.body_format) for i, layer in enumerate(spec.layers)]
    roles = ("embed",) if spec.tied else ("lm_head",)
    head = place.matrix(roles, spec.vocab_size, spec.d_model, target.head_format, head=True)
    packed_bytes = place.end
    embed_offset = -1
    if not spec.tied:
        embed_offset = packed_bytes
        row_bytes = spec.vocab_size * spec.d_model * target.weight_format.element_bytes
        place.end += -(-row_bytes // 64) * 64

    phases = [Phase(Op.EMBED, -1, -(-spec.d_model // EMBED_BLOCK), scale=spec.embed_multiplier)]
    fold = None  # of the feed-forward before
    for i in range(spec.n_layers):
        more, fold = _layer_phases(place, spec, target, i, matrices[i], fold)
        phases += more
    final_norm = place.vector(("final_norm",), spec.d_model)
    phases.append(
        Phase(
            Op.LM_HEAD,
            -1,
            head.n_tiles,
            head,
            final_norm,
            spec.final_norm_eps,
            scale=spec.logits_multiplier,
            fold=fold,
        )
    )
    phases.append(Phase(Op.SAMPLE, -1, MAX_HEAD_ROWS))
    return Lowered(tuple(phases), packed_bytes, embed_offset, place.end)


def _layer_phases(
    place: _Placer, spec: ModelSpec, target: Target, i: int, matrices: tuple[PackedMatrix, ...], before: Fold | None
) -> tuple[list[Phase], Fold | None]:
    """The five phases of a layer, and what its feed-forward leaves to fold in; `before` is what the last one left."""
    layer, at, eps = spec.layers[i], f"layers.{i}.", spec.layers[i].norm_eps
    qkv, o_proj, gate_up, down = matrices

    def norm(name: str, present: bool, n: int) -> Vector | None:
        return place.vector((at + name,), n) if present else None

    def bias(matrix: PackedMatrix, present: bool) -> Vector | None:
        roles = tuple(f"{role}_bias" for role in matrix.roles)
        return place.vector(roles, matrix.n_tiles * matrix.tile_outputs) if present else None

    def post_fold(name: str, space: Space) -> Fold | None:
        vector = norm(name, layer.post_norm, spec.d_model)
        return None if vector is None else Fold(space, vector, eps, layer.residual_multiplier)

    attention_out, ffn_out = (Space.ATTENTION_OUT, Space.FFN_OUT) if layer.post_norm else (Space.RESIDUAL,) * 2
    scale = 1.0 if layer.post_norm else layer.residual_multiplier  # with a norm to come the fold has it
    q_weights, k_weights = (
        (layer.head_dim, layer.head_dim) if layer.qk_norm is QkNorm.HEAD else (layer.q_width, layer.kv_width)
    )
    attn_norm, ffn_norm = (norm(name, layer.pre_norm, spec.d_model) for name in ("attn_norm", "ffn_norm"))
    q_norm = norm("q_norm", layer.qk_norm is not None, q_weights)
    k_norm = norm("k_norm", layer.qk_norm is not None, k_weights)
    attention, ffn = post_fold("attn_post_norm", attention_out), post_fold("ffn_post_norm", ffn_out)
    o_bias, down_bias = bias(o_proj, layer.o_bias), bias(down, layer.mlp_bias)
    return [
        Phase(Op.QKV, i, qkv.n_tiles, qkv, attn_norm, eps, bias(qkv, layer.qkv_bias), fold=before),
        Phase(Op.ATTEND, i, attend_units(layer, target), norm_eps=eps, q_norm=q_norm, k_norm=k_norm),
        Phase(Op.O_PROJ, i, o_proj.n_tiles, o_proj, bias=o_bias, scale=scale, fold=before, to=attention_out),
        Phase(Op.GATE_UP, i, gate_up.n_tiles, gate_up, ffn_norm, eps, bias(gate_up, layer.mlp_bias), fold=attention),
        Phase(Op.DOWN, i, down.n_tiles, down, bias=down_bias, scale=scale, fold=attention, to=ffn_out),
    ], ffn


def _layer_matrices(place: _Placer, spec: ModelSpec, i: int, layer: LayerSpec, fmt: Format) -> tuple[PackedMatrix, ...]:
    at, d = f"layers.{i}.", spec.d_model
    return (
        place.matrix((at + "q", at + "k", at + "v"), qkv_width(layer), d, fmt),
        place.matrix((at + "o",), d, layer.q_width, fmt),
        place.matrix((at + "gate", at + "up"), 2 * layer.d_ff, d, fmt, Order.ALTERNATE),
        place.matrix((at + "down",), d, layer.d_ff, fmt),
    )
