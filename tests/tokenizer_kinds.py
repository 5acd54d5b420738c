"""Small tokenizers of every kind that models ship, and texts that are hard on them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPLIT_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_LLAMA3 = SPLIT_QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CORPUS = [
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n" * 3,
    "The quick brown fox jumps over the lazy dog. It's 1234 and 56, isn't it? We'll see, they've said 'no'.\n" * 3,
    "日本語のテキストと中文文本 and some العربية with numbers 2024.\n" * 3,
    "user assistant system hello world, hello there; you are a helpful assistant. What is the weather in Paris?\n" * 4,
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n\n\t\tindented   text  ' * 3,
]


def texts(specials: list[str]) -> list[str]:
    """200 texts, the same every time: written ones, then random mixtures of their parts and of `specials`."""
    written = [
        *("", " ", "  ", "\n", "\n\n\n", "\t", " \n \n", "a", " a", "a ", "  a  b  ", "\n a\n  b\n\n", "\r\n\r\n x"),
        *(
            "hello world",
            "Hello, World!",
            "It's the dog's; isn't it? We'll go, I'd say.",
            "don ' t . ! ? , n't 've",
            "HELLO",
        ),
        "def fib(n):\n\treturn n if n < 2 else fib(n - 1) + fib(n - 2)\n",
        "#include <stdio.h>\nint main(void) { return 0x1F; } /* ... */",
        *("0", "1234567890", "3.14159e-10", "1,000,000", "²³½", "١٢٣٤", "\uff11\uff12\uff13"),
        *("日本語のテキスト", "中文文本。", "한국어 텍스트", "العربية والنص", "עברית", "ไทย", "हिन्दी"),
        *("🙂", "👩‍👩‍👧‍👦 family", "🏳️‍🌈", "👍🏽", "🇫🇷🇩🇪"),
        *("e\u0301 and \u00e9", "a" + "\u0301" * 30, "\u1100\u1161\u11a8", "ﬁ ﬀ Å"),
        *("\u0000", "a\u0000b", "\u0001\u0002\u001f\u007f\u0085", "\u200b\u200d\ufeff", "\ufffd", "\ue000\U000f0000"),
        *("\u00a0nbsp\u00a0", "\u2003em\u2003space", "\u2028line\u2029", "\ufdd0\uffff", "▁", "▁a ▁▁b", "Ġa Ċ", "##a"),
        *("a" * 1000, "supercalifragilistic" * 20, "ab" * 333, " " * 100, "\n" * 50, "-" * 77, "= " * 40),
        *("<0x41>", "<0x0A><0xFF>", "<unk>", "<s>", "</s>", "[INST] x [/INST]", "<|endoftext|>", "[CLS] a [SEP]"),
        *specials,
        *(f"a{s}b" for s in specials),
        *(f" {s} {s}  b" for s in specials),
        "".join(specials),
        "\n".join(specials),
    ]
    rng = random.Random(1)
    parts = [*(w for w in written if w and len(w) < 60), *specials, " ", "\n", "fib", "123"]
    while len(written) < 200:
        written.append("".join(rng.choice(parts) for _ in range(rng.randint(2, 6))))
    return written


@dataclass(frozen=True)
class Kind:
    """`make`: the backend; `config`: tokenizer_config.json; `model`: keys of config.json."""

    make: Callable[[], Tokenizer]
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, **config: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        self.make().save(str(folder / "tokenizer.json"))
        contents = {"config.json": {"model_type": "llama"} | self.model, "tokenizer_config.json": self.config | config}
        for name, content in (contents | self.files).items():
            (folder / name).write_text(json.dumps(content))
        return folder

    def specials(self) -> list[str]:
        return [t.content for t in self.make().get_added_tokens_decoder().values()]


@cache
def _trained(specials: tuple[str, ...], regex: str | None, size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _bytes(regex)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


def _bytes(regex: str | None, add_prefix_space: bool = False) -> Any:
    if regex is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    return pre_tokenizers.Sequence([split, last])


def byte_level(
    specials: list[Any],
    regex: str | None = None,
    nfc: bool = False,
    ignore_merges: bool = False,
    bos: str | None = None,
    eos: str | None = None,
) -> Tokenizer:
    """GPT-2, GPT-NeoX, Qwen, Llama 3 and Tekken: bytes as letters; special tokens behind the vocabulary."""
    parsed = json.loads(_trained((), regex, 420))
    parsed["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    tokenizer.pre_tokenizer = _bytes(regex)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    for token in specials:
        tokenizer.add_tokens([token if isinstance(token, AddedToken) else AddedToken(token, special=True)])
    with_template(tokenizer, bos, eos)
    return tokenizer


def with_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    if bos or eos:
        named = [(t, tokenizer.token_to_id(t)) for t in (bos, eos) if t]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(t for t in (bos, "$A", eos) if t), special_tokens=named
        )


@cache
def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in the manner of SentencePiece: control tokens, bytes, letters, merged pieces."""
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([line.encode("ascii", "ignore").decode() for line in CORPUS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    controls = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    letters = [p for p in model["vocab"] if p not in controls]
    return {p: i for i, p in enumerate([*controls, *letters])}, [tuple(m) for m in model["merges"]]


def sentencepiece(
    form: str,
    specials: list[Any] | None = None,
    replaced: tuple[str, str, str] = ("<unk>", "<s>", "</s>"),
    bos: str | None = "<s>",
) -> Tokenizer:
    """Llama 2 (`prepend`, or `first`, `always`, `never` of Metaspace), Gemma (`gemma`), byte fallback throughout."""
    vocab, merges = _pieces()
    names = dict(zip(("<unk>", "<s>", "</s>"), replaced, strict=True))
    vocab = {names.get(piece, piece): i for piece, i in vocab.items()}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=replaced[0], byte_fallback=True, fuse_unk=True))
    shared = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if form == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(shared)
    else:
        if form == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", form, split=False)
        strip = [] if form == "never" else [decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence([*shared, *strip])
    tokenizer.add_special_tokens(list(replaced))
    for token in specials or []:
        tokenizer.add_tokens([token if isinstance(token, AddedToken) else AddedToken(token, special=True)])
    with_template(tokenizer, bos, None)
    return tokenizer


def unigram() -> Tokenizer:
    return Tokenizer.from_str(_unigram())


@cache  # training is not the same every time
def _unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    with_template(tokenizer, None, "</s>")
    return str(tokenizer.to_str())


def word_piece() -> Tokenizer:
    return Tokenizer.from_str(_word_piece())


@cache
def _word_piece() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    with_template(tokenizer, "[CLS]", "[SEP]")
    return str(tokenizer.to_str())


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    return tokenizer


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN3 = [*CHATML, *(AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>", "<tool_call>"))]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI3 = [AddedToken(t, rstrip=True, special=True) for t in ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>")]
GEMMA = ["<start_of_turn>", "<end_of_turn>", AddedToken("\n\n", normalized=False), "<mask>", "<pad>"]
FLAGGED = [
    AddedToken("<|left|>", lstrip=True, special=True),
    AddedToken("<|right|>", rstrip=True, special=True),
    AddedToken("word", single_word=True),
    AddedToken("É", normalized=True),
    AddedToken("<|plain|>", normalized=False),
]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _declared(tokens: list[AddedToken], first: int) -> dict[str, Any]:
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    return {str(first + i): {name: getattr(token, name) for name in flags} for i, token in enumerate(tokens)}


def _qwen2() -> Tokenizer:
    return byte_level(CHATML, SPLIT_QWEN, nfc=True)


def _llama3() -> Tokenizer:
    return byte_level(LLAMA3, SPLIT_LLAMA3, ignore_merges=True, bos="<|begin_of_text|>")


def _gemma() -> Tokenizer:
    return sentencepiece("gemma", GEMMA, ("<unk>", "<bos>", "<eos>"), "<bos>")


_LLAMA2: dict[str, dict[str, Any]] = {
    "plain": FAST,
    "class": {"tokenizer_class": "LlamaTokenizer"},
    "legacy": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    "no legacy": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": None},
    "no prefix": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
}
QWEN_NAMES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
KINDS: dict[str, Kind] = {
    "gpt2": Kind(lambda: byte_level(["<|endoftext|>"]), {"tokenizer_class": "GPT2Tokenizer"}),
    "gpt2 class, qwen regex": Kind(lambda: byte_level(CHATML, SPLIT_QWEN), {"tokenizer_class": "GPT2TokenizerFast"}),
    "gpt-neox": Kind(
        lambda: byte_level(["<|endoftext|>", "<|padding|>"], nfc=True),
        {"tokenizer_class": "GPTNeoXTokenizerFast"},
        {"model_type": "olmo"},
    ),
    "olmo2": Kind(
        lambda: byte_level(["<|endoftext|>"], SPLIT_LLAMA3),
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"},
        {"model_type": "olmo2"},
    ),
    "qwen2": Kind(_qwen2, {"tokenizer_class": "Qwen2Tokenizer", **QWEN_NAMES}, {"model_type": "qwen2"}),
    "qwen2, wrong class": Kind(_qwen2, {"tokenizer_class": "LlamaTokenizerFast"} | QWEN_NAMES, {"model_type": "qwen2"}),
    "qwen3": Kind(
        lambda: byte_level(QWEN3, SPLIT_QWEN, nfc=True),
        {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_start|>"], **QWEN_NAMES},
        {"model_type": "qwen3"},
    ),
    "qwen, no class": Kind(_qwen2, QWEN_NAMES, {"model_type": "qwen3"}),
    "llama 3": Kind(_llama3, {**FAST, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama 3, llama class": Kind(_llama3, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<|begin_of_text|>"}),
    "tekken": Kind(
        lambda: byte_level(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], SPLIT_LLAMA3, ignore_merges=True, bos="<s>"),
        {"tokenizer_class": "LlamaTokenizer", **NAMED},
        {"model_type": "mistral"},
    ),
    **{
        f"llama 2, {form}, {name}": Kind(partial(sentencepiece, form), config | NAMED)
        for form in ("prepend", "first", "always", "never")
        for name, config in _LLAMA2.items()
    },
    "mistral 7b": Kind(
        lambda: sentencepiece("prepend", ["[INST]", "[/INST]"]),
        {"tokenizer_class": "LlamaTokenizer", **NAMED, "add_bos_token": False, "add_eos_token": True},
        {"model_type": "mistral"},
    ),
    "gemma": Kind(
        _gemma,
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"},
        {"model_type": "gemma2"},
    ),
    "gemma, plain": Kind(_gemma, FAST | {"bos_token": "<bos>"}),
    "phi 3": Kind(
        lambda: sentencepiece("prepend", PHI3),
        {"tokenizer_class": "LlamaTokenizer", **NAMED, "legacy": False, "added_tokens_decoder": _declared(PHI3, 500)},
        {"model_type": "phi3"},
    ),
    "unigram": Kind(unigram, FAST | {"eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True}),
    "word piece": Kind(word_piece, FAST | {"unk_token": "[UNK]", "clean_up_tokenization_spaces": True}),
    "word level": Kind(word_level, FAST | NAMED | {"clean_up_tokenization_spaces": True}),
    "flags": Kind(lambda: byte_level([*CHATML, *FLAGGED], SPLIT_QWEN), FAST | {"eos_token": "<|im_end|>"}),
    "flags, class": Kind(
        lambda: byte_level([*CHATML, *FLAGGED], SPLIT_QWEN),
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"model_type": "qwen3"},
    ),
    "flags declared": Kind(
        lambda: sentencepiece("first", FLAGGED),
        {"tokenizer_class": "LlamaTokenizer", **NAMED, "added_tokens_decoder": _declared(FLAGGED, 600)},
    ),
    "specials split": Kind(_qwen2, FAST | {"split_special_tokens": True, **QWEN_NAMES}),
    "bpe is not cleaned up": Kind(_llama3, FAST | {"clean_up_tokenization_spaces": True}),
    "older files": Kind(
        lambda: sentencepiece("prepend"),
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "</s>"},
        files={
            "special_tokens_map.json": {
                "bos_token": {"content": "<s>", "lstrip": False, "rstrip": True, "normalized": True},
                "eos_token": "</s>",
                "additional_special_tokens": ["<|extra|>"],
            },
            "added_tokens.json": {"<|late|>": 900, "<|extra|>": 901},
        },
    ),
}
