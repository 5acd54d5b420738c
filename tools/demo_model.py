"""The demo model in torch: Llama with Hugging Face's parameter names, for training only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

D_MODEL, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, D_FF = 256, 5, 4, 2, 64, 704
VOCAB_SIZE, N_POS, NORM_EPS, ROPE_THETA = 2048, 512, 1e-5, 10000.0


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * self.weight


class Cache:
    """Keys and values of earlier positions, by attention module."""

    def __init__(self) -> None:
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, module: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if module in self.kept:
            k = torch.cat([self.kept[module][0], k], 2)
            v = torch.cat([self.kept[module][1], v], 2)
        self.kept[module] = k, v
        return k, v


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D_MODEL, N_HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(D_MODEL, N_KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(D_MODEL, N_KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(N_HEADS * HEAD_DIM, D_MODEL, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        b, t, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(b, t, -1, HEAD_DIM).transpose(1, 2)

        def rope(y: Tensor) -> Tensor:
            a, c = y.float().chunk(2, -1)
            return torch.cat([a * cos - c * sin, c * cos + a * sin], -1).to(y.dtype)

        q, k, v = rope(heads(self.q_proj(x))), rope(heads(self.k_proj(x))), heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.extend(self, k, v)
        group = N_HEADS // N_KV_HEADS
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D_MODEL, D_FF, bias=False)
        self.up_proj = nn.Linear(D_MODEL, D_FF, bias=False)
        self.down_proj = nn.Linear(D_FF, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, D_MODEL)
        self.layers = nn.ModuleList([Layer() for _ in range(N_LAYERS)])
        self.norm = RMSNorm()
        inv_freq = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angle = torch.arange(N_POS)[:, None] * inv_freq
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.02 if "o_proj" not in name and "down" not in name else 0.02 / math.sqrt(2 * N_LAYERS)
                )

    def forward(self, ids: Tensor, pos: int = 0, cache: Cache | None = None) -> Tensor:  # (b, t) -> (b, t, vocab)
        x = self.embed_tokens(ids).float()
        end = pos + ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[pos:end], self.sin[pos:end], cache)
        return F.linear(self.norm(x), self.embed_tokens.weight)
