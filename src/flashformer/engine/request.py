"""What a request may ask, in one place: every limit, and the checks that turn arguments into a Request."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..errors import LoadError, RequestError

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Limits:
    """Hard bounds, both ends allowed."""

    prompt_chars: int = 8 << 20
    max_tokens: tuple[int, int] = (1, 1 << 30)
    temperature: tuple[float, float] = (1e-6, 100.0)  # or 0, which is greedy
    seed: tuple[int, int] = (0, 2**64 - 1)
    streams: tuple[int, int] = (1, 16)
    threads: tuple[int, int] = (1, 1024)
    prompt_chunk: tuple[int, int] = (1, 1024)
    slot_wait_s: float = 600.0  # a request that finds no free slot for so long is refused


LIMITS: Final = Limits()


@dataclass(frozen=True)
class Request:
    """A validated request."""

    ids: NDArray[np.int32]  # (n_prompt) token ids, 1 <= n_prompt < ctx
    max_tokens: int  # at most ctx - n_prompt
    temperature: float  # 0: greedy
    seed: int
    stop_ids: frozenset[int]  # token ids that end the text


def integer(name: str, value: object, limits: tuple[int, int]) -> int:
    """`value` as an int within `limits`. Booleans and floats are not integers. Raises RequestError."""
    low, high = limits
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{name}={value!r}: expected an integer from {low} to {high}") from None
    if not low <= number <= high:
        raise RequestError(f"{name}={number}: expected an integer from {low} to {high}")
    return number


def temperature(value: object) -> float:
    """A temperature: 0 for greedy, else within the limits. Raises RequestError."""
    low, high = LIMITS.temperature
    expected = f"expected 0 (greedy) or a number from {low:g} to {high:g}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise RequestError(f"temperature={value!r}: {expected}")
    if not (value == 0 or low <= value <= high):  # NaN compares false
        raise RequestError(f"temperature={value!r}: {expected}")
    return float(value)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name}={value!r}: expected True or False")
    return value


def seed(value: object) -> int:
    """The given seed, or one drawn here. Drawn seeds have 53 bits, so that every JSON reader keeps them."""
    return secrets.randbits(53) if value is None else integer("seed", value, LIMITS.seed)


def prompt_text(text: str) -> str:
    """Text that every tokenizer can encode. Raises RequestError."""
    if len(text) > LIMITS.prompt_chars:
        raise RequestError(f"prompt of {len(text)} characters: at most {LIMITS.prompt_chars} are accepted")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"prompt has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
            "it is not valid Unicode text; decode the bytes as UTF-8 first"
        ) from None
    return text


def token_ids(ids: Sequence[object] | NDArray[np.integer], vocab_size: int, ctx: int) -> NDArray[np.int32]:
    """Token ids, (n) int32, taken literally: nothing is added. Raises RequestError."""
    if len(ids) == 0:
        raise RequestError("empty list of token ids: at least one is needed, for example the BOS id")
    if len(ids) > ctx:
        raise RequestError(too_long(len(ids), ctx))
    if isinstance(ids, np.ndarray) and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
        raise RequestError(f"token ids of shape {ids.shape}, {ids.dtype}: expected one dimension of integers")
    limits = (0, vocab_size - 1)
    return np.array([integer(f"token id at position {i}: id", v, limits) for i, v in enumerate(ids)], np.int32)


def too_long(n: int, ctx: int) -> str:
    return f"prompt of {n} tokens is longer than the context of {ctx}: shorten it, or load with a larger ctx"


def clamp_tokens(max_tokens: object, n_prompt: int, ctx: int) -> int:
    """New tokens that may be made: what is asked, at most what the context leaves. Raises RequestError."""
    asked = DEFAULT_MAX_TOKENS if max_tokens is None else integer("max_tokens", max_tokens, LIMITS.max_tokens)
    if n_prompt > ctx:
        raise RequestError(too_long(n_prompt, ctx))
    if n_prompt == ctx:
        raise RequestError(
            f"prompt of {n_prompt} tokens fills the context of {ctx} and leaves no room for a new one: "
            "shorten it, or load with a larger ctx"
        )
    return min(asked, ctx - n_prompt)


@dataclass(frozen=True)
class Defaults:
    """What generation_config.json asks for. `unused`: its sampling settings that are not applied, as text."""

    temperature: float
    unused: tuple[str, ...]


_NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}


def defaults(generation_config: dict[str, object]) -> Defaults:
    """temperature only under `do_sample` (then 1 where none is stated). Raises LoadError."""
    if not generation_config.get("do_sample"):
        return Defaults(0.0, ())
    stated = generation_config.get("temperature")
    try:
        chosen = temperature(1.0 if stated is None else stated)
    except RequestError as error:
        raise LoadError(f"generation_config.json: {error}") from None
    unused = tuple(
        f"{key}={value}"
        for key, neutral in _NEUTRAL.items()
        if (value := generation_config.get(key)) is not None and value != neutral
    )
    return Defaults(chosen, unused)


def is_batch(prompt: object) -> bool:
    """True for a list of prompts, False for one prompt. A flat list of numbers is one prompt. Raises RequestError."""
    if isinstance(prompt, str | np.ndarray):
        return False
    if not isinstance(prompt, list | tuple):
        raise RequestError(f"prompt of type {type(prompt).__name__}: expected text, token ids, or a list of these")
    if not prompt:
        raise RequestError("empty list of prompts: expected text, token ids, or a list of these")
    nested = [isinstance(p, str | list | tuple | np.ndarray) for p in prompt]
    if any(nested) and not all(nested):
        raise RequestError("list of prompts mixed with single token ids: expected either a list of prompts or of ids")
    return nested[0]
