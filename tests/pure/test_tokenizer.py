"""Text and token ids against transformers' AutoTokenizer on the same folders; incremental decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_checkpoint import CHAT_TEMPLATE, byte_tokenizer, write_folder
from tokenizer_kinds import KINDS, Kind, sentencepiece
from tokenizer_kinds import texts as hard_texts
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from flashformer import LoadError, RequestError
from flashformer.checkpoint import open_checkpoint
from flashformer.checkpoint.resolve import resolve
from flashformer.checkpoint.tokenizer import load_tokenizer
from flashformer.checkpoint.tokenizer_class import MISNAMED, REGISTERED
from flashformer.formats import BF16
from flashformer.model import load_model

TEXTS = [
    "",
    " ",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "Ünïcödé, 日本語, 🙂👩‍👩‍👧, e\u0301, \u0000 and \ufffd",
    "<|bos|>text with <|eos|> inside <|eos|>",
    "  leading and trailing  \n\n",
    "a" * 1000,
]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 600,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def trained(**kwargs: Any) -> Tokenizer:
    """Byte-level BPE with merges, as the demo has."""
    tokenizer = Tokenizer(models.BPE(**kwargs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|bos|>", "<|eos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, Path(__file__).read_text()], trainer)
    return tokenizer


def with_bos_and_eos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", pair="$A $B", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    return tokenizer


def limited(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20)
    return tokenizer


def spaces_as_underlines() -> Tokenizer:
    """In the manner of SentencePiece: a space in front, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefgnrtui()", "▁d"]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "d")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


NAMES = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bytes": (byte_tokenizer, {**FAST, **NAMES}),
    "no rule": (trained, {**FAST, **NAMES}),
    "no rule, BOS asked": (trained, {**FAST, **NAMES, "add_bos_token": True}),
    "BOS and EOS by rule": (lambda: with_bos_and_eos(trained()), {**FAST, **NAMES}),
    "rule, none asked": (lambda: with_bos_and_eos(trained()), {**FAST, **NAMES, "add_bos_token": False}),
    "rule, EOS asked": (lambda: with_bos_and_eos(trained()), {**FAST, **NAMES, "add_eos_token": True}),
    "asked but not named": (lambda: with_bos_and_eos(trained()), {**FAST, "add_bos_token": True}),
    "limits are not applied": (lambda: limited(trained()), {**FAST, **NAMES, "pad_token": "<|eos|>"}),
    "specials split": (trained, {**FAST, **NAMES, "split_special_tokens": True}),
    "tokens added by the config": (
        trained,
        {
            **FAST,
            "bos_token": {"__type": "AddedToken", "content": "<|new|>"},
            "eos_token": "<|eos|>",
            "added_tokens_decoder": {
                "400": {"content": "fib", "special": False, "lstrip": False, "rstrip": True},
                "401": {"content": "<|inside|>", "special": True, "lstrip": False, "rstrip": False},
            },
            "extra_special_tokens": ["<|extra|>"],
            "image_token": "<|image|>",
        },
    ),
    "older name of extra tokens": (trained, {**FAST, **NAMES, "additional_special_tokens": ["<|extra|>"]}),
    "extra tokens by name": (trained, {**FAST, **NAMES, "extra_special_tokens": {"image_token": "<|image|>"}}),
    "backend class": (byte_tokenizer, {"tokenizer_class": "TokenizersBackend", **NAMES}),
    "class not named": (byte_tokenizer, NAMES),
    "sentencepiece manner": (spaces_as_underlines, {**FAST, "bos_token": "<s>", "eos_token": "</s>"}),
}


def write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any] | None) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CASES)
def test_equals_auto_tokenizer(tmp_path: Path, name: str) -> None:
    make, config = CASES[name]
    write(tmp_path, make(), config)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "<|new|> fib  fib <|inside|> <s></s> <|extra|><|image|>."]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert len({tuple(ours.encode(t)) for t in texts}) == len(texts)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for key in ("bos_token", "eos_token"):
        assert ours.special_tokens.get(key) == getattr(theirs, key)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_equals_auto_tokenizer(tmp_path: Path, name: str) -> None:
    """Ids with and without BOS and EOS, text, and text in pieces, of 200 texts."""
    kind = KINDS[name]
    kind.write(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    samples = hard_texts(kind.specials())
    assert len(samples) == 200
    every = set()
    for text in samples:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        stream = ours.stream()
        assert "".join([*(stream.step(i) or "" for i in ids), stream.finish() or ""]) == ours.decode(ids)
        every.add(tuple(ids))
    assert len(every) > 100
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.special_tokens == theirs.special_tokens_map


def test_some_classes_rebuild_the_tokenizer(tmp_path: Path) -> None:
    """The comparison above would see it if tokenizer.json were taken as it stands."""
    for name in ("llama 2, prepend, class", "llama 2, first, no prefix", "gpt2 class, qwen regex", "flags, class"):
        kind = KINDS[name]
        kind.write(tmp_path / name)
        ours, plain = load_tokenizer(tmp_path / name), kind.make()
        assert any(ours.encode(text) != plain.encode(text).ids for text in hard_texts(kind.specials()))


def test_classes_of_model_types_are_those_of_transformers() -> None:
    from transformers.models.auto import tokenization_auto as auto

    for model_type, name in REGISTERED.items():
        registered = auto.TOKENIZER_MAPPING_NAMES[model_type]
        assert name == ("TokenizersBackend" if registered == "MistralCommonBackend" else registered)
        assert (model_type in MISNAMED) == (model_type in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)
    assert set(MISNAMED) <= set(REGISTERED)
    assert "llama" not in auto.TOKENIZER_MAPPING_NAMES


def test_tokens_that_only_the_class_names_get_no_id(tmp_path: Path) -> None:
    """transformers gives <mask> an id behind the vocabulary, which no embedding has."""
    kind = Kind(
        lambda: sentencepiece("gemma", None, ("<unk>", "<bos>", "<eos>"), "<bos>"),
        {"tokenizer_class": "GemmaTokenizer"},
        {"model_type": "gemma"},
    )
    kind.write(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == kind.make().get_vocab_size()
    assert ours.special_tokens["mask_token"] == "<mask>"
    assert ours.encode("hello <bos>") == AutoTokenizer.from_pretrained(tmp_path).encode("hello <bos>")


def test_stream_waits_where_cleaning_up_may_change_the_text(tmp_path: Path) -> None:
    KINDS["word level"].write(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("It ' s , isn ' t . We ' ll", "hello . world ?", "they ' ve said ' no ' ."):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        assert "".join([*(stream.step(i) or "" for i in ids), stream.finish() or ""]) == tokenizer.decode(ids)


def test_without_tokenizer_config(tmp_path: Path) -> None:
    write(tmp_path, byte_tokenizer(), None)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert [ours.encode(t) for t in TEXTS] == [theirs.encode(t) for t in TEXTS]
    assert ours.chat_template is None


@pytest.mark.parametrize("name", ["bytes", "no rule", "sentencepiece manner", "tokens added by the config"])
def test_stream_gives_the_text_in_whole_characters(tmp_path: Path, name: str) -> None:
    make, config = CASES[name]
    write(tmp_path, make(), config)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [piece for i in ids if (piece := stream.step(i)) is not None]
        rest = stream.finish()
        assert "".join([*pieces, rest or ""]) == tokenizer.decode(ids)
        assert all(pieces)
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces)
            assert rest is None


def test_stream_holds_back_an_incomplete_character(tmp_path: Path) -> None:
    write(tmp_path, byte_tokenizer(), NAMES)
    tokenizer = load_tokenizer(tmp_path)
    a, first, second, third, fourth = tokenizer.encode("a🙂", add_special_tokens=False)
    stream = tokenizer.stream()
    assert [stream.step(i) for i in (a, first, second, third)] == ["a", None, None, None]
    assert stream.step(0) is None
    assert stream.finish() == tokenizer.decode([a, first, second, third])[1:]
    assert stream.finish() is None
    stream = tokenizer.stream()
    assert [stream.step(i) for i in (first, second, third, fourth)] == [None, None, None, "🙂"]


@given(name=st.sampled_from(["bytes", "sentencepiece manner"]), ids=st.lists(st.integers(0, 300), max_size=30))
def test_stream_of_any_ids_equals_decode(name: str, ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / name
    if not folder.exists():
        make, config = CASES[name]
        write(folder, make(), config)
    tokenizer = load_tokenizer(folder)
    stream = tokenizer.stream()
    text = "".join([*(stream.step(i) or "" for i in ids), stream.finish() or ""])
    due = tokenizer.decode(ids)
    if name == "bytes" or "\ufffd" not in due:
        assert text == due
    else:
        assert "\ufffd" in text


def test_lone_surrogate(tmp_path: Path) -> None:
    write(tmp_path, byte_tokenizer(), NAMES)
    with pytest.raises(RequestError, match="character 1"):
        load_tokenizer(tmp_path).encode("a\ud800")


def test_chat_template_sources(tmp_path: Path) -> None:
    write(tmp_path, byte_tokenizer(), {**NAMES, "chat_template": "one"})
    assert load_tokenizer(tmp_path).chat_template == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    write(tmp_path, byte_tokenizer(), {**NAMES, "chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three {{ é }}", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "three {{ é }}"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "three {{ é }}"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": None}, ("tokenizer.json is missing",)),
        (
            {"tokenizer.json": None, "tokenizer.model": b"x"},
            ("holds tokenizer.model", "sentencepiece"),
        ),
        ({"tokenizer.json": None, "tekken.json": b"{}"}, ("holds tekken.json", "save_pretrained")),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"1": {"lstrip": true}}}'}, ("token", "expected text")),
        ({"special_tokens_map.json": b"[]"}, ("special_tokens_map.json",)),
        ({"added_tokens.json": b'{"a": "b"}'}, ("added_tokens.json",)),
        ({"tokenizer.json": b"{}"}, ("tokenizer.json", "not a tokenizer")),
        ({"tokenizer.json": b"[" * 100_000}, ("not a tokenizer",)),
        ({"tokenizer.json": b"\xff"}, ("not a tokenizer",)),
        ({"tokenizer.json": b"version https://git-lfs.github.com/spec/v1\n"}, ("Git LFS",)),
        ({"tokenizer_config.json": b"{"}, ("tokenizer_config.json", "JSON")),
        ({"tokenizer_config.json": b'{"a": 1, "a": 2}'}, ("twice",)),
        ({"tokenizer_config.json": b'{"bos_token": 3}'}, ("token 3",)),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"x": {}}}'}, ("added_tokens_decoder",)),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": []}'}, ("added_tokens_decoder",)),
        ({"tokenizer_config.json": b'{"chat_template": 1}'}, ("chat_template",)),
        ({"chat_template.jinja": b"\xff"}, ("chat_template.jinja", "UTF-8")),
    ],
)
def test_a18_bad_files(tmp_path: Path, files: dict[str, bytes | None], words: tuple[str, ...]) -> None:
    write(tmp_path, byte_tokenizer(), NAMES)
    for name, content in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(LoadError) as caught:
        load_tokenizer(tmp_path)
    for word in (str(tmp_path), *words):
        assert word in str(caught.value)


# ---- folders and hub ids


def test_open_checkpoint(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, BF16)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["hidden_size"] == 16
    assert checkpoint.generation_config == {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    assert checkpoint.tokenizer.chat_template == CHAT_TEMPLATE
    assert len(checkpoint.tensors) == 12
    (tmp_path / "generation_config.json").unlink()
    assert open_checkpoint(str(tmp_path)).generation_config == {}
    (tmp_path / "config.json").unlink()
    with pytest.raises(LoadError, match=r"config.json is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/nowhere", "", "a b/c", "../x"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(LoadError, match="no such folder"):
        resolve(name) if name else resolve(Path("nowhere"))


@pytest.mark.parametrize("name", ["x" * 10_000, "~no_such_user_here/model", "a\0b"])
def test_not_even_a_path(name: str) -> None:
    with pytest.raises(LoadError, match=r"not a usable path|no such folder"):
        resolve(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))


def test_revision_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no revisions"):
        resolve(tmp_path, revision="main")


def test_hub_cache_is_used_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "models--some--model"
    commit = "0" * 40
    write_folder(repo / "snapshots" / commit, CONFIG, BF16)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load_model("some/model", offline=True)
    assert (model.name, model.spec.d_model) == ("some/model", 16)


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, flashformer; print([m for m in ('numpy', 'tokenizers', 'huggingface_hub') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    code = "import sys, flashformer.model; print([m for m in ('tokenizers', 'huggingface_hub') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
