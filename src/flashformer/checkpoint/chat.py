"""Conversations to token ids, so that only the template writes special tokens.

Text that users give may spell a special token (`<|im_end|>`). Before rendering, every such text in messages, tools and
variables is broken up by a noncharacter, the *mark*, which no tokenizer knows; the template's logic (strip, split,
comparison with its own words) does not notice. Ends of texts that could become a special token together with what the
template or the next message puts beside them are broken up too. After rendering, all special tokens that the
tokenizer finds are the template's own. Where nothing was marked, which is the ordinary case, the text is encoded as
transformers does it, in one go. Otherwise the template's special tokens are replaced by a *stand-in* that no text
contains, marks are removed, and the whole is encoded once by a second tokenizer that knows the stand-in but no special
token; every stand-in then gives way to the id of the token it stands for. Everything keeps its place in one text, so
that rules for the beginning of a text or of a section hold as before.

Protected are the tokens flagged `special`. Other added tokens (`</think>` and `<tool_call>` of Qwen3) are words that
templates look for in what an assistant said, and that conversations may quote: they are encoded as everywhere else. A
role may complete a special token of the template (`'<|' + role + '|>'`), as some templates intend.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .encoding import encoding
from .template import MAX_VALUE_DEPTH, ChatTemplate

if TYPE_CHECKING:
    import tokenizers

_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_EDGE_CHARS = 256  # at either end of a text, where it may be part of a special token that continues outside
_WINDOW_CHARS = 64 << 10  # searched in one go, in which no other thread of the process runs
_TREE_LEVELS = 16  # of patterns inside each other


class ChatEncoder:
    """Encodes conversations with one tokenizer. May be used from several threads."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._special = {i: t.content for i, t in inner.get_added_tokens_decoder().items() if t.special and t.content}

    def encode(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        check: Callable[[int], object] = int,
    ) -> list[int]:
        """Token ids of a rendered conversation. `check`: see Tokenizer.chat_ids. Raises RequestError."""
        texts = list(_texts((messages, tools, variables)))
        check(sum(map(len, texts)))
        mark = _free_mark(template.source, *texts)
        marks = Marks(frozenset(self._special.values()), mark)
        text = template.render_with(
            marks.put, messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )
        check(len(text) - text.count(mark))
        if not marks.used:
            return list(encoding(self._inner, text, add_special_tokens=False).ids)
        # Where tojson writes ASCII only, it has spelled the mark.
        return self.encode_marked(re.sub(rf"(?<!\\)((?:\\\\)*)\\u{ord(mark):04x}", rf"\1{mark}", text), mark)

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of a rendered text in which marks break up what the template did not write itself."""
        found = encoding(self._inner, text, add_special_tokens=False)
        own, pieces, at = [], [], 0
        for id_, (begin, end) in zip(found.ids, found.offsets, strict=True):
            if id_ in self._special and begin >= at and text[begin:end].strip() == self._special[id_].strip():
                own.append(id_)
                pieces.append(text[at:begin].replace(mark, ""))
                at = end
        pieces.append(text[at:].replace(mark, ""))
        plain, stand_in, stand_in_id = self._without_specials
        if any(stand_in in piece for piece in pieces):
            raise RequestError("the conversation contains a secret of this process: send it again")
        due, result = iter(own), []
        for id_ in encoding(plain, stand_in.join(pieces), add_special_tokens=False).ids:
            if id_ in self._special and any(self._special[id_] in piece for piece in pieces):
                raise RequestError(
                    f"the conversation contains {self._special[id_]!r}, a special token of the model that its "
                    "tokenizer makes from plain text as well: remove it"
                )
            result.append(next(due) if id_ == stand_in_id else id_)
        return result

    @cached_property
    def _without_specials(self) -> tuple[tokenizers.Tokenizer, str, int]:
        """A copy that takes special tokens for text, and knows one token of its own: (copy, its text, its id)."""
        import tokenizers

        copy = tokenizers.Tokenizer.from_str(self._inner.to_str())
        copy.encode_special_tokens = True
        stand_in = "".join(secrets.choice(_NONCHARACTERS) for _ in range(32))
        copy.add_tokens([tokenizers.AddedToken(stand_in, normalized=False)])
        id_ = copy.token_to_id(stand_in)
        assert id_ is not None
        return copy, stand_in, id_


class Marks:
    """Puts marks into the texts of one conversation. `used`: whether any was needed."""

    def __init__(self, words: frozenset[str], mark: str) -> None:
        self._words, self._mark = words, mark
        self.used = False

    def put(self, text: str) -> str:
        """`text`, broken up by marks wherever it is or may become a special token."""
        words = _compiled(self._words)
        places: set[int] = set()  # a mark goes in front of these characters
        for begin, end in words.found(text):
            if end - begin == 1 and not text[begin].isspace():
                raise RequestError(
                    f"the conversation contains {text[begin]!r}, which is a special token of the model: remove it"
                )
            places.update(range(begin + 1, end))
        places.update(self._edges(text, words))
        if not places:
            return text
        self.used = True
        cuts = [0, *sorted(places), len(text)]
        return self._mark.join(text[a:b] for a, b in pairwise(cuts))

    @staticmethod
    def _edges(text: str, words: _Words) -> set[int]:
        """Behind the first character of what could be the beginning, the end or the inside of a special token."""
        places: set[int] = set()
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if begin >= end:
            return places
        tail = max(begin, end - _EDGE_CHARS)
        for at in range(tail, end):
            if text[at] in words.firsts and text[at:end] in words.heads:
                places.add(at + 1)
        for stop in range(min(end, begin + _EDGE_CHARS), begin + 1, -1):
            if text[begin:stop] in words.tails:
                places.add(begin + 1)
                break
        if end - begin <= _EDGE_CHARS and text[begin:end] in words.insides:
            places.add(begin + 1)
        return places


@dataclass(frozen=True)
class _Words:
    """`whole`: the first character of a special token, and as a group what follows it in the longest one that begins
    there; `longest`: characters of the longest of all; `heads`, `tails`, `insides`: proper parts of them.

    Parts that consist of letters, digits, - and _ only are left out: `user`, `text` and `tool_call` are words that
    templates compare with.
    """

    whole: re.Pattern[str]
    longest: int
    firsts: frozenset[str]
    heads: frozenset[str]
    tails: frozenset[str]
    insides: frozenset[str]

    def found(self, text: str) -> Iterator[tuple[int, int]]:
        """(begin, end) of the longest special token at every place where one begins: they may overlap."""
        for window in range(0, len(text), _WINDOW_CHARS):
            stop = window + _WINDOW_CHARS
            for match in self.whole.finditer(text, window, stop + self.longest - 1):
                if match.start() < stop:
                    yield match.start(), match.end(match.lastindex or 0)


@lru_cache(maxsize=8)
def _compiled(words: frozenset[str]) -> _Words:
    heads = {w[:n] for w in words for n in range(1, min(len(w), _EDGE_CHARS))}
    tails = {w[n:] for w in words for n in range(1, len(w) - 1)}
    insides = {w[a:b] for w in words if len(w) <= 64 for a in range(1, len(w)) for b in range(a + 1, len(w))}
    return _Words(
        whole=re.compile(_search(words) or "(?!)"),
        longest=max(map(len, words), default=1),
        firsts=frozenset(w[0] for w in words),
        heads=frozenset(filter(_odd, heads)),
        tails=frozenset(filter(_odd, tails)),
        insides=frozenset(part for part in insides if _odd(part[0] + part[-1])),
    )


def _search(words: Collection[str]) -> str:
    """Finds every word, also inside another one: it takes a first character, and looks at what follows."""
    rests = _by_first(words)
    return "|".join(f"{re.escape(first)}(?=({_longest(rests[first], _TREE_LEVELS)}))" for first in sorted(rests))


def _longest(words: Collection[str], levels: int) -> str:
    """Matches the longest of some words. At every character there is one way on, however many words there are."""
    if not levels:  # words that begin with each other, so many that the compiler would refuse
        return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    branches = []
    for first, rests in sorted(_by_first(words).items()):
        low, high = min(rests), max(rests)
        common = low[: next((i for i, c in enumerate(low) if not high.startswith(c, i)), len(low))]
        further = _longest({rest[len(common) :] for rest in rests}, levels - 1) if len(rests) > 1 else ""
        branches.append(re.escape(first + common) + further)
    return f"(?:{'|'.join(branches)}){'?' if '' in words else ''}" if branches else ""


def _by_first(words: Collection[str]) -> dict[str, list[str]]:
    """First character -> what follows it in the words that have one."""
    rests: dict[str, list[str]] = {}
    for word in filter(None, words):
        rests.setdefault(word[0], []).append(word[1:])
    return rests


def _odd(part: str) -> bool:
    return re.fullmatch(r"[\w-]*", part) is None


def _free_mark(*texts: str) -> str:
    """A noncharacter that appears nowhere in the conversation."""
    free = next((c for c in _NONCHARACTERS if not any(c in text for text in texts)), None)
    if free is None:
        raise RequestError("the conversation uses every noncharacter from U+FDD0 to U+FDEF: remove one of them")
    return free


def _texts(value: Any, depth: int = -2) -> Iterator[str]:
    """Every text in the value, names included. Messages, tools and variables are at depth 0."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        if depth == MAX_VALUE_DEPTH:
            raise RequestError(f"messages, tools or variables: nested more than {MAX_VALUE_DEPTH} deep")
        for item in value:
            yield from _texts(item, depth + 1)
        if isinstance(value, Mapping):
            for item in value.values():
                yield from _texts(item, depth + 1)
