"""config.json and tensor names against transformers; every key and relation that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_checkpoint import byte_tokenizer, write_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from flashformer import LoadError
from flashformer.checkpoint.folder import open_tensors
from flashformer.formats import BF16, F32, to_f32
from flashformer.model import (
    ModelSpec,
    load_model,
    read_family,
    read_spec,
    rope_table,
    shape_config,
)
from flashformer.model.config import READ_KEYS
from flashformer.model.families import FAMILIES

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
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **WIDTHS, "sliding_window": None}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **WIDTHS}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Folders are small, so each test writes its own.
CASES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDTHS),
    "llama tied": LlamaConfig(**WIDTHS, tie_word_embeddings=True, eos_token_id=[2, 7]),
    "llama biases": LlamaConfig(**WIDTHS, attention_bias=True, mlp_bias=True),
    "llama head_dim": LlamaConfig(**{**WIDTHS, "num_attention_heads": 4, "head_dim": 20}),
    "llama 3": LlamaConfig(**WIDTHS, rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0}),
    "llama one kv head each": LlamaConfig(**{**WIDTHS, "num_key_value_heads": None}),
    "mistral": MistralConfig(**WIDTHS, sliding_window=None),
    "qwen2": Qwen2Config(**WIDTHS, bos_token_id=5, eos_token_id=6),
}


def refused(config: dict[str, Any], *words: str, generation: dict[str, Any] | None = None) -> None:
    with pytest.raises(LoadError) as caught:
        read_spec(config, generation)
    for word in words:
        assert word in str(caught.value)


def saved(tmp_path: Path, config: PreTrainedConfig) -> tuple[Any, dict[str, Any]]:
    """A transformers model with random weights, saved; and its config.json."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    return model, json.loads((tmp_path / "config.json").read_text())


def load_without_tokenizer(folder: Path) -> Any:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return load_model(folder)


@pytest.mark.parametrize("name", CASES)
def test_saved_by_transformers(tmp_path: Path, name: str) -> None:
    """Every key that save_pretrained writes is accepted, and every role gets its tensor's values."""
    model, config = saved(tmp_path, CASES[name])
    spec, theirs = read_spec(config), model.config
    layer = spec.layers[0]
    attention = model.model.layers[0].self_attn
    assert spec.n_layers == len(model.model.layers)
    assert (spec.vocab_size, spec.d_model) == tuple(model.model.embed_tokens.weight.shape)
    assert (layer.q_width, layer.kv_width) == (attention.q_proj.out_features, attention.k_proj.out_features)
    assert (layer.head_dim, layer.heads_per_kv) == (attention.head_dim, attention.num_key_value_groups)
    assert layer.attention_scale == attention.scaling
    assert layer.d_ff == model.model.layers[0].mlp.up_proj.out_features
    assert layer.norm_eps == spec.final_norm_eps == model.model.norm.variance_epsilon
    assert layer.qkv_bias == (attention.q_proj.bias is not None)
    assert layer.o_bias == (attention.o_proj.bias is not None)
    assert layer.mlp_bias == (model.model.layers[0].mlp.up_proj.bias is not None)
    assert (spec.max_positions, spec.bos_id) == (theirs.max_position_embeddings, theirs.bos_token_id)
    eos = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert spec.eos_ids == tuple(eos)

    ours = load_without_tokenizer(tmp_path)
    state = model.state_dict()
    assert ours.spec == spec
    assert ours.stored_format is F32
    assert len(ours.weights) == len(state) - spec.tied
    names = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
    inner = {
        **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        **{x: f"self_attn.{x}_proj" for x in "qkvo"},
        **{x: f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    for role, tensor in ours.weights.items():
        *prefix, last = role.removeprefix("layers.").split(".")
        base, kind = (last[:-5], "bias") if last.endswith("_bias") else (last, "weight")
        source = f"model.layers.{prefix[0]}.{inner[base]}" if prefix else names[base]
        np.testing.assert_array_equal(to_f32(tensor.data, tensor.format), state[f"{source}.{kind}"].numpy())


# ---- keys


def test_no_family_leaves_a_key_of_transformers_undecided() -> None:
    """All attributes of a config, also those that save_pretrained leaves out today."""
    for config in CASES.values():
        whole = config.to_dict()
        whole["architectures"] = [next(f.architecture for f in FAMILIES.values() if f.model_type == config.model_type)]
        assert read_spec(whole) == read_spec({**json.loads(config.to_json_string()), "dtype": "float32"})


def test_reasons_are_given_and_keys_have_one_treatment() -> None:
    for family in FAMILIES.values():
        assert all(family.ignored.values())
        read = READ_KEYS | {s for s in family.switches.values() if isinstance(s, str)}
        assert not read & family.plain.keys()
        assert not read & family.ignored.keys()
        assert not family.plain.keys() & family.ignored.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"no_such_key": 1}, ("'no_such_key' = 1", "LlamaForCausalLM")),
        ({"num_local_experts": 8}, ("num_local_experts",)),
        ({"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping",)),
        ({"embedding_multiplier": 12.0}, ("embedding_multiplier",)),
        ({"sliding_window": 4096}, ("sliding_window = 4096", "null")),
        ({"pretraining_tp": 2}, ("pretraining_tp = 2",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
        ({"hidden_act": "gelu"}, ("hidden_act = 'gelu'", "silu")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ({"layer_types": ["full_attention"]}, ("layer_types", "2 layers")),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings = 'yes'",)),
        ({"attention_bias": 1}, ("attention_bias = 1",)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("rope_scaling", "'yarn'", "llama3")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("'linear'",)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("'dynamic'",)),
        ({"rope_parameters": {"rope_type": "longrope"}}, ("rope_parameters", "'longrope'")),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("full_attention",)),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, ("['factor']",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "beta": 1}}, ("['beta']",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "type": "default"}}, ("rope type",)),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, ("rope type",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": 0.5}}, ("factor = 0.5",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, ("factor = None",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, ("low_freq_factor < high_freq_factor",)),
        ({"rope_scaling": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5}}, ("partial_rotary_factor",)),
        ({"rope_scaling": [1]}, ("rope_scaling",)),
        ({"rope_theta": 0}, ("rope_theta = 0",)),
        ({"rope_theta": "1e4"}, ("rope_theta",)),
    ],
)
def test_a15_a16_keys_refused_by_name(change: dict[str, Any], words: tuple[str, ...]) -> None:
    refused({**LLAMA, **change}, *words)


def test_families_with_windows() -> None:
    refused({**MISTRAL, "sliding_window": 4096}, "sliding_window = 4096")
    refused({k: v for k, v in MISTRAL.items() if k != "sliding_window"}, "sliding_window = 4096", "absence")
    refused({**QWEN2, "use_sliding_window": True}, "use_sliding_window = True")
    assert read_spec({**QWEN2, "use_sliding_window": False, "sliding_window": 32768}).layers[0].qkv_bias


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


@pytest.mark.parametrize("name", ["qwen3-0.6b", "granite-3.1-2b"])
def test_a14_unsupported_shapes(name: str) -> None:
    config = shape_config(name)
    refused(config, config["architectures"][0], *FAMILIES)
    with pytest.raises(LoadError, match="not supported"):
        load_model(f"shape:{name}")


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
    assert read_spec(LLAMA).eos_ids == ()
    refused(LLAMA, "generation_config.json: eos_token_id = 300", generation={"eos_token_id": 300})


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
def test_a9_tensors(folder: Path, change: Any, config: dict[str, Any], words: tuple[str, ...]) -> None:
    edit(folder, change, config)
    with pytest.raises(LoadError) as caught:
        load_model(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_a9_ignored_tensors(folder: Path) -> None:
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


def test_stored_format_is_the_widest_of_the_matrices(tmp_path: Path) -> None:
    write_folder(tmp_path, LLAMA, BF16)
    assert load_model(tmp_path).stored_format is BF16
    edit(tmp_path, {"model.norm.weight": torch.ones(48)})
    assert load_model(tmp_path).stored_format is BF16
    edit(tmp_path, {"lm_head.weight": torch.ones(300, 48)})
    assert load_model(tmp_path).stored_format is F32


def test_loading_maps_and_reads_nothing(folder: Path) -> None:
    for tensor in open_tensors(folder).values():
        assert not tensor.data.flags.owndata
        assert not tensor.data.flags.writeable


def test_spec_is_frozen_and_hashable() -> None:
    spec: ModelSpec = read_spec(LLAMA)
    assert hash(spec) == hash(read_spec(dict(LLAMA)))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(LLAMA3_ROPE)), inner),
    max_leaves=4,
)


@given(
    base=st.sampled_from([LLAMA, MISTRAL, QWEN2]),
    change=st.dictionaries(st.sampled_from([*sorted(READ_KEYS), "attention_bias", "sliding_window"]), JSON_VALUES),
)
def test_fuzz(base: dict[str, Any], change: dict[str, Any]) -> None:
    """Any JSON either is a model or raises LoadError."""
    try:
        spec = read_spec({**base, **change})
    except LoadError:
        return
    layer = spec.layers[0]
    assert 0 < layer.n_kv_heads <= layer.n_heads
    assert layer.n_heads % layer.n_kv_heads == layer.head_dim % 2 == 0
    assert np.isfinite(rope_table(spec.rope, layer.head_dim, 2)).all()
