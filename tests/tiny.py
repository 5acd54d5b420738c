"""Tiny random models, as transformers computes them and as this package sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from flashformer.backends.base import Kernel, Want
from flashformer.checkpoint import Tensor
from flashformer.formats import BF16, F32
from flashformer.model import ModelSpec, bind, read_family, read_spec

BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "vocab_size": 101,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Tiny:
    """`oracle` computes in float32 with the weights in `tensors`."""

    oracle: Any  # LlamaForCausalLM
    spec: ModelSpec
    tensors: Mapping[str, Tensor]  # by role

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """(n_tokens, vocab_size) of transformers."""
        with torch.no_grad():
            result: NDArray[np.float32] = self.oracle(torch.tensor([ids])).logits[0].float().numpy()
        return result


def tiny(seed: int, *, stored: str = "f32", scale: float = 0.05, **overrides: Any) -> Tiny:
    """Every parameter is random: weights N(0, scale), biases N(0, 0.2), norms 1 + N(0, 0.2)."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(**(BASE | overrides), architectures=["LlamaForCausalLM"])
    config._attn_implementation = "eager"
    oracle = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(noise * 0.2)
            else:
                parameter.copy_(1 + noise * 0.2 if "norm" in name else noise * scale)
            if stored == "bf16":
                parameter.copy_(parameter.bfloat16().float())
    read = json.loads(config.to_json_string(use_diff=False))
    spec = read_spec(read)
    state = {k: v for k, v in oracle.state_dict().items() if not (spec.tied and k == "lm_head.weight")}
    return Tiny(oracle, spec, bind(read_family(read), spec, {k: _stored(k, v, stored) for k, v in state.items()}))


def _stored(name: str, values: torch.Tensor, stored: str) -> Tensor:
    if stored == "bf16":
        return Tensor(name, BF16, values.bfloat16().view(torch.int16).numpy().view(np.uint16))
    return Tensor(name, F32, values.numpy())


def forward(
    kernel: Kernel, ids: list[int], *, pos: int = 0, slot: int = 0, want: Want = Want.LOGITS
) -> NDArray[np.float32]:
    """One forward over the rows of one slot; (rows, vocab_size) logits where they are wanted."""
    put(kernel, 0, ids, pos=pos, slot=slot, want=want)
    kernel.forward(len(ids))
    return kernel.logits[: len(ids)].copy()


def put(kernel: Kernel, row: int, ids: list[int], *, pos: int, slot: int, want: Want) -> None:
    rows, at = kernel.rows, slice(row, row + len(ids))
    rows.token[at], rows.slot[at], rows.want[at], rows.temperature[at], rows.choice[at] = ids, slot, want, 0, 0
    rows.pos[at] = np.arange(pos, pos + len(ids))


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference over the largest expected value; NaN counts as infinite."""
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return np.inf if np.isnan(error) else error
