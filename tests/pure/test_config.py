"""Every key and relation of config.json that is refused; missing, extra, misshapen and tied tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_checkpoint import write_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flashformer import LoadError
from flashformer.checkpoint.tensor import Stored
from flashformer.formats import BF16, F16, F32, FORMATS, Format
from flashformer.model import ModelSpec, load_model, read_family, read_spec, rope_table
from flashformer.model.config import READ_KEYS
from flashformer.model.families import FAMILIES
from flashformer.model.outline import read_outline

WIDTHS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **WIDTHS}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **WIDTHS}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **WIDTHS, "head_dim": 8}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refused(config: dict[str, Any], *words: str, generation: dict[str, Any] | None = None) -> None:
    with pytest.raises(LoadError) as caught:
        read_spec(config, generation)
    for word in words:
        assert word in str(caught.value)


# ---- keys


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"no_such_key": 1}, ("'no_such_key' = 1", "LlamaForCausalLM")),
        ({"num_local_experts": 8}, ("num_local_experts",)),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping",)),
        ({"embedding_multiplier": 12.0}, ("embedding_multiplier",)),
        ({"sliding_window": 4096}, ("sliding_window = 4096", "null")),
        ({"layer_norm_eps": 1e-5}, ("layer_norm_eps",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"hidden_act": "gelu"}, ("hidden_act = 'gelu'", "silu")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ({"layer_types": ["full_attention"]}, ("layer_types", "list of 2")),
        ({"num_experts_per_tok": 2}, ("num_experts_per_tok",)),
        ({"attention_sink": True}, ("attention_sink",)),
        ({"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, ("per_layer_config",)),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings = 'yes'",)),
        ({"attention_bias": 1}, ("attention_bias = 1",)),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, ("rope_scaling", "'mrope'", "llama3")),
        ({"rope_parameters": {"rope_type": "longrope"}}, ("rope_parameters", "short_factor")),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("full_attention",)),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, ("['factor']",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "beta": 1}}, ("['beta']",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "type": "default"}}, ("rope type",)),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, ("rope type",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": 0.5}}, ("factor = 0.5",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, ("factor = None",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, ("high_freq_factor = 1.0",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5}}, ("partial_rotary_factor",)),
        ({"rope_scaling": [1]}, ("rope_scaling",)),
        ({"rope_theta": 0}, ("rope_theta = 0",)),
        ({"rope_theta": "1e4"}, ("rope_theta",)),
    ],
)
def test_a15_a16_a17_keys_refused_by_name(change: dict[str, Any], words: tuple[str, ...]) -> None:
    refused({**LLAMA, **change}, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, ("hidden_size = 0",)),
        ({"hidden_size": 49}, ("hidden_size = 49", "num_attention_heads = 6")),
        ({"hidden_size": 42}, ("head_dim = 7 is odd",)),
        ({"hidden_size": 2**40}, ("hidden_size", "262144")),
        ({"hidden_size": 48.0}, ("hidden_size = 48.0", "integer")),
        ({"hidden_size": True}, ("hidden_size = True",)),
        ({"hidden_size": None}, ("hidden_size = None",)),
        ({"num_attention_heads": 0}, ("num_attention_heads = 0",)),
        ({"num_attention_heads": -6}, ("num_attention_heads = -6",)),
        ({"num_key_value_heads": 12}, ("num_attention_heads = 6", "num_key_value_heads = 12")),
        ({"num_key_value_heads": 4}, ("num_attention_heads = 6", "num_key_value_heads = 4")),
        ({"num_key_value_heads": 0}, ("num_key_value_heads = 0",)),
        ({"head_dim": 0}, ("head_dim = 0",)),
        ({"head_dim": 7}, ("head_dim = 7",)),
        ({"head_dim": 258}, ("head_dim = 258", "256")),
        ({"hidden_size": 258 * 6}, ("head_dim = 258", "256")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers = 1000000000", "1024")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers = 0",)),
        ({"vocab_size": 10**10}, ("vocab_size",)),
        ({"intermediate_size": -1}, ("intermediate_size = -1",)),
        ({"max_position_embeddings": 2**31}, ("max_position_embeddings",)),
        ({"rms_norm_eps": 0.0}, ("rms_norm_eps = 0.0",)),
        ({"rms_norm_eps": None}, ("rms_norm_eps",)),
        ({"bos_token_id": 300}, ("bos_token_id = 300", "299")),
        ({"bos_token_id": [1, 2]}, ("bos_token_id",)),
        ({"eos_token_id": [1, -1]}, ("eos_token_id = [1, -1]",)),
        ({"eos_token_id": 1.0}, ("eos_token_id = 1.0",)),
    ],
)
def test_a13_absurd_values(change: dict[str, Any], words: tuple[str, ...]) -> None:
    refused({**LLAMA, **change}, *words)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": ["CustomModel"], "auto_map": {"AutoModelForCausalLM": "modeling.CustomModel"}},
        {"architectures": None, "model_type": "gpt2"},
        {"architectures": None, "model_type": None},
        {"model_type": "mistral"},
    ],
)
def test_a14_unknown_architecture(change: dict[str, Any]) -> None:
    refused({**LLAMA, **change}, *FAMILIES, "doctor")


def test_model_type_alone_is_enough() -> None:
    assert read_family({"model_type": "llama"}).architecture == "LlamaForCausalLM"


def test_eos_is_the_union() -> None:
    assert read_spec({**LLAMA, "eos_token_id": 7}, {"eos_token_id": [3, 7]}).eos_ids == (3, 7)
    assert read_spec(LLAMA, {"eos_token_id": 3}).eos_ids == (3,)
    assert read_spec({**LLAMA, "eos_token_id": None}).eos_ids == ()
    refused(LLAMA, "generation_config.json: eos_token_id = 300", generation={"eos_token_id": 300})


def test_absent_ids_are_those_of_transformers_where_the_vocabulary_has_them() -> None:
    assert (read_spec(LLAMA).bos_id, read_spec(LLAMA).eos_ids) == (1, (2,))
    assert read_spec(LLAMA, {"eos_token_id": None}).eos_ids == (2,)
    small = read_spec({**LLAMA, "vocab_size": 2})
    assert (small.bos_id, small.eos_ids) == (1, ())


# ---- A9, A12: tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path, LLAMA, F32)
    return tmp_path


def edit(folder: Path, change: dict[str, torch.Tensor | None], config: dict[str, Any] | None = None) -> None:
    tensors: dict[str, Any] = {**load_file(folder / "model.safetensors"), **change}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({Q: None}, {}, ("1 missing", Q)),
        ({"lm_head.weight": None}, {}, ("1 missing", "lm_head.weight")),
        ({"model.extra": torch.ones(1)}, {}, ("1 not known", "model.extra")),
        ({Q[:-6] + "bias": torch.ones(48)}, {}, ("not known", "q_proj.bias")),
        ({}, {"attention_bias": True}, ("8 missing", "q_proj.bias")),
        ({}, {"num_hidden_layers": 3}, ("9 missing", "num_hidden_layers = 3", "model.layers.2.")),
        ({}, {"num_hidden_layers": 1}, ("9 not known", "num_hidden_layers = 1", "model.layers.1.")),
        ({Q: torch.ones(24, 48)}, {}, (f"{Q}: found (24, 48)", "(48, 48)", "num_attention_heads * head_dim")),
        ({}, {"vocab_size": 310}, ("found (300, 48)", "(310, 48) = (vocab_size, hidden_size)")),
        ({}, {"head_dim": 16}, ("found (48, 48)", "(96, 48)", "num_key_value_heads * head_dim")),
        ({}, {"intermediate_size": 41}, ("found (40, 48)", "(41, 48) = (intermediate_size, hidden_size)")),
        ({"model.norm.weight": torch.ones(48, 1)}, {}, ("found (48, 1)", "(48,)")),
    ],
)
def test_a09_tensors(folder: Path, change: Any, config: dict[str, Any], words: tuple[str, ...]) -> None:
    edit(folder, change, config)
    with pytest.raises(LoadError) as caught:
        load_model(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_a09_ignored_tensors(folder: Path) -> None:
    before = load_model(folder)
    edit(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert load_model(folder).weights.keys() == before.weights.keys()


@pytest.mark.parametrize("case", ["absent", "same", "different", "only the head"])
def test_a12_tied_config_as_transformers(folder: Path, case: str) -> None:
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change = {
        "absent": {"lm_head.weight": None},
        "same": {"lm_head.weight": embed.clone()},
        "different": {},
        "only the head": {"model.embed_tokens.weight": None},
    }[case]
    edit(folder, change, {"tie_word_embeddings": True})
    assert not torch.equal(head, embed)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder)
    their_embed, their_head = theirs.model.embed_tokens.weight, theirs.lm_head.weight
    assert ours.spec.tied == (their_head is their_embed) == (case != "different")
    assert ("lm_head" in ours.weights) == (case == "different")
    np.testing.assert_array_equal(ours.weights["embed"].data, their_embed.detach().numpy())
    np.testing.assert_array_equal(ours.weights.get("lm_head", ours.weights["embed"]).data, their_head.detach().numpy())


def test_stored_format_holds_all_matrices(tmp_path: Path) -> None:
    for stored, mixed in ((BF16, torch.float16), (F16, torch.bfloat16), (BF16, torch.float32)):
        folder = tmp_path / f"{stored.name} {mixed}"
        write_folder(folder, LLAMA, stored)
        assert load_model(folder).stored_format is read_outline(folder).stored_format is stored
        edit(folder, {"model.norm.weight": torch.ones(48)})
        assert load_model(folder).stored_format is stored
        assert load_model(folder).warnings == read_outline(folder).warnings == ()
        edit(folder, {"lm_head.weight": torch.ones(300, 48, dtype=mixed)})
        assert load_model(folder).stored_format is read_outline(folder).stored_format is F32
        (warning,) = load_model(folder).warnings
        assert read_outline(folder).warnings == (warning,)
        assert f"in {stored.name}, 1 in " in warning


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_plan_without_tensors_takes_the_stated_dtype(tmp_path: Path, fmt: Format) -> None:
    for key in ("torch_dtype", "dtype"):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, key: fmt.config}))
        assert read_outline(tmp_path).stored_format is fmt
    for wrong in ("float8_e4m3fn", ["float32"]):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "dtype": wrong}))
        with pytest.raises(LoadError, match="bfloat16"):
            read_outline(tmp_path)
    for config in (LLAMA, {**LLAMA, "dtype": None}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        outline = read_outline(tmp_path)
        assert outline.stored_format is BF16
        assert ["bf16 is assumed" in warning for warning in outline.warnings] == [True]


FUSED = "model.layers.1.self_attn.qkv_proj.weight"


def test_a09_fused_tensors(tmp_path: Path) -> None:
    """The whole tensor is checked, named once, and its parts are views of the file."""
    write_folder(tmp_path, PHI3, F32)
    whole = load_file(tmp_path / "model.safetensors")[FUSED].numpy()
    weights = load_model(tmp_path).weights
    q, k, v = (weights[f"layers.1.{x}"] for x in "qkv")
    for part, rows in ((q, whole[:48]), (k, whole[48:64]), (v, whole[64:])):
        assert isinstance(part.source, Stored)
        np.testing.assert_array_equal(part.data, rows)
        np.testing.assert_array_equal(part.rows(3, 9), rows[3:9])
    edit(tmp_path, {FUSED: torch.ones(72, 48)})
    with pytest.raises(LoadError) as caught:
        load_model(tmp_path)
    implied = "(80, 48) = (num_attention_heads * head_dim + num_key_value_heads * head_dim + num_key_value_heads * "
    for word in ("1 of the wrong shape", f"{FUSED}: found (72, 48)", f"{implied}head_dim, hidden_size)"):
        assert word in str(caught.value)
    edit(tmp_path, {FUSED: None})
    with pytest.raises(LoadError, match=f"1 missing: '{FUSED}'"):
        load_model(tmp_path)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_norms_stored_without_their_offset(tmp_path: Path, fmt: Format) -> None:
    write_folder(tmp_path, GEMMA2, fmt)
    stored = load_file(tmp_path / "model.safetensors")
    weights = load_model(tmp_path).weights
    norms = {"final_norm": "model.norm.weight", "layers.1.ffn_post_norm": NORM}
    for role, name in norms.items():
        assert weights[role].format is F32
        np.testing.assert_array_equal(weights[role].data, (1.0 + stored[name].float()).numpy())
        assert abs(float(weights[role].data.mean()) - 1) < 0.05
    assert weights["layers.1.q"].format is fmt


NORM = "model.layers.1.post_feedforward_layernorm.weight"


def test_loading_reads_no_matrix(folder: Path) -> None:
    assert all(isinstance(tensor.source, Stored) for tensor in load_model(folder).weights.values())


def test_spec_is_frozen_and_hashable() -> None:
    spec: ModelSpec = read_spec(LLAMA)
    assert hash(spec) == hash(read_spec(dict(LLAMA)))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(LLAMA3_ROPE)), inner),
    max_leaves=4,
)


FUZZED = sorted({*READ_KEYS, *(key for family in FAMILIES.values() for key in family.defaults)})


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    change=st.dictionaries(st.sampled_from(FUZZED), JSON_VALUES | st.integers(0, 8)),
)
def test_fuzz(family: str, change: dict[str, Any]) -> None:
    """Any JSON either is a model or raises LoadError."""
    try:
        spec = read_spec({**WIDTHS, "architectures": [family], **change})
    except LoadError:
        return
    for layer in set(spec.layers):
        assert 0 < layer.n_kv_heads <= layer.n_heads
        assert layer.n_heads % layer.n_kv_heads == layer.head_dim % 2 == 0
        assert layer.window is None or layer.window > 0
        assert 0 < layer.attention_scale < np.inf
    for rope in spec.ropes:
        assert np.isfinite(rope_table(rope, 2)).all()
