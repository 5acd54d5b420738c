"""Requests, answers and plans, over the reference backend; greedy tokens against transformers."""

from __future__ import annotations

from pathlib import Path

import folders
import numpy as np
import pytest
import torch
from folders import EOS, VOCAB_SIZE, model_folder
from transformers import LlamaForCausalLM, RepetitionPenaltyLogitsProcessor

import flashformer as ff
from flashformer.backends.cpu import topology
from flashformer.engine import Options, plan_model
from flashformer.engine.defaults import Defaults, read_defaults
from flashformer.engine.request import make_request
from flashformer.engine.stats import make_timing, percentile, stats_line

CTX = folders.CONFIG["max_position_embeddings"]
PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: object) -> ff.LLM:
    return ff.load(folder, device="reference", threads=2, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llm(folder: Path):
    with load(folder, streams=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def encoded(text: str) -> list[int]:
    return folders.byte_tokenizer().encode(text).ids


def greedy(oracle: LlamaForCausalLM, ids: list[int], n: int) -> list[int]:
    """n greedy tokens by whole-prompt forwards; EOS does not end them."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-n:]


# ---- answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_greedy_tokens_equal_transformers(folder: Path, oracle: LlamaForCausalLM, chunk: int) -> None:
    with load(folder, prompt_chunk=chunk) as llm:
        out = llm.generate(PROMPT, max_tokens=20, ignore_eos=True)
    expected = greedy(oracle, encoded(PROMPT), 20)
    assert out.token_ids == expected
    assert len(set(expected)) > 5
    assert out.prompt_token_ids == encoded(PROMPT)
    assert out.finish_reason == "length"


def test_logits_equal_transformers_after_each_position(llm: ff.LLM, oracle: LlamaForCausalLM) -> None:
    ids = np.random.default_rng(3).integers(0, VOCAB_SIZE, 41).tolist()  # several chunks of head rows
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
    found = llm.logits(ids)
    assert found.dtype == np.float32
    assert found.shape == (41, VOCAB_SIZE)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_eos_ends_the_text_and_is_the_last_id(folder: Path, oracle: LlamaForCausalLM, tmp_path: Path) -> None:
    tokens = greedy(oracle, encoded(PROMPT), 12)
    ending = next(t for i, t in enumerate(tokens) if i >= 3 and t not in tokens[:i])
    stop = model_folder(tmp_path / "stop", generation={"eos_token_id": [ending, EOS]})
    with load(stop) as llm:
        out = llm.generate(PROMPT, max_tokens=12)
        on = llm.generate(PROMPT, max_tokens=12, ignore_eos=True)
    assert out.finish_reason == "stop"
    assert out.token_ids == tokens[: tokens.index(ending) + 1]
    assert out.text == folders.byte_tokenizer().decode(out.token_ids[:-1])
    assert on.token_ids == tokens


def test_pieces_joined_are_the_text(llm: ff.LLM) -> None:
    out = llm.generate("héllo", max_tokens=30, temperature=1.5, seed=11, ignore_eos=True)
    stream = llm.stream("héllo", max_tokens=30, temperature=1.5, seed=11, ignore_eos=True)
    pieces = list(stream)
    assert "".join(p.text for p in pieces) == out.text == folders.byte_tokenizer().decode(out.token_ids)
    assert [p.token_id for p in pieces if p.token_id is not None] == out.token_ids
    assert stream.output.text == out.text
    assert any(p.text == "" for p in pieces)  # bytes of incomplete characters


def test_seeds(llm: ff.LLM) -> None:
    def sample(seed: int | None) -> ff.Output:
        return llm.generate("a", max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True)

    drawn = sample(None)
    assert sample(drawn.seed).token_ids == drawn.token_ids
    assert sample(2**64 - 1).seed == 2**64 - 1
    assert len({tuple(sample(seed).token_ids) for seed in range(4)}) == 4
    assert sample(None).seed != sample(None).seed


def test_a_list_of_prompts_gives_what_each_gives_alone(llm: ff.LLM) -> None:
    prompts = ["one", "two", "three and more"]
    together = llm.generate(prompts, max_tokens=6, temperature=1.0, seed=5)
    alone = [llm.generate(p, max_tokens=6, temperature=1.0, seed=5) for p in prompts]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    ids = llm.generate([encoded("one"), encoded("two")], max_tokens=6, temperature=1.0, seed=5)
    assert [o.token_ids for o in ids] == [o.token_ids for o in alone[:2]]


def test_defaults_come_from_the_generation_config_and_sampling_ones_only_if_it_samples() -> None:
    qwen = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.1}
    assert read_defaults(qwen) == Defaults(0.7, 20, 0.8, 0.1, 1.05)
    assert read_defaults(qwen | {"do_sample": False}) == Defaults(repeat_penalty=1.05)
    assert read_defaults({"temperature": 0.7}).temperature == 0
    assert read_defaults({"do_sample": True, "temperature": None}) == Defaults(temperature=1)
    assert read_defaults({"do_sample": True, "typical_p": 0.9}).unused == ("typical_p=0.9",)
    for key, bad in (("temperature", "hot"), ("top_p", 0), ("top_k", -1), ("min_p", 2), ("repetition_penalty", 0)):
        with pytest.raises(ff.LoadError, match=f"generation_config.json: {key}: .*{bad}"):
            read_defaults({"do_sample": True, key: bad})


def test_what_is_not_applied_is_said(tmp_path: Path) -> None:
    greedy = {"num_beams": 4, "no_repeat_ngram_size": 3, "suppress_tokens": [1] * 99, "forced_eos_token_id": 2}
    said = read_defaults(greedy | {"a_new_key": True}).unused
    assert [text.split("=")[0] for text in said] == [*greedy, "a_new_key"]
    assert all(len(text) <= 80 for text in said)
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": None, "suppress_tokens": [], "min_length": 0}
    usual = {"bos_token_id": 1, "eos_token_id": [2, 3], "transformers_version": "5", "_from_model_config": True}
    assert read_defaults(neutral | usual | {"max_length": 4096, "top_p": 0.5}) == Defaults()
    assert read_defaults({}).warning is None
    assert "num_beams=4, no_repeat" in str(read_defaults(greedy).warning)
    with pytest.warns(UserWarning, match="num_beams=2"):
        load(model_folder(tmp_path / "m", generation={"num_beams": 2})).close()


def test_defaults_are_what_the_arguments_would_be(tmp_path: Path) -> None:
    stated = {"do_sample": True, "temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}
    arguments = {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repeat_penalty": 1.3}
    off = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1}
    asked = {"max_tokens": 12, "seed": 1, "ignore_eos": True}
    with load(model_folder(tmp_path / "m", generation=stated)) as llm:
        decided = make_request(np.array([1]), ff.SamplingSettings(), llm.defaults, llm.spec, CTX, has_text=True)
        assert {name: getattr(decided, name) for name in arguments} == arguments
        decided = make_request(np.array([1]), ff.SamplingSettings(**off), llm.defaults, llm.spec, CTX, has_text=True)
        assert {name: getattr(decided, name) for name in off} == off
        sampled = llm.generate(PROMPT, **asked).token_ids
        plain = llm.generate(PROMPT, **asked | off).token_ids
    with load(model_folder(tmp_path / "plain")) as llm:
        assert sampled == llm.generate(PROMPT, **asked | arguments).token_ids
        assert plain == llm.generate(PROMPT, **asked).token_ids
    assert sampled != plain
    with load(model_folder(tmp_path / "large", generation=stated | {"top_k": 10**6})) as llm:  # more than there are
        assert len(llm.generate(PROMPT, **asked).token_ids) == 12


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repeat_penalty_is_that_of_transformers(folder: Path, oracle: LlamaForCausalLM, penalty: float) -> None:
    ids = torch.tensor([encoded(PROMPT)])
    change = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(16):
        with torch.no_grad():
            scores = change(ids, oracle(ids).logits[:, -1])
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], -1)
    with load(folder) as llm:
        out = llm.generate(PROMPT, max_tokens=16, repeat_penalty=penalty, ignore_eos=True)
        plain = llm.generate(PROMPT, max_tokens=16, ignore_eos=True)
    assert out.token_ids == ids[0, -16:].tolist()
    assert out.token_ids != plain.token_ids


# ---- limits -------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    {"ctx": 0},
    {"ctx": CTX + 1},
    {"streams": 0},
    {"streams": 17},
    {"threads": 0},
    {"prompt_chunk": 0},
    {"dtype": "f64"},
    {"quant": "int4-g31"},
    {"quant": "fp8"},
    {"kv_dtype": "int8"},
    {"exact": 1},
    {"ctx": 1.5},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=repr)
def test_load_options_out_of_range_are_refused(folder: Path, options: dict[str, object]) -> None:
    with pytest.raises(ff.RequestError, match=next(iter(options))):
        ff.load(folder, **({"device": "reference"} | options))  # type: ignore[arg-type]


def test_more_threads_than_cpus_are_obeyed_with_a_warning(folder: Path) -> None:
    n = len(topology.affinity()) + 1
    with (
        pytest.warns(UserWarning, match=f"{n} threads asked for"),
        ff.load(folder, device="reference", threads=n) as llm,
    ):
        assert llm.program.target.n_workers == n


def test_devices_that_are_not_there(folder: Path) -> None:
    with pytest.raises(ff.DeviceError, match=r"^device='cuda': .*; or use device='cpu'$"):
        ff.load(folder, device="cuda", exact=True)  # which no GPU can
    with pytest.raises(ff.RequestError, match="device='tpu'"):
        ff.load(folder, device="tpu")


# ---- plans and statistics -----------------------------------------------------------------------------


def test_plan_needs_only_the_configuration_and_agrees_with_the_loaded_model(tmp_path: Path, llm: ff.LLM) -> None:
    bare = model_folder(tmp_path / "bare", weights=False)
    plan = plan_model(str(bare), Options(device="reference", threads=2, streams=2), prove=True)
    assert plan.memory == llm.plan.memory
    assert plan.phases == llm.plan.phases
    assert set(plan.memory) == {"weights_bytes", "kv_bytes", "buffers_bytes", "total_bytes"}
    assert plan.memory["total_bytes"] == sum(plan.memory.values()) - plan.memory["total_bytes"]
    assert plan.proof
    assert all(sum(p.worker_bytes) == p.bytes for p in plan.phases)
    assert sum(p.bytes for p in plan.phases) == llm.program.packed_bytes


def test_plan_follows_the_files_where_the_configuration_disagrees(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", torch_dtype="bfloat16")
    options = Options(device="reference", threads=2)
    with ff.load(folder, device="reference", threads=2) as llm:
        assert plan_model(str(folder), options).memory == llm.plan.memory
        assert llm.plan.dtype == "f32"


def test_plan_counts_the_bytes_that_config_implies() -> None:
    plan = plan_model("shape:llama-3.2-1b", Options(threads=2, ctx=2048))
    matrices = 16 * (2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192) + 128256 * 2048
    assert plan.weight_bytes_per_token == 2 * matrices
    assert plan.kv_bytes_per_position == 16 * 2 * 512 * 2
    assert plan.memory["kv_bytes"] == 2048 * plan.kv_bytes_per_position
    assert (plan.dtype, plan.kv_dtype, plan.floor_ms) == ("bf16", "bf16", None)


def test_formats_follow_their_defaults(folder: Path) -> None:
    kinds = {dtype: plan_model(str(folder), Options(dtype=dtype)) for dtype in ("auto", "f32", "bf16", "f16")}
    assert {k: (p.dtype, p.kv_dtype) for k, p in kinds.items()} == {
        "auto": ("f32", "f32"),
        "f32": ("f32", "f32"),
        "bf16": ("bf16", "bf16"),
        "f16": ("f16", "bf16"),
    }


def test_timing_arithmetic() -> None:
    timing = make_timing(5_000_000, [1_000_000, 3_000_000, 2_000_000], 12_000_000)
    assert (timing.ttft_ms, timing.n_tokens, timing.tok_s) == (5.0, 4, 500.0)
    assert (timing.p50_ms, timing.p99_ms, timing.gb_s) == (2.0, 3.0, 2.0)
    assert make_timing(5_000_000, [], 0).tok_s is None
    assert percentile([float(i) for i in range(100)], 0.99) == 99.0


def test_stats_line() -> None:
    timing = ff.Timing(41.2, 128, 118.4, 8.4, 8.9, 31.2)
    line = stats_line(23, timing, fits_in_cache=False, measured_gb_s=33.9, peak_bytes=987842478)
    assert line == (
        "prompt 23 tok 41 ms | 128 tok 118.4 tok/s (p50 8.4 p99 8.9 ms) | 31.2 GB/s = 92% of measured 33.9 | "
        "peak 0.92 GiB"
    )
    cached = stats_line(23, timing, fits_in_cache=True, measured_gb_s=None, peak_bytes=0)
    assert "weights fit in cache" in cached
    assert "%" not in cached


def test_c50_models_that_share_the_cpus_are_said_to(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    n_cpus = len(topology.affinity())
    with ff.load(folder, threads=n_cpus):
        with pytest.warns(UserWarning, match="of models loaded before and 1 of this one share"):
            second = ff.load(folder, threads=1)
        second.close()
    recwarn.clear()
    ff.load(folder, device="reference", threads=n_cpus).close()
    assert not [w for w in recwarn if "share" in str(w.message)]


def test_quantized_layers_and_their_head(folder: Path) -> None:
    """A 4-bit body has an 8-bit head; what is read per token counts scales and zeros."""
    for quant, (body, head) in {
        "int8": ("int8-g128", "int8-g128"),
        "int4": ("int4-g32", "int8-g128"),
        "int4-g64-zp": ("int4-g64-zp", "int8-g128"),
        "nf4": ("nf4-g64", "int8-g128"),
        "int8-g32": ("int8-g32", "int8-g32"),
        "none": ("none", "none"),
    }.items():
        plan = plan_model(str(folder), Options(quant=quant), prove=True)
        assert (plan.quant, plan.head_quant) == (body, head)
    wide = plan_model("shape:llama-3.2-1b", Options(ctx=512))
    narrow = plan_model("shape:llama-3.2-1b", Options(ctx=512, quant="int4-g32"))
    layers = 973078528  # weights of the layers
    head = 128256 * 2048
    assert wide.weight_bytes_per_token == 2 * (layers + head)
    assert narrow.weight_bytes_per_token == layers * 4.5 / 8 + head * (8 + 16 / 128) / 8
    assert narrow.memory["weights_bytes"] < 0.34 * wide.memory["weights_bytes"]
