"""Quantized formats: the definition of codes, scales and zeros that every packer and kernel follows.

A row is cut into groups of `scale_group` consecutive elements. An element is (code - zero) * scale, or with a codebook
codebook[code] * scale, in float32; scales are float16. Of a few scales the one with the least squared error is taken.
Activations that meet quantized weights are quantized too: int8 with a float32 scale for every row and group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .formats import Format

F32Array = NDArray[np.float32]

SMALLEST = np.float32(1e-30)  # of the largest activation of a group; below it the group counts as zero

# The largest element becomes this many steps; symmetric 4 bits have 8 on one side and 7 on the other.
INT4_STEPS = tuple(np.float32(x) for x in (8, 8.5, 7.5, 7, 6.5, 6))
INT4_ZP_SHARES = tuple(np.float32(x) for x in (1, 0.95, 0.9, 0.85, 0.8))  # of the range that 15 steps span
NF4_SHARES = tuple(np.float32(x) for x in (1, 0.95, 0.9, 0.85))  # of the largest element


@dataclass(frozen=True)
class Quantized:
    """Of (rows, k) elements, k a multiple of the group."""

    codes: NDArray[np.uint8]  # (rows, k)
    scales: NDArray[np.float16]  # (rows, k / group)
    zeros: NDArray[np.uint8]  # (rows, k / group)


def quantize(x: F32Array, fmt: Format) -> Quantized:
    """(rows, k) -> codes; k is padded to whole groups with zeros. What float16 scales cannot hold becomes Inf."""
    rows, k = x.shape
    group = fmt.scale_group
    padded = np.zeros((rows, -(-k // group) * group), np.float32)
    padded[:, :k] = x
    groups = padded.reshape(-1, group)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        codes, scales, zeros = _best(groups, fmt)
    return Quantized(
        codes.reshape(padded.shape), scales.reshape(rows, -1), np.broadcast_to(zeros, scales.shape).reshape(rows, -1)
    )


def dequantize(q: Quantized, fmt: Format) -> F32Array:
    """(rows, k padded) float32."""
    group, rows = fmt.scale_group, len(q.codes)
    codes, scales = q.codes.reshape(-1, group), q.scales.reshape(-1, 1).astype(np.float32)
    return (_levels(codes, q.zeros.reshape(-1, 1), fmt) * scales).reshape(rows, -1)


def round_weights(x: F32Array, fmt: Format) -> F32Array:
    """(rows, k) the values that `x` has after being quantized."""
    return dequantize(quantize(x, fmt), fmt)[:, : x.shape[1]]


def quantize_rows(x: F32Array, group: int) -> tuple[NDArray[np.int32], F32Array]:
    """Activations (rows, k) -> int8 values (rows, k padded) as int32, and scales (rows, k padded / group).

    scale = max / 127; NaN where an element is not finite, 0 where all are below SMALLEST.
    """
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // group) * group), np.float32)
    padded[:, :k] = x
    groups = padded.reshape(-1, group)
    largest = np.abs(groups).max(axis=1)
    bad, empty = ~np.isfinite(groups).all(axis=1), largest < SMALLEST
    usable = ~bad & ~empty
    inverse = np.zeros(len(groups), np.float32)
    inverse[usable] = np.float32(127) / largest[usable]
    with np.errstate(invalid="ignore"):
        values = np.where(usable[:, None], np.rint(groups * inverse[:, None]), np.float32(0))
    scale = np.where(empty, np.float32(0), largest / np.float32(127))
    scale[bad] = np.nan
    return values.astype(np.int32).reshape(padded.shape), scale.reshape(rows, -1)


def _levels(codes: NDArray[np.uint8], zeros: NDArray[np.uint8], fmt: Format) -> F32Array:
    if fmt.codebook:
        return np.array(fmt.codebook, np.float32)[codes]
    return codes.astype(np.float32) - zeros.astype(np.float32)


def _best(x: F32Array, fmt: Format) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8]]:
    """Of (n, group) elements: the candidate with the least error, the first of equals."""
    best: tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8]] | None = None
    least = np.full(len(x), np.inf)
    for scale, zero in _candidates(x, fmt):
        half = scale.astype(np.float16)
        codes = _encode(x, half.astype(np.float32), zero, fmt)
        values = _levels(codes, zero[:, None], fmt) * half.astype(np.float32)[:, None]
        error = np.add.accumulate(np.square(x.astype(np.float64) - values), axis=1)[:, -1]
        if best is None:
            best, least = (codes, half, zero), error
            continue
        better = error < least
        least = np.where(better, error, least)
        best = (
            np.where(better[:, None], codes, best[0]),
            np.where(better, half, best[1]),
            np.where(better, zero, best[2]),
        )
    assert best is not None
    return best


def _candidates(x: F32Array, fmt: Format) -> list[tuple[F32Array, NDArray[np.uint8]]]:
    """Scales and zeros to try."""
    n = len(x)
    zero = np.full(n, fmt.zero, np.uint8)
    at = np.abs(x).argmax(axis=1)
    largest = x[np.arange(n), at]  # with its sign; the first of equals
    if fmt.bits == 8:
        return [(np.abs(largest) / np.float32(127), zero)]
    if fmt.codebook:
        return [(np.abs(largest) * share / np.float32(127), zero) for share in NF4_SHARES]
    if not fmt.zero_points:
        return [(-largest / steps, zero) for steps in INT4_STEPS]
    low, high = np.minimum(x.min(axis=1), np.float32(0)), np.maximum(x.max(axis=1), np.float32(0))
    made = []
    for share in INT4_ZP_SHARES:
        scale = (high - low) * share / np.float32(15)
        half = scale.astype(np.float16).astype(np.float32)
        offset = np.where(half > 0, np.rint(-low * share / np.where(half > 0, half, 1)), 0)
        made.append((scale, np.clip(offset, 0, 15).astype(np.uint8)))
    return made


def _encode(x: F32Array, scale: F32Array, zero: NDArray[np.uint8], fmt: Format) -> NDArray[np.uint8]:
    """Nearest codes; a scale of 0 gives the code of 0."""
    usable = scale != 0
    steps = x / np.where(usable, scale, 1)[:, None]
    if fmt.codebook:
        book = np.array(fmt.codebook, np.float32)
        middles = (book[1:] + book[:-1]) * np.float32(0.5)
        codes = (steps[:, :, None] > middles).sum(axis=2)
        empty = fmt.codebook.index(0)
    else:
        top = 255 if fmt.bits == 8 else 15
        bottom = 1 if fmt.bits == 8 else 0  # -127 to 127
        codes = np.clip(np.rint(steps) + zero[:, None], bottom, top)
        empty = -1
    fallback = np.where(empty < 0, zero, np.uint8(max(empty, 0)))[:, None]
    result: NDArray[np.uint8] = np.where(usable[:, None], codes, fallback).astype(np.uint8)
    return result
