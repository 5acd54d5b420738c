"""config.json -> ModelSpec. Every key is read, accepted at a plain value, ignored for a reason, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..checkpoint.files import shown
from ..errors import LoadError
from .families import FAMILIES
from .family import Family
from .rope import read_rope
from .spec import MAX_HEAD_DIM, Activation, LayerSpec, ModelSpec

READ_KEYS = frozenset(
    {
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"),
        *("rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
        *("bos_token_id", "eos_token_id"),
    }
)

# Far above any model; they keep a damaged file from deciding how much is allocated.
LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": MAX_HEAD_DIM,
    "max_position_embeddings": 2**24,
}


def read_family(config: Mapping[str, Any]) -> Family:
    """The family that `architectures`, or without it `model_type`, names. Raises LoadError."""
    supported = f"supported: {', '.join(FAMILIES)}. `flashformer doctor` prints what to put into a request for it"
    by_type = {family.model_type: family.architecture for family in FAMILIES.values()}
    named = config.get("architectures")
    if named is None:
        named = [by_type.get(str(config.get("model_type")), config.get("model_type"))]
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str) or named[0] not in FAMILIES:
        raise LoadError(f"config.json: architecture {shown(named)} is not supported; {supported}")
    family = FAMILIES[named[0]]
    if config.get("model_type", family.model_type) != family.model_type:
        raise LoadError(
            f"config.json: model_type = {shown(config['model_type'])} does not belong to {family.architecture}, "
            f"expected {family.model_type!r}; {supported}"
        )
    return family


def read_spec(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelSpec:
    """A validated ModelSpec; `eos_ids` is the union of both files' ids, sorted.

    Raises LoadError naming the key or the relation that fails, before anything is allocated that a number decides.
    """
    family = read_family(config)
    _refuse_unknown(config, family)
    values: dict[str, Any] = {**family.defaults, **config}
    d_model, n_heads = _integer(values, "hidden_size"), _integer(values, "num_attention_heads")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = n_heads
    n_kv_heads = _integer(values, "num_key_value_heads")
    if n_heads % n_kv_heads:
        _refuse(f"num_attention_heads = {n_heads} is not a multiple of num_key_value_heads = {n_kv_heads}")
    if values.get("head_dim") is None:
        if d_model % n_heads:
            _refuse(f"hidden_size = {d_model} is not a multiple of num_attention_heads = {n_heads}, head_dim is absent")
        values["head_dim"] = d_model // n_heads
    head_dim = _integer(values, "head_dim")
    if head_dim % 2:
        _refuse(f"head_dim = {head_dim} is odd; rotary positions need pairs")
    if values.get("hidden_act", "silu") not in tuple(Activation):
        _refuse(f"hidden_act = {shown(values['hidden_act'])} is not supported; supported: {', '.join(Activation)}")
    n_layers = _integer(values, "num_hidden_layers")
    kinds = values.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * n_layers:
        _refuse(f"layer_types = {shown(kinds)} is not supported; expected full_attention in all {n_layers} layers")
    eps = values.get("rms_norm_eps")
    if not isinstance(eps, float) or not 0 < eps < 1:
        _refuse(f"rms_norm_eps = {shown(eps)}: expected a number between 0 and 1")
    layer = LayerSpec(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=_integer(values, "intermediate_size"),
        qkv_bias=_switch(values, family.switches["qkv_bias"]),
        o_bias=_switch(values, family.switches["o_bias"]),
        mlp_bias=_switch(values, family.switches["mlp_bias"]),
        norm_eps=eps,
        activation=Activation(values.get("hidden_act", "silu")),
        attention_scale=head_dim**-0.5,
    )
    vocab_size = _integer(values, "vocab_size")
    bos = _token_ids(values.get("bos_token_id"), vocab_size, "config.json: bos_token_id")
    if len(bos) > 1:
        _refuse(f"bos_token_id = {shown(bos)}: expected one id or null")
    eos = _token_ids(values.get("eos_token_id"), vocab_size, "config.json: eos_token_id")
    more_eos = (generation_config or {}).get("eos_token_id")
    return ModelSpec(
        d_model=d_model,
        vocab_size=vocab_size,
        max_positions=_integer(values, "max_position_embeddings"),
        layers=(layer,) * n_layers,
        final_norm_eps=eps,
        rope=read_rope(values),
        tied=_switch(values, "tie_word_embeddings"),
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(sorted({*eos, *_token_ids(more_eos, vocab_size, "generation_config.json: eos_token_id")})),
    )


def _refuse(message: str) -> NoReturn:
    raise LoadError(f"config.json: {message}")


def _refuse_unknown(config: Mapping[str, Any], family: Family) -> None:
    known = READ_KEYS | {s for s in family.switches.values() if isinstance(s, str)}
    values: dict[str, Any] = {**family.defaults, **config}
    for key, value in values.items():
        if key in family.plain:
            if value not in family.plain[key]:
                absent = "" if key in config else " (what its absence means)"
                expected = " or ".join("null" if v is None else repr(v) for v in family.plain[key])
                _refuse(f"{key} = {shown(value)}{absent} is not supported; expected {expected}")
        elif key not in known and key not in family.ignored:
            _refuse(
                f"key {shown(key)} = {shown(value)} is not known for {family.architecture} and may change the result; "
                "it is not supported"
            )


def _integer(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 1 <= value <= LIMITS[key]:
        raise LoadError(f"config.json: {key} = {shown(value)}: expected an integer from 1 to {LIMITS[key]}")
    return value


def _switch(values: Mapping[str, Any], source: str | bool) -> bool:
    """`source` is a config key, off where absent, or the value itself."""
    value = values.get(source, False) if isinstance(source, str) else source
    if not isinstance(value, bool):
        raise LoadError(f"config.json: {source} = {shown(value)}: expected true or false")
    return value


def _token_ids(value: Any, vocab_size: int, where: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise LoadError(f"{where} = {shown(value)}: expected ids from 0 to vocab_size - 1 = {vocab_size - 1}")
    return ids
