"""Text <-> token ids, exactly as transformers' AutoTokenizer does for the same folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoadError, RequestError
from .chat import ChatEncoder
from .convert import no_tokenizer
from .encoding import encoding
from .files import member, read_bytes, read_json, refuse_impostor, shown
from .template import ChatTemplate, Templates, read_templates
from .token_stream import TokenStream, cleaned_up
from .tokenizer_class import CLASSES, TokenizerClass, class_name, rebuilt

if TYPE_CHECKING:
    import tokenizers

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

# Byte-level vocabularies write a byte that is no printable character as one of those from U+0100 on, in order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`.

    `special_tokens`: "bos_token" -> its text, and so on; `templates`: the chat templates that the folder carries;
    `clean_up`: whether decoded text loses its spaces before punctuation.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        templates: Templates,
        special_tokens: dict[str, str],
        clean_up: bool = False,
    ) -> None:
        self._inner = inner
        self.templates = templates
        self.special_tokens = special_tokens
        self.clean_up = clean_up
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)  # largest id + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds BOS and the like where the tokenizer's own rule does.

        Raises RequestError for text that is not Unicode (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise RequestError(f"text has a lone surrogate at character {e.start}; expected valid Unicode") from e
        return list(encoding(self._inner, text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens; an incomplete character becomes U+FFFD."""
        text = self._inner.decode(list(ids), skip_special_tokens=True)
        return cleaned_up(text) if self.clean_up else text

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, as UTF-8, of which it may have a part; of a special token, its name."""
        name, text = self._inner.id_to_token(token_id) or "", self.decode([token_id])
        if all(char in _BYTES for char in name):
            raw = bytes(_BYTES[char] for char in name)
            if raw.decode("utf-8", "replace") == text:
                return raw
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        return name.replace("\u2581", " ").encode()

    def is_silent(self, token_id: int) -> bool:
        """Whether a token is no part of any text: special ones, and ids that the tokenizer does not know."""
        name = self._inner.id_to_token(token_id)
        return name is None or name in self._special

    @cached_property
    def byte_fallback(self) -> Mapping[int, int]:
        """Token id -> byte, where decoding joins such tokens to characters (as SentencePiece does); else empty."""
        ids = {self._inner.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        found = {id_: byte for id_, byte in ids.items() if id_ is not None}
        stray = self._inner.token_to_id("<0x80>")
        return found if stray is not None and self.decode([stray]) == "\ufffd" else {}

    @cached_property
    def _special(self) -> frozenset[str]:
        return frozenset(t.content for t in self._inner.get_added_tokens_decoder().values() if t.special)

    def tokens_from(self, first: int) -> dict[int, str]:
        """Id -> name of every token with an id of at least `first`."""
        if self.vocab_size <= first:
            return {}
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        return {id_: name for name, id_ in sorted(vocabulary.items(), key=lambda item: item[1]) if id_ >= first}

    def stream(self) -> TokenStream:
        """A decoder for the tokens of one sequence as they come."""
        return TokenStream(self)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the template for chats without tools, None where the folder has none."""
        return self.templates.source(tools=False)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation: the model's chat template rendered and encoded, nothing added.

        Only what the template itself writes becomes special tokens: text in `messages`, `tools` and `variables` that
        spells one is encoded as text (see `checkpoint/chat.py`). For all other text the ids are those of
        transformers' apply_chat_template. Raises RequestError where there is no template, or where it fails.
        """
        return self.chat_ids(messages, tools, variables, add_generation_prompt=add_generation_prompt)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
        check: Callable[[int], object] = int,
    ) -> list[int]:
        """As `encode_chat`. `check` is given the number of characters of all texts before work is done for them, and
        that of the rendered text before it is encoded: it may refuse them."""
        return self._chat.encode(
            self._template(tools=tools is not None),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
            check=check,
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of `encode_chat`, as apply_chat_template(tokenize=False) gives it. Raises RequestError."""
        template = self._template(tools=tools is not None)
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)

    def _template(self, tools: bool) -> ChatTemplate:
        source = self.templates.source(tools=tools)
        if source is None:
            raise RequestError(self.templates.missing())
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(source, self.special_tokens)
        return self._compiled[source]

    @cached_property
    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self._inner)

    @cached_property
    def _compiled(self) -> dict[str, ChatTemplate]:
        return {}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, as AutoTokenizer of transformers 5 makes it.

    From tokenizer.json, of which some classes keep only parts (`tokenizer_class.py`), and from the tokens that
    tokenizer_config.json, special_tokens_map.json and added_tokens.json name. BOS and EOS follow the rule in
    tokenizer.json: `add_bos_token` and `add_eos_token` beside it have no effect there either, nor have its truncation
    and padding. Raises LoadError.
    """
    path = member(folder, "tokenizer.json")
    if path is None:
        names = [file.name for file in folder.iterdir()]
        raise LoadError(no_tokenizer(str(folder), names, str(folder), str(folder)))
    data = read_bytes(path)
    refuse_impostor(path, data)
    inner = _parse(path, data)
    config_path = member(folder, "tokenizer_config.json")
    config = read_json(config_path) if config_path else {}
    where = str(config_path or path)
    name = class_name(_optional_json(folder, "config.json"), config, b'"ByteLevel"' in data)
    chosen = CLASSES.get(name) if type(inner.model).__name__ == "BPE" else None
    declared = _Declared(folder, config, where, inner, chosen)
    specials = {key: str(token.content) for key, token in declared.named.items()}
    if chosen is not None:
        inner = _parse(path, json.dumps(rebuilt(json.loads(data), chosen, config, specials)).encode())
    declared.add_to(inner)
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = bool(config.get("split_special_tokens", False))
    return Tokenizer(inner, read_templates(folder, config, where), specials, _cleans_up(inner, config))


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    path = member(folder, name)
    return read_json(path) if path else {}


def _parse(path: Path, data: bytes) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except BaseException as e:  # a panic in the library does not derive from Exception
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise LoadError(f"{path}: not a tokenizer that this version of `tokenizers` reads: {e}") from e
        raise


def _cleans_up(inner: tokenizers.Tokenizer, config: dict[str, Any]) -> bool:
    """As transformers: not for BPE, whose spaces mean something, unless a key with a long name insists."""
    insists = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(config.get("clean_up_tokenization_spaces", False)) and (
        type(inner.model).__name__ != "BPE" or bool(insists)
    )


class _Declared:
    """Tokens that the files beside tokenizer.json declare, collected in the order in which transformers does.

    `named`: "bos_token" -> token, and so on; `extra`: special tokens without a name; `by_id`: added tokens.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        where: str,
        inner: tokenizers.Tokenizer,
        chosen: TokenizerClass | None,
    ) -> None:
        self._class = chosen
        self._where = where
        stated = dict(config)
        self.by_id: dict[int, tokenizers.AddedToken] = {}
        if "added_tokens_decoder" in config:
            self.by_id = self._decoder(config["added_tokens_decoder"])
        else:
            stated |= _optional_json(folder, "special_tokens_map.json")
        padding = inner.padding
        if padding is not None:
            stated.setdefault("pad_token", padding["pad_token"])
        self.extra = self._extra(stated)
        self.named = self._named(stated)
        if "added_tokens_decoder" not in config:
            self.by_id = self._legacy(folder) | dict(inner.get_added_tokens_decoder())
        known = {token.content: token for token in self.by_id.values()}
        self.named = {name: known.get(token.content, token) for name, token in self.named.items()}
        self._invented = frozenset(chosen.specials if chosen else ()) - frozenset(stated)

    def add_to(self, inner: tokenizers.Tokenizer) -> None:
        """Adds what `inner` lacks or has with other flags.

        Special tokens that only the class names are left out where the vocabulary lacks them: transformers gives
        them ids behind the last one, for which no model has an embedding.
        """
        from tokenizers import AddedToken

        present = inner.get_added_tokens_decoder()
        flagged = {repr(token) for token in present.values()}
        due = [token for _, token in sorted(self.by_id.items()) if repr(token) not in flagged]
        known = {token.content for token in (*present.values(), *due)}
        for name, token in self.named.items():
            invented = name in self._invented and inner.token_to_id(token.content) is None
            if token.content not in known and not invented:
                known.add(token.content)
                due.append(token)
        for token in self.extra:
            if token.content not in known:
                known.add(token.content)
                due.append(token)
        names = {token.content for token in self.named.values()}
        for token in due:
            if token.content in names and not token.special:
                token.special = True
        inner.add_tokens(due)
        if self._class is not None and self._class.adds_specials:
            every = [*self.named.values(), *self.extra]
            texts = dict.fromkeys(t.content for t in every if inner.token_to_id(t.content) is not None)
            inner.add_tokens([AddedToken(text, special=True) for text in texts])

    def _token(self, token: Any, special: bool) -> tokenizers.AddedToken:
        """A token in a configuration is a string, or an object with its `content` and flags."""
        from tokenizers import AddedToken

        fields = token if isinstance(token, dict) else {"content": token}
        content = fields.get("content")
        if not isinstance(content, str):
            raise LoadError(f"{self._where}: token {shown(token)}: expected text")
        flags = {name: bool(fields[name]) for name in _FLAGS if name in fields}
        return AddedToken(content, **({"special": special} | flags))

    def _decoder(self, declared: Any) -> dict[int, tokenizers.AddedToken]:
        if not isinstance(declared, dict) or not all(k.isdecimal() and len(k) < 10 for k in declared):
            raise LoadError(
                f"{self._where}: added_tokens_decoder must map token ids to tokens, found {shown(declared)}"
            )
        return {int(id_): self._token(token, special=False) for id_, token in declared.items()}

    def _named(self, stated: dict[str, Any]) -> dict[str, tokenizers.AddedToken]:
        defaults = dict(self._class.specials) if self._class else {}
        texts = {name: stated.get(name, defaults.get(name)) for name in _SPECIAL_NAMES}
        further = {k: v for k, v in stated.items() if k.endswith("_token") and k not in texts}
        texts |= {k: v for k, v in further.items() if isinstance(v, str) or (isinstance(v, dict) and "content" in v)}
        extra = stated.get("extra_special_tokens")
        texts |= extra if isinstance(extra, dict) else {}
        return {name: self._token(token, special=True) for name, token in texts.items() if token is not None}

    def _extra(self, stated: dict[str, Any]) -> list[tokenizers.AddedToken]:
        extra = stated.get("extra_special_tokens") or stated.get("additional_special_tokens") or []
        if not isinstance(extra, list | dict):
            raise LoadError(f"{self._where}: extra_special_tokens {shown(extra)}: expected a list or an object")
        return [] if isinstance(extra, dict) else [self._token(token, special=True) for token in extra]

    def _legacy(self, folder: Path) -> dict[int, tokenizers.AddedToken]:
        """added_tokens.json: text -> id."""
        from tokenizers import AddedToken

        texts = _optional_json(folder, "added_tokens.json")
        if not all(isinstance(id_, int) for id_ in texts.values()):
            raise LoadError(f"{folder / 'added_tokens.json'}: expected an object of token -> id, found {shown(texts)}")
        special = {token.content for token in (*self.named.values(), *self.extra)}
        return {
            id_: AddedToken(text, special=text in special, normalized=text not in special)
            for text, id_ in texts.items()
        }
