"""vLLM's shape over the engine: its defaults, its fields, and a refusal by name of what is not supported."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import model_folder

import flashformer as ff
from flashformer.compat import LLM, RequestOutput, SamplingParams

PROMPT = "def f(x):"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{{ tail | default('assistant:') }}"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.3}
    folder = model_folder(tmp_path_factory.mktemp("model"), generation=generation)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, threads=1) as loaded:
        yield loaded


def test_an_answer_is_the_engines(llm: LLM) -> None:
    [found] = llm.generate(PROMPT, GREEDY)
    expected = llm.engine.generate(PROMPT, temperature=0, repeat_penalty=1, max_tokens=12, ignore_eos=True)
    [answer] = found.outputs
    assert (found.prompt, found.prompt_token_ids) == (PROMPT, expected.prompt_token_ids)
    assert (answer.index, answer.text, answer.token_ids) == (0, expected.text, expected.token_ids)
    assert (answer.finish_reason, answer.stop_reason, answer.logprobs) == ("length", None, None)
    assert answer.cumulative_logprob is None
    assert (found.finished, answer.finished()) == (True, True)
    assert len(set(answer.token_ids)) > 3


def test_log_probabilities_are_those_of_the_raw_distribution(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, seed=3, max_tokens=9, logprobs=3, ignore_eos=True, repetition_penalty=1.5)
    [found] = llm.generate(PROMPT, params)
    [answer] = found.outputs
    ids = found.prompt_token_ids + answer.token_ids
    logits = llm.engine.logits(ids)[len(found.prompt_token_ids) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert answer.logprobs is not None
    for row, token, given in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        best = np.argsort(-row, kind="stable")[:3].tolist()
        assert list(given) == list(dict.fromkeys([token, *best]))
        assert all(math.isclose(given[i].logprob, row[i], rel_tol=1e-6, abs_tol=1e-6) for i in given)
        assert [given[i].rank for i in best] == [1, 2, 3]
        assert given[token].rank == (best.index(token) + 1 if token in best else None)
        assert given[token].decoded_token == llm.get_tokenizer().decode([token])
    assert answer.cumulative_logprob == pytest.approx(
        sum(row[token] for row, token in zip(expected, answer.token_ids, strict=True)), rel=1e-6
    )
    assert any(len(given) == 4 for given in answer.logprobs), "no token outside the three likeliest"


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.max_tokens, params.logprobs, params.seed) == (1.0, 16, None, None)


def test_given_params_replace_the_generation_config_and_none_means_it(llm: LLM) -> None:
    config = llm.get_default_sampling_params()
    assert (config.temperature, config.top_k, config.top_p, config.repetition_penalty) == (0.7, 9, 0.8, 1.3)
    with LLM(llm.engine.name, threads=1, seed=7) as one, LLM(llm.engine.name, threads=1, seed=7) as other:
        assert ids_of(one.generate(PROMPT)) == ids_of(other.generate(PROMPT, config))
        plain = SamplingParams(seed=5, ignore_eos=True)
        expected = one.engine.generate(
            PROMPT, max_tokens=16, temperature=1, top_k=0, top_p=1, repeat_penalty=1, seed=5, ignore_eos=True
        )
        assert ids_of(one.generate(PROMPT, plain)) == [[expected.token_ids]]
        assert len(expected.token_ids) == 16


def ids_of(found: list[RequestOutput]) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in found]


def test_the_seed_of_the_model_makes_a_program_repeatable(folder: Path) -> None:
    def program(seed: int | None) -> list[list[list[int]]]:
        with LLM(folder, threads=1, seed=seed) as llm:
            params = SamplingParams(ignore_eos=True)
            return ids_of(llm.generate(["a", "a"], params) + llm.generate("a", params))

    first = program(0)
    assert first == program(0)
    assert first[0] != first[1] != first[2]
    assert first not in (program(1), program(None))


def test_n_answers_count_seeds_up(llm: LLM) -> None:
    [found] = llm.generate(PROMPT, SamplingParams(n=3, seed=2**64 - 1, ignore_eos=True))
    alone = [llm.generate(PROMPT, SamplingParams(seed=s, ignore_eos=True))[0].outputs[0] for s in (2**64 - 1, 0, 1)]
    assert [answer.token_ids for answer in found.outputs] == [answer.token_ids for answer in alone]
    assert [answer.index for answer in found.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in alone}) == 3


def test_a_stop_string_ends_the_text_and_is_reported(llm: LLM) -> None:
    text = llm.generate(PROMPT, GREEDY)[0].outputs[0].text
    stop = text[4:6]
    [found] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[stop, "never"]))
    assert found.outputs[0].text == text[: text.index(stop)]
    assert (found.outputs[0].finish_reason, found.outputs[0].stop_reason) == ("stop", stop)


def test_every_way_to_give_prompts(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPT)
    given: list[Any] = [PROMPT, {"prompt": PROMPT}, {"prompt_token_ids": ids}, ids]
    together = llm.generate(given, GREEDY)
    assert ids_of(together) == [ids_of(llm.generate(prompt, GREEDY))[0] for prompt in given]
    assert len({str(answer) for answer in ids_of(together)}) == 1
    assert [output.prompt for output in together] == [PROMPT, PROMPT, None, None]
    assert len({output.request_id for output in together}) == 4
    assert llm.generate([], GREEDY) == []
    one_each = llm.generate([PROMPT, PROMPT], [GREEDY, SamplingParams(temperature=0, max_tokens=2)])
    assert [len(output.outputs[0].token_ids) for output in one_each] == [12, 2]
    for bad in ({"text": "a"}, {}, {"prompt": "a", "prompt_token_ids": [1]}, {"prompt": "a", "multi_modal_data": 1}):
        with pytest.raises(ff.RequestError, match="prompt"):
            llm.generate(bad, GREEDY)
    with pytest.raises(ff.RequestError, match="1 for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_chat_renders_the_template(llm: LLM) -> None:
    [found] = llm.chat(MESSAGES, GREEDY)
    assert found.prompt == "user:hi\nassistant:"
    assert ids_of([found]) == ids_of(llm.generate({"prompt_token_ids": found.prompt_token_ids}, GREEDY))
    many = llm.chat([MESSAGES, MESSAGES], GREEDY, chat_template_kwargs={"tail": "!"})
    assert [output.prompt for output in many] == ["user:hi\n!"] * 2
    assert ids_of(many)[0] != ids_of([found])[0]


def test_a_long_answer_fills_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    [found] = llm.generate([{"prompt_token_ids": [5] * 90}], params)
    assert len(found.outputs[0].token_ids) == 96 - 90


@pytest.mark.parametrize("top_k", [-1, 0, 258, 2**31 - 1])
def test_top_k_that_keeps_everything_is_off(llm: LLM, top_k: int) -> None:
    off, found = (llm.generate(PROMPT, SamplingParams(seed=1, top_k=k, ignore_eos=True)) for k in (0, top_k))
    assert ids_of(found) == ids_of(off)
    assert ids_of(off) != ids_of(llm.generate(PROMPT, SamplingParams(seed=1, top_k=1, ignore_eos=True)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("presence_penalty", 0.5), ("frequency_penalty", -1), ("stop_token_ids", [3]), ("bad_words", ["x"])),
        *(("include_stop_str_in_output", True), ("min_tokens", 2), ("prompt_logprobs", 0), ("detokenize", False)),
        *(("skip_special_tokens", False), ("structured_outputs", {"regex": "a"}), ("extra_args", {"a": 1})),
        *(("n", 0), ("n", 65), ("temperature", -0.1), ("top_p", 0), ("top_k", -2), ("min_p", 1.1)),
        *(("repetition_penalty", 0), ("max_tokens", 0), ("stop", ["a"] * 5), ("seed", -1), ("logprobs", 21)),
        *(("logprobs", -1), ("ignore_eos", 1), ("logit_bias", {3: 101})),
    ],
)
def test_params_that_are_not_supported_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_greedy_answers_are_not_repeated() -> None:
    with pytest.raises(ff.RequestError, match="n=2"):
        SamplingParams(n=2, temperature=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("tensor_parallel_size", 2), ("trust_remote_code", True), ("quantization", "awq"), ("enable_lora", True)),
        *(("gpu_memory_utilization", 1.5), ("max_num_seqs", 256), ("load_format", "pt"), ("tokenizer", "other")),
        *(("enable_prefix_caching", False), ("speculative_config", {"method": "ngram"}), ("no_such_name", None)),
        *(("dtype", "float64"), ("kv_cache_dtype", "fp8")),
    ],
)
def test_ways_to_load_that_are_not_supported_are_refused_by_name(folder: Path, name: str, value: object) -> None:
    with pytest.raises(ff.RequestError, match="kv_dtype" if name == "kv_cache_dtype" else name):
        LLM(folder, **{name: value})  # type: ignore[arg-type]


def test_prompts_of_a_list_share_forwards(folder: Path) -> None:
    """As many at a time as asked for; their answers are those they have alone."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    found, forwards = [], []
    for n in (1, 3):
        with LLM(folder, threads=1, max_num_seqs=n) as llm:
            rows, kernel = [], llm.engine.kernel
            real = kernel.forward
            kernel.forward = lambda n_rows, *more, rows=rows, real=real: (rows.append(n_rows), real(n_rows, *more))[1]  # type: ignore[method-assign]
            found.append(ids_of(llm.generate(["a", "b", "c"], params)))
            forwards.append(rows)
    assert found[0] == found[1]
    assert len(forwards[1]) < len(forwards[0])
    assert 3 in forwards[1]


def test_neutral_arguments_and_their_names_of_formats(folder: Path) -> None:
    neutral = {"tensor_parallel_size": 1, "enforce_eager": True, "trust_remote_code": False, "swap_space": 4}
    with LLM(folder, dtype="half", max_model_len=40, threads=1, gpu_memory_utilization=0.5, **neutral) as llm:
        target = llm.engine.setup.target
        assert (target.weight_format.name, target.ctx, target.streams) == ("f16", 40, 4)
        assert len(llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)) == 1
        for call in (llm.generate, llm.chat):
            with pytest.raises(ff.RequestError, match="lora_request"):
                call(MESSAGES, lora_request="x")  # type: ignore[operator]
