"""Model folders with random weights and a byte-level tokenizer, for tests of everything above the kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCAB_SIZE, BOS, EOS, D_MODEL, N_HEADS, HEAD_DIM, D_FF, N_LAYERS = 258, 0, 1, 32, 2, 16, 48, 2

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


def byte_tokenizer(add_bos: bool = True) -> Tokenizer:
    """256 byte tokens after BOS and EOS; text <-> ids is one to one with UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": BOS, "</s>": EOS} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = "<s> $A" if add_bos else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS)])
    return tokenizer


def random_weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def matrix(n_out: int, k: int) -> np.ndarray:
        return rng.normal(0, 0.3, (n_out, k)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + rng.normal(0, 0.2, D_MODEL)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, D_MODEL), "model.norm.weight": norm()}
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(N_HEADS * HEAD_DIM, D_MODEL),
            prefix + "self_attn.k_proj.weight": matrix(HEAD_DIM, D_MODEL),
            prefix + "self_attn.v_proj.weight": matrix(HEAD_DIM, D_MODEL),
            prefix + "self_attn.o_proj.weight": matrix(D_MODEL, N_HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": matrix(D_FF, D_MODEL),
            prefix + "mlp.up_proj.weight": matrix(D_FF, D_MODEL),
            prefix + "mlp.down_proj.weight": matrix(D_MODEL, D_FF),
        }
    return tensors


def model_folder(
    folder: Path,
    *,
    seed: int = 0,
    generation: dict[str, Any] | None = None,
    add_bos: bool = True,
    weights: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a model folder; `overrides` change config.json (None removes a key)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in (CONFIG | overrides).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    byte_tokenizer(add_bos).save(str(folder / "tokenizer.json"))
    if weights:
        save_file(random_weights(seed), str(folder / "model.safetensors"))
    return folder
