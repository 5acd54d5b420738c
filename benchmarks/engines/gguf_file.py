"""GGUF, as far as a comparison needs it: a checkpoint of Llama's or Qwen2's kind as llama.cpp reads it, and the bytes
that a token reads of a file.

The layout is that of version 3 in ggml's docs/gguf.md: header, key-value pairs, tensor infos, aligned data.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
U32, F32_VALUE, STRING = 4, 6, 8  # types of values
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
F32, BF16 = 0, 30  # types of tensors that we write
# Type of a tensor -> elements and bytes of a block.
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 6: (32, 22), 8: (32, 34), 14: (256, 210), 30: (1, 2)}
TYPE_NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 6: "Q5_0", 8: "Q8_0", 14: "Q6_K", 30: "BF16"}

# Architecture in config.json -> (name in GGUF, whether q and k pair neighbours when they are rotated)
ARCHITECTURES = {"LlamaForCausalLM": ("llama", True), "Qwen2ForCausalLM": ("qwen2", False)}
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Info:
    """A tensor of a file: `shape` as numpy has it, outputs first."""

    name: str
    shape: tuple[int, ...]
    type: int

    @property
    def n_bytes(self) -> int:
        elements, n_bytes = BLOCKS[self.type]
        return math.prod(self.shape) // elements * n_bytes


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight. KeyError for a tensor that it has no name for."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{TENSORS[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{TENSORS[part]}.{kind}"


def paired_neighbours(rows: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Rows of q or k, whose rotation pairs row i of a head with i + head_dim / 2, so that it pairs 2i with 2i + 1."""
    halves = rows.reshape(n_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """What the frequencies of each pair are divided by: of `llama3` scaling (Llama 3.1's rule), None without any."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise SystemExit(f"rope_scaling {kind}: only llama3 is written to GGUF here")
    dim, factor = head_dim(config), scaling["factor"]
    waves = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 0: slowed by the whole factor, 1: left as it is
    factors: NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def metadata(config: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Key-value pairs of a model with this config.json; token ids only, no tokenizer."""
    arch, _ = ARCHITECTURES[config["architectures"][0]]
    values: dict[str, str | int | float] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim(config),
        "rope.freq_base": float(config["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    values = {f"{arch}.{key}": value for key, value in values.items()}
    return values | {"general.architecture": arch, "general.alignment": ALIGNMENT, "tokenizer.ggml.model": "no_vocab"}


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pair(key: str, value: str | int | float) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", STRING) + _text(value)
    kind = U32 if isinstance(value, int) else F32_VALUE
    return _text(key) + struct.pack("<I", kind) + struct.pack(SCALARS[kind], value)


def _padding(n_bytes: int) -> bytes:
    return bytes(-n_bytes % ALIGNMENT)


def write(path: Path, pairs: Mapping[str, str | int | float], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Tensors are float32, or uint16 for the bits of bf16."""
    infos, offset = b"", 0
    for name, data in tensors.items():
        kind = {np.dtype("<f4"): F32, np.dtype("<u2"): BF16}[data.dtype]
        infos += _text(name) + struct.pack("<I", data.ndim) + struct.pack(f"<{data.ndim}Q", *data.shape[::-1])
        infos += struct.pack("<IQ", kind, offset)
        offset += data.nbytes + len(_padding(data.nbytes))
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(pairs))
    head += b"".join(_pair(key, value) for key, value in pairs.items()) + infos
    with path.open("wb") as file:
        file.write(head + _padding(len(head)))
        for data in tensors.values():
            file.write(data.data)
            file.write(_padding(data.nbytes))


def _read(file: BinaryIO, layout: str) -> Any:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def _read_text(file: BinaryIO) -> str:
    return file.read(_read(file, "<Q")).decode()


def infos(path: Path) -> Iterator[Info]:
    """The tensors of a file that holds scalars and texts as its pairs, as those written here and quantized do."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC or _read(file, "<I") != VERSION:
            raise SystemExit(f"{path}: not a GGUF file of version {VERSION}")
        n_tensors, n_pairs = _read(file, "<Q"), _read(file, "<Q")
        for _ in range(n_pairs):
            _read_text(file)
            kind = _read(file, "<I")
            _read_text(file) if kind == STRING else _read(file, SCALARS[kind])
        for _ in range(n_tensors):
            name, n_dims = _read_text(file), _read(file, "<I")
            shape = struct.unpack(f"<{n_dims}Q", file.read(8 * n_dims))[::-1]
            yield Info(name, shape, _read(file, "<I"))
            _read(file, "<Q")


def token_bytes(tensors: list[Info]) -> int:
    """Bytes of matrices that a token reads: the embedding only where it is the head too; norms and biases not."""
    tied = not any(info.name == "output.weight" for info in tensors)
    return sum(i.n_bytes for i in tensors if len(i.shape) == 2 and (tied or i.name != "token_embd.weight"))
