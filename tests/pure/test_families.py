"""Every family's config.json and tensor names against transformers, and that no family has a name elsewhere."""

from __future__ import annotations

import ast
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import families_table
import numpy as np
import pytest
import torch
from make_checkpoint import byte_tokenizer
from published import FACTORS, PUBLISHED
from transformers import AutoConfig, AutoModelForCausalLM

from flashformer import LoadError
from flashformer.checkpoint.tensor import Stored
from flashformer.formats import BF16, F16, F32, to_f32
from flashformer.model import Activation, QkNorm, RopeKind, load_model, read_family, read_spec
from flashformer.model.config import READ_KEYS
from flashformer.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src/flashformer/model/families"
FULL, SLIDING = "full_attention", "sliding_attention"
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)

WIDTHS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "eos_token_id": [2, 7]}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_attention_heads": 4, "head_dim": 20, "num_key_value_heads": None}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 9}),
    ("qwen2", {"bos_token_id": 5, "eos_token_id": 6}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
    ("granite", {"embedding_multiplier": 12, "logits_scaling": 8.0, "attention_bias": True, "mlp_bias": True}),
    ("smollm3", {"no_rope_layers": [1, 0], "bos_token_id": 1, "eos_token_id": 2}),
    ("olmo2", {"attention_bias": True, "eos_token_id": None}),
    ("phi3", {"partial_rotary_factor": 0.5, "num_key_value_heads": 3, "eos_token_id": 2}),
    ("gemma2", {"head_dim": 12}),
    ("gemma3_text", {"head_dim": 12, "tie_word_embeddings": False, "attention_bias": True}),
]


def their_roles(model: Any) -> dict[str, np.ndarray]:
    """Role -> what transformers computes with, from its modules and nothing else."""
    parts = {"embed": model.model.embed_tokens, "final_norm": model.model.norm, "lm_head": model.lm_head}
    roles = {role: part.weight for role, part in parts.items()}
    for i, layer in enumerate(model.model.layers):
        modules = dict(layer.named_modules())
        sandwich = "pre_feedforward_layernorm" in modules or "input_layernorm" not in modules
        norms = {
            "attn_norm": "input_layernorm",
            "ffn_norm": "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm",
            "attn_post_norm": "post_attention_layernorm" if sandwich else "none",
            "ffn_post_norm": "post_feedforward_layernorm",
            **{f"{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
        }
        linears = {f"self_attn.{x}_proj": x for x in "qkvo"} | {f"mlp.{x}_proj": x for x in ("gate", "up", "down")}
        roles |= {f"layers.{i}.{role}": modules[name].weight for role, name in norms.items() if name in modules}
        for name, role in linears.items():
            if name in modules:
                roles[f"layers.{i}.{role}"] = modules[name].weight
                if modules[name].bias is not None:
                    roles[f"layers.{i}.{role}_bias"] = modules[name].bias
        if "self_attn.qkv_proj" in modules:
            heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
            rows = modules["self_attn.qkv_proj"].weight.unflatten(0, (heads + 2 * kv_heads, -1))
            split = zip("qkv", rows.split([heads, kv_heads, kv_heads]), strict=True)
            roles |= {f"layers.{i}.{x}": part.flatten(0, 1) for x, part in split}
            halves = modules["mlp.gate_up_proj"].weight.chunk(2)
            roles |= {f"layers.{i}.gate": halves[0], f"layers.{i}.up": halves[1]}
    offset = 1.0 if "Gemma" in type(model).__name__ else 0.0
    return {r: (w.detach().float() + offset * r.endswith("norm")).numpy() for r, w in roles.items()}


@pytest.mark.parametrize(("model_type", "change"), CASES)
@pytest.mark.parametrize("stored", [F32, BF16, F16], ids=lambda f: f.name)
def test_saved_by_transformers(tmp_path: Path, model_type: str, change: dict[str, Any], stored: Any) -> None:
    """Every key that save_pretrained writes is accepted, and every role gets its tensor's values."""
    config = AutoConfig.for_model(model_type, **{**WIDTHS, **change})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, stored.config))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_model(tmp_path), model.config
    spec, layer, attention = ours.spec, ours.spec.layers[0], model.model.layers[0].self_attn
    assert spec == read_spec(json.loads((tmp_path / "config.json").read_text()))
    assert ours.stored_format is stored
    assert (layer.head_dim, layer.attention_scale) == (attention.head_dim, attention.scaling)
    assert layer.norm_eps == spec.final_norm_eps == theirs.rms_norm_eps
    assert (spec.max_positions, spec.bos_id) == (theirs.max_position_embeddings, theirs.bos_token_id)
    eos = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert spec.eos_ids == tuple(e for e in eos if e is not None)
    roles = their_roles(model)
    assert ours.weights.keys() == roles.keys() - ({"lm_head"} if theirs.tie_word_embeddings else set())
    for role, tensor in ours.weights.items():
        np.testing.assert_array_equal(to_f32(tensor.data, tensor.format), roles[role], role)
        assert isinstance(tensor.source, Stored) or role.endswith("norm")


# ---- keys of config.json


@every_family
def test_absent_keys_mean_what_they_mean_to_transformers(family: Any) -> None:
    bare = {"architectures": [family.architecture]}
    config = AutoConfig.for_model(family.model_type)
    assert read_spec(bare) == read_spec({**json.loads(config.to_json_string(use_diff=False)), **bare})
    shared = family.defaults.keys() & set(dir(type(config)))
    assert {key: family.defaults[key] for key in shared} == {key: getattr(type(config), key) for key in shared}
    beside = {"rope_theta", "rope_local_base_freq", "partial_rotary_factor", "sliding_window_pattern"}
    assert family.defaults.keys() - shared <= beside


@every_family
def test_no_key_of_transformers_is_undecided(family: Any) -> None:
    """Reasons are given, and a key has one treatment."""
    assert all(family.ignored.values())
    read = READ_KEYS | family.defaults.keys()
    read |= {source for source in family.switches.values() if isinstance(source, str)}
    assert read == READ_KEYS | family.defaults.keys()
    assert not read & family.plain.keys() | read & family.ignored.keys() | family.plain.keys() & family.ignored.keys()
    fields = AutoConfig.for_model(family.model_type).to_dict().keys()
    assert not fields - read - family.plain.keys() - family.ignored.keys()


# (windows, rotated layers, thetas, attention scale, pre_norm, post_norm, qk_norm) of all layers in order, in short.
FACTS: dict[str, tuple[Any, ...]] = {
    "Mistral-7B-v0.1": ([4096] * 32, "r" * 32, {1e4}, 128**-0.5, True, False, None),
    "Qwen2.5-7B-Instruct": ([None] * 28, "r" * 28, {1e6}, 128**-0.5, True, False, None),
    "Qwen3-8B": ([None] * 36, "r" * 36, {1e6}, 128**-0.5, True, False, QkNorm.HEAD),
    "granite-3.1-2b-instruct": ([None] * 40, "r" * 40, {5e6}, 0.015625, True, False, None),
    "SmolLM3-3B": ([None] * 36, "rrr-" * 9, {5e6}, 128**-0.5, True, False, None),
    "OLMo-2-1124-7B": ([None] * 32, "r" * 32, {5e5}, 128**-0.5, False, True, QkNorm.WIDTH),
    "Phi-3-mini-4k-instruct": ([2047] * 32, "r" * 32, {1e4}, 96**-0.5, True, False, None),
    "Phi-4-mini-instruct": ([262144] * 32, "r" * 32, {1e4}, 128**-0.5, True, False, None),
    "gemma-2-27b": ([4096, None] * 23, "r" * 46, {1e4}, 1 / 12, True, True, None),
    "gemma-3-1b-it": ([*[*[512] * 5, None] * 4, 512, 512], "r" * 26, {1e6, 1e4}, 1 / 16, True, True, QkNorm.HEAD),
}
# What is not 1, none or off in ModelSpec and in the first layer.
EXTRAS: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B-Instruct": {"qkv_bias": True},
    "granite-3.1-2b-instruct": {"embed_multiplier": 12.0, "logits_multiplier": 0.125, "residual_multiplier": 0.22},
    "gemma-2-27b": {"embed_multiplier": 4608**0.5, "logits_softcap": 30.0, "score_softcap": 50.0},
    "gemma-3-1b-it": {"embed_multiplier": 1152**0.5},
}
PLAIN = {"embed_multiplier": 1.0, "logits_multiplier": 1.0, "logits_softcap": None}
PLAIN |= {"residual_multiplier": 1.0, "score_softcap": None, "qkv_bias": False, "o_bias": False, "mlp_bias": False}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name: str) -> None:
    """As published (spelling of transformers 4), and as transformers 5 saves the same config."""
    config = PUBLISHED[name]
    spec = read_spec(config)
    windows, rotated, thetas, scale, pre_norm, post_norm, qk_norm = FACTS[name]
    assert [layer.window for layer in spec.layers] == windows
    assert "".join("r" if layer.rope else "-" for layer in spec.layers) == rotated
    assert {rope.theta for rope in spec.ropes} == thetas
    distinct = set(zip(windows, rotated, strict=True))
    assert len({id(layer) for layer in spec.layers}) == len(set(spec.layers)) == len(distinct)
    gelu = "gemma" in name
    for layer in spec.layers:
        assert layer.attention_scale == pytest.approx(scale, rel=1e-12)
        assert (layer.pre_norm, layer.post_norm, layer.qk_norm) == (pre_norm, post_norm, qk_norm)
        assert layer.activation is (Activation.GELU_TANH if gelu else Activation.SILU)
        assert layer.rope is None or layer.rope.theta == (1e4 if layer.window == 512 else max(thetas))
        for key, value in {**PLAIN, **EXTRAS.get(name, {})}.items():
            assert getattr(layer if hasattr(layer, key) else spec, key) == value, key
    whole = json.loads(AutoConfig.for_model(**deepcopy(config)).to_json_string(use_diff=False))
    assert "rope_parameters" in whole
    assert "rope_theta" not in whole
    assert read_spec({**whole, "architectures": config["architectures"]}) == spec


def test_partly_rotated_heads() -> None:
    rope = read_spec(PUBLISHED["Phi-4-mini-instruct"]).layers[0].rope
    assert rope is not None
    assert (rope.kind, rope.rotary_dim, rope.original_positions) == (RopeKind.LONGROPE, 96, 4096)
    assert rope.long_factors == tuple(FACTORS["long_factor"])


def test_layer_types_win_where_transformers_reads_them() -> None:
    upper = {"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 4}
    config = {**PUBLISHED["Qwen2.5-7B-Instruct"], **upper, "max_window_layers": 3}
    assert [layer.window for layer in read_spec(config).layers] == [None, None, None, 64]
    types = [SLIDING, FULL, SLIDING, FULL]
    assert [layer.window for layer in read_spec({**config, "layer_types": types}).layers] == [64, None, 64, None]
    stated = {**PUBLISHED["Mistral-7B-v0.1"], "num_hidden_layers": 2, "layer_types": [SLIDING] * 2}
    assert read_spec(stated).layers[0].window == 4096


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("Mistral-7B-v0.1", {"layer_types": [FULL] * 32}, ("layer_types[0]", "expected sliding_attention")),
        ("Mistral-7B-v0.1", {"sliding_window": 0}, ("sliding_window = 0",)),
        ("Mistral-7B-v0.1", {"attention_bias": True}, ("attention_bias = True",)),
        ("Qwen2.5-7B-Instruct", {"layer_types": [SLIDING] * 28}, ("use_sliding_window = False", "layer 0")),
        ("Qwen2.5-7B-Instruct", {"layer_types": [FULL] * 27}, ("layer_types", "list of 28")),
        (
            "Qwen2.5-7B-Instruct",
            {"layer_types": [FULL] * 27 + ["linear_attention"]},
            ("layer_types[27]", "linear_attention"),
        ),
        ("Qwen2.5-7B-Instruct", {"max_window_layers": -1}, ("max_window_layers = -1",)),
        ("Qwen2.5-7B-Instruct", {"use_sliding_window": 1}, ("use_sliding_window = 1", "true or false")),
        ("Qwen3-8B", {"num_experts": 128}, ("'num_experts' = 128", "Qwen3ForCausalLM")),
        ("Qwen3-8B", {"head_dim": 512}, ("head_dim = 512", "256")),
        ("granite-3.1-2b-instruct", {"logits_scaling": 0}, ("logits_scaling = 0", "positive")),
        ("granite-3.1-2b-instruct", {"residual_multiplier": "1"}, ("residual_multiplier = '1'",)),
        ("granite-3.1-2b-instruct", {"num_local_experts": 8}, ("num_local_experts",)),
        ("SmolLM3-3B", {"no_rope_layers": [1] * 35}, ("no_rope_layers", "36 layers")),
        ("SmolLM3-3B", {"no_rope_layers": [2] * 36}, ("no_rope_layers",)),
        ("SmolLM3-3B", {"no_rope_layers": None, "no_rope_layer_interval": 0}, ("no_rope_layer_interval = 0",)),
        ("OLMo-2-1124-7B", {"clip_qkv": 8.0}, ("clip_qkv",)),
        ("OLMo-2-1124-7B", {"sliding_window": 4096}, ("sliding_window = 4096",)),
        ("Phi-4-mini-instruct", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ("yarn", "longrope")),
        ("Phi-4-mini-instruct", {"partial_rotary_factor": 1.0}, ("short_factor", "64")),
        ("Phi-4-mini-instruct", {"lm_head_bias": True}, ("lm_head_bias",)),
        ("gemma-2-27b", {"sliding_window": None}, ("sliding_window = None", "layer 0")),
        ("gemma-2-27b", {"use_bidirectional_attention": True}, ("use_bidirectional_attention = True",)),
        ("gemma-2-27b", {"attn_logit_softcapping": 0.0}, ("attn_logit_softcapping = 0.0", "null")),
        ("gemma-2-27b", {"hidden_activation": "gelu"}, ("hidden_activation = 'gelu'", "gelu_pytorch_tanh")),
        ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping = 50.0", "null")),
        ("gemma-3-1b-it", {"rope_parameters": {"rope_type": "default"}}, ("rope_parameters", "sliding_attention")),
        ("gemma-3-1b-it", {"attention_sinks": True}, ("attention_sinks",)),
        ("gemma-3-1b-it", {"quantization_config": {"quant_method": "awq"}}, ("quantization_config", "awq")),
    ],
)
def test_a16_refused_by_name(name: str, change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(LoadError) as caught:
        read_spec({**PUBLISHED[name], **change})
    for word in words:
        assert word in str(caught.value)


def test_models_of_more_than_text_are_refused() -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {}}
    with pytest.raises(LoadError, match=r"Gemma3ForConditionalGeneration.*text model alone"):
        read_spec(config)


# ---- where families live


def test_the_readme_shows_every_family() -> None:
    text = families_table.README.read_text()
    assert families_table.filled(text) == text
    for family in FAMILIES.values():
        assert f"| {family.name} | `{family.architecture}` |" in text
        assert read_family({"model_type": family.model_type}) is family
    for broken in (text.replace("<!-- families -->", ""), text + "<!-- families -->"):
        with pytest.raises(SystemExit, match="markers"):
            families_table.filled(broken)


def test_family_files_are_small() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert len(lengths) > len(FAMILIES)
    assert {name: n for name, n in lengths.items() if n >= 120} == {}


# A kind of rotation and the names of shapes are called after families; tokenizer_class.py lists tokenizers.
NAMED_AFTER = re.compile(r"(?i)llama3|shape:[\w.-]+")
FAMILY_NAMES = re.compile(r"(?i)llama|mistral|mixtral|qwen|granite|smollm|olmo|gemma|phi[-_]?\d")


def names_in_python(text: str) -> list[str]:
    """Identifiers and strings that name a family; comments and docstrings may."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)}
    words = [str(value) for node in ast.walk(tree) if id(node) not in docs for _, value in ast.iter_fields(node)]
    return [w for w in words if "<ast." not in w and FAMILY_NAMES.search(NAMED_AFTER.sub("", w))]


def names_in_native(text: str) -> list[str]:
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    return FAMILY_NAMES.findall(NAMED_AFTER.sub("", code))


def test_no_family_name_below_families() -> None:
    python = [p for p in (ROOT / "src").rglob("*.py") if FOLDER not in p.parents and p.name != "tokenizer_class.py"]
    native = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cuh")]
    assert python
    assert native
    found = {str(p): names_in_python(p.read_text()) for p in python} | {
        str(p): names_in_native(p.read_text()) for p in native
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_the_search_for_names_finds_them() -> None:
    for code in (
        "def qwen_rope(): ...",
        "x = 'Phi3ForCausalLM'",
        "import gemma",
        "f(llama=1)",
        "a.olmo",
        "f'{x}mistral'",
    ):
        assert names_in_python(code), code
    for code in ('"""Like Gemma."""', "x = 1  # qwen", "LLAMA3 = 'llama3'", "x = 'try shape:llama-3.2-1b'"):
        assert not names_in_python(code), code
    assert names_in_native("int granite;")
    assert not names_in_native("int x; // as Llama\n/* Qwen\n */")
