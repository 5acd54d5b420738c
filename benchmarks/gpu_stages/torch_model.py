"""Models of the named shapes that live on the GPU: random weights made there, packed there, and their oracle.

Made with PyTorch's plain operations. Quantized weights are drawn as codes and scales, not quantized from anything:
random weights need no search for scales. Only what the Llama shapes have is here; others are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashformer.formats import BF16, Format
from flashformer.model.rope import rope_table
from flashformer.model.spec import Activation, ModelSpec
from flashformer.program import fragments
from flashformer.program.ir import PackedMatrix, Program
from flashformer.program.pack import row_map

STD = 0.02
STEPS = {8: 40.0, 4: 2.7}  # of a code, that make one standard deviation


@dataclass(frozen=True)
class Matrix:
    """(n_out, k): bf16 elements, or codes u8 with scales (n_out, k / group) f16."""

    fmt: Format
    elements: torch.Tensor
    scales: torch.Tensor | None = None

    def values(self, rows: Any = slice(None)) -> torch.Tensor:
        """float32 of some rows."""
        elements = self.elements[rows].float()
        if self.scales is None:
            return elements
        grouped = (elements - self.fmt.zero).unflatten(1, (-1, self.fmt.scale_group))
        return (grouped * self.scales[rows].float()[..., None]).flatten(1)


Weights = dict[str, Matrix | torch.Tensor]  # by role; norms are float32 vectors


def random_weights(spec: ModelSpec, quant: Format | None, device: str, seed: int = 0) -> Weights:
    """All roles of a model of the Llama family; the embedding is quantized only where it is the head too."""
    require_plain(spec)
    torch.manual_seed(seed)
    weights: Weights = {}

    def matrix(role: str, n_out: int, k: int, fmt: Format | None = quant) -> None:
        weights[role] = _drawn(n_out, k, fmt, device)

    def norm(role: str) -> None:
        weights[role] = 1 + 0.1 * torch.randn(spec.d_model, device=device)

    matrix("embed", spec.vocab_size, spec.d_model, quant if spec.tied else None)
    if not spec.tied:
        matrix("lm_head", spec.vocab_size, spec.d_model)
    norm("final_norm")
    for i, la in enumerate(spec.layers):
        at = f"layers.{i}."
        for name, n_out, k in (
            ("q", la.q_width, spec.d_model), ("k", la.kv_width, spec.d_model), ("v", la.kv_width, spec.d_model),
            ("o", spec.d_model, la.q_width), ("gate", la.d_ff, spec.d_model), ("up", la.d_ff, spec.d_model),
            ("down", spec.d_model, la.d_ff),
        ):  # fmt: skip
            matrix(at + name, n_out, k)
        norm(at + "attn_norm")
        norm(at + "ffn_norm")
    return weights


def require_plain(spec: ModelSpec) -> None:
    """What the oracle here computes; anything else is a mistake of the caller."""
    for la in spec.layers:
        switches = (la.qkv_bias, la.o_bias, la.mlp_bias, la.post_norm, la.qk_norm, la.window, la.score_softcap)
        assert not any(switches), la
        assert la.pre_norm, la
        assert la.rope is not None, la
        assert la.activation is Activation.SILU, la
        assert la.residual_multiplier == 1, la
    assert spec.embed_multiplier == spec.logits_multiplier == 1
    assert spec.logits_softcap is None


def _drawn(n_out: int, k: int, fmt: Format | None, device: str) -> Matrix:
    noise = torch.randn(n_out, k, device=device, dtype=torch.bfloat16)
    if fmt is None:
        return Matrix(BF16, noise.mul_(STD))
    steps = STEPS[fmt.bits]
    codes = noise.mul_(steps).round_().add_(fmt.zero).clamp_(0, 2**fmt.bits - 1).to(torch.uint8)
    scales = (0.8 + 0.4 * torch.rand(n_out, k // fmt.scale_group, device=device)) * (STD / steps)
    return Matrix(fmt, codes, scales.half())


# ---- packing: program/fragments.py is the definition ---------------------------------------------------------------


def pack(program: Program, weights: Weights, device: str) -> torch.Tensor:
    """(weights_bytes) u8 as the kernel reads it."""
    region = torch.zeros(program.memory.weights_bytes, dtype=torch.uint8, device=device)
    for phase in program.phases:
        if phase.matrix is not None:
            _pack_matrix(region, phase.matrix, weights)
        for vector in phase.vectors.values():
            values = torch.cat([_vector(weights, role) for role in vector.roles]).contiguous().view(torch.uint8)
            region[vector.offset :][: len(values)] = values
    if program.embed_offset >= 0:
        rows = _matrix(weights, "embed").elements.view(torch.uint8).flatten()
        region[program.embed_offset :][: len(rows)] = rows
    return region


def _matrix(weights: Weights, role: str) -> Matrix:
    found = weights[role]
    assert isinstance(found, Matrix)
    return found


def _vector(weights: Weights, role: str) -> torch.Tensor:
    found = weights[role]
    assert isinstance(found, torch.Tensor)
    return found


def _pack_matrix(region: torch.Tensor, matrix: PackedMatrix, weights: Weights) -> None:
    sources, fmt = [_matrix(weights, role) for role in matrix.roles], matrix.format
    assert matrix.k == matrix.k_padded, "widths of the named shapes are whole units"
    rows = torch.from_numpy(row_map(matrix)).long().to(region.device)
    keep = (rows >= 0)[:, None]
    stacked = torch.cat([one.elements for one in sources])[rows.clamp(min=0)]
    units = torch.where(keep, stacked, torch.full_like(stacked, fmt.zero if fmt.scale_group else 0))
    shape = (matrix.n_tiles, fragments.TILE_OUTPUTS, matrix.k // fragments.unit_k(fmt), -1)
    if fmt.scale_group:
        assert not fmt.zero_points
        scales = torch.cat([one.scales for one in sources if one.scales is not None])[rows.clamp(min=0)]
        scales = torch.where(keep, scales, torch.zeros_like(scales)).view(shape).permute(0, 2, 3, 1)
        parts = [_lane_codes(units.view(shape), fmt.bits), scales.contiguous().view(torch.uint8).flatten(2)]
        packed = torch.cat(parts, dim=2)
    else:
        packed = units.view(shape).transpose(1, 2).contiguous().view(torch.uint8).flatten(2)
    per_slice = fragments.SLICE_K // fragments.unit_k(fmt)
    for s, (begin, end) in enumerate(matrix.ranges(0, matrix.n_tiles)):
        region[begin:end] = packed[:, s * per_slice : (s + 1) * per_slice].flatten()


def _lane_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(tiles, 16, units, unit_k) -> (tiles, units, bytes)"""
    tiles, _, units, _ = codes.shape
    if bits == 8:  # half, g, unit, step, q, e
        lanes = codes.reshape(tiles, 2, 8, units, -1, 4, 8).permute(0, 3, 4, 2, 5, 1, 6)
        return lanes.reshape(tiles, units, -1)
    parts = codes.reshape(tiles, 2, 8, units, -1, 2, 4, 2, 2, 2)  # half, g, unit, step, run, q; element 4 a + 2 b + c
    octets = parts[..., 0, :] | parts[..., 1, :] << 4  # b = 0 in the low nibble of byte 2 c + a
    return octets.permute(0, 3, 4, 2, 6, 1, 5, 8, 7).reshape(tiles, units, -1)


# ---- the oracle ----------------------------------------------------------------------------------------------------


def logits(
    spec: ModelSpec, weights: Weights, ids: torch.Tensor, wanted: list[int], rounding: torch.dtype | None = None
) -> torch.Tensor:
    """(len(wanted), vocab_size) float32 at positions of one sequence.

    With `rounding` the inputs of products are rounded to it, and queries, keys, values and the weights of attention to
    bf16, which is where the kernel rounds.
    """
    torch.backends.cuda.matmul.allow_tf32 = False

    def small(x: torch.Tensor) -> torch.Tensor:
        return x if rounding is None else x.to(rounding).float()

    def product(x: torch.Tensor, role: str) -> torch.Tensor:
        return small(x) @ _matrix(weights, role).values().T

    x = _matrix(weights, "embed").values(ids)
    for i, la in enumerate(spec.layers):
        at = f"layers.{i}."
        h = _normed(x, _vector(weights, at + "attn_norm"), la.norm_eps)
        q, k, v = (product(h, at + name).unflatten(1, (-1, la.head_dim)).transpose(0, 1) for name in "qkv")
        assert la.rope is not None
        table = torch.from_numpy(np.array(rope_table(la.rope, len(ids)))).to(x.device)
        seen = _attended(_rotated(q, table), _rotated(k, table), v, la.attention_scale, rounding is not None)
        x = x + product(seen, at + "o")
        h = _normed(x, _vector(weights, at + "ffn_norm"), la.norm_eps)
        x = x + product(torch.nn.functional.silu(product(h, at + "gate")) * product(h, at + "up"), at + "down")
    x = small(_normed(x[wanted], _vector(weights, "final_norm"), spec.final_norm_eps))
    head = _matrix(weights, "embed" if spec.tied else "lm_head")
    step = 16384
    return torch.cat([x @ head.values(slice(n, n + step)).T for n in range(0, spec.vocab_size, step)], dim=1)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(heads, n, head_dim), of which the first elements are pairs (i, i + rotary_dim / 2)."""
    cos, sin = table[:, 0], table[:, 1]
    half = cos.shape[1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rounded: bool) -> torch.Tensor:
    """(n, heads * head_dim); a group of heads at a time, so that 8192 positions fit."""

    def small(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float() if rounded else x

    n, group = q.shape[1], len(q) // len(k)
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1)
    results = []
    for h in range(len(k)):
        scores = (small(q[h * group : (h + 1) * group]) @ small(k[h]).T).mul_(scale)
        shares = torch.softmax(scores.masked_fill_(hidden, -torch.inf), dim=-1)
        results.append(small(shares) @ small(v[h]))
    return torch.cat(results).transpose(0, 1).flatten(1)
