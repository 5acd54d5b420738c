"""Which parts of tokenizer.json transformers 5 keeps: some of its tokenizer classes take only vocabulary and merges.

AutoTokenizer picks a class from tokenizer_config.json and config.json. Most use tokenizer.json as it stands. Those in
CLASSES keep its vocabulary, merges and post-processor and bring a normalizer, pre-tokenizer and decoder of their own,
so the ids of a text can differ from those of the plain file; we give the same. Classes of encoders, of Unigram models
and of code infilling (BertTokenizer, T5Tokenizer, CodeLlamaTokenizer, ...) do so too, but no model that we run ships
one: for these tokenizer.json is used as it stands, as transformers 4 did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_PLAIN = "TokenizersBackend"
_REGEX_OF_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Classes that transformers registers for a model type. They matter where tokenizer_config.json names another or none.
_REGISTERED = {
    "GemmaTokenizer": ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "recurrent_gemma"),
    "GPT2Tokenizer": ("gpt2", "gpt_neo", "gptj", "phi", "starcoder2"),
    "GPTNeoXTokenizer": ("gpt_neox", "mpt", "olmo", "olmoe"),
    "Qwen2Tokenizer": ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"),
    _PLAIN: (
        *("ernie4_5", "flex_olmo", "glm", "glm4", "gpt_bigcode", "granite", "granitemoe", "internlm3", "minicpm3"),
        *("ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "phi3", "phimoe", "stablelm"),
    ),
}
REGISTERED = {model_type: name for name, model_types in _REGISTERED.items() for model_type in model_types}
# Model types whose checkpoints are known to name a wrong class: the registered one is taken.
MISNAMED = frozenset({"ernie4_5", "internlm3", "minicpm3", "nemotron", "phi3", "phimoe", "qwen2"})


@dataclass(frozen=True)
class TokenizerClass:
    """`rebuild`: (model of tokenizer.json, tokenizer_config.json, special tokens) -> the parts that replace its own.

    `specials`: special tokens where tokenizer_config.json names none. `adds_specials`: flags them once more at the end.
    """

    specials: Mapping[str, str]
    rebuild: Callable[[Json, Json, Mapping[str, str]], Json]
    adds_specials: bool = False


def class_name(config: Json, tokenizer_config: Json, byte_level: bool) -> str:
    """The class that AutoTokenizer of transformers 5 takes. `byte_level`: whether tokenizer.json says ByteLevel."""
    model_type = config.get("model_type")
    registered = REGISTERED.get(model_type) if isinstance(model_type, str) else None
    stated = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(stated, str):
        return registered or _PLAIN
    stated = stated.removesuffix("Fast")
    if stated == "LlamaTokenizer" and byte_level and model_type not in MISNAMED:
        return _PLAIN
    if registered is None or registered == stated:
        return stated
    return registered if registered == _PLAIN or model_type in MISNAMED else stated


def rebuilt(parsed: Json, tokenizer_class: TokenizerClass, config: Json, specials: Mapping[str, str]) -> Json:
    """tokenizer.json as the class remakes it: no added tokens, these are added from the configuration."""
    kept = {key: parsed.get(key) for key in ("version", "post_processor", "truncation", "padding")}
    return kept | {"added_tokens": []} | tokenizer_class.rebuild(parsed["model"], config, specials)


def _bpe(model: Json, **options: Any) -> Json:
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", "vocab": model["vocab"], "merges": model.get("merges") or [], **plain, **flags, **options}


def _byte_level(add_prefix_space: bool, use_regex: bool = True, trim_offsets: bool = True) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    }


_BYTES = _byte_level(True)  # as a decoder, without effect of its settings
_UNDERLINES = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def _llama(model: Json, config: Json, specials: Mapping[str, str]) -> Json:
    asked = config.get("add_prefix_space")
    prefix = asked is None or bool(asked)
    legacy = config.get("legacy", False)
    scheme = "never" if not prefix else "always" if legacy is not None and legacy else "first"
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "model": _bpe(model, fuse_unk=True, byte_fallback=True),
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": [*_UNDERLINES, *strip]},
    }


def _gemma(model: Json, config: Json, specials: Mapping[str, str]) -> Json:
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return {
        "model": _bpe(model, fuse_unk=True, byte_fallback=True, unk_token=specials["unk_token"]),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": split,
        "decoder": {"type": "Sequence", "decoders": _UNDERLINES},
    }


def _qwen2(model: Json, config: Json, specials: Mapping[str, str]) -> Json:
    split = {"type": "Split", "pattern": {"Regex": _REGEX_OF_QWEN2}, "behavior": "Isolated", "invert": False}
    last = _byte_level(bool(config.get("add_prefix_space")), use_regex=False)
    return {
        "model": _bpe(model, continuing_subword_prefix="", end_of_word_suffix=""),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, last]},
        "decoder": _BYTES,
    }


def _gpt2(model: Json, config: Json, specials: Mapping[str, str]) -> Json:
    return {
        "model": _bpe(model, continuing_subword_prefix="", end_of_word_suffix=""),
        "normalizer": None,
        "pre_tokenizer": _byte_level(bool(config.get("add_prefix_space"))),
        "decoder": _BYTES,
    }


def _gpt_neox(model: Json, config: Json, specials: Mapping[str, str]) -> Json:
    return _gpt2(model, config, specials) | {"normalizer": {"type": "NFC"}}


_END = "<|endoftext|>"
CLASSES: Mapping[str, TokenizerClass] = {
    "LlamaTokenizer": TokenizerClass({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, _llama),
    "GemmaTokenizer": TokenizerClass(
        {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        _gemma,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        {"unk_token": _END, "eos_token": _END, "pad_token": _END}, _qwen2, adds_specials=True
    ),
    "GPT2Tokenizer": TokenizerClass({"unk_token": _END, "bos_token": _END, "eos_token": _END}, _gpt2),
    "GPTNeoXTokenizer": TokenizerClass(
        {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"}, _gpt_neox
    ),
}
