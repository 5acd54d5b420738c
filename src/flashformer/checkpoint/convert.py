"""What to say of a model that carries its weights or its tokenizer only in formats that are not read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"

_OTHER_WEIGHTS = (
    ".bin",
    ".pth",
    ".pt",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".safetensors",
    ".bin.index.json",
)
_CONVERTED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_NEEDED = "pip install torch transformers sentencepiece protobuf tiktoken"


def command(source: str, into: str, *, weights: bool = False, tokenizer: bool = False) -> str:
    """A shell command with which transformers writes the model `source` in readable formats into the folder `into`."""
    classes = [name for name, wanted in (("AutoModelForCausalLM", weights), ("AutoTokenizer", tokenizer)) if wanted]
    load, save = json.dumps(source, ensure_ascii=False), json.dumps(into, ensure_ascii=False)
    parts = [f"from transformers import {', '.join(classes)}"]
    for name in classes:
        dtype = ', dtype="auto"' if name == "AutoModelForCausalLM" else ""
        parts.append(f"{name}.from_pretrained({load}{dtype}).save_pretrained({save})")
    return f"python -c {shlex.quote('; '.join(parts))}"


def no_weights(where: str, names: Iterable[str], source: str, into: str) -> str:
    """The message for a folder or repository `where` of the files `names`, without SINGLE or INDEX."""
    names = set(names)
    found = sorted(n for n in names if n.endswith(_OTHER_WEIGHTS) and "/" not in n)
    if not found:
        return f"{where}: neither {SINGLE} nor {INDEX} is there; expected a Hugging Face model folder"
    shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    what = f"{where}: holds {shown} but no {SINGLE}; only safetensors are read, as they cannot run code"
    if any(name.startswith("adapter_model.") for name in names):
        return f"{where}: is an adapter, not a model; merge it into its base model first (merge_and_unload of peft)"
    if not names & {*_CONVERTED}:
        return f"{what}. Take the repository that holds {SINGLE} or {INDEX}"
    both = command(source, into, weights=True, tokenizer=source != into or TOKENIZER not in names)
    return f"{what}. Convert them once ({_NEEDED}): {both}{_then(source, into)}"


def no_tokenizer(where: str, names: Iterable[str], source: str, into: str) -> str:
    """The message for a folder or repository `where` of the files `names`, without TOKENIZER."""
    found = sorted({*names} & {*_OTHER_TOKENIZERS})
    if not found:
        return f"{where}: {TOKENIZER} is missing; take it from the model's original repository"
    made = command(source, into, weights=source != into, tokenizer=True)
    return (
        f"{where}: holds {', '.join(found)} but no {TOKENIZER}, the only form of a tokenizer that is read. "
        f"Convert it once ({_NEEDED}): {made}{_then(source, into)}"
    )


def _then(source: str, into: str) -> str:
    return "" if source == into else f" and then give the folder ./{into} as the model"
