"""`shape:NAME` models in memory, and the folders that tools/make_checkpoint.py writes, against transformers."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import make_checkpoint
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flashformer import LoadError
from flashformer.formats import BF16, F32, to_f32
from flashformer.model import Model, load_model, shape_config, shape_names

NAMES = [
    "granite-3.1-2b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "mistral-7b-v0.3",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "smollm2-135m",
]


def meta_model(config: dict[str, Any]) -> Any:
    """The transformers model without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def n_parameters(model: Model) -> int:
    return sum(int(np.prod(t.data.shape)) for t in model.weights.values())


def test_names() -> None:
    assert shape_names() == NAMES
    with pytest.raises(LoadError) as caught:
        load_model("shape:gpt-5")
    for name in ("shape:gpt-5", *NAMES):
        assert name in str(caught.value)
    with pytest.raises(LoadError, match="no such shape"):
        load_model("shape:../shapes/smollm2-135m")


@pytest.mark.parametrize("name", NAMES)
def test_random_model_has_the_shape_of_the_real_one(name: str) -> None:
    tracemalloc.start()
    try:
        ours = load_model(f"shape:{name}")
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    theirs = meta_model(shape_config(name))
    assert n_parameters(ours) == sum(p.numel() for p in theirs.parameters())
    assert held < 20e6
    assert ours.tokenizer is None
    assert ours.stored_format is BF16
    assert ours.max_positions == theirs.config.max_position_embeddings
    assert ours.spec.eos_ids == (theirs.config.eos_token_id,)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b"])
def test_random_values(name: str) -> None:
    ours, again = load_model(f"shape:{name}"), load_model(f"shape:{name}")
    firsts = []
    for role, tensor in ours.weights.items():
        assert not tensor.data.flags.writeable
        values = to_f32(tensor.data, BF16)
        np.testing.assert_array_equal(tensor.data[:50], again.weights[role].data[:50])
        if role.endswith("norm"):
            assert (values == 1).all()
            continue
        assert values.std() == pytest.approx(0.02, rel=0.5)  # a bias has as few as 128 values
        if values.ndim == 2:
            assert values.mean() == pytest.approx(0, abs=0.001)
            assert values.std() == pytest.approx(0.02, rel=0.05)
            assert len(np.unique(values[:, :16], axis=0)) == len(values)
        firsts.append(tuple(values.ravel()[:64]))
    assert len(set(firsts)) == len(firsts) > 100


@pytest.mark.parametrize("name", NAMES)
def test_folder_loads_strictly_in_transformers(tmp_path: Path, name: str) -> None:
    make_checkpoint.main([name, str(tmp_path), "--layers", "1", "--vocab", "300"])
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype is torch.bfloat16
    assert theirs.config.architectures == shape_config(name)["architectures"]
    weights = theirs.model.layers[0].self_attn.v_proj.weight.float()
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    norm = theirs.model.norm.weight.float()
    assert norm.mean().item() == pytest.approx(1, abs=0.01)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("héllo")
    assert ids[0] == theirs.config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "héllo"
    assert max(tokenizer.get_vocab().values()) < 300
    ours = load_model(str(tmp_path))
    assert ours.stored_format is BF16
    assert ours.tokenizer is not None
    assert ours.tokenizer.encode("héllo") == ids
    assert n_parameters(ours) == theirs.num_parameters()
    embed = theirs.get_input_embeddings().weight
    np.testing.assert_array_equal(ours.weights["embed"].data, embed.view(torch.uint16).numpy())


def test_folder_in_f32_and_seeds(tmp_path: Path) -> None:
    def folder(sub: str, *options: str) -> Path:
        make_checkpoint.main(["smollm2-135m", str(tmp_path / sub), "--layers", "2", "--vocab", "258", *options])
        return tmp_path / sub

    wide, narrow = load_model(folder("wide", "--dtype", "f32")), load_model(folder("narrow"))
    other = load_model(folder("other", "--seed", "1"))
    assert wide.stored_format is F32
    assert wide.spec == narrow.spec == other.spec
    for role, tensor in wide.weights.items():
        values = to_f32(tensor.data, F32)
        np.testing.assert_allclose(to_f32(narrow.weights[role].data, BF16), values, rtol=2.0**-8)
        assert (narrow.weights[role].data != other.weights[role].data).any()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype is torch.float32


def test_biases_and_untied_head_of_any_config(tmp_path: Path) -> None:
    config = {
        **shape_config("smollm2-135m"),
        **{"hidden_size": 36, "intermediate_size": 20, "head_dim": 8, "num_hidden_layers": 1, "vocab_size": 260},
        **{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    }
    make_checkpoint.write_folder(tmp_path, config, F32)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ours = load_model(tmp_path)
    assert {r for r in ours.weights if r.endswith("bias")} == {
        f"layers.0.{x}_bias" for x in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert n_parameters(ours) == theirs.num_parameters()


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="258"):
        make_checkpoint.main(["smollm2-135m", str(tmp_path / "x"), "--vocab", "257"])
    assert not (tmp_path / "x").exists()


def test_shapes_are_plain_json() -> None:
    for name in NAMES:
        assert json.loads(json.dumps(shape_config(name))) == shape_config(name)
