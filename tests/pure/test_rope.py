"""Rotary positions against transformers' rotary embeddings, for every kind."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from flashformer.errors import LoadError
from flashformer.model import RopeKind, RopeSpec, rope_table, shape_config
from flashformer.model.rope import inverse_frequencies, model_positions, read_rope

POSITIONS = "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"
BASE: dict[str, Any] = {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 5, POSITIONS: 256}

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.5}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    short, long = [1.0 + 0.03 * i for i in range(pairs)], [1.1 + 0.7 * i for i in range(pairs)]
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **more}


def without(key: str, params: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in params.items() if k != key}


def table_of(rotary: Any, n_positions: int, *layer_type: str) -> np.ndarray[Any, Any]:
    """What one call over all positions rotates by."""
    cos, sin = rotary(torch.zeros(1), torch.arange(n_positions)[None], *layer_type)
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return np.stack([cos[0, :, :half].numpy(), sin[0, :, :half].numpy()], 1)


def error(rope: RopeSpec, theirs: np.ndarray[Any, Any]) -> float:
    ours = rope_table(rope, len(theirs))
    assert ours.shape == theirs.shape == (len(theirs), 2, rope.rotary_dim // 2)
    assert ours.dtype == np.float32
    return float(np.abs(ours.astype(np.float64) - theirs).max())


def llama(config: dict[str, Any], n_positions: int, phi3: bool = False) -> tuple[RopeSpec, np.ndarray[Any, Any]]:
    """Ours and theirs. They write into nested objects."""
    values = BASE | config
    make, rotary = (Phi3Config, Phi3RotaryEmbedding) if phi3 else (LlamaConfig, LlamaRotaryEmbedding)
    their_config = make(**deepcopy(values), pad_token_id=None)
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if phi3:
        values = {ORIGINAL: 4096} | values
    return read_rope(values, head_dim=head_dim), table_of(rotary(their_config), n_positions)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "smollm2-135m", "mistral-7b-v0.3", "qwen2.5-0.5b"])
def test_named_shapes_equal_transformers(name: str) -> None:
    shape = shape_config(name)
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling")
    config = {k: shape[k] for k in (*keys, POSITIONS) if k in shape}
    assert error(*llama(config, shape[POSITIONS] // 4 + 3)) <= 1e-6


SCALINGS: list[tuple[dict[str, Any] | None, list[int]]] = [
    (None, [513]),
    (LINEAR, [513]),
    (LINEAR | {"factor": 1.7}, [513]),
    (DYNAMIC, [1, 255, 256, 257, 513]),
    (DYNAMIC | {"factor": 1.0}, [256, 300]),
    (DYNAMIC | {"factor": 7.3}, [256, 513]),
    (LLAMA3, [513]),
    (LLAMA3 | {"factor": 6.5, "low_freq_factor": 1.3}, [513]),
    (LLAMA3 | {ORIGINAL: 96}, [513]),
    (without(ORIGINAL, LLAMA3), [513]),
    (YARN, [513]),
    (YARN | {"factor": None}, [513]),
    (YARN | {"factor": 2.3, ORIGINAL: 100}, [513]),
    (without(ORIGINAL, YARN), [513]),
    (YARN | {"truncate": False}, [513]),
    (YARN | {"truncate": False, "beta_fast": 20, "beta_slow": 1.5, ORIGINAL: 200}, [513]),
    (YARN | {"beta_fast": 1, "beta_slow": 1}, [513]),
    (YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None}, [513]),
    (YARN | {"attention_factor": 1.37}, [513]),
    (YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}, [513]),
    (YARN | {"mscale": 0.7}, [513]),
    (YARN | {"mscale_all_dim": 0.7, "mscale": 0}, [513]),
    (YARN | {"factor": 1.0, ORIGINAL: 256}, [513]),
    (YARN | {ORIGINAL: 4}, [513]),
]


@pytest.mark.parametrize("head_dim", [4, 6, 10, 48, 112, 256])
@pytest.mark.parametrize(("scaling", "lengths"), SCALINGS)
def test_tables_equal_transformers(head_dim: int, scaling: dict[str, Any] | None, lengths: list[int]) -> None:
    """Where PyTorch rounds a power differently, angles differ in the last bit of up to 513 radians."""
    for length in lengths:
        rope, theirs = llama({"head_dim": head_dim, "rope_theta": 12345.6, "rope_scaling": scaling}, length)
        assert error(rope, theirs) <= 513 * 2.0**-23 * rope.attention_factor
        assert rope.rotary_dim == head_dim


@pytest.mark.parametrize("more", [{}, {"factor": 3.0}, {"attention_factor": 1.6}, {"factor": 2.0, ORIGINAL: 50}])
@pytest.mark.parametrize("length", [1, 49, 50, 51, 300])
def test_longrope_equals_transformers_on_both_sides_of_the_switch(more: dict[str, Any], length: int) -> None:
    config = {"rope_scaling": longrope(6, **({ORIGINAL: 50} | more)), "rope_theta": 3e4}
    rope, theirs = llama(config, length)
    assert error(rope, theirs) <= 513 * 2.0**-23 * rope.attention_factor
    assert rope.attention_factor > 1
    assert not np.allclose(inverse_frequencies(rope, length), inverse_frequencies(rope, 300 if length <= 50 else 1))


@pytest.mark.parametrize(("share", "rotated"), [(1.0, 24), (0.75, 18), (0.5, 12), (0.4, None), (0.1, 2)])
@pytest.mark.parametrize("beside", [True, False])
def test_partial_rotation_as_in_phi3(share: float, rotated: int | None, beside: bool) -> None:
    """0.4 of 24 is 9 elements, an odd number."""
    sizes = {"hidden_size": 120, "partial_rotary_factor" if beside else "unused": share}
    params = {} if beside else {"partial_rotary_factor": share}
    if rotated is None:
        with pytest.raises(LoadError, match="rotates 9 elements"):
            read_rope(BASE | sizes | {"rope_parameters": {"rope_type": "default", **params}}, head_dim=24)
        return
    for scaling in {"rope_type": "default"}, longrope(rotated // 2):
        config = without("unused", sizes) | {ORIGINAL: 100, "rope_parameters": {**scaling, **params}}
        for length in 90, 200:
            rope, theirs = llama(config, length, phi3=True)
            assert rope.rotary_dim == rotated
            assert error(rope, theirs) <= 513 * 2.0**-23 * rope.attention_factor


def test_phi3_positions_beside_the_parameters_win() -> None:
    scaling = longrope(6, **{ORIGINAL: 32})
    for beside, expected in ({ORIGINAL: 64}, 64), ({}, 4096):
        rope, theirs = llama({"rope_scaling": scaling, **beside}, 70, phi3=True)
        assert rope.original_positions == expected
        assert error(rope, theirs) <= 1e-5
    old = {"type": "su", **without("rope_type", scaling)}
    rope, theirs = llama({"rope_scaling": old, ORIGINAL: 64}, 70, phi3=True)
    assert rope.kind is RopeKind.LONGROPE
    assert error(rope, theirs) <= 1e-5
    saved = Phi3Config(**(BASE | {"rope_scaling": deepcopy(old), ORIGINAL: 64}), pad_token_id=None).to_dict()
    assert read_rope(saved, head_dim=12) == rope


GEMMA3: list[dict[str, Any]] = [
    {},
    {"rope_theta": 77777.0, "rope_local_base_freq": 123.0},
    {"rope_scaling": LINEAR, "rope_theta": 77777.0, "rope_local_base_freq": 123.0},
    {"rope_scaling": DYNAMIC},
    {"rope_scaling": YARN},
    {"rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 5e5}, "sliding_attention": {"rope_theta": 321.0}}},
    {"rope_parameters": {"full_attention": YARN, "sliding_attention": LLAMA3 | {ORIGINAL: 64}}, "rope_theta": 999.0},
    {"rope_parameters": {"full_attention": {"rope_theta": 99.0}, "sliding_attention": None}, "rope_scaling": LINEAR},
    {"rope_parameters": {"sliding_attention": {"rope_theta": 55.0, "rope_type": "default"}}},
]


@pytest.mark.parametrize("config", GEMMA3)
@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_two_rotations_as_in_gemma3(config: dict[str, Any], layer_type: str) -> None:
    config = {"num_hidden_layers": 6, "head_dim": 12, **BASE, **config}
    their_config = Gemma3TextConfig(**deepcopy(config))
    theirs = table_of(Gemma3RotaryEmbedding(their_config), 300, layer_type)
    values = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, **config}
    rope = read_rope(values, layer_type, head_dim=12)
    assert error(rope, theirs) <= 513 * 2.0**-23 * rope.attention_factor
    saved = {**their_config.to_dict(), "rope_local_base_freq": 1e4}
    assert read_rope(saved, layer_type, head_dim=12) == rope


def test_spellings_agree() -> None:
    def rope(**keys: Any) -> RopeSpec:
        return read_rope(BASE | keys, head_dim=8)

    new = rope(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert new == RopeSpec(RopeKind.LLAMA3, 5e5, 8, 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    old_name = {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}
    assert new == rope(rope_theta=5e5, rope_scaling=LLAMA3) == rope(rope_theta=5e5, rope_scaling=old_name)
    assert new == rope(rope_scaling={**LLAMA3, "rope_theta": 5e5}, rope_parameters={"rope_type": "default"})
    assert new == rope(rope_scaling={}, rope_parameters={**LLAMA3, "type": "llama3"}, rope_theta=5e5)
    plain = RopeSpec(RopeKind.DEFAULT, 10000.0, 8)
    assert plain == rope() == rope(rope_scaling=None) == rope(rope_scaling={"type": "default"}, rope_theta=1e4)
    for keys in ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_theta": 77}, {}):
        theirs = LlamaConfig(**deepcopy(BASE | keys)).rope_parameters
        assert (rope(**keys).kind, rope(**keys).theta) == (theirs["rope_type"], theirs["rope_theta"])


def test_frequencies_of_dynamic_follow_the_context() -> None:
    """The same up to the original positions, slower with every longer context."""
    rope = read_rope(BASE | {"rope_scaling": DYNAMIC}, head_dim=8)
    at = [inverse_frequencies(rope, n) for n in (1, 256, 257, 400, 1000)]
    assert np.array_equal(at[0], at[1])
    assert all((longer[1:] < shorter[1:]).all() for shorter, longer in pairwise(at[1:]))


def test_positions_of_a_model() -> None:
    def positions(**keys: Any) -> int:
        return model_positions(BASE | keys, [read_rope(BASE | keys, head_dim=12)])

    assert positions() == positions(rope_scaling=LINEAR) == positions(rope_scaling=LLAMA3) == 256
    assert positions(rope_scaling=YARN) == positions(rope_scaling=longrope(6, **{ORIGINAL: 32})) == 256
    assert positions(rope_scaling=YARN | {"factor": 8.01}) == 513
    assert positions(rope_scaling=without(ORIGINAL, YARN)) == 1024
    assert positions(rope_scaling=DYNAMIC) == 640
    assert model_positions(BASE, []) == 256
    with pytest.raises(LoadError, match="factor"):
        positions(rope_scaling=DYNAMIC | {"factor": 1e9})
    with pytest.raises(LoadError, match=POSITIONS):
        model_positions({}, [])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "mrope"),
    ({"rope_scaling": {"rope_type": "proportional"}}, "proportional"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "yarn"),
    ({"rope_scaling": LINEAR | {"type": "dynamic"}}, "dynamic"),
    ({"rope_scaling": "linear"}, "expected an object"),
    ({"rope_parameters": [1]}, "expected an object"),
    ({"rope_scaling": {"factor": 2.0}}, "factor"),
    ({"rope_scaling": {"mrope_section": [1, 2, 3]}}, "mrope_section"),
    ({"rope_scaling": LINEAR | {ORIGINAL: 64}}, ORIGINAL),
    ({"rope_scaling": LLAMA3 | {"beta_fast": 32}}, "beta_fast"),
    ({"rope_scaling": YARN | {"tuned": True}}, "tuned"),
    ({"rope_scaling": longrope(6, short_mscale=1.0)}, "short_mscale"),
    ({"rope_scaling": without("factor", LINEAR)}, "factor = None"),
    ({"rope_scaling": LINEAR | {"factor": 0.5}}, "factor = 0.5"),
    ({"rope_scaling": DYNAMIC | {"factor": 0}}, "factor = 0"),
    ({"rope_scaling": DYNAMIC | {"factor": True}}, "factor = True"),
    ({"rope_scaling": DYNAMIC | {"factor": float("inf")}}, "factor = inf"),
    ({"rope_scaling": DYNAMIC | {"factor": float("nan")}}, "factor = nan"),
    ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor = '8'"),
    ({"rope_scaling": without("low_freq_factor", LLAMA3)}, "low_freq_factor = None"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor = 1.0"),
    ({"rope_scaling": LLAMA3 | {ORIGINAL: 100.5}}, ORIGINAL),
    ({"rope_scaling": YARN | {ORIGINAL: 2**40}}, ORIGINAL),
    ({"rope_scaling": YARN | {ORIGINAL: 512, "factor": None}}, "factor = 0.5"),
    ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}}, "beta_slow"),
    ({"rope_scaling": YARN | {"truncate": 1}}, "truncate"),
    ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor"),
    ({"rope_scaling": YARN | {"mscale": -1.0}}, "mscale"),
    ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta"),
    ({"rope_scaling": longrope(5)}, "short_factor"),
    ({"rope_scaling": longrope(6) | {"long_factor": [1.0] * 7}}, "long_factor"),
    ({"rope_scaling": longrope(6) | {"long_factor": [1.0] * 5 + [0.0]}}, "long_factor = 0.0"),
    ({"rope_scaling": longrope(6) | {"short_factor": None}}, "short_factor = None"),
    ({"rope_scaling": longrope(6, factor=0.9)}, "factor = 0.9"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": "1e4"}, "rope_theta"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.01}, "rotates 0 elements"),
    ({"rope_scaling": DYNAMIC, "partial_rotary_factor": 0.17}, "at least 4"),
    ({"rope_scaling": DYNAMIC, POSITIONS: None}, POSITIONS),
    ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}}, "full_attention"),
    ({"rope_local_base_freq": 1e4, "rope_parameters": LINEAR}, "factor"),
    ({"rope_local_base_freq": 1e4, "rope_parameters": {"full_attention": 1}}, "expected an object"),
    ({"rope_local_base_freq": 1e4, "rope_scaling": YARN | {"truncate": False}}, "truncate"),
    ({"rope_local_base_freq": 1e4, ORIGINAL: 32}, ORIGINAL),
]


@pytest.mark.parametrize(("config", "named"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(LoadError) as refusal:
        read_rope(BASE | config, head_dim=12)
    assert named in str(refusal.value)
    assert "config.json" in str(refusal.value)
