"""Weight and KV formats: one row of a table each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Format:
    """How elements of a matrix lie in memory.

    A packed vector holds 16 outputs by `k_group` consecutive k: `k_group * bits` bits per lane. Quantized formats have
    a float16 scale for every `scale_group` elements of a row: an element is (code - zero) * scale, or with a codebook
    codebook[code] * scale; quantize.py defines them.
    """

    name: str
    code: int  # the number native code knows it by; formats of one code differ in what stands beside it
    bits: int
    k_group: int
    storage: np.dtype  # numpy dtype of the raw bits, codes of quantized formats one to a byte
    safetensors: str = ""  # dtype name in a safetensors header
    config: str = ""  # dtype name in a config.json
    scale_group: int = 0  # 0: not quantized
    zero_points: bool = False  # a zero of its own for every group; else `zero`
    zero: int = 0
    codebook: tuple[int, ...] = ()

    @property
    def element_bytes(self) -> int:
        """Of formats that are not quantized."""
        assert not self.scale_group
        return self.bits // 8

    @property
    def k_multiple(self) -> int:
        """Rows are padded to a multiple of this many elements."""
        return self.scale_group or self.k_group

    def row_bytes(self, k: int) -> int:
        """Bytes of k elements of a row: codes, scales, zeros."""
        groups = -(-k // self.scale_group) if self.scale_group else 0
        return -(-k * self.bits // 8) + groups * (2 + self.zero_points)

    def group_bytes(self, vectors: int) -> int:
        """Packed bytes of k_multiple consecutive k of a tile: scales, zeros, codes, each in whole cache lines."""
        if not self.scale_group:
            return vectors * 64
        zeros = _lines(vectors * 16) if self.zero_points else 0
        return _lines(vectors * 32) + zeros + self.scale_group // self.k_group * vectors * 64


def _lines(n_bytes: int) -> int:
    return -(-n_bytes // 64) * 64


F32 = Format("f32", 0, 32, 1, np.dtype("<f4"), "F32", "float32")
BF16 = Format("bf16", 1, 16, 2, np.dtype("<u2"), "BF16", "bfloat16")
F16 = Format("f16", 2, 16, 2, np.dtype("<f2"), "F16", "float16")

FORMATS = {f.name: f for f in (F32, BF16, F16)}
BY_SAFETENSORS = {f.safetensors: f for f in FORMATS.values()}

# The 16 quantiles of a normal distribution of "QLoRA" (Dettmers et al. 2023), times 127.
NF4 = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)

_BYTE = np.dtype("u1")
QUANTS = {
    f.name: f
    for f in (
        *(Format(f"int8-g{g}", 3, 8, 4, _BYTE, scale_group=g, zero=128) for g in (32, 64, 128)),
        *(Format(f"int4-g{g}", 4, 4, 8, _BYTE, scale_group=g, zero=8) for g in (32, 64, 128)),
        *(Format(f"int4-g{g}-zp", 4, 4, 8, _BYTE, scale_group=g, zero_points=True) for g in (32, 64, 128)),
        *(Format(f"nf4-g{g}", 5, 4, 8, _BYTE, scale_group=g, codebook=NF4) for g in (32, 64, 128)),
    )
}
# What a name without a group means.
QUANT_NAMES = {"int8": "int8-g128", "int4": "int4-g32", "int4-zp": "int4-g32-zp", "nf4": "nf4-g64"}


def find_quant(name: str) -> Format | None:
    """The quantized format of a name on the command line; None for `none`. KeyError if there is none such."""
    return None if name == "none" else QUANTS[QUANT_NAMES.get(name, name)]


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
