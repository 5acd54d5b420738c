"""Tiny random models, as transformers computes them and as this package sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from flashformer.backends.base import Kernel, Want
from flashformer.checkpoint import Tensor
from flashformer.formats import BF16, F16, F32
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


_ROUND = {
    "f32": lambda values: values,
    "bf16": lambda values: values.bfloat16().float(),
    "f16": lambda values: values.half().float(),
}


@dataclass(frozen=True)
class Tiny:
    """`oracle` computes in float32 with the weights in `tensors`, by its own eager attention."""

    oracle: Any  # transformers' model
    config: Mapping[str, Any]  # config.json
    spec: ModelSpec
    tensors: Mapping[str, Tensor]  # by role

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """(n_tokens, vocab_size) of transformers."""
        with torch.no_grad():
            result: NDArray[np.float32] = self.oracle(torch.tensor([ids])).logits[0].float().numpy()
        return result

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """`n` tokens after a prompt, of transformers."""
        return greedy(self.oracle, ids, n)


def greedy(oracle: Any, ids: list[int], n: int) -> list[int]:
    """`n` tokens after a prompt, of a model of transformers."""
    tokens, past = torch.tensor([ids]), None
    result: list[int] = []
    with torch.no_grad():
        for _ in range(n):
            out = oracle(tokens, past_key_values=past, use_cache=True)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            result.append(int(tokens))
    return result


def tiny(seed: int, *, stored: str = "f32", **options: Any) -> Tiny:
    """`stored` is the format of the checkpoint; everything else goes to `random_oracle`."""
    oracle = random_oracle(seed, stored=stored, **options)
    config = json.loads(oracle.config.to_json_string(use_diff=False))
    spec = read_spec(config)
    state = {k: v for k, v in oracle.state_dict().items() if not (spec.tied and k == "lm_head.weight")}
    tensors = {k: _stored(k, v, stored) for k, v in state.items()}
    return Tiny(oracle, config, spec, bind(read_family(config), spec, tensors))


def random_oracle(
    seed: int,
    *,
    architecture: str = "LlamaForCausalLM",
    stored: str = "f32",
    scale: float = 0.05,
    embed_gain: float = 1.0,
    ctx: int | None = None,
    **overrides: Any,
) -> Any:
    """A model of transformers in which every parameter is random: weights N(0, scale), the embedding's times
    embed_gain, biases N(0, 0.2), norms their initial value + N(0, 0.2), all rounded to `stored`.

    `overrides` go over BASE into the config; head_dim = None leaves it out. With `ctx` the model rotates as for a
    sequence of that many tokens, however long its input.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    model_class = getattr(transformers, architecture)
    keys = deepcopy({k: v for k, v in (BASE | overrides).items() if (k, v) != ("head_dim", None)})
    config = model_class.config_class(**keys, architectures=[architecture])
    config._attn_implementation = "eager"
    oracle = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                noise *= 0.2
            elif "norm" in name:
                noise = parameter + noise * 0.2
            else:
                noise *= scale * (embed_gain if "embed_tokens" in name else 1)
            parameter.copy_(_ROUND[stored](noise))
    if ctx is not None:
        _fix_frequencies(oracle.model.rotary_emb, ctx)
    return oracle


def _fix_frequencies(rotary: Any, ctx: int) -> None:
    """Frequencies that follow the length (dynamic, longrope) become those of a sequence of `ctx` tokens for good.

    One call at the last position chooses them; a rotation that calls itself default never chooses again.
    """
    last, layered = torch.tensor([[ctx - 1]]), isinstance(rotary.rope_type, dict)
    for layer_type in list(rotary.rope_type) if layered else [None]:
        rotary(torch.zeros(1), last, *([layer_type] if layered else []))
    rotary.rope_type = dict.fromkeys(rotary.rope_type, "default") if layered else "default"


def _stored(name: str, values: torch.Tensor, stored: str) -> Tensor:
    if stored == "bf16":
        return Tensor(name, BF16, values.bfloat16().view(torch.int16).numpy().view(np.uint16))
    return Tensor(name, F32, values.numpy()) if stored == "f32" else Tensor(name, F16, values.half().numpy())


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
    rows.top_k[at], rows.top_p[at], rows.min_p[at], rows.adjust_begin[at], rows.adjust_end[at] = 0, 1, 0, 0, 0
    rows.pos[at] = np.arange(pos, pos + len(ids))


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference over the largest expected value; NaN counts as infinite."""
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return np.inf if np.isnan(error) else error
