"""The fragment layout: how a matrix lies so that tensor cores read it in whole 16-byte pieces.

A tile is 16 packed outputs. Its k is cut into slices of SLICE_K, the last one shorter; an item is one slice of one
tile; a matrix is its items, slice by slice, so neighbouring tiles are one byte range in every slice. An item is a
sequence of units of 16 outputs x unit_k elements:

    bf16, f16  16 rows x 32 k, row by row
    int8       per 32 k: 32 lanes x 16 bytes; lane 4 g + q has row g at k = 8 q .. 8 q + 7, then row g + 8 at the same
    int4       per 64 k: 32 lanes x 4 words; row g at 8 q .., row g at 32 + 8 q .., then row g + 8 at both; element e
               of the eight in a word is nibble e / 2 + 4 (e % 2)

Behind the codes of a quantized unit: scales (groups, 16) f16, then, if the format has them, zeros (groups, 16) u8.
"""

from __future__ import annotations

from ..formats import Format

TILE_OUTPUTS = 16
SLICE_K = 2048
ALTERNATE_WIDTH = 8  # outputs of gate, then as many of up
SLOT_BYTES = 16 << 10  # about what one copy into the ring brings
WARPS = 8  # units of a copy are dealt to so many


def unit_k(fmt: Format) -> int:
    """k of a unit: what 16 bytes per lane hold, and whole groups."""
    return max(32 if fmt.bits >= 8 else 64, fmt.scale_group)


def unit_bytes(fmt: Format) -> int:
    """Codes, scales and zeros of a unit; a multiple of 16."""
    groups = unit_k(fmt) // fmt.scale_group if fmt.scale_group else 0
    return TILE_OUTPUTS * (unit_k(fmt) * fmt.bits // 8 + groups * (2 + fmt.zero_points))


def slot_units(fmt: Format) -> int:
    """Units of one copy, the same number for every warp."""
    codes = TILE_OUTPUTS * unit_k(fmt) * fmt.bits // 8
    return max(SLOT_BYTES // codes // WARPS, 1) * WARPS


def slices(k: int, fmt: Format) -> tuple[tuple[int, int], ...]:
    """[begin, end) of each slice of k, the last one padded to whole units."""
    padded = -(-k // unit_k(fmt)) * unit_k(fmt)
    return tuple((begin, min(begin + SLICE_K, padded)) for begin in range(0, padded, SLICE_K))


def item_bytes(begin: int, end: int, fmt: Format) -> int:
    """Of one slice of one tile."""
    return (end - begin) // unit_k(fmt) * unit_bytes(fmt)
