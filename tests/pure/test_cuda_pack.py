"""Weights packed for the CUDA kernel, by threads, with and without the CPU extension: the bytes of program/pack.py."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_models import cuda_program, random_weights
from programs import spec

from flashformer.backends.cuda import host, pack
from flashformer.backends.cuda.pack import pack_weights
from flashformer.checkpoint import Tensor
from flashformer.checkpoint.tensor import Stored, StoredFile
from flashformer.errors import LoadError
from flashformer.formats import BF16, F16, F32, QUANTS, Format, from_f32, to_f32
from flashformer.model.spec import ModelSpec
from flashformer.program import Program
from flashformer.program.pack import pack as define
from flashformer.program.pack import row_map

INTEGERS = [fmt for name, fmt in QUANTS.items() if name.startswith("int")]
MODEL = spec(n_layers=2, d_model=56, d_ff=2120, bias=True)  # down has two slices, outputs fill no whole tile


def expected_region(program: Program, weights: dict[str, Tensor]) -> np.ndarray:
    """Every byte by the definitions; those between the parts are 0x5A, as in the region that is compared."""
    region = np.full(program.memory.weights_bytes, 0x5A, np.uint8)
    for phase in program.phases:
        if (matrix := phase.matrix) is not None:
            sources = [to_f32(weights[role].data, weights[role].format) for role in matrix.roles]
            if not matrix.format.scale_group:
                sources = [from_f32(values, matrix.format) for values in sources]
            region[matrix.offset :][: matrix.n_bytes] = define(matrix, sources)
        for name, vector in phase.vectors.items():
            values = np.concatenate([to_f32(weights[role].data, weights[role].format) for role in vector.roles])
            if name == "bias":
                assert matrix is not None
                values = np.append(values, np.float32(0))[row_map(matrix)]
            region[vector.offset :][: 4 * len(values)] = values.view(np.uint8)
    if program.embed_offset >= 0:
        values = to_f32(weights["embed"].data, weights["embed"].format)
        rows = np.ascontiguousarray(from_f32(values, program.target.weight_format))
        region[program.embed_offset :][: rows.nbytes] = rows.view(np.uint8).reshape(-1)
    return region


def packed(program: Program, weights: dict[str, Tensor], n_threads: int = 3, native: Any = None) -> np.ndarray:
    region = np.full(program.memory.weights_bytes, 0x5A, np.uint8)
    pack_weights(region, program, weights, n_threads, native=native)
    return region


@pytest.mark.parametrize("piece_bytes", [1, 4 << 20])
@pytest.mark.parametrize("stored", [F32, BF16, F16], ids=lambda f: f.name)
@pytest.mark.parametrize("fmt", [BF16, F16], ids=lambda f: f.name)
def test_formats_of_16_bits(fmt: Format, stored: Format, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "PIECE_BYTES", piece_bytes)
    program, weights = cuda_program(MODEL, fmt=fmt), random_weights(MODEL, stored)
    found, expected = packed(program, weights), expected_region(program, weights)
    np.testing.assert_array_equal(found, expected)
    assert (found != 0x5A).mean() > 0.9


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("fmt", INTEGERS, ids=lambda f: f.name)
def test_quantized_formats(fmt: Format, native: bool) -> None:
    tied = spec(d_model=72, d_ff=2120, tied=True)
    program, weights = cuda_program(tied, quant=fmt, head_quant=QUANTS["int8-g128"]), random_weights(tied)
    extension = host.extension()
    assert extension is not None, "these tests need the CPU extension"
    found = packed(program, weights, native=extension if native else None)
    np.testing.assert_array_equal(found, expected_region(program, weights))


@pytest.mark.parametrize("order", [1, -1])
def test_weights_in_a_file(order: int, tmp_path: Path) -> None:
    """Read piece by piece where they lie, whatever the order of the tensors."""
    program, weights = cuda_program(MODEL), random_weights(MODEL)
    blob, offsets = b"??", {}
    for role in list(weights)[::order]:
        offsets[role] = len(blob)
        blob += weights[role].data.tobytes()
    (tmp_path / "weights").write_bytes(blob)
    file = StoredFile(tmp_path / "weights")
    stored = {r: Tensor(r, t.format, Stored(file, offsets[r], t.shape)) for r, t in weights.items()}
    np.testing.assert_array_equal(packed(program, stored), expected_region(program, weights))


def spoiled(role: str, index: tuple[int, ...], value: float, stored: Format = F32) -> dict[str, Tensor]:
    weights = random_weights(MODEL, stored)
    values = to_f32(weights[role].data, stored).copy()
    values[index] = value
    return weights | {role: Tensor(role, stored, from_f32(values, stored))}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("quant", [None, QUANTS["int8-g64"], QUANTS["int4-g32-zp"]], ids=lambda f: f and f.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("role", "index"), [("layers.1.up", (71, 5)), ("layers.0.v", (27, 0)), ("lm_head", (100, 55)), ("embed", (3, 3))]
)
def test_a_weight_that_is_not_finite_is_named(
    role: str, index: tuple[int, int], value: float, quant: Format | None, native: bool
) -> None:
    program = cuda_program(MODEL, quant=quant)
    with pytest.raises(LoadError, match=rf"tensor {role}: element \[{index[0]}, {index[1]}\] is NaN or Inf"):
        packed(program, spoiled(role, index, value), native=host.extension() if native else None)


def test_a_weight_that_the_format_cannot_hold_is_named() -> None:
    with pytest.raises(LoadError, match=r"layers.0.down: element \[7\] is too large for the format"):
        packed(cuda_program(MODEL, fmt=F16), spoiled("layers.0.down", (7, 2119), 1e30))


def test_tensors_of_one_product_must_be_stored_alike() -> None:
    weights = random_weights(MODEL) | {"layers.0.k": random_weights(MODEL, F32)["layers.0.k"]}
    with pytest.raises(LoadError, match="differ in dtype"):
        packed(cuda_program(MODEL), weights)


def test_progress_ends_at_the_whole() -> None:
    program, seen = cuda_program(MODEL), []
    region = np.empty(program.memory.weights_bytes, np.uint8)
    pack_weights(region, program, random_weights(MODEL), 2, lambda *at: seen.append(at))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("packing", program.memory.weights_bytes, program.memory.weights_bytes)
    assert len(seen) > len(program.phases) / 2


@pytest.mark.parametrize("n_bytes", [4096, 3 << 20, (3 << 20) + 4096])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_block_sums_are_those_of_the_extension(n_bytes: int, n_threads: int) -> None:
    buffer = np.random.default_rng(n_bytes).integers(0, 256, n_bytes).astype(np.uint8)
    found, expected = np.zeros((2, -(-n_bytes // (1 << 20))), np.uint64)
    host.block_sums(buffer, 1 << 20, found, n_threads)
    extension = host.extension()
    assert extension is not None
    extension.block_sums(buffer, 1 << 20, expected, 1)
    np.testing.assert_array_equal(found, expected)
    assert found.all()


@pytest.mark.parametrize("extension", [True, False])
def test_a_region_reads_a_part_of_a_file(extension: bool, tmp_path: Path) -> None:
    kind = host.extension().Region if extension else host.Region  # type: ignore[union-attr]
    data = np.random.default_rng(0).integers(0, 256, 7 << 20).astype(np.uint8)
    path, begin, n = tmp_path / "file", 4096, (5 << 20) + 13
    path.write_bytes(data.tobytes())
    with path.open("r+b") as file:
        for n_threads in (1, 3):
            region = kind.read(file.fileno(), begin, n, n_threads)
            np.testing.assert_array_equal(region.array, data[begin : begin + n])
        file.truncate(6 << 20)
        np.testing.assert_array_equal(region.array, data[begin : begin + n])
        with pytest.raises((OSError, RuntimeError), match="Input/output error"):
            kind.read(file.fileno(), begin, 6 << 20, 2)
    with path.open("wb") as file, pytest.raises((OSError, RuntimeError), match="Bad file descriptor"):
        kind.read(file.fileno(), 0, 1, 2)


def test_memory_is_pythons_where_the_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "extension", lambda: None)
    memory = host.host_memory()
    assert isinstance(memory, types.SimpleNamespace)
    assert memory.Region(10, resident=False).array.shape == (10,)


def test_the_model_has_all_that_can_go_wrong() -> None:
    """Several slices, padded outputs, k that is no whole unit, several sources, biases."""
    model: ModelSpec = MODEL
    matrices = [phase.matrix for phase in cuda_program(model).phases if phase.matrix]
    assert any(len(m.item_bytes) > 1 for m in matrices)
    assert any((row_map(m) < 0).any() for m in matrices)
    assert any(m.k_padded > m.k for m in matrices)
    assert any(len(m.roles) > 2 for m in matrices)
