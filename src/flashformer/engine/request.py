"""What a request may ask, in one place: every limit, and the checks that turn arguments into a Request."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..backends.base import MAX_BIASES
from ..errors import ContextError, RequestError
from ..model.spec import ModelSpec

if TYPE_CHECKING:
    from .defaults import Defaults

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 256
SHOWN_CHARS = 80  # of a value, in a message


@dataclass(frozen=True)
class Limits:
    """Hard bounds, both ends allowed."""

    prompt_chars: int = 8 << 20
    chars_per_position: int = 64  # of the context, beyond `spare_chars`: longer text is not even encoded
    spare_chars: int = 64 << 10
    max_tokens: tuple[int, int] = (1, 1 << 30)
    temperature: tuple[float, float] = (1e-6, 100.0)  # or 0, which is greedy
    top_k: tuple[int, int] = (0, 2**31 - 1)  # and no more than the vocabulary
    top_p: tuple[float, float] = (1e-6, 1.0)
    min_p: tuple[float, float] = (0.0, 1.0)
    repeat_penalty: tuple[float, float] = (0.1, 10.0)
    biases: int = MAX_BIASES
    bias: tuple[float, float] = (-100.0, 100.0)
    stops: int = 4
    stop_chars: int = 256
    logprobs: tuple[int, int] = (0, 20)  # and no more than the vocabulary
    seed: tuple[int, int] = (0, 2**64 - 1)
    messages: int = 2048
    template_variables: int = 16
    streams: tuple[int, int] = (1, 16)
    threads: tuple[int, int] = (1, 1024)
    prompt_chunk: tuple[int, int] = (1, 1024)
    slot_wait_s: float = 600.0  # a request that finds no free slot for so long is refused


LIMITS: Final = Limits()


class SamplingArguments(TypedDict, total=False):
    """The fields of SamplingSettings as keyword arguments."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    ignore_eos: bool


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen and when an answer ends, as asked: the one type that all entry paths share.

    Everything but what needs the model is checked here. None means the model's default, which is what
    generation_config.json says (of temperature, top_k, top_p and min_p only if it samples), else off. In the order in
    which they apply: repeat_penalty, logit_bias, temperature, top_k, top_p, min_p (see backends/sampling.py). Raises
    RequestError.
    """

    max_tokens: int | None = None  # 256 unless given, at most what the context leaves
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None  # choose among the k likeliest; 0: off
    top_p: float | None = None  # choose among the likeliest that make up p together; 1: off
    min_p: float | None = None  # leave out tokens below this share of the likeliest; 0: off
    repeat_penalty: float | None = None  # of every token of prompt and answer; divides a positive logit; 1: off
    logit_bias: Mapping[int, float] | None = None  # token id -> added to its logit
    seed: int | None = None  # drawn for every answer unless given
    stop: str | Sequence[str] | None = None  # texts that end the answer and are not part of it
    logprobs: int | None = None  # report each token's log probability, and those of so many likeliest tokens
    ignore_eos: bool = False  # go on past the end of the text

    def __post_init__(self) -> None:
        for name, checked in _CHECKS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked(value))
        flag("ignore_eos", self.ignore_eos)

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())  # a tuple since it was checked


@dataclass(frozen=True)
class Request:
    """A validated request of one model, every setting decided."""

    ids: NDArray[np.int32]  # (n_prompt) token ids, 1 <= n_prompt < ctx
    max_tokens: int  # at most ctx - n_prompt; 0: the prompt is computed and no token made
    temperature: float  # 0: greedy
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stops: tuple[str, ...]
    stop_ids: frozenset[int]  # token ids that end the text
    logprobs: int | None


def make_request(
    ids: NDArray[np.int32], asked: SamplingSettings, defaults: Defaults, spec: ModelSpec, ctx: int, *, has_text: bool
) -> Request:
    """`has_text`: whether the model has a tokenizer. Raises RequestError for what this model cannot do."""
    vocab_size = spec.vocab_size
    bias = asked.logit_bias or {}
    for token in bias:
        integer("logit_bias: token id", token, (0, vocab_size - 1))
    if asked.top_k is not None:
        integer("top_k", asked.top_k, (0, vocab_size))
    if asked.logprobs is not None:
        integer("logprobs", asked.logprobs, (0, min(LIMITS.logprobs[1], vocab_size)))
    if asked.stops and not has_text:
        raise RequestError("stop: this model has no tokenizer and so makes no text: leave stop out")
    return Request(
        ids=ids,
        max_tokens=clamp_tokens(asked.max_tokens, len(ids), ctx),
        temperature=_first(asked.temperature, defaults.temperature),
        top_k=_first(asked.top_k, defaults.top_k),  # a default may be more than there are tokens: all of them
        top_p=_first(asked.top_p, defaults.top_p),
        min_p=_first(asked.min_p, defaults.min_p),
        repeat_penalty=_first(asked.repeat_penalty, defaults.repeat_penalty),
        logit_bias=bias,
        seed=seed(asked.seed),
        stops=asked.stops,
        stop_ids=frozenset() if asked.ignore_eos else frozenset(spec.eos_ids),
        logprobs=asked.logprobs,
    )


def _first(asked: T | None, default: T) -> T:
    return default if asked is None else asked


def integer(name: str, value: object, limits: tuple[int, int]) -> int:
    """`value` as an int within `limits`. Booleans and floats are not integers. Raises RequestError."""
    low, high = limits
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{name}={shown(value)}: expected an integer from {low} to {high}") from None
    if not low <= number <= high:
        raise RequestError(f"{name}={shown(number)}: expected an integer from {low} to {high}")
    return number


def real(name: str, value: object, limits: tuple[float, float], *, or_zero: str = "") -> float:
    """`value` as a float within `limits`, or 0 where `or_zero` says what that means. Raises RequestError."""
    low, high = limits
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not (number and ((or_zero and value == 0) or low <= value <= high)):  # type: ignore[operator]  # NaN is neither
        zero = f"0 ({or_zero}) or " if or_zero else ""
        raise RequestError(f"{name}={shown(value)}: expected {zero}a number from {low:g} to {high:g}")
    return float(value)  # type: ignore[arg-type]


def shown(value: object) -> str:
    """`value` for a message, cut where it is long; no more of it is looked at than is shown."""
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return f"an integer of {value.bit_length()} bits"
    text = ""
    try:
        for part in _repr(value):
            text += part
            if len(text) > SHOWN_CHARS:
                break
    except ValueError:  # such an integer inside
        text = f"a value of type {type(value).__name__}"
    return cut(text)


def cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."


def _repr(value: object) -> Iterator[str]:
    """`repr`, part by part; of a long text as much as is shown."""
    if type(value) is str:
        quotes = "".join(quote for quote in "'\"" if quote in value)  # they decide on the quotes around it
        yield repr(value if len(value) <= SHOWN_CHARS else value[:SHOWN_CHARS] + quotes)
    elif type(value) is dict:
        yield "{"
        for i, (key, item) in enumerate(value.items()):
            yield ", " if i else ""
            yield from _repr(key)
            yield ": "
            yield from _repr(item)
        yield "}"
    elif type(value) is list or type(value) is tuple:
        yield "[" if type(value) is list else "("
        for i, item in enumerate(value):
            yield ", " if i else ""
            yield from _repr(item)
        yield "]" if type(value) is list else ",)" if len(value) == 1 else ")"
    else:
        yield repr(value)


def temperature(value: object) -> float:
    return real("temperature", value, LIMITS.temperature, or_zero="greedy")


def top_k(value: object) -> int:
    return integer("top_k", value, LIMITS.top_k)


def top_p(value: object) -> float:
    return real("top_p", value, LIMITS.top_p)


def min_p(value: object) -> float:
    return real("min_p", value, LIMITS.min_p)


def repeat_penalty(value: object) -> float:
    return real("repeat_penalty", value, LIMITS.repeat_penalty)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)}: expected True or False")
    return value


def seed(value: object) -> int:
    """The given seed, or one drawn here. Drawn seeds have 53 bits, so that every JSON reader keeps them."""
    return secrets.randbits(53) if value is None else integer("seed", value, LIMITS.seed)


def logit_bias(value: object) -> Mapping[int, float]:
    """Token id -> bias; the ids are checked against the vocabulary later. Raises RequestError."""
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias of type {type(value).__name__}: expected a mapping of token ids to numbers")
    if len(value) > LIMITS.biases:
        raise RequestError(f"logit_bias of {len(value)} tokens: at most {LIMITS.biases} are accepted")
    return {
        integer("logit_bias: token id", token, (0, 2**31 - 1)): real(f"logit_bias[{shown(token)}]", bias, LIMITS.bias)
        for token, bias in value.items()
    }


def stop_strings(value: object) -> tuple[str, ...]:
    """One text or several. Raises RequestError."""
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple):
        raise RequestError(f"stop of type {type(value).__name__}: expected text, or a list of texts")
    if len(stops) > LIMITS.stops:
        raise RequestError(f"stop: {len(stops)} texts, at most {LIMITS.stops} are accepted")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= LIMITS.stop_chars:
            found = f"{len(stop)} characters" if isinstance(stop, str) else f"{shown(stop)}"
            raise RequestError(f"stop: {found}, expected text of 1 to {LIMITS.stop_chars} characters")
        unicode_text("stop", stop)
    return tuple(dict.fromkeys(stops))


_CHECKS: Final[Mapping[str, Any]] = {
    "max_tokens": lambda value: integer("max_tokens", value, LIMITS.max_tokens),
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "repeat_penalty": repeat_penalty,
    "logit_bias": logit_bias,
    "seed": seed,
    "stop": stop_strings,
    "logprobs": lambda value: integer("logprobs", value, LIMITS.logprobs),
}


def unicode_text(name: str, text: str) -> str:
    """Text without lone surrogates. Raises RequestError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: "
            "it is not valid Unicode text; decode the bytes as UTF-8 first"
        ) from None
    return text


def prompt_text(text: str, ctx: int) -> str:
    """Text that every tokenizer can encode, and that may fit into `ctx` positions. Raises RequestError."""
    if len(text) > LIMITS.prompt_chars:
        raise RequestError(f"prompt of {len(text)} characters: at most {LIMITS.prompt_chars} are accepted")
    require_chars("prompt", len(text), ctx)
    return unicode_text("prompt", text)


def require_chars(name: str, n: int, ctx: int) -> None:
    """Refuses text that is far too long for `ctx` positions before work is done for all of it. Raises RequestError."""
    most = LIMITS.chars_per_position * ctx + LIMITS.spare_chars
    if n > most:
        raise ContextError(
            f"{name} of {n} characters: too long for the context of {ctx}, for which at most {most} are read: "
            "shorten it, or load with a larger ctx"
        )


def template_variables(given: object) -> dict[str, Any]:
    """Further variables of a chat template: a few, by name, of single values. Raises RequestError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RequestError(f"template_variables of type {type(given).__name__}: expected a mapping of names to values")
    if len(given) > LIMITS.template_variables:
        raise RequestError(f"template_variables: {len(given)}, at most {LIMITS.template_variables} are accepted")
    for name, value in given.items():
        if not isinstance(name, str) or name in RESERVED_VARIABLES:
            raise RequestError(f"template_variables: name {shown(name)}: expected text, none of {RESERVED_VARIABLES}")
        if not isinstance(value, str | int | float | None):
            raise RequestError(
                f"template_variables[{shown(name)}]={shown(value)}: expected text, a number, True, False or None"
            )
    return dict(given)


RESERVED_VARIABLES = ("self", "messages", "tools", "add_generation_prompt")


def token_ids(ids: Sequence[object] | NDArray[np.integer], vocab_size: int, ctx: int) -> NDArray[np.int32]:
    """Token ids, (n) int32, taken literally: nothing is added. Raises RequestError."""
    if len(ids) == 0:
        raise RequestError("empty list of token ids: at least one is needed, for example the BOS id")
    if len(ids) > ctx:
        raise ContextError(too_long(len(ids), ctx))
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
        raise ContextError(too_long(n_prompt, ctx))
    if n_prompt == ctx:
        raise ContextError(
            f"prompt of {n_prompt} tokens fills the context of {ctx} and leaves no room for a new one: "
            "shorten it, or load with a larger ctx"
        )
    return min(asked, ctx - n_prompt)


def is_batch(prompt: object) -> bool:
    """True for a list of prompts, False for one prompt. A flat list of numbers is one prompt. Raises RequestError."""
    if isinstance(prompt, str | np.ndarray):
        return False
    if not isinstance(prompt, list | tuple):
        raise RequestError(f"prompt of type {type(prompt).__name__}: expected text, token ids, or a list of these")
    if not prompt:
        raise RequestError("empty list of prompts: expected text, token ids, or a list of these")
    nested = {issubclass(kind, _PROMPTS) for kind in set(map(type, prompt))}  # there may be millions
    if len(nested) > 1:
        raise RequestError("list of prompts mixed with single token ids: expected either a list of prompts or of ids")
    return nested.pop()


_PROMPTS = (str, list, tuple, np.ndarray)
