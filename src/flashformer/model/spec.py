"""ModelSpec: everything a forward pass depends on, as frozen data. No family has a name below this point."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_HEAD_DIM = 256  # elements of the widest head that kernels hold


class Activation(StrEnum):
    SILU = "silu"


class RopeKind(StrEnum):
    DEFAULT = "default"
    LLAMA3 = "llama3"


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions. The factors are those of `llama3` and unused under `default`."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0


@dataclass(frozen=True)
class LayerSpec:
    """Widths and switches of one layer."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    norm_eps: float
    activation: Activation
    attention_scale: float  # scores are q . k times this

    @property
    def q_width(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def heads_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True)
class ModelSpec:
    """One decoder. Built and validated by `flashformer.model.read_spec`; all arithmetic below follows from it."""

    d_model: int
    vocab_size: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    final_norm_eps: float
    rope: RopeSpec
    tied: bool  # lm_head is the embedding
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        return len(self.layers)
