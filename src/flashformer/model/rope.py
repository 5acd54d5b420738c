"""Rotary positions: reading them from a config, and the table of cos and sin.

| kind     | reads                                                                                        |
|----------|----------------------------------------------------------------------------------------------|
| default  | theta                                                                                        |
| linear   | theta, factor                                                                                |
| dynamic  | theta, factor, original_positions                                                            |
| llama3   | theta, factor, original_positions, low_freq_factor, high_freq_factor                         |
| yarn     | theta, factor, original_positions, beta_fast, beta_slow, truncate, attention_factor          |
| longrope | theta, original_positions, short_factors, long_factors, attention_factor                     |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.files import shown
from ..errors import LoadError
from .spec import RopeKind, RopeSpec

DEFAULT_THETA = 10000.0
MAX_POSITIONS = 2**24  # beyond it float32 does not hold every position

FULL, SLIDING = "full_attention", "sliding_attention"

_ORIGINAL = "original_max_position_embeddings"
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS: dict[RopeKind, set[str]] = {
    RopeKind.DEFAULT: set(),
    RopeKind.LINEAR: {"factor"},
    RopeKind.DYNAMIC: {"factor"},
    RopeKind.YARN: {
        *("factor", _ORIGINAL, "attention_factor", "mscale", "mscale_all_dim"),
        *("beta_fast", "beta_slow", "truncate"),
    },
    RopeKind.LLAMA3: {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
    RopeKind.LONGROPE: {"factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"},
}
_UNREAD: dict[RopeKind, set[str]] = {  # that checkpoints have, and transformers warns of and leaves aside
    RopeKind.DYNAMIC: {_ORIGINAL},
    RopeKind.YARN: {"attn_factor", "finetuned"},
}
_OLD_NAMES = {"su": "longrope"}


def read_rope(values: Mapping[str, Any], rotary: str = FULL, *, head_dim: int) -> RopeSpec:
    """The rotation of one type of layer. `values` is config.json over the family's defaults.

    Reads `rope_scaling` where it is not empty, else `rope_parameters`; in them, or beside them, `rope_theta`,
    `partial_rotary_factor` and `original_max_position_embeddings` (beside them it wins); `max_position_embeddings`.
    `rope_local_base_freq` in `values` marks a model that rotates its sliding layers by themselves: `rotary` says
    which are asked for, `rope_parameters` has an object for each, `rope_scaling` changes only the full ones, and
    the key is the theta of the sliding ones. All as transformers reads them, but every type and key that neither
    computes raises LoadError.
    """
    find = _two_rotations if "rope_local_base_freq" in values else _one_rotation
    where, params = find(values, rotary)
    names = [_OLD_NAMES.get(str(params[k]), params[k]) for k in ("rope_type", "type") if k in params] or ["default"]
    if names[0] not in tuple(RopeKind) or names[0] != names[-1]:
        wrong = names[0] if names[0] not in tuple(RopeKind) else names
        raise LoadError(f"{where}: rope type {shown(wrong)} is not supported; supported: {', '.join(RopeKind)}")
    kind = RopeKind(names[0])
    unknown = set(params) - _KEYS[kind] - _COMMON - _UNREAD.get(kind, set())
    if unknown:
        raise LoadError(f"{where}: keys not known for rope type {kind}: {shown(sorted(unknown))}")
    return _Reader(where, kind, params, values, head_dim).read()


def model_positions(values: Mapping[str, Any], ropes: Sequence[RopeSpec]) -> int:
    """The most positions of a model: those of the config, or what yarn or dynamic stretch theirs to, if more."""
    stated = _positions("config.json", "max_position_embeddings", values.get("max_position_embeddings"))
    reach = [r.original_positions * r.factor for r in ropes if r.kind in (RopeKind.YARN, RopeKind.DYNAMIC)]
    return _positions("config.json", f"{_ORIGINAL} * factor", round(max([stated, *reach])))


def rope_table(rope: RopeSpec, n_positions: int) -> NDArray[np.float32]:
    """cos (plane 0) and sin (plane 1) of every position and pair: (n_positions, 2, rotary_dim // 2) float32.

    The same float32 operations in the same order as transformers (LlamaRotaryEmbedding); power, cos and sin are
    rounded correctly, where those of PyTorch depend on the CPU in the last bit. `n_positions` is the context the
    model is loaded with; see `inverse_frequencies` for what depends on it.
    """
    inv_freq = inverse_frequencies(rope, n_positions)
    angles = np.arange(n_positions, dtype=np.float32)[:, None] * inv_freq
    table = np.empty((n_positions, 2, len(inv_freq)), np.float32)
    for begin in range(0, n_positions, 4096):  # bounds the float64 temporaries
        wide = angles[begin : begin + 4096].astype(np.float64)
        table[begin : begin + 4096, 0] = np.cos(wide)
        table[begin : begin + 4096, 1] = np.sin(wide)
    table *= np.float32(rope.attention_factor)
    return table


def inverse_frequencies(rope: RopeSpec, n_positions: int) -> NDArray[np.float32]:
    """Radians per position of every pair: (rotary_dim // 2) float32.

    Under dynamic and longrope they depend on the length: they are chosen once, from the context of `n_positions`
    that the model is loaded with, and are those that transformers uses for a sequence of that length. (It chooses
    again as a sequence grows, after which the keys in its cache no longer fit.)
    """
    return _FREQUENCIES[rope.kind](rope, n_positions)


def _two_rotations(values: Mapping[str, Any], rotary: str) -> tuple[str, Mapping[str, Any]]:
    """(where, parameters) of the layers `rotary`, in a model whose sliding layers have a rotation of their own."""
    nested = _object("config.json: rope_parameters", values.get("rope_parameters"))
    if set(nested) - {FULL, SLIDING}:
        raise LoadError(
            f"config.json: rope_parameters has the keys {shown(sorted(nested))}; expected {FULL!r} and {SLIDING!r}"
        )
    where = f"config.json: rope_parameters.{rotary}"
    params = _object(where, nested.get(rotary))
    if rotary == FULL and values.get("rope_scaling"):
        where = "config.json: rope_scaling"
        params = {**params, **_object(where, values["rope_scaling"])}
    for key, found in ("truncate", params.get("truncate")), (_ORIGINAL, values.get(_ORIGINAL)):
        if found is not None:  # transformers ignores them here
            raise LoadError(f"{where}: {key} is not supported where sliding layers have a rotation of their own")
    beside = values.get("rope_local_base_freq" if rotary == SLIDING else "rope_theta")
    return where, {"rope_theta": beside, **params}


def _one_rotation(values: Mapping[str, Any], rotary: str) -> tuple[str, Mapping[str, Any]]:
    """(where, parameters) in a model that rotates all its layers alike."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    params = _object(f"config.json: {name}", values.get(name))
    return f"config.json: {name}", {"rope_theta": values.get("rope_theta"), **params}


def _object(where: str, value: object) -> dict[str, Any]:
    """Without entries that are null."""
    if value is not None and not isinstance(value, dict):
        raise LoadError(f"{where} = {shown(value)}: expected an object or null")
    return {key: entry for key, entry in (value or {}).items() if entry is not None}


class _Reader:
    """The fields of one kind, checked."""

    def __init__(
        self, where: str, kind: RopeKind, params: Mapping[str, Any], values: Mapping[str, Any], head_dim: int
    ) -> None:
        self.where, self.kind, self.params, self.values, self.head_dim = where, kind, params, values, head_dim

    def read(self) -> RopeSpec:
        beside = self.values.get("partial_rotary_factor")
        share = self.number("partial_rotary_factor", 1.0 if beside is None else beside)
        rotary_dim = int(self.head_dim * share)
        if share > 1 or rotary_dim % 2 or rotary_dim < 2:
            self.refuse(
                f"partial_rotary_factor = {share} of head_dim = {self.head_dim} rotates {rotary_dim} elements; "
                "expected an even number from 2 to head_dim"
            )
        theta = self.number("rope_theta", DEFAULT_THETA)
        return RopeSpec(self.kind, theta, rotary_dim, **_FIELDS[self.kind](self, theta, rotary_dim))

    def refuse(self, message: str) -> NoReturn:
        raise LoadError(f"{self.where}: {message}")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; without a default it must be there."""
        value = self.params.get(key)
        return _positive(self.where, key, default if value is None else value)

    def factor(self) -> float:
        factor = self.number("factor")
        if factor < 1:
            self.refuse(f"factor = {factor}: expected at least 1")
        return factor

    def positions(self) -> int:
        value = self.values.get("max_position_embeddings")
        return _positions("config.json", "max_position_embeddings", value)

    def original(self) -> int:
        """Beside the parameters, in them, or all positions: the first that is there."""
        beside = self.values.get(_ORIGINAL)
        value = self.params.get(_ORIGINAL, self.positions()) if beside is None else beside
        return _positions(self.where, _ORIGINAL, value)

    def list_of_factors(self, key: str, length: int) -> tuple[float, ...]:
        factors = self.params.get(key)
        if not isinstance(factors, list) or len(factors) != length:
            self.refuse(f"{key} = {shown(factors)}: expected a list of {length} numbers, one per pair of elements")
        return tuple(_positive(self.where, key, factor) for factor in factors)


def _linear_fields(reader: _Reader, theta: float, rotary_dim: int) -> dict[str, Any]:
    return {"factor": reader.factor()}


def _dynamic_fields(reader: _Reader, theta: float, rotary_dim: int) -> dict[str, Any]:
    if rotary_dim == 2:
        reader.refuse("rope type dynamic rotates 2 elements; expected at least 4")
    return {"factor": reader.factor(), "original_positions": reader.positions()}


def _llama3_fields(reader: _Reader, theta: float, rotary_dim: int) -> dict[str, Any]:
    low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
    if high <= low:
        reader.refuse(f"low_freq_factor = {low}, high_freq_factor = {high}: expected the first to be smaller")
    return {
        "factor": reader.factor(),
        "original_positions": reader.original(),
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _yarn_fields(reader: _Reader, theta: float, rotary_dim: int) -> dict[str, Any]:
    original = reader.original()
    factor = reader.factor() if "factor" in reader.params else reader.positions() / original
    fast, slow = reader.number("beta_fast", 32.0), reader.number("beta_slow", 1.0)
    truncate = reader.params.get("truncate", True)
    if theta <= 1 or factor < 1 or fast < slow or not isinstance(truncate, bool):
        reader.refuse(
            f"rope_theta = {theta}, factor = {factor}, beta_fast = {fast}, beta_slow = {slow}, truncate = "
            f"{shown(truncate)}: expected rope_theta > 1, factor >= 1, beta_fast >= beta_slow, truncate true or false"
        )
    scales = [reader.number(key) for key in ("mscale", "mscale_all_dim") if reader.params.get(key)]
    upper, lower = scales if len(scales) == 2 else (1.0, 0.0)  # one alone has no effect
    implied = (0.1 * upper * math.log(factor) + 1.0) / (0.1 * lower * math.log(factor) + 1.0)
    return {
        "factor": factor,
        "original_positions": original,
        "attention_factor": reader.number("attention_factor", implied),
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": truncate,
    }


def _longrope_fields(reader: _Reader, theta: float, rotary_dim: int) -> dict[str, Any]:
    original = reader.original()
    stretch = reader.factor() if "factor" in reader.params else max(reader.positions() / original, 1.0)
    implied = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
    return {
        "original_positions": original,
        "attention_factor": reader.number("attention_factor", implied),
        "short_factors": reader.list_of_factors("short_factor", rotary_dim // 2),
        "long_factors": reader.list_of_factors("long_factor", rotary_dim // 2),
    }


_FIELDS: dict[RopeKind, Callable[[_Reader, float, int], dict[str, Any]]] = {
    RopeKind.DEFAULT: lambda reader, theta, rotary_dim: {},
    RopeKind.LINEAR: _linear_fields,
    RopeKind.DYNAMIC: _dynamic_fields,
    RopeKind.YARN: _yarn_fields,
    RopeKind.LLAMA3: _llama3_fields,
    RopeKind.LONGROPE: _longrope_fields,
}


def _positive(where: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise LoadError(f"{where}: {key} = {shown(value)}: expected a positive number")
    return float(value)


def _positions(where: str, key: str, value: object) -> int:
    number = _positive(where, key, value)
    if number != int(number) or number > MAX_POSITIONS:
        raise LoadError(f"{where}: {key} = {shown(value)}: expected an integer from 1 to {MAX_POSITIONS}")
    return int(number)


_ONE = np.float32(1)


def _powers(theta: np.float32 | float, rotary_dim: int) -> NDArray[np.float32]:
    """theta to the power of 2 i / rotary_dim: (rotary_dim // 2) float32."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _default(rope: RopeSpec, n_positions: int) -> NDArray[np.float32]:
    return _ONE / _powers(rope.theta, rope.rotary_dim)


def _linear(rope: RopeSpec, n_positions: int) -> NDArray[np.float32]:
    return _default(rope, n_positions) / np.float32(rope.factor)


def _dynamic(rope: RopeSpec, n_positions: int) -> NDArray[np.float32]:
    """Beyond the original positions theta grows with the length."""
    if n_positions <= rope.original_positions:
        return _default(rope, n_positions)
    stretch = np.float32(rope.factor) * np.float32(n_positions) / np.float32(rope.original_positions)
    stretch -= np.float32(rope.factor - 1)
    exponent = np.float32(rope.rotary_dim / (rope.rotary_dim - 2))
    growth = np.float32(np.power(np.float64(stretch), np.float64(exponent)))
    return _ONE / _powers(np.float32(rope.theta) * growth, rope.rotary_dim)


def _llama3(rope: RopeSpec, n_positions: int) -> NDArray[np.float32]:
    """Long waves are slowed down by `factor`, short ones kept, those between interpolated."""
    inv_freq = _default(rope, n_positions)
    factor, low = np.float32(rope.factor), np.float32(rope.low_freq_factor)
    positions = np.float32(rope.original_positions)
    longest, shortest = (np.float32(rope.original_positions / f) for f in (rope.low_freq_factor, rope.high_freq_factor))
    wavelength = _ONE / inv_freq * np.float32(2 * math.pi)
    slowed = np.where(wavelength > longest, inv_freq / factor, inv_freq)
    spread = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    share = (_ONE / wavelength * positions - low) / spread
    between = (_ONE - share) * slowed / factor + share * slowed
    return np.where((wavelength >= shortest) & (wavelength <= longest), between, slowed).astype(np.float32)


def _yarn(rope: RopeSpec, n_positions: int) -> NDArray[np.float32]:
    """A ramp over the pairs from kept to slowed by `factor`, between those that turn `beta_fast` and `beta_slow`
    times within the original positions (arXiv 2309.00071, section 3.2)."""
    powers = _powers(rope.theta, rope.rotary_dim)
    kept, slowed = _ONE / powers, _ONE / (np.float32(rope.factor) * powers)
    low, high = (
        rope.rotary_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low or high + 0.001 - low
    ramp = (np.arange(rope.rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    share_kept = _ONE - np.clip(ramp, np.float32(0), _ONE)
    inv_freq: NDArray[np.float32] = slowed * (_ONE - share_kept) + kept * share_kept
    return inv_freq


def _longrope(rope: RopeSpec, n_positions: int) -> NDArray[np.float32]:
    factors = rope.long_factors if n_positions > rope.original_positions else rope.short_factors
    inv_freq: NDArray[np.float32] = _ONE / (np.array(factors, np.float32) * _powers(rope.theta, rope.rotary_dim))
    return inv_freq


_FREQUENCIES: dict[RopeKind, Callable[[RopeSpec, int], NDArray[np.float32]]] = {
    RopeKind.DEFAULT: _default,
    RopeKind.LINEAR: _linear,
    RopeKind.DYNAMIC: _dynamic,
    RopeKind.YARN: _yarn,
    RopeKind.LLAMA3: _llama3,
    RopeKind.LONGROPE: _longrope,
}
