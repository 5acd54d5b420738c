"""Writes a Hugging Face folder with random weights in the shape of a well-known model.

    python tools/make_checkpoint.py SHAPE OUT [--dtype bf16|f32] [--layers N] [--vocab N] [--seed N]

Every shape of `flashformer.model.shape_names()` can be written, also those that flashformer does not run yet.
The tokenizer has one token per byte, `<|bos|>` and `<|eos|>`. `write_folder` does the same for any config.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from flashformer.formats import FORMATS, Format, from_f32
from flashformer.model import shape_config, shape_names
from flashformer.model.families.common import TENSORS
from flashformer.model.family import TensorRule

SPECIALS = {"<|bos|>": 0, "<|eos|>": 1}
BOS, EOS = SPECIALS.values()
MIN_VOCAB = len(SPECIALS) + 256
STD = 0.02
CHUNK = 1 << 22  # elements made at a time

CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

# What a model type has beyond config switches and the tensors of every decoder.
ALWAYS_ON = {"qwen2": {"qkv_bias"}, "qwen3": {"qk_norm"}}
QK_NORM = tuple(
    TensorRule(f"layers.{{i}}.{x}_norm", f"model.layers.{{i}}.self_attn.{x}_norm.weight", ("head_dim",), "qk_norm")
    for x in "qk"
)


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(role, name, shape) of every tensor of a decoder with this config.json."""
    n_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    widths = {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "d_ff": config["intermediate_size"],
        "head_dim": head_dim,
        "q_width": n_heads * head_dim,
        "kv_width": (config.get("num_key_value_heads") or n_heads) * head_dim,
    }
    asked = {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"}
    on = {switch for switch, key in asked.items() if config.get(key)} | ALWAYS_ON.get(config["model_type"], set())
    for rule in (*TENSORS, *QK_NORM):
        if (rule.switch is None or rule.switch in on) and not (
            rule.role == "lm_head" and config.get("tie_word_embeddings")
        ):
            for i in range(config["num_hidden_layers"] if "{i}" in rule.role else 1):
                yield rule.role, rule.source.format(i=i), tuple(widths[word] for word in rule.shape)


def write_safetensors(path: Path, config: dict[str, Any], fmt: Format, seed: int) -> None:
    """Norms 1 + N(0, STD), all else N(0, STD)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    tensors = list(tensor_shapes(config))
    for _, name, shape in tensors:
        end = position + int(np.prod(shape)) * fmt.element_bytes
        header[name] = {"dtype": fmt.safetensors, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for role, _, shape in tensors:
            mean = np.float32(role.endswith("norm"))
            n = int(np.prod(shape))
            for begin in range(0, n, CHUNK):
                noise = rng.standard_normal(min(CHUNK, n - begin), np.float32)
                file.write(from_f32(mean + np.float32(STD) * noise, fmt).data)


def byte_tokenizer() -> Tokenizer:
    """One token per byte after the specials; BOS in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = SPECIALS | {char: len(SPECIALS) + i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


def write_folder(out: Path, config: dict[str, Any], fmt: Format, seed: int = 0) -> None:
    """A complete model folder for a config.json; its dtype, BOS and EOS are set to what the folder holds."""
    if config["vocab_size"] < MIN_VOCAB:
        raise SystemExit(f"vocab_size = {config['vocab_size']}: the byte tokenizer needs at least {MIN_VOCAB}")
    dtype = {"bf16": "bfloat16", "f32": "float32"}[fmt.name]
    ids = {"bos_token_id": BOS, "eos_token_id": EOS}
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", config, fmt, seed)
    byte_tokenizer().save(str(out / "tokenizer.json"))
    files = {
        "config.json": {**config, **ids, "torch_dtype": dtype},
        "generation_config.json": {**ids, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=shape_names())
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=FORMATS, default="bf16")
    parser.add_argument("--layers", type=int, help="instead of the shape's number of layers")
    parser.add_argument("--vocab", type=int, help="instead of the shape's vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    config = shape_config(args.shape)
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    config["vocab_size"] = args.vocab or config["vocab_size"]
    write_folder(args.out, config, FORMATS[args.dtype], args.seed)


if __name__ == "__main__":
    main()
