"""Writes a Hugging Face folder with random weights in the shape of a well-known model.

    python tools/make_checkpoint.py SHAPE OUT [--dtype bf16|f32|f16] [--layers N] [--vocab N] [--seed N]

SHAPE is one of `flashformer.model.shape_names()`.
The tokenizer has one token per byte, `<|bos|>` and `<|eos|>`. `write_folder` does the same for any config.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from flashformer.formats import FORMATS, Format, from_f32
from flashformer.model import read_family, read_spec, shape_config, shape_names
from flashformer.model.tensors import Due, expected

SPECIALS = {"<|bos|>": 0, "<|eos|>": 1}
BOS, EOS = SPECIALS.values()
MIN_VOCAB = len(SPECIALS) + 256
STD = 0.02
CHUNK = 1 << 22  # elements made at a time

CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def due_tensors(config: dict[str, Any]) -> dict[str, Due]:
    """Name -> what it holds, of every tensor of a model with this config.json; of a fused one its first role."""
    spec = read_spec(config)
    found: dict[str, Due] = {}
    for due in expected(read_family(config), spec):
        if not (spec.tied and due.role == "lm_head"):
            found.setdefault(due.source, due)
    return found


def write_safetensors(path: Path, config: dict[str, Any], fmt: Format, seed: int) -> None:
    """Norms 1 + N(0, STD) less the offset that they are stored without, all else N(0, STD)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    dues = due_tensors(config)
    for name, due in dues.items():
        end = position + math.prod(due.stored_shape) * fmt.element_bytes
        header[name] = {"dtype": fmt.safetensors, "shape": due.stored_shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng, offset = np.random.default_rng(seed), read_family(config).norm_offset
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for due in dues.values():
            mean = np.float32(1 - offset if due.is_norm else 0)
            n = math.prod(due.stored_shape)
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
    ids = {"bos_token_id": BOS, "eos_token_id": EOS}
    out.mkdir(parents=True, exist_ok=True)
    config = {**config, **ids, "torch_dtype": fmt.config}
    write_safetensors(out / "model.safetensors", config, fmt, seed)
    byte_tokenizer().save(str(out / "tokenizer.json"))
    files = {
        "config.json": config,
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
