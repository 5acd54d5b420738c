"""Host models of the wrappers that compute: what each gives for which bits, by NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashformer.formats import BF16, F16, Format, from_f32, to_f32

Words = NDArray[Any]
IsNan = Callable[[Words], Words]
Output = tuple[int, str, Words, IsNan]  # row of the result, name, bits, which of them are NaN (any will do)

U32 = np.uint32
ANY_NAN = U32(0x7FC0DEAD)
FORMATS = {"bf16": BF16, "f16": F16}


def rounded(values: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    return to_f32(from_f32(values, FORMATS[kind]), FORMATS[kind])


def bits_of(values: NDArray[np.float32], fmt: Format) -> Words:
    return from_f32(values, fmt).view(np.uint16).astype(U32)


# ---- mma.m16n8k16: lane 4 g + q ------------------------------------------------------------------------------------


def mma_operands(a: Words, b: Words, c: Words, kind: str) -> Words:
    """(n, 16, 16), (n, 16, 8), (n, 16, 8) -> (n, 32, 10) words of every lane."""
    fmt = FORMATS[kind]
    high = U32(16)
    rows, columns = bits_of(a, fmt), bits_of(b, fmt).swapaxes(1, 2)  # (n, 16, k), (n, 8, k)
    pairs_a, pairs_b = (m[..., ::2] | m[..., 1::2] << high for m in (rows, columns))  # words of k = 2 j, 2 j + 1
    lane = np.arange(32)
    g, q = lane // 4, lane % 4
    words = [pairs_a[:, g, q], pairs_a[:, g + 8, q], pairs_a[:, g, q + 4], pairs_a[:, g + 8, q + 4]]
    words += [pairs_b[:, g, q], pairs_b[:, g, q + 4]]
    bits = c.view(U32)
    words += [bits[:, g, 2 * q], bits[:, g, 2 * q + 1], bits[:, g + 8, 2 * q], bits[:, g + 8, 2 * q + 1]]
    return np.ascontiguousarray(np.stack(words, axis=2))


def mma_result(found: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, 32, 4) of every lane -> (n, 16, 8)."""
    lane = np.arange(32)
    g, q = lane // 4, lane % 4
    c = np.full((len(found), 16, 8), np.nan, np.float32)
    for i in range(4):
        c[:, g + i // 2 * 8, 2 * q + i % 2] = found[:, :, i]
    return c


# ---- one number at a time ------------------------------------------------------------------------------------------


def cases(rng: np.random.Generator) -> Iterator[tuple[str, Words, list[Output]]]:
    """(what the inputs are, (3, n) words, outputs)"""
    with np.errstate(all="ignore"):
        yield "every 16 bits", *_every_half(rng)
        yield "around every rounding", *_roundings()
        yield "any bits", *_any_bits(rng)
        yield "tame floats", *_tame(rng)
        yield "special floats", *_special(rng)


def _f32_nan(words: Words) -> Words:
    return (words & U32(0x7FFFFFFF)) > U32(0x7F800000)


def _no_nan(words: Words) -> Words:
    return np.zeros(words.shape, bool)


def _half_nan(fmt: Format) -> IsNan:
    """Of one number in the low half."""
    infinite = U32({"bf16": 0x7F80, "f16": 0x7C00}[fmt.name])
    return lambda words: (words & U32(0x7FFF)) > infinite


def _pair_nan(words: Words) -> Words:
    """Of two f16."""
    nan = _half_nan(F16)
    return nan(words) | nan(words >> U32(16))


def _every_half(rng: np.random.Generator) -> tuple[Words, list[Output]]:
    a = np.arange(65536, dtype=U32)
    some = a[[0, 0x8000, 0x3C00, 0x6408, 0x64FF, 0x7BFF, 1, 0xD480]]  # among them what codes are converted with
    b = np.concatenate([rng.permutation(a)[:32768], np.repeat(some, 4096)])
    halves = a.astype(np.uint16)
    wide = halves.view(np.float16).astype(np.float32).view(U32)
    difference = halves.view(np.float16) - b.astype(np.uint16).view(np.float16)
    outputs: list[Output] = [
        (2, "f16_to_f32", wide, _f32_nan),
        (3, "bf16_to_f32", a << U32(16), _no_nan),
        (4, "sub_f16x2", difference.view(np.uint16).astype(U32), _pair_nan),  # the high half is 0 - 0
    ]
    return np.stack([a, b, a]), outputs


def _roundings() -> tuple[Words, list[Output]]:
    """f32 numbers at, just below and just above every f16 and bf16 and the middle between neighbours."""
    halves = np.arange(65536, dtype=np.uint16)
    f16 = halves.view(np.float16).astype(np.float32)
    middle = ((f16.astype(np.float64) + np.roll(f16, -1)) / 2).astype(np.float32)
    bf16 = halves.astype(U32) << U32(16)
    exact = np.concatenate([f16.view(U32), middle.view(U32), bf16, bf16 | U32(0x8000)])
    x = np.concatenate([exact, exact + U32(1), exact - U32(1)])
    y = np.roll(x, 12345)
    low, high = x.view(np.float32), y.view(np.float32)
    finite = ~(_f32_nan(x) | _f32_nan(y))  # of a pair with a NaN the other half is looked at where it is not one
    x, y, low, high = x[finite], y[finite], low[finite], high[finite]
    outputs: list[Output] = [
        (0, "cvt_bf16x2", bits_of(low, BF16) | bits_of(high, BF16) << U32(16), _no_nan),
        (1, "cvt_f16x2", bits_of(low, F16) | bits_of(high, F16) << U32(16), _no_nan),
    ]
    return np.stack([x, y, x]), outputs


def _any_bits(rng: np.random.Generator) -> tuple[Words, list[Output]]:
    a, b, c = rng.integers(0, 2**32, (3, 1 << 17), U32)
    x, y = a.view(np.float32), b.view(np.float32)
    bytes_of = np.concatenate([a[:, None], b[:, None]], axis=1).view(np.uint8)  # (n, 8)
    picked = np.empty((len(a), 4), np.uint8)
    for i in range(4):
        selector = (c >> U32(4 * i)) & U32(15)
        byte = np.take_along_axis(bytes_of, (selector & U32(7))[:, None].astype(np.int64), axis=1)[:, 0]
        sign = np.where(byte & 0x80, np.uint8(0xFF), np.uint8(0))
        picked[:, i] = np.where(selector & U32(8), sign, byte)
    halves_a, halves_b = (v.view(np.uint16).reshape(-1, 2).view(np.float16) for v in (a, b))
    outputs: list[Output] = [
        (4, "sub_f16x2", (halves_a - halves_b).view(np.uint16).view(U32)[:, 0], _pair_nan),
        (6, "and_or", (a & b) | c, _no_nan),
        (7, "prmt", picked.view(U32)[:, 0], _no_nan),
        (9, "sqrt_f32", np.sqrt(x).view(U32), _f32_nan),
        (10, "opaque", a, _no_nan),
        (11, "f32 product", (x * y).view(U32), _f32_nan),
        (12, "f32 quotient", (x / y).view(U32), _f32_nan),
    ]
    return np.stack([a, b, c]), outputs


def _tame(rng: np.random.Generator) -> tuple[Words, list[Output]]:
    """Numbers of which a * b + c is exact in fp64, so that rounding it once is the fused result."""
    n = 1 << 17

    def numbers(bits: int, exponent: int) -> NDArray[np.float64]:
        whole = rng.integers(2 ** (bits - 1), 2**bits, n) * rng.choice([-1, 1], n)
        scaled: NDArray[np.float64] = np.ldexp(
            whole.astype(np.float64), rng.integers(-exponent, exponent, n) - bits + 1
        )
        return scaled

    a, b, c = numbers(16, 4), numbers(16, 4), numbers(24, 4)
    words = np.stack([v.astype(np.float32).view(U32) for v in (a, b, c)])
    fused = (a * b + c).astype(np.float32).view(U32)
    halves = words.view(np.uint16).reshape(3, n, 2)
    tame = (halves & 0x83FF) | (rng.integers(11, 20, halves.shape).astype(np.uint16) << np.uint16(10))
    changed = np.arange(n) % 2 == 1  # every second word is for f16
    words[:, changed] = np.ascontiguousarray(tame).view(U32)[:, changed, 0]
    f16 = words.view(np.uint16).reshape(3, n, 2).view(np.float16).astype(np.float64)
    fused_f16 = np.ascontiguousarray((f16[0] * f16[1] + f16[2]).astype(np.float16)).view(U32)[:, 0]
    low, high = ~changed, changed
    # words that are for the other kind are compared with nothing: their expected value is any NaN, on both sides
    outputs: list[Output] = [
        (8, "fma_f32", np.where(low, fused, ANY_NAN), lambda w: _f32_nan(w) | high),
        (5, "fma_f16x2", np.where(high, fused_f16, ANY_NAN), lambda w: low),
    ]
    return words, outputs


def _special(rng: np.random.Generator) -> tuple[Words, list[Output]]:
    """Every pair of zeros, infinities, NaN, the smallest and the largest numbers, and some others."""
    magnitudes = [0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000]
    some = np.array([m | s for m in magnitudes for s in (0, 1 << 31)], U32)
    some = np.concatenate([some, rng.integers(0, 2**32, 238, U32)])
    a, b = (np.ascontiguousarray(m).reshape(-1) for m in np.meshgrid(some, some))
    larger = np.fmax(a.view(np.float32), b.view(np.float32)).view(U32)
    zeros = ((a | b) << U32(1)) == 0
    outputs: list[Output] = [(13, "max_f32", np.where(zeros, a & b, larger), _f32_nan)]  # -0 is less than 0
    return np.stack([a, b, a]), outputs
