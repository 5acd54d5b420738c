"""config.json -> ModelSpec. Every key is read, accepted at a plain value, ignored for a reason, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..checkpoint.files import shown
from ..errors import LoadError
from .families import FAMILIES
from .family import Family, Power
from .rope import FULL, SLIDING, model_positions, read_rope
from .spec import MAX_HEAD_DIM, Activation, LayerSpec, ModelSpec

# Read of every family, beside those in its `defaults`.
READ_KEYS = frozenset(
    {
        *("architectures", "model_type", "bos_token_id", "eos_token_id", "head_dim", "layer_types"),
        *("rope_theta", "rope_scaling", "rope_parameters"),
    }
)

# Lowest and highest value: far above any model; they keep a damaged file from deciding how much is allocated.
LIMITS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**18),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (1, MAX_HEAD_DIM),
    "max_position_embeddings": (1, 2**24),
    "original_max_position_embeddings": (1, 2**24),
    "sliding_window": (1, 2**31),
    "sliding_window_pattern": (1, 1024),
    "max_window_layers": (0, 1024),
    "no_rope_layer_interval": (1, 1024),
}
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")


def read_family(config: Mapping[str, Any]) -> Family:
    """The family that `architectures`, or without it `model_type`, names. Raises LoadError."""
    supported = (
        f"supported: {', '.join(FAMILIES)}. `flashformer doctor --model MODEL` prints what to put into a request for it"
    )
    by_type = {family.model_type: family.architecture for family in FAMILIES.values()}
    named = config.get("architectures")
    if named is None:
        named = [by_type.get(str(config.get("model_type")), config.get("model_type"))]
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str) or named[0] not in FAMILIES:
        nested = "text_config" in config
        hint = "it reads more than text; a checkpoint of its text model alone is needed; " if nested else ""
        raise LoadError(f"config.json: architecture {shown(named)} is not supported; {hint}{supported}")
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
    values = _checked({**family.defaults, **config}, family)
    layers, vocab_size = _layers(values, family), values["vocab_size"]
    bos = _token_ids(config, family, "bos_token_id", vocab_size)
    if len(bos) > 1:
        _refuse(f"bos_token_id = {shown(config['bos_token_id'])}: expected one id or null")
    generation = generation_config or {}
    eos = _stated_ids(generation.get("eos_token_id"), vocab_size, "generation_config.json: eos_token_id")
    if not eos or "eos_token_id" in config:
        eos = [*eos, *_token_ids(config, family, "eos_token_id", vocab_size)]
    return ModelSpec(
        d_model=values["hidden_size"],
        vocab_size=vocab_size,
        max_positions=model_positions(values, [layer.rope for layer in set(layers) if layer.rope]),
        layers=layers,
        final_norm_eps=layers[0].norm_eps,
        tied=_switch(values, "tie_word_embeddings"),
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(sorted(set(eos))),
        embed_multiplier=_factor(values, family.embed_multiplier),
        logits_multiplier=_factor(values, family.logits_multiplier),
        logits_softcap=_softcap(values, family.logits_softcap),
    )


def _checked(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """`values` with every integer in its range and what follows from null filled in."""
    for key in LIMITS:
        read = key in values and key not in family.ignored
        if read and (values[key] is not None or key not in _MAY_BE_NULL):
            _integer(values, key)
    d_model, n_heads = values["hidden_size"], values["num_attention_heads"]
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = n_heads
    if n_heads % values["num_key_value_heads"]:
        _refuse(
            f"num_attention_heads = {n_heads} is not a multiple of num_key_value_heads = "
            f"{values['num_key_value_heads']}"
        )
    if values.get("head_dim") is None:
        if d_model % n_heads:
            _refuse(f"hidden_size = {d_model} is not a multiple of num_attention_heads = {n_heads}, head_dim is absent")
        values["head_dim"] = d_model // n_heads
        _integer(values, "head_dim")
    if values["head_dim"] % 2:
        _refuse(f"head_dim = {values['head_dim']} is odd; rotary positions need pairs")
    if "use_sliding_window" in family.defaults and not _switch(values, "use_sliding_window"):
        values["sliding_window"] = None
    if values[family.activation] not in tuple(Activation):
        found = shown(values[family.activation])
        _refuse(f"{family.activation} = {found} is not supported; supported: {', '.join(Activation)}")
    eps = values["rms_norm_eps"]
    if not isinstance(eps, float) or not 0 < eps < 1:
        _refuse(f"rms_norm_eps = {shown(eps)}: expected a number between 0 and 1")
    return values


def _layers(values: Mapping[str, Any], family: Family) -> tuple[LayerSpec, ...]:
    """One object per distinct layer, however often it occurs."""
    made: dict[tuple[str, bool], LayerSpec] = {}
    layers = []
    for i, kind in enumerate(_layer_kinds(values, family)):
        key = kind, family.rotates(values, i)
        if key not in made:
            made[key] = _layer(values, family, *key)
        layers.append(made[key])
    return tuple(layers)


def _layer_kinds(values: Mapping[str, Any], family: Family) -> list[str]:
    n_layers = values["num_hidden_layers"]
    kinds = [SLIDING if family.slides(values, i) else FULL for i in range(n_layers)]
    stated = values.get("layer_types")
    if stated is not None:
        if not isinstance(stated, list) or len(stated) != n_layers:
            _refuse(f"layer_types = {shown(stated)}: expected a list of {n_layers} types, one per layer")
        for i, kind in enumerate(stated):
            allowed = (FULL, SLIDING) if "layer_types" in family.defaults else kinds[i : i + 1]
            if kind not in allowed:
                _refuse(f"layer_types[{i}] = {shown(kind)} is not supported; expected {' or '.join(allowed)}")
        kinds = stated
    if SLIDING in kinds and values["sliding_window"] is None:
        off = values.get("use_sliding_window") is False
        why = "use_sliding_window = False" if off else "sliding_window = None"
        _refuse(f"{why}, but layer {kinds.index(SLIDING)} is of type {SLIDING}; one of them is wrong")
    return kinds


def _layer(values: Mapping[str, Any], family: Family, kind: str, rotates: bool) -> LayerSpec:
    head_dim = values["head_dim"]
    ropes = {rotary: read_rope(values, rotary, head_dim=head_dim) for rotary in (FULL, SLIDING)}  # used or not
    for rope in ropes.values():
        if rope.kind not in family.rope_kinds:
            _refuse(f"rope type {rope.kind} is not supported; {family.architecture} has {', '.join(family.rope_kinds)}")
        if rope.rotary_dim != head_dim and "partial_rotary_factor" not in family.defaults:
            _refuse(f"partial_rotary_factor rotates {rope.rotary_dim} of {head_dim}; {family.architecture} has 1")
    return LayerSpec(
        n_heads=values["num_attention_heads"],
        n_kv_heads=values["num_key_value_heads"],
        head_dim=head_dim,
        d_ff=values["intermediate_size"],
        qkv_bias=_switch(values, family.switches["qkv_bias"]),
        o_bias=_switch(values, family.switches["o_bias"]),
        mlp_bias=_switch(values, family.switches["mlp_bias"]),
        norm_eps=values["rms_norm_eps"],
        activation=Activation(values[family.activation]),
        attention_scale=_factor(values, family.attention_scale),
        rope=ropes[kind] if rotates else None,
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        qk_norm=family.qk_norm,
        window=values["sliding_window"] if kind == SLIDING else None,
        score_softcap=_softcap(values, family.score_softcap),
        residual_multiplier=_factor(values, family.residual_multiplier),
    )


def _refuse(message: str) -> NoReturn:
    raise LoadError(f"config.json: {message}")


def _refuse_unknown(config: Mapping[str, Any], family: Family) -> None:
    for key, value in config.items():
        if key in family.plain:
            if value not in family.plain[key]:
                expected = " or ".join("null" if v is None else repr(v) for v in family.plain[key])
                _refuse(f"{key} = {shown(value)} is not supported; expected {expected}")
        elif key not in READ_KEYS and key not in family.defaults and key not in family.ignored:
            _refuse(
                f"key {shown(key)} = {shown(value)} is not known for {family.architecture} and may change the result; "
                "it is not supported"
            )


def _integer(values: Mapping[str, Any], key: str) -> None:
    lowest, highest = LIMITS[key]
    if type(values[key]) is not int or not lowest <= values[key] <= highest:
        _refuse(f"{key} = {shown(values[key])}: expected an integer from {lowest} to {highest}")


def _switch(values: Mapping[str, Any], source: str | bool) -> bool:
    """`source` is a config key, or the value itself."""
    value = values[source] if isinstance(source, str) else source
    if not isinstance(value, bool):
        _refuse(f"{source} = {shown(value)}: expected true or false")
    return value


def _number(values: Mapping[str, Any], key: str, expected: str = "a positive number") -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 < value < 1e30:
        _refuse(f"{key} = {shown(value)}: expected {expected}")
    return float(value)


def _factor(values: Mapping[str, Any], power: Power | None) -> float:
    return _number(values, power.key) ** power.exponent if power else 1.0


def _softcap(values: Mapping[str, Any], key: str | None) -> float | None:
    return None if key is None or values[key] is None else _number(values, key, "a positive number or null")


def _token_ids(config: Mapping[str, Any], family: Family, key: str, vocab_size: int) -> list[int]:
    """The ids in config.json; where the key is absent, the family's, unless the vocabulary ends before it."""
    if key in config:
        return _stated_ids(config[key], vocab_size, f"config.json: {key}")
    return [i for i in (family.defaults[key],) if i is not None and i < vocab_size]


def _stated_ids(value: Any, vocab_size: int, where: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise LoadError(f"{where} = {shown(value)}: expected ids from 0 to vocab_size - 1 = {vocab_size - 1}")
    return ids
