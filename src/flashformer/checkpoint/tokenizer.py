"""Text <-> token ids, exactly as transformers' AutoTokenizer does for the same folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoadError, RequestError
from .files import member, read_bytes, read_json, read_text, refuse_impostor, shown

if TYPE_CHECKING:
    import tokenizers

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`. `chat_template` is the Jinja source that the folder carries, not run here."""

    def __init__(self, inner: tokenizers.Tokenizer, chat_template: str | None, special_tokens: dict[str, str]) -> None:
        self._inner = inner
        self.chat_template = chat_template
        self.special_tokens = special_tokens  # "bos_token" -> its text, and so on
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)  # largest id + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds BOS and the like where the tokenizer's own rule does.

        Raises RequestError for text that is not Unicode (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise RequestError(f"text has a lone surrogate at character {e.start}; expected valid Unicode") from e
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens; an incomplete character becomes U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TokenStream:
        """A decoder for the tokens of one sequence as they come."""
        return TokenStream(self._inner)


class TokenStream:
    """Incremental `decode`: the pieces joined, with that of `finish`, are the text of all ids.

    A piece is what a token adds to the text of the tokens of the piece before it, so that decoders that treat the
    first token of a text differently see the same beginning twice. (`tokenizers.DecodeStream` raises where bytes
    that are not UTF-8 change the text before them. Here, as there, the number of U+FFFD for such bytes may differ
    from that in `decode`.)
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._ids: list[int] = []  # of the last piece, then what has come since
        self._n_given = 0  # of these, tokens whose text was handed out

    def step(self, token_id: int) -> str | None:
        """The text that `token_id` completes, or None while a character is not whole."""
        self._ids.append(token_id)
        piece = self._new_text()
        if not piece or piece.endswith("\ufffd"):
            return None
        del self._ids[: self._n_given]
        self._n_given = len(self._ids)
        return piece

    def finish(self) -> str | None:
        """What is left at the end of the sequence: an incomplete character, as U+FFFD, or None."""
        piece = self._new_text()
        self._n_given = len(self._ids)
        return piece or None

    def _new_text(self) -> str:
        given = self._inner.decode(self._ids[: self._n_given], skip_special_tokens=True)
        return self._inner.decode(self._ids, skip_special_tokens=True)[len(given) :]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, and tokens that only tokenizer_config.json names.

    As in transformers, BOS and EOS follow the rule in tokenizer.json; `add_bos_token` and `add_eos_token` beside it
    have no effect, nor have its truncation and padding. Raises LoadError.
    """
    path = member(folder, "tokenizer.json")
    if path is None:
        hint = (
            "only tokenizer.model is there; convert it once with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            if member(folder, "tokenizer.model")
            else "download the model again with its tokenizer"
        )
        raise LoadError(f"{folder}: tokenizer.json is missing; {hint}")
    inner = _parse(path)
    config_path = member(folder, "tokenizer_config.json")
    config = read_json(config_path) if config_path else {}
    where = str(config_path or path)
    specials = {name: _text_of(config[name], where) for name in _SPECIAL_NAMES if config.get(name) is not None}
    _add_missing_tokens(inner, config, [*specials.values(), *_further_specials(config, where)], where)
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = bool(config.get("split_special_tokens", False))
    return Tokenizer(inner, _chat_template(folder, config, where), specials)


def _parse(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    data = read_bytes(path)
    refuse_impostor(path, data)
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except BaseException as e:  # a panic in the library does not derive from Exception
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise LoadError(f"{path}: not a tokenizer that this version of `tokenizers` reads: {e}") from e
        raise


def _text_of(token: Any, where: str) -> str:
    """A token in tokenizer_config.json is a string or an object with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise LoadError(f"{where}: token {shown(token)}: expected text")
    return content


def _further_specials(config: dict[str, Any], where: str) -> list[str]:
    """Special tokens beyond the usual names: other `*_token` keys, then the list or object of extra ones."""
    named = [v for k, v in config.items() if k.endswith("_token") and k not in _SPECIAL_NAMES and isinstance(v, str)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise LoadError(f"{where}: extra_special_tokens {shown(extra)}: expected a list or an object")
    return [*named, *(_text_of(t, where) for t in (extra.values() if isinstance(extra, dict) else extra))]


def _add_missing_tokens(inner: tokenizers.Tokenizer, config: dict[str, Any], specials: list[str], where: str) -> None:
    """Adds tokens that only tokenizer_config.json names, those with an id first, as transformers does."""
    from tokenizers import AddedToken

    declared = config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict) or not all(k.isdecimal() and len(k) < 10 for k in declared):
        raise LoadError(f"{where}: added_tokens_decoder must map token ids to tokens, found {shown(declared)}")
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
        text = _text_of(token, where)
        if text not in known:
            known.add(text)
            chosen = {name: bool(token[name]) for name in flags if name in token}
            chosen["special"] = chosen.get("special", False) or text in specials
            inner.add_tokens([AddedToken(text, **chosen)])
    inner.add_special_tokens([AddedToken(t, special=True) for t in dict.fromkeys(specials) if t not in known])


def _chat_template(folder: Path, config: dict[str, Any], where: str) -> str | None:
    """chat_template.jinja if there is one, else the `chat_template` of tokenizer_config.json."""
    path = member(folder, "chat_template.jinja")
    if path is not None:
        return read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name", "template"}, ...]
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise LoadError(f"{where}: chat_template: expected text, found {shown(template)}")
    return template
