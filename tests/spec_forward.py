"""The function that a ModelSpec and weights by role describe: a whole prompt at once in NumPy float64, no cache.

Shares nothing with the programs and kernels but the table of rotations, so that it tells a wrong spec from a wrong
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from flashformer.checkpoint import Tensor
from flashformer.formats import to_f32
from flashformer.model import Activation, LayerSpec, ModelSpec, QkNorm, RopeSpec, rope_table

Array = NDArray[np.float64]


class Weights:
    """float64 arrays by role; one that is not there is a KeyError, one that was never asked for is left in `unread`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.unread = set(tensors)

    def __getitem__(self, role: str) -> Array:
        tensor = self._tensors[role]
        self.unread.discard(role)
        return to_f32(tensor.data, tensor.format).astype(np.float64)

    def product(self, x: Array, role: str, bias: bool) -> Array:
        """x (n, k) times a matrix (n_out, k), plus its bias."""
        return x @ self[role].T + (self[f"{role}_bias"] if bias else 0.0)


def spec_logits(spec: ModelSpec, tensors: Mapping[str, Tensor], ids: list[int], ctx: int | None = None) -> Array:
    """(n, vocab_size) logits after each of the n ids, in a model loaded with `ctx` positions (n if None)."""
    weights = Weights(tensors)
    embed = weights["embed"]
    x = embed[ids] * spec.embed_multiplier
    for i, layer in enumerate(spec.layers):
        at = f"layers.{i}."
        for branch, name in (_attention, "attn"), (_feed_forward, "ffn"):
            y = _rms_norm(x, weights[f"{at}{name}_norm"], layer.norm_eps) if layer.pre_norm else x
            y = branch(weights, layer, at, y, ctx or len(ids))
            if layer.post_norm:
                y = _rms_norm(y, weights[f"{at}{name}_post_norm"], layer.norm_eps)
            x = x + layer.residual_multiplier * y
    x = _rms_norm(x, weights["final_norm"], spec.final_norm_eps)
    logits = x @ (embed if spec.tied else weights["lm_head"]).T * spec.logits_multiplier
    assert not weights.unread, f"no part of the spec reads {sorted(weights.unread)}"
    return _capped(logits, spec.logits_softcap)


def _attention(weights: Weights, layer: LayerSpec, at: str, x: Array, ctx: int) -> Array:
    n = len(x)
    q, k, v = (weights.product(x, at + name, layer.qkv_bias) for name in "qkv")
    if layer.qk_norm is QkNorm.WIDTH:
        q, k = (_rms_norm(y, weights[f"{at}{name}_norm"], layer.norm_eps) for name, y in (("q", q), ("k", k)))
    q, k, v = (y.reshape(n, -1, layer.head_dim) for y in (q, k, v))
    if layer.qk_norm is QkNorm.HEAD:
        q, k = (_rms_norm(y, weights[f"{at}{name}_norm"], layer.norm_eps) for name, y in (("q", q), ("k", k)))
    if layer.rope is not None:
        q, k = _rotated(q, layer.rope, ctx), _rotated(k, layer.rope, ctx)
    back = np.arange(n)[:, None] - np.arange(n)[None, :]  # from a row to a key
    seen = (back >= 0) & (back < (layer.window or n))
    out = np.empty_like(q)
    for head in range(layer.n_heads):
        shared = head // (layer.n_heads // layer.n_kv_heads)
        scores = _capped(q[:, head] @ k[:, shared].T * layer.attention_scale, layer.score_softcap)
        scores = np.where(seen, scores, -np.inf)
        share = np.exp(scores - scores.max(1, keepdims=True))
        out[:, head] = share / share.sum(1, keepdims=True) @ v[:, shared]
    return weights.product(out.reshape(n, -1), at + "o", layer.o_bias)


def _feed_forward(weights: Weights, layer: LayerSpec, at: str, x: Array, ctx: int) -> Array:
    gate, up = (weights.product(x, at + name, layer.mlp_bias) for name in ("gate", "up"))
    return weights.product(_ACTIVATIONS[layer.activation](gate) * up, at + "down", layer.mlp_bias)


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * weight


def _rotated(x: Array, rope: RopeSpec, ctx: int) -> Array:
    """x (n, heads, head_dim), row i at position i."""
    cos, sin = np.moveaxis(rope_table(rope, ctx)[: len(x), :, None].astype(np.float64), 1, 0)
    half = rope.rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _capped(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


_ACTIVATIONS = {
    Activation.SILU: lambda x: x / (1 + np.exp(-x)),
    Activation.GELU_TANH: lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}
