"""Text to token ids, so that other threads run meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

LONG_CHARS = 16 << 10


def encoding(inner: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
    """As `inner.encode`, which lets no other thread of Python run: half a second for half a MB.

    Encoding several texts does, but starts threads of its own: only for long texts.
    """
    if len(text) <= LONG_CHARS:
        return inner.encode(text, add_special_tokens=add_special_tokens)
    return inner.encode_batch([text], add_special_tokens=add_special_tokens)[0]
