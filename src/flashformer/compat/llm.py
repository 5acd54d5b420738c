"""LLM: vLLM's class for answering prompts in a Python program."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine import Output, load
from ..engine.request import LIMITS, integer, real
from ..errors import RequestError
from .arguments import dtype as format_name
from .arguments import require_neutral
from .outputs import RequestOutput, completion
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..checkpoint import Tokenizer

Given = str | Mapping[str, Any] | Sequence[int]  # a prompt: text, {"prompt": ...}, {"prompt_token_ids": ...}, token ids
Messages = Sequence[Mapping[str, Any]]

SEQUENCES = 4  # at a time

_NEUTRAL_LOAD: Mapping[str, tuple[object, ...]] = {
    "block_size": (None,),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0.0, 0),
    "data_parallel_size": (1,),
    "disable_custom_all_reduce": (False, True),
    "disable_log_stats": (False, True),
    "distributed_executor_backend": (None,),
    "download_dir": (None,),
    "enable_chunked_prefill": (None, True),
    "enable_lora": (False,),
    "enable_prefix_caching": (None, True),
    "enforce_eager": (False, True),
    "generation_config": ("auto",),
    "hf_overrides": (None, {}),
    "hf_token": (None,),
    "load_format": ("auto", "safetensors"),
    "max_logprobs": (20,),
    "max_num_batched_tokens": (None,),
    "override_generation_config": (None, {}),
    "pipeline_parallel_size": (1,),
    "quantization": (None,),
    "runner": ("auto", "generate"),
    "skip_tokenizer_init": (False,),
    "speculative_config": (None,),
    "swap_space": (0.0, 0, 4.0, 4),
    "task": (None, "auto", "generate"),
    "tensor_parallel_size": (1,),
    "tokenizer": (None,),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "trust_remote_code": (False,),
}
_NEUTRAL_CALL: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template": (None,),
    "chat_template_content_format": ("auto",),
    "continue_final_message": (False,),
    "lora_request": (None,),
    "mm_processor_kwargs": (None,),
    "priority": (None,),
    "tokenization_kwargs": (None, {}),
    "use_tqdm": (False, True),  # no bar is drawn
}


class LLM:
    """A loaded model with vLLM's names. `engine` is the model as flashformer.load gives it.

    Prompts of a list share forwards, `max_num_seqs` (1 to 16) at a time: each has its own KV cache. `max_model_len` is
    `ctx`; where it is None the context is chosen as flashformer.load does. A request without a seed gets one drawn from
    `seed`, so that a program gives the same answers every time; None draws them anew. Raises LoadError, RequestError,
    DeviceError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        seed: int | None = 0,
        revision: str | None = None,
        kv_cache_dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        device: str = "auto",
        threads: int | None = None,
        offline: bool = False,
        **others: object,
    ) -> None:
        require_neutral(others, _NEUTRAL_LOAD)
        real("gpu_memory_utilization", gpu_memory_utilization, (0.0, 1.0))  # a bound that no CPU memory counts towards
        self.engine = load(
            model,
            device=device,
            dtype=format_name(dtype),
            kv_dtype=None if kv_cache_dtype == "auto" else format_name(kv_cache_dtype),
            ctx=max_model_len,
            streams=SEQUENCES if max_num_seqs is None else integer("max_num_seqs", max_num_seqs, LIMITS.streams),
            threads=threads,
            revision=revision,
            offline=offline,
        )
        self._seeds = None if seed is None else random.Random(seed)
        self._request_ids = count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees threads and memory."""
        self.engine.close()

    def get_tokenizer(self) -> Tokenizer:
        """With `encode` and `decode`. Raises RequestError where the model has none."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without sampling_params uses: generation_config.json where it samples, else the defaults."""
        given = self.engine.defaults
        return SamplingParams(
            temperature=given.temperature or SamplingParams.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            min_p=given.min_p,
            repetition_penalty=given.repeat_penalty,
        )

    def generate(
        self,
        prompts: Given | Sequence[Given],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **others: object,
    ) -> list[RequestOutput]:
        """Answers a prompt, or each of a list of prompts; all are validated before the first one runs.

        Raises RequestError, NumericalError, DeviceError.
        """
        require_neutral(others, _NEUTRAL_CALL)
        given = [_prompt(prompt) for prompt in _each(prompts)]
        return self._run(given, [prompt if isinstance(prompt, str) else None for prompt in given], sampling_params)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **others: object,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of a list of conversations, by the model's chat template. Raises as above."""
        require_neutral(others, _NEUTRAL_CALL)
        one = bool(messages) and isinstance(messages[0], Mapping)
        chats: list[Any] = [messages] if one else list(messages)
        variables = dict(chat_template_kwargs or {})
        ids = [self.engine.chat_ids(chat, tools=tools, template_variables=variables) for chat in chats]
        texts = [self.engine.tokenizer.render_chat(chat, tools=tools, **variables) for chat in chats]
        return self._run(ids, texts, sampling_params)

    def _run(
        self,
        prompts: Sequence[str | list[int]],
        texts: Sequence[str | None],
        asked: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        asked = self.get_default_sampling_params() if asked is None else asked
        params = [asked] * len(prompts) if isinstance(asked, SamplingParams) else list(asked)
        if len(params) != len(prompts):
            raise RequestError(f"sampling_params: {len(params)} for {len(prompts)} prompts; expected one, or as many")
        vocab_size = self.engine.spec.vocab_size
        streams = [
            [self.engine.start(prompt, each.settings(vocab_size, self._seed(each, index))) for index in range(each.n)]
            for prompt, each in zip(prompts, params, strict=True)
        ]
        done = iter(self.engine.run_out([stream for answers in streams for stream in answers]))
        outputs = [[next(done) for _ in answers] for answers in streams]
        return [self._answer(text, answers) for text, answers in zip(texts, outputs, strict=True)]

    def _answer(self, text: str | None, outputs: Sequence[Output]) -> RequestOutput:
        return RequestOutput(
            request_id=str(next(self._request_ids)),
            prompt=text,
            prompt_token_ids=outputs[0].prompt_token_ids,
            outputs=[completion(index, output, self._decode) for index, output in enumerate(outputs)],
            num_cached_tokens=outputs[0].cached_tokens,
        )

    def _decode(self, token_id: int) -> str | None:
        try:
            return self.engine.tokenizer.decode([token_id])
        except RequestError:  # the model has none
            return None

    def _seed(self, asked: SamplingParams, index: int) -> int | None:
        if asked.seed is not None:
            return (asked.seed + index) % (LIMITS.seed[1] + 1)
        return None if self._seeds is None else self._seeds.getrandbits(53)


def _each(prompts: Any) -> list[Any]:
    """Every prompt of what was given: one prompt (a flat list of numbers is one), or a list of them."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and not isinstance(prompts[0], str | Mapping | Sequence) else prompts


def _prompt(given: Any) -> str | list[int]:
    if not isinstance(given, Mapping):
        return given if isinstance(given, str) else list(given)
    known = [given[name] for name in ("prompt", "prompt_token_ids") if given.get(name) is not None]
    others = sorted(set(given) - {"prompt", "prompt_token_ids"})
    if others or len(known) != 1:
        found = ", ".join(map(str, given)) or "nothing"
        raise RequestError(f"prompt with {found}: expected either prompt or prompt_token_ids, and nothing else")
    return known[0] if isinstance(known[0], str) else list(known[0])
