"""ModelSpec: everything a forward pass depends on, as frozen data. No family has a name below this point."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_HEAD_DIM = 256  # elements of the widest head that kernels hold


class Activation(StrEnum):
    """Of the gate, in hidden = activation(gate) * up."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"  # GELU by its tanh approximation


class QkNorm(StrEnum):
    """RMS norm of queries and keys before they are rotated."""

    HEAD = "head"  # each head by itself; weights (head_dim)
    WIDTH = "width"  # all heads as one vector; weights (q_width) and (kv_width)


class RopeKind(StrEnum):
    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"
    LONGROPE = "longrope"

    @classmethod
    def of_length(cls) -> tuple[RopeKind, ...]:
        """The kinds whose frequencies depend on how long a sequence may become; chosen once, from ctx."""
        return (cls.DYNAMIC, cls.LONGROPE)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions of the first `rotary_dim` elements of a head: pairs (i, i + rotary_dim / 2).

    Each kind reads the fields that rope.py lists for it; the others keep their defaults. `attention_factor`
    multiplies cos and sin.
    """

    kind: RopeKind
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # (rotary_dim / 2)
    long_factors: tuple[float, ...] = ()  # (rotary_dim / 2)


@dataclass(frozen=True)
class LayerSpec:
    """Widths and switches of one layer:

    x += residual_multiplier * post_norm(attention(pre_norm(x))), then the same with the feed-forward.
    """

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
    rope: RopeSpec | None  # None: queries and keys are not rotated
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: QkNorm | None = None
    window: int | None = None  # keys a row sees, itself included; None: all before it
    score_softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    residual_multiplier: float = 1.0

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
    tied: bool  # lm_head is the embedding
    bos_id: int | None
    eos_ids: tuple[int, ...]
    embed_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None  # after the multiplier: softcap * tanh(logit / softcap)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The rotations that occur, each once, in order of first use."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))
