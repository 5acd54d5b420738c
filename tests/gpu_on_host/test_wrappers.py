"""What each wrapper of the host build computes, against NumPy and PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_on_host.build import DEVICE, HOST
from gpu_on_host.cases_run import primitive
from numpy.typing import NDArray

RANDOM = np.random.default_rng(5)
LANES = np.arange(32)


def words(*shape: int) -> NDArray[np.uint32]:
    return RANDOM.integers(0, 2**32, shape, np.uint32)


def test_shuffles_and_ballot() -> None:
    rows = words(64, 3)
    for seed in range(6):
        for warp in (slice(0, 32), slice(32, 64)):
            inside = rows[warp]
            xor = primitive("kShuffleXor", rows, seed=seed)[warp]
            assert np.array_equal(xor[:, :3], np.stack([inside[LANES ^ m, i] for i, m in enumerate((5, 16, 31))], 1))
            idx = primitive("kShuffleIdx", rows, seed=seed)[warp]
            source = (np.full(32, 7), (LANES + 3) % 32, 31 - LANES)
            assert np.array_equal(idx[:, :3], np.stack([inside[s, i] for i, s in enumerate(source)], 1))
            votes = primitive("kBallot", rows, seed=seed)[warp, 0]
            assert np.array_equal(votes, np.full(32, np.sum((inside[:, 0] & 1) << LANES, dtype=np.uint32)))


@pytest.mark.parametrize("what", ["kMmaBf16", "kMmaF16"])
def test_mma_adds_exact_products_in_order(what: str) -> None:
    dtype = torch.bfloat16 if what == "kMmaBf16" else torch.float16
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(2, 16, 16, generator=generator).to(dtype)
    b = torch.randn(2, 16, 8, generator=generator).to(dtype)
    c = torch.randn(2, 16, 8, generator=generator)
    rows = np.zeros((2, 32, 10), np.uint32)
    bits_a, bits_b = (x.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for x in (a, b))
    g, q = LANES // 4, LANES % 4
    places = [(g, 2 * q), (g, 2 * q + 1), (g + 8, 2 * q), (g + 8, 2 * q + 1)]
    for i, (m, n) in enumerate(places):
        rows[:, :, i] = c.numpy().view(np.uint32)[:, m, n]
    for i, (m, k) in enumerate([(g, 2 * q), (g + 8, 2 * q), (g, 2 * q + 8), (g + 8, 2 * q + 8)]):
        rows[:, :, 4 + i] = bits_a[:, m, k] | bits_a[:, m, k + 1] << 16
    for i, first in enumerate([2 * q, 2 * q + 8]):
        rows[:, :, 8 + i] = bits_b[:, first, g] | bits_b[:, first + 1, g] << 16
    found = primitive(what, rows.reshape(64, 10)).view(np.float32).reshape(2, 32, 4)

    exact = a.double() @ b.double() + c.double()
    in_order = c.numpy().copy()
    for step in range(16):
        in_order += a[:, :, step, None].float().numpy() * b[:, step, None, :].float().numpy()
    for i, (m, n) in enumerate(places):
        assert np.array_equal(found[:, :, i], in_order[:, m, n])
        assert np.allclose(found[:, :, i], exact.numpy()[:, m, n], rtol=1e-4, atol=1e-4)


def finite_and_edges() -> NDArray[np.uint32]:
    """f32 patterns: random ones, and every f16 and bf16 number with its neighbours and midpoints."""
    halves = np.arange(65536, dtype=np.uint32)
    near = [halves.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32), halves << 16]
    middles = [near[0] + 0x1000, near[1] + 0x8000]
    both = [x + d for x in (*near, *middles) for d in (np.uint32(0), np.uint32(1), np.uint32(0xFFFFFFFF))]
    chosen = [RANDOM.choice(x, 4096) for x in both]
    return np.concatenate([*chosen, words(4096), np.arange(4096, dtype=np.uint32) + 0x33000000 - 2048])


def same_or_nan(found: NDArray[np.uint16], expected: NDArray[np.uint16], is_nan: NDArray[np.bool_]) -> None:
    assert np.array_equal(found[~is_nan], expected[~is_nan])
    assert np.all(found[is_nan] == 0x7FFF)  # the pattern that the GPU gives


def test_rounding_to_16_bits() -> None:
    bits = finite_and_edges()
    numbers = bits.view(np.float32)
    rows = np.stack([bits, bits[::-1]], 1)
    with np.errstate(over="ignore", invalid="ignore"):
        f16 = numbers.astype(np.float16).view(np.uint16)
    bf16 = torch.from_numpy(numbers.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    for what, expected in (("kToF16", f16), ("kToBf16", bf16)):
        found = primitive(what, rows)[:, 0]
        same_or_nan((found & 0xFFFF).astype(np.uint16), expected, np.isnan(numbers))
        same_or_nan((found >> 16).astype(np.uint16)[::-1], expected, np.isnan(numbers))


def test_widening_every_pattern() -> None:
    bits = np.arange(65536, dtype=np.uint32)
    f16 = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    found = primitive("kFromF16", bits[:, None])[:, 0].view(np.float32)
    assert np.array_equal(found, f16, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(f16))
    assert np.array_equal(primitive("kFromBf16", bits[:, None])[:, 0], bits << 16)


def test_f16_differences() -> None:
    rows = words(8192, 2)
    rows[:, 1] = np.where(np.arange(8192) % 2, rows[:, 0] ^ (rows[:, 1] & 0x00030003), rows[:, 1])  # cancellation
    halves = rows.view(np.float16).reshape(-1, 2, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = halves[:, 0] - halves[:, 1]
    found = primitive("kSubF16", rows)[:, :1].copy().view(np.float16)
    assert np.array_equal(found, expected, equal_nan=True)


def test_f16_fma_rounds_once() -> None:
    rows = words(16384, 3)
    rows[::2, 2] = (rows[::2, 2] & 0x83FF83FF) | 0x3C003C00  # around 1 and
    rows[::2, :2] = (rows[::2, :2] & 0x83FF83FF) | 0x38003800  # products of its size
    halves = rows.view(np.float16).astype(np.float64).reshape(-1, 3, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (halves[:, 0] * halves[:, 1] + halves[:, 2]).astype(np.float16)
        twice = (halves[:, 0] * halves[:, 1]).astype(np.float16) + halves[:, 2].astype(np.float16)
    found = primitive("kFmaF16", rows)[:, :1].copy().view(np.float16)
    assert np.array_equal(found, expected, equal_nan=True)
    assert not np.array_equal(found, twice, equal_nan=True)


def test_bits() -> None:
    rows = words(64, 3)
    assert np.array_equal(primitive("kAndOr", rows)[:, 0], rows[:, 0] & rows[:, 1] | rows[:, 2])


def test_byte_permutation() -> None:
    rows = words(4096, 3)
    octets = np.concatenate([rows[:, :1], rows[:, 1:2]], 1).view(np.uint8)  # (n, 8): a's bytes, then b's
    expected = np.zeros((4096, 4), np.uint8)
    for i in range(4):
        pick = rows[:, 2] >> 4 * i & 15
        chosen = octets[np.arange(4096), pick & 7]
        expected[:, i] = np.where(pick & 8, np.where(chosen & 0x80, 255, 0), chosen)
    assert np.array_equal(primitive("kPrmt", rows)[:, 0], expected.view(np.uint32)[:, 0])


def test_fma_and_sqrt_round_once() -> None:
    a, b = (RANDOM.uniform(1, 2, 4096).astype(np.float32) for _ in range(2))
    c = -(a * b)  # what the product loses in f32 is exact in f64
    rows = np.stack([a, b, c], 1).view(np.uint32)
    exact = a.astype(np.float64) * b + c
    assert np.any(exact != 0)
    assert np.array_equal(primitive("kFma", rows)[:, 0].view(np.float32), exact.astype(np.float32))
    assert np.array_equal(primitive("kSqrt", rows)[:, 0].view(np.float32), np.sqrt(a))


def test_identity_and_time() -> None:
    rows = np.zeros((192, 1), np.uint32)
    found = primitive("kIdentity", rows, n_blocks=3)
    thread, block = np.arange(192) % 64, np.arange(192) // 64
    assert np.array_equal(found[:, 0], thread | block << 16)
    assert np.array_equal(found[:, 1:], np.stack([thread // 32, thread % 32, np.full(192, 3)], 1))
    assert np.array_equal(primitive("kTime", rows)[:, :2], np.ones((192, 2)))


def test_host_and_device_have_the_same_wrappers() -> None:
    pattern = re.compile(r"^(?:inline DEVICE |inline )?(\w+) (\w+)\(((?:[^()]|\([^()]*\)(?:\[4\])?)*)\)", re.M)

    def wrappers(path: Path) -> dict[str, tuple[str, list[str]]]:
        found = {}
        for result, name, arguments in pattern.findall(path.read_text().split("namespace flashformer {")[1]):
            own = re.split(r",? *(?:AT$|const char *\* *file)", arguments)[
                0
            ]  # the host's place in the source is left out
            parameters = [a for a in own.replace("(&c)[4]", "*").split(",") if a.strip()]
            found[name] = (result, [re.sub(r"(?<=[ *])[a-z]\w*$", "", a.strip()).strip() for a in parameters])
        return found

    def kinds(parameters: list[str]) -> list[str]:
        return ["Site" if kind.startswith("Site") else kind.replace(" ", "") for kind in parameters]

    device, host = wrappers(DEVICE / "ptx.cuh"), wrappers(HOST / "ptx.h")
    assert len(device) > 40
    assert device.keys() == host.keys()
    for name, (result, parameters) in device.items():
        assert host[name][0] == result
        assert kinds(host[name][1]) == kinds(parameters), name


def test_every_site_orders_something() -> None:
    sites = re.findall(r"X\((k\w+),", (DEVICE / "sites.h").read_text())
    used = re.findall(r"Site::(k\w+)", "".join(path.read_text() for path in DEVICE.glob("*.cuh")))
    assert len(sites) > 30
    assert len(set(sites)) == len(sites)
    assert set(used) == set(sites)
