"""Weight and KV formats: one row of a table each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """How elements of a matrix lie in memory.

    A packed vector holds 16 outputs by `k_group` consecutive k: `k_group * bits` bits per lane.
    """

    name: str
    code: int  # the number native code knows it by
    bits: int
    k_group: int
    storage: np.dtype  # numpy dtype of the raw bits
    safetensors: str  # dtype name in a safetensors header
    config: str  # dtype name in a config.json

    @property
    def element_bytes(self) -> int:
        return self.bits // 8


F32 = Format("f32", 0, 32, 1, np.dtype("<f4"), "F32", "float32")
BF16 = Format("bf16", 1, 16, 2, np.dtype("<u2"), "BF16", "bfloat16")
F16 = Format("f16", 2, 16, 2, np.dtype("<f2"), "F16", "float16")

FORMATS = {f.name: f for f in (F32, BF16, F16)}
BY_SAFETENSORS = {f.safetensors: f for f in FORMATS.values()}


def to_f32(data: NDArray[np.generic], fmt: Format) -> NDArray[np.float32]:
    """Raw bits in `fmt` -> float32, exactly."""
    if fmt is not BF16:
        return data.astype(np.float32, copy=False)
    wide: NDArray[np.float32] = (data.astype(np.uint32) << 16).view(np.float32)
    return wide


def from_f32(data: NDArray[np.float32], fmt: Format) -> NDArray[np.generic]:
    """float32 -> raw bits in `fmt`, rounded to nearest even. NaN stays NaN; beyond the format's range is Inf."""
    if fmt is not BF16:
        with np.errstate(over="ignore"):
            return data.astype(fmt.storage, copy=False)
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)


def round_to(data: NDArray[np.float32], fmt: Format) -> NDArray[np.float32]:
    """The float32 values that `data` has after being stored in `fmt`."""
    return to_f32(from_f32(data, fmt), fmt)
