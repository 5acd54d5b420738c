"""What generation_config.json asks for: the settings of requests that leave them open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import LoadError, RequestError
from . import request as requests


@dataclass(frozen=True)
class Defaults:
    """Settings of a request that states none. `unused`: what changes the text and is not applied, as text."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repeat_penalty: float = 1.0  # 1: off
    unused: tuple[str, ...] = ()

    @property
    def warning(self) -> str | None:
        """One line for people, None where everything is applied."""
        if not self.unused:
            return None
        return (
            f"generation_config.json asks for {', '.join(self.unused)}: not applied by this version, so the text can "
            "differ from that of transformers"
        )


# Key of generation_config.json -> (field of Defaults, its check, whether it counts only under do_sample).
_APPLIED: Mapping[str, tuple[str, Callable[[object], float], bool]] = {
    "temperature": ("temperature", requests.temperature, True),
    "top_k": ("top_k", requests.top_k, True),
    "top_p": ("top_p", requests.top_p, True),
    "min_p": ("min_p", requests.min_p, True),
    "repetition_penalty": ("repeat_penalty", requests.repeat_penalty, False),
}
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
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
}
_NEUTRAL_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "typical_p": (1,),
}
# No effect on the text here: ids, which are read with the model; lengths, which -n and ctx decide; memory and output.
_WITHOUT_EFFECT = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
        *("do_sample", "max_length", "max_new_tokens", "early_stopping", "length_penalty"),
        *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "compile_config"),
        *("disable_compile", "prefill_chunk_size", "continuous_batching_config"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "trust_remote_code", "chat_format", "max_window_size"),
    )
)


def read_defaults(generation_config: Mapping[str, object]) -> Defaults:
    """Settings of sampling count only under `do_sample`, which alone means a temperature of 1. Raises LoadError.

    What changes the text and is not applied goes to `unused`, so that it is said: many checkpoints state such keys,
    and refusing them would help nobody. Keys that no version of transformers knows are `unused` too.
    """
    samples = bool(generation_config.get("do_sample"))
    chosen: dict[str, float] = {"temperature": 1.0} if samples else {}
    unused = []
    for key, value in generation_config.items():
        if value is None or key.startswith("_") or key in _WITHOUT_EFFECT:
            continue
        if key in _APPLIED:
            name, checked, only_sampling = _APPLIED[key]
            if samples or not only_sampling:
                try:
                    chosen[name] = checked(value)
                except RequestError as error:
                    raise LoadError(f"generation_config.json: {key}: {error}") from None
            continue
        if key in _NEUTRAL_SAMPLING:
            neutral = not samples or value in _NEUTRAL_SAMPLING[key]
        else:
            neutral = value in _NEUTRAL.get(key, ())
        if not neutral:
            text = f"{key}={value}"
            unused.append(text if len(text) <= 80 else f"{text[:77]}...")
    return Defaults(**chosen, unused=tuple(unused))  # type: ignore[arg-type]
