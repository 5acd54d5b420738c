"""Random models in which every switch of a LayerSpec occurs, no layer like the next, and kernels for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flashformer.backends.cpu.kernel import CpuKernel
from flashformer.backends.reference import ReferenceKernel
from flashformer.check import check
from flashformer.checkpoint import Tensor
from flashformer.formats import F32, Format, from_f32
from flashformer.model.spec import Activation, LayerSpec, ModelSpec, QkNorm, RopeKind, RopeSpec
from flashformer.program import Target, build

D_MODEL, VOCAB = 52, 211


def random_layer(rng: np.random.Generator) -> LayerSpec:
    def flip() -> bool:
        return bool(rng.random() < 0.5)

    head_dim = int(rng.integers(4, 20)) * 2
    rope = RopeSpec(RopeKind.DEFAULT, 100.0, 2 * int(rng.integers(1, head_dim // 2 + 1)))
    n_kv_heads = int(rng.integers(1, 4))
    return LayerSpec(
        n_heads=n_kv_heads * int(rng.integers(1, 4)),
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=int(rng.integers(20, 150)),
        qkv_bias=flip(),
        o_bias=flip(),
        mlp_bias=flip(),
        norm_eps=1e-5,
        activation=Activation.SILU if flip() else Activation.GELU_TANH,
        attention_scale=float(head_dim**-0.5 * rng.uniform(0.5, 2)),
        rope=rope if rng.random() < 0.7 else None,
        pre_norm=rng.random() < 0.7,
        post_norm=flip(),
        qk_norm=(None, QkNorm.HEAD, QkNorm.WIDTH)[int(rng.integers(3))],
        window=int(rng.integers(1, 300)) if flip() else None,
        score_softcap=float(rng.uniform(0.5, 5)) if flip() else None,
        residual_multiplier=float(rng.uniform(0.2, 1.5)) if flip() else 1.0,
    )


def random_spec(seed: int) -> ModelSpec:
    """Every layer differs from the next, more than in any family."""
    rng = np.random.default_rng(seed)
    return ModelSpec(
        d_model=D_MODEL,
        vocab_size=VOCAB,
        max_positions=1024,
        layers=tuple(random_layer(rng) for _ in range(3)),
        final_norm_eps=1e-5,
        tied=bool(seed % 2),
        bos_id=None,
        eos_ids=(),
        embed_multiplier=float(rng.uniform(0.5, 3)),
        logits_multiplier=float(rng.uniform(0.5, 3)),
        logits_softcap=float(rng.uniform(3, 20)) if seed % 3 else None,
    )


def shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(role, shape) of every tensor of a model."""
    yield from (("embed", (spec.vocab_size, spec.d_model)), ("final_norm", (spec.d_model,)))
    if not spec.tied:
        yield "lm_head", (spec.vocab_size, spec.d_model)
    for i, la in enumerate(spec.layers):
        d, heads = spec.d_model, la.qk_norm is QkNorm.WIDTH
        found: dict[str, tuple[tuple[int, ...], bool]] = {
            **{name: ((la.q_width, d), True) for name in ("q",)},
            **{name: ((la.kv_width, d), True) for name in ("k", "v")},
            "o": ((d, la.q_width), True),
            **{name: ((la.d_ff, d), True) for name in ("gate", "up")},
            "down": ((d, la.d_ff), True),
            "q_bias": ((la.q_width,), la.qkv_bias),
            **{name: ((la.kv_width,), la.qkv_bias) for name in ("k_bias", "v_bias")},
            "o_bias": ((d,), la.o_bias),
            **{name: ((la.d_ff,), la.mlp_bias) for name in ("gate_bias", "up_bias")},
            "down_bias": ((d,), la.mlp_bias),
            **{name: ((d,), la.pre_norm) for name in ("attn_norm", "ffn_norm")},
            **{name: ((d,), la.post_norm) for name in ("attn_post_norm", "ffn_post_norm")},
            "q_norm": ((la.q_width if heads else la.head_dim,), la.qk_norm is not None),
            "k_norm": ((la.kv_width if heads else la.head_dim,), la.qk_norm is not None),
        }
        yield from ((f"layers.{i}.{name}", shape) for name, (shape, there) in found.items() if there)


def random_tensors(spec: ModelSpec, seed: int, fmt: Format = F32) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for role, shape in shapes(spec):
        values = rng.standard_normal(shape, np.float32) * np.float32(0.2)
        values = values + np.float32(1) if role.endswith("norm") else values
        tensors[role] = Tensor(role, fmt, from_f32(values, fmt))
    return tensors


def cpu(spec: ModelSpec, tensors: dict[str, Tensor], n_workers: int = 2, **target: Any) -> CpuKernel:
    chosen = {"weight_format": F32, "kv_format": F32, "rows": 64, "streams": 1, "ctx": 640} | target
    return CpuKernel(check(build(spec, Target(n_workers, **chosen))), tensors)


def reference(spec: ModelSpec, tensors: dict[str, Tensor], **target: Any) -> ReferenceKernel:
    chosen = {"weight_format": F32, "kv_format": F32, "rows": 64, "streams": 1, "ctx": 640} | target
    return ReferenceKernel(check(build(spec, Target(3, **chosen))), tensors, seed=7)
