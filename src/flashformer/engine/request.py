"""What a request may ask, in one place: every limit, and the checks that turn arguments into a Request."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Mapping, Sequence
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
    """What generation_config.json asks for. `unused`: settings that change the text and are not applied, as text."""

    temperature: float
    unused: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """One line for people, None where everything is applied."""
        if not self.unused:
            return None
        return (
            f"generation_config.json asks for {', '.join(self.unused)}: not applied by this version, so the text can "
            "differ from that of transformers"
        )


# Settings of generation_config.json that change the text, with the values that leave it as it is (None always does).
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": ([],),
    "guidance_scale": (1,),
    "low_memory": (False,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "repetition_penalty": (1,),
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
}
_NEUTRAL_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
    "top_k": (0,),
    "top_p": (1,),
    "typical_p": (1,),
}
# No effect on the text here: ids, which are read with the model; lengths, which -n and ctx decide; memory and output.
_WITHOUT_EFFECT = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
        *("do_sample", "temperature", "max_length", "max_new_tokens", "early_stopping", "length_penalty"),
        *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "compile_config"),
        *("disable_compile", "prefill_chunk_size", "continuous_batching_config"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "trust_remote_code", "chat_format", "max_window_size"),
    )
)


def defaults(generation_config: Mapping[str, object]) -> Defaults:
    """temperature only under `do_sample` (then 1 where none is stated). Raises LoadError.

    What changes the text and is not applied goes to `unused`, so that it is said: many checkpoints state a
    repeat penalty or top_p, and refusing them would help nobody. Settings of sampling count only under `do_sample`;
    keys that no version of transformers knows are `unused` too.
    """
    samples = bool(generation_config.get("do_sample"))
    chosen = 0.0
    if samples:
        stated = generation_config.get("temperature")
        try:
            chosen = temperature(1.0 if stated is None else stated)
        except RequestError as error:
            raise LoadError(f"generation_config.json: {error}") from None
    unused = []
    for key, value in generation_config.items():
        if value is None or key.startswith("_") or key in _WITHOUT_EFFECT:
            continue
        if key in _NEUTRAL_SAMPLING:
            neutral = not samples or value in _NEUTRAL_SAMPLING[key]
        else:
            neutral = value in _NEUTRAL.get(key, ())
        if not neutral:
            text = f"{key}={value}"
            unused.append(text if len(text) <= 80 else f"{text[:77]}...")
    return Defaults(chosen, tuple(unused))


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
