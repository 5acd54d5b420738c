"""Rotary positions: reading them from a config, and the table of cos and sin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.files import shown
from ..errors import LoadError
from .spec import RopeKind, RopeSpec

DEFAULT_THETA = 10000.0

_FACTORS = {
    RopeKind.DEFAULT: frozenset[str](),
    RopeKind.LLAMA3: frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
_OPTIONAL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(config: dict[str, Any]) -> RopeSpec:
    """`rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5) -> RopeSpec.

    As in transformers, a `rope_scaling` that is not empty wins over `rope_parameters`. Raises LoadError for every
    type and key that is not computed.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    params = config.get(name) or {}
    if not isinstance(params, dict):
        raise LoadError(f"config.json: {name} = {shown(params)}: expected an object or null")
    kind_name = params.get("rope_type", params.get("type", "default"))
    if kind_name not in tuple(RopeKind) or params.get("type", kind_name) != kind_name:
        raise LoadError(
            f"config.json: {name}: rope type {shown(kind_name)} is not supported; supported: {', '.join(RopeKind)}"
        )
    kind = RopeKind(kind_name)
    unknown = set(params) - _FACTORS[kind] - _OPTIONAL
    if unknown:
        raise LoadError(f"config.json: {name}: keys not known for rope type {kind}: {shown(sorted(unknown))}")
    if params.get("partial_rotary_factor", 1) not in (1, None):
        raise LoadError(
            f"config.json: {name}: partial_rotary_factor = {shown(params['partial_rotary_factor'])} is not "
            "supported; expected 1 or none"
        )
    theta = params.get("rope_theta", config.get("rope_theta"))
    theta = _positive(name, "rope_theta", DEFAULT_THETA if theta is None else theta)
    if kind is RopeKind.DEFAULT:
        return RopeSpec(kind, theta)
    positions = params.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    low, high = (_positive(name, key, params.get(key)) for key in ("low_freq_factor", "high_freq_factor"))
    factor = _positive(name, "factor", params.get("factor"))
    if factor < 1 or high <= low:
        raise LoadError(
            f"config.json: {name}: factor = {factor}, low_freq_factor = {low}, high_freq_factor = {high}: expected "
            "factor >= 1 and low_freq_factor < high_freq_factor"
        )
    original = _positive(name, "original_max_position_embeddings", positions)
    if original != int(original) or original >= 2**31:
        raise LoadError(f"config.json: {name}: original_max_position_embeddings = {original}: expected an integer")
    return RopeSpec(kind, theta, factor, low, high, int(original))


def _positive(where: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise LoadError(f"config.json: {where}: {key} = {shown(value)}: expected a positive number")
    return float(value)


def rope_table(rope: RopeSpec, head_dim: int, n_positions: int) -> NDArray[np.float32]:
    """cos and sin of every position and pair of a head: (n_positions, head_dim // 2, 2) float32.

    The same float32 operations in the same order as transformers (LlamaRotaryEmbedding); power, cos and sin are
    rounded correctly, where those of PyTorch depend on the CPU in the last bit.
    """
    angles = np.arange(n_positions, dtype=np.float32)[:, None] * inverse_frequencies(rope, head_dim)
    table = np.empty((n_positions, head_dim // 2, 2), np.float32)
    for begin in range(0, n_positions, 4096):  # bounds the float64 temporaries
        wide = angles[begin : begin + 4096].astype(np.float64)
        table[begin : begin + 4096, :, 0] = np.cos(wide)
        table[begin : begin + 4096, :, 1] = np.sin(wide)
    return table


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> NDArray[np.float32]:
    """Radians per position of every pair of a head: (head_dim // 2) float32."""
    one = np.float32(1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(np.float32(rope.theta)), exponents.astype(np.float64)).astype(np.float32)
    inv_freq: NDArray[np.float32] = one / powers
    if rope.kind is RopeKind.DEFAULT:
        return inv_freq
    # Long waves are slowed down by `factor`, short ones kept, those between interpolated.
    factor, low = np.float32(rope.factor), np.float32(rope.low_freq_factor)
    positions = np.float32(rope.original_positions)
    longest, shortest = (np.float32(rope.original_positions / f) for f in (rope.low_freq_factor, rope.high_freq_factor))
    wavelength = one / inv_freq * np.float32(2 * math.pi)
    slowed = np.where(wavelength > longest, inv_freq / factor, inv_freq)
    spread = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    share = (one / wavelength * positions - low) / spread
    between = (one - share) * slowed / factor + share * slowed
    return np.where((wavelength >= shortest) & (wavelength <= longest), between, slowed).astype(np.float32)
