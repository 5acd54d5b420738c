"""Text of tokens that come one by one."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

HELD_TOKENS = 8  # whose text ends in U+FFFD: then it is not one character that is still incomplete
_KEPT_TOKENS = 16  # in front of what comes next
_CHAR_BYTES = 4  # at most, in UTF-8

# What transformers replaces in decoded text where `clean_up_tokenization_spaces` is set, in this order.
_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TokenStream:
    """Incremental `decode`: the pieces joined, with that of `finish`, are the text of all ids.

    A piece is what a token adds to the text of the tokens of the piece before it, so that decoders that treat the
    first token of a text differently see the same beginning twice. (`tokenizers.DecodeStream` raises where bytes
    that are not UTF-8 change the text before them. Here, as there, the number of U+FFFD for such bytes may differ
    from that in `decode`.) The work for a token does not grow with the text, nor with what is held of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last piece, then what has come since
        self._n_given = 0  # of these, tokens of the last piece
        self._n_chars = 0  # of the text of `_ids`, what was handed out

    def step(self, token_id: int) -> str | None:
        """The text that `token_id` completes, or None while a character is not whole."""
        self._ids.append(token_id)
        piece = self._new_text()
        if not piece or piece.endswith("\ufffd") or self._unsettled(piece):
            return self._held(token_id, piece)
        self._begin(self._ids[self._n_given :])
        return piece

    def finish(self) -> str | None:
        """What is left at the end of the sequence: an incomplete character, as U+FFFD, or None."""
        piece = self._new_text()
        self._begin(self._ids)
        return piece or None

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._ids)[self._n_chars :]

    def _begin(self, ids: list[int]) -> None:
        """Goes on behind the text of `ids`."""
        self._ids, self._n_given = ids, len(ids)
        self._n_chars = len(self._tokenizer.decode(ids))

    def _held(self, token_id: int, piece: str) -> str | None:
        """What may be handed out of a piece whose end may change: nothing, until it has become long."""
        tokenizer, ids = self._tokenizer, self._ids
        if tokenizer.is_silent(token_id):
            ids.pop()
            return None
        if len(ids) - self._n_given < HELD_TOKENS or not piece.endswith("\ufffd") or tokenizer.clean_up:
            return None
        if tokenizer.byte_fallback:
            return self._of_bytes(piece)
        kept = ids[-_KEPT_TOKENS:]
        n = len(tokenizer.decode(kept))
        if n < _CHAR_BYTES:  # `kept` may begin inside its last character
            return None
        self._ids, self._n_given, self._n_chars = kept, len(kept) - 1, n - 1
        return piece[:-1]

    def _of_bytes(self, piece: str) -> str | None:
        """Of a run of tokens for single bytes, all become U+FFFD unless all together are UTF-8."""
        bytes_of = self._tokenizer.byte_fallback
        run = bytes(map(bytes_of.__getitem__, takewhile(bytes_of.__contains__, reversed(self._ids))))[::-1]
        try:
            run.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return None
            stray = next(id_ for id_, byte in bytes_of.items() if byte == 0x80)
            self._begin([stray])  # it stands for the run, which no byte makes UTF-8 again
        else:
            self._begin(self._ids[self._n_given :])
        return piece

    def _unsettled(self, piece: str) -> bool:
        """Whether later text may yet change the end of this piece."""
        return self._tokenizer.clean_up and any(
            piece.endswith(pattern[:n]) for pattern in _CLEAN_UP for n in range(1, len(pattern))
        )


def cleaned_up(text: str) -> str:
    """`text` as transformers cleans it: no space before punctuation and English contractions."""
    for pattern in _CLEAN_UP:
        text = text.replace(pattern, pattern.strip())
    return text
