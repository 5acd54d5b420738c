"""SamplingParams: how vLLM writes down what a request asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ..engine import SamplingSettings
from ..engine.request import LIMITS, flag, integer, real
from ..errors import RequestError
from .arguments import require_neutral

GREEDY_BELOW = 1e-5  # a temperature under this is greedy decoding
MAX_ANSWERS = 64

# Fields that exist so that their neutral value may be spelled out.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "presence_penalty": (0.0, 0),
    "frequency_penalty": (0.0, 0),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "prompt_logprobs": (None,),
    "detokenize": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (None,),
    "structured_outputs": (None,),
    "extra_args": (None, {}),
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """vLLM's names and defaults. Raises RequestError, a ValueError, for what is out of range or not supported.

    A given SamplingParams replaces what generation_config.json says, as in vLLM.
    """

    n: int = 1  # answers per prompt, with seeds counted up from `seed`
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0 and -1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int | None = 16  # None: what the context leaves
    stop: str | Sequence[str] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    structured_outputs: None = None
    extra_args: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        require_neutral({f.name: getattr(self, f.name) for f in fields(self) if f.name in _NEUTRAL}, _NEUTRAL)
        integer("n", self.n, (1, MAX_ANSWERS))
        integer("top_k", self.top_k, (-1, LIMITS.top_k[1]))
        real("repetition_penalty", self.repetition_penalty, LIMITS.repeat_penalty)
        flag("ignore_eos", self.ignore_eos)
        self.settings(vocab_size=LIMITS.top_k[1], seed=self.seed)
        if self.n > 1 and self.temperature < GREEDY_BELOW:
            raise RequestError(f"n={self.n} with temperature={self.temperature}: greedy answers are all the same")

    def settings(self, vocab_size: int, seed: int | None) -> SamplingSettings:
        """The same for the engine, every setting given. Raises RequestError."""
        temperature = real("temperature", self.temperature, (0.0, LIMITS.temperature[1]))
        return SamplingSettings(
            max_tokens=LIMITS.max_tokens[1] if self.max_tokens is None else self.max_tokens,
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_k=self.top_k if 0 < self.top_k < vocab_size else 0,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=seed,
            stop=self.stop or None,
            logprobs=self.logprobs,
            ignore_eos=self.ignore_eos,
        )
