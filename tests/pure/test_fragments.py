"""The fragment layout: every element where its description says, and Programs in it proved like any other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.programs import spec

from flashformer.check import check
from flashformer.formats import BF16, F16, QUANTS, Format
from flashformer.model.spec import ModelSpec
from flashformer.program import Target, build, fragments
from flashformer.program.ir import Layout, Op, Order, PackedMatrix, Program
from flashformer.program.pack import pack, row_map
from flashformer.quantize import quantize

FORMATS = [BF16, F16, *(fmt for name, fmt in QUANTS.items() if name.startswith("int"))]


def program(model: ModelSpec, n_workers: int, fmt: Format = BF16, quant: Format | None = None) -> Program:
    return build(model, Target(n_workers, fmt, BF16, 16, 2, 600, False, quant, quant, Layout.FRAGMENTS))


def items(matrix: PackedMatrix, packed: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """(slice, tile) -> bytes, by the description of fragments.py."""
    found, at = {}, 0
    k_end = -(-matrix.k // fragments.unit_k(matrix.format)) * fragments.unit_k(matrix.format)
    for index, begin in enumerate(range(0, k_end, 2048)):
        n_units = (min(begin + 2048, k_end) - begin) // fragments.unit_k(matrix.format)
        for tile in range(matrix.n_tiles):
            found[index, tile] = packed[at : at + n_units * fragments.unit_bytes(matrix.format)]
            at += n_units * fragments.unit_bytes(matrix.format)
    assert at == len(packed) == matrix.n_bytes
    return found


def matrix(fmt: Format, n_out: int, k: int, order: Order = Order.PLAIN) -> PackedMatrix:
    tiles = 2 * -(-n_out // 2 // 8) * 8 if order is Order.ALTERNATE else n_out
    return PackedMatrix(("w",), n_out, k, fmt, 1, -(-tiles // 16), 0, order, Layout.FRAGMENTS)


@pytest.mark.parametrize("k", [40, 2048, 4200])
@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("fmt", [BF16, F16], ids=lambda f: f.name)
def test_elements_of_16_bits(fmt: Format, order: Order, k: int) -> None:
    shape = matrix(fmt, 38, k, order)
    source = np.random.default_rng(1).integers(1, 1 << 15, (38, k)).astype(np.uint16).view(fmt.storage)
    found, rows = items(shape, pack(shape, [source])), row_map(shape)
    rng = np.random.default_rng(2)
    for _ in range(500):
        tile, row, at = rng.integers(shape.n_tiles), rng.integers(16), rng.integers(shape.k_padded)
        unit, e = at % 2048 // 32, at % 32
        where = unit * 1024 + row * 64 + e * 2
        value = found[at // 2048, tile][where : where + 2].view(np.uint16)[0]
        source_row = rows[tile * 16 + row]
        expected = source[source_row, at].view(np.uint16) if source_row >= 0 and at < k else 0
        assert value == expected


@pytest.mark.parametrize("k", [50, 4200])
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.scale_group], ids=lambda f: f.name)
def test_codes_scales_and_zeros(fmt: Format, k: int) -> None:
    shape, rng = matrix(fmt, 21, k), np.random.default_rng(3)
    source = rng.normal(size=(21, k)).astype(np.float32)
    q, found = quantize(source, fmt), items(shape, pack(shape, [source]))
    unit_k, group = fragments.unit_k(fmt), fmt.scale_group
    n_codes = 16 * unit_k * fmt.bits // 8
    for _ in range(500):
        tile, row, at = rng.integers(shape.n_tiles), rng.integers(16), rng.integers(shape.k_padded)
        unit = found[at // 2048, tile].reshape(-1, fragments.unit_bytes(fmt))[at % 2048 // unit_k]
        inside, g, half = at % unit_k, row % 8, row // 8
        lane, e = 4 * g + inside % 32 // 8, inside % 8
        if fmt.bits == 8:
            code = unit[inside // 32 * 512 + lane * 16 + half * 8 + e]
        else:
            byte = inside // 64 * 512 + lane * 16 + half * 8 + inside % 64 // 32 * 4
            word = int(unit[byte : byte + 4].view(np.uint32)[0])
            code = word >> 4 * (e // 2 + 4 * (e % 2)) & 15
        out = tile * 16 + row
        real = out < 21 and at < q.codes.shape[1]
        assert code == (q.codes[out, at] if real else fmt.zero)
        scale = unit[n_codes:].view(np.float16)[inside // group * 16 + row] if real else 0
        assert scale == (q.scales[out, at // group] if real else 0)
        if fmt.zero_points and real:
            begin = n_codes + unit_k // group * 32
            assert unit[begin + inside // group * 16 + row] == q.zeros[out, at // group]


@pytest.mark.parametrize("n_workers", [1, 3, 8, 132])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_programs_are_proved(fmt: Format, n_workers: int) -> None:
    model = spec(n_layers=3, d_model=2080, d_ff=4200, head_dim=40, vocab_size=333, bias=True)
    quant = fmt if fmt.scale_group else None
    made = program(model, n_workers, BF16 if quant else fmt, quant)
    assert check(made).program is made
    slices = {phase.op: len(phase.matrix.item_bytes) for phase in made.phases if phase.matrix}
    assert (slices[Op.DOWN], slices[Op.QKV], slices[Op.O_PROJ]) == (3, 2, 1)
    for index, phase in enumerate(made.phases):
        for worker, tape in enumerate(made.tapes):
            n_items = slices.get(phase.op, 0) if len(phase.spans[worker]) else 0
            assert sum(item.phase == index for item in tape) == n_items


def test_a_lost_slice_is_found() -> None:
    made = program(spec(d_model=2080), 2)
    tapes = (made.tapes[0][1:], *made.tapes[1:])
    with pytest.raises(Exception, match="tape"):
        check(dataclasses.replace(made, tapes=tapes))
