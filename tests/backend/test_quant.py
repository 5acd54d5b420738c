"""Quantized weights: packing against the definition, products against the reference, bits, and the extremes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_kernels import ISAS, cpu_kernel, greedy, prefill, prompt_logits
from numpy.typing import NDArray
from odd_shapes import random_ids
from switch_models import cpu, random_spec, random_tensors, reference
from tiny import Tiny, relative_error, tiny

from flashformer.backends.cpu.native import load_native
from flashformer.checkpoint import Tensor
from flashformer.errors import LoadError, NumericalError
from flashformer.formats import BF16, F32, QUANTS, Format
from flashformer.program.ir import Order, PackedMatrix
from flashformer.program.pack import pack
from flashformer.quantize import Quantized, dequantize, quantize, quantize_rows

every_format = pytest.mark.parametrize("fmt", QUANTS.values(), ids=QUANTS)


def extremes(rng: np.random.Generator, rows: int, k: int) -> np.ndarray[Any, Any]:
    """Rows of every kind: normal, zero, denormal, one large element, all equal, one-sided, alternating, huge, ties."""
    x = rng.standard_normal((rows, k)).astype(np.float32)
    x[1] = 0
    x[2] *= np.float32(1e-40)
    x[3] = 0
    x[3, k // 2] = 5
    x[4] = -0.75
    x[5] = np.abs(x[5])
    x[6] = -np.abs(x[6])
    x[7] = np.where(np.arange(k) % 2, 1, -1)
    x[8] *= np.float32(1e4)
    x[9] *= np.float32(1e-7)
    x[10] = np.round(x[10] * 4) / 4
    x[11, ::3] = 0
    return x


@every_format
@pytest.mark.parametrize("isa", load_native().isas())
def test_native_packing_is_the_definition(fmt: Format, isa: str) -> None:
    """Bytes, of every kind of row, on every instruction set; padding is zeros."""
    rng = np.random.default_rng(len(fmt.name))
    native = load_native()
    for vectors, n_out, k in ((1, 21, 96), (2, 50, 257), (4, 70, 300)):
        x = extremes(rng, n_out, k)
        tiles = -(-n_out // (16 * vectors))
        matrix = PackedMatrix(("a",), n_out, k, fmt, vectors, tiles, 0, Order.PLAIN)
        region = native.Region(matrix.n_bytes)
        region.array[:] = 0xA5
        assert packed_by(native, region, matrix, x, isa) == -1
        found, expected = region.array[: matrix.n_bytes], pack(matrix, [x])
        assert np.array_equal(found, expected.reshape(-1).view(np.uint8))


@every_format
@pytest.mark.parametrize("isa", load_native().isas())
def test_native_packing_of_hard_choices(fmt: Format, isa: str) -> None:
    """Steps that lie on or beside the middle of two codes, scales that are denormal in float16 or at its end, groups
    of which several candidates are equally good.
    """
    rng, native = np.random.default_rng(11), load_native()
    k, n_out = 256, 256
    x = rng.integers(-16, 17, (n_out, k)).astype(np.float32) / 2  # ties
    x *= np.exp2(rng.integers(-26, 12, (n_out, 1))).astype(np.float32)
    x[::3] = np.nextafter(x[::3], np.where(rng.random((len(x[::3]), k)) < 0.5, -np.inf, np.inf).astype(np.float32))
    x[5] = np.float32(-0.0)
    x[7, :] = np.float32(3e-8) * np.sign(rng.standard_normal(k)).astype(np.float32)
    x[9, :] = np.float32(65504 * 5) * rng.uniform(-1, 1, k).astype(np.float32)
    matrix = PackedMatrix(("a",), n_out, k, fmt, 4, n_out // 64, 0, Order.PLAIN)
    region = native.Region(matrix.n_bytes)
    assert packed_by(native, region, matrix, x, isa) == -1
    assert np.array_equal(region.array[: matrix.n_bytes], pack(matrix, [x]).reshape(-1).view(np.uint8))


@every_format
@pytest.mark.parametrize("isa", load_native().isas())
def test_the_row_that_cannot_be_packed_is_named(fmt: Format, isa: str) -> None:
    native = load_native()
    matrix = PackedMatrix(("a",), 70, 96, fmt, 2, 3, 0, Order.PLAIN)
    region = native.Region(matrix.n_bytes)
    for bad, value in ((np.nan, 37), (np.inf, 5), (3e38, 69), (-3e38, 16)):
        x = extremes(np.random.default_rng(12), 70, 96)
        x[value, 50] = bad
        assert packed_by(native, region, matrix, x, isa) == value


def packed_by(native: Any, region: Any, matrix: PackedMatrix, x: np.ndarray[Any, Any], isa: str) -> int:
    fmt = matrix.format
    rows = np.full(matrix.n_tiles * matrix.tile_outputs, -1, np.int32)
    rows[: matrix.n_out] = np.arange(matrix.n_out)
    result: int = native.pack(
        region=region, offset=0, format=fmt.code, scale_group=fmt.scale_group,
        group_bytes=fmt.group_bytes(matrix.vectors), zero_points=fmt.zero_points, zero=fmt.zero,
        vectors=matrix.vectors, n_tiles=matrix.n_tiles, k=matrix.k, k_padded=matrix.k_padded, row_map=rows,
        sources=[x], source_format=F32.code, isa=isa, n_threads=2,
    )  # fmt: skip
    return result


@every_format
def test_quantizing_is_close_and_keeps_zeros(fmt: Format) -> None:
    x = extremes(np.random.default_rng(1), 40, 256)
    values = dequantize(quantize(x, fmt), fmt)
    assert np.isfinite(values).all()
    assert (values[1] == 0).all()
    normal = np.r_[0, 4:9, 10:40]
    error = np.sqrt(np.mean((values[normal] - x[normal]) ** 2, axis=1) / np.mean(x[normal] ** 2, axis=1))
    assert error.max() < (0.02 if fmt.bits == 8 else 0.2)


def test_a_better_scale_is_found() -> None:
    """Least error, not least range: the search pays for normal weights."""
    x = np.random.default_rng(2).standard_normal((200, 128)).astype(np.float32)
    fmt = QUANTS["int4-g32"]
    searched = np.mean((dequantize(quantize(x, fmt), fmt) - x) ** 2)
    groups = x.reshape(-1, 32)
    largest = groups[np.arange(len(groups)), np.abs(groups).argmax(axis=1)]
    scale = (-largest / 8).astype(np.float16)
    codes = np.clip(np.rint(groups / scale.astype(np.float32)[:, None]) + 8, 0, 15).astype(np.uint8)
    plain = Quantized(codes, scale[:, None], np.full((len(groups), 1), 8, np.uint8))
    assert searched < 0.97 * np.mean((dequantize(plain, fmt) - groups) ** 2)


def test_activations_of_every_kind() -> None:
    x = extremes(np.random.default_rng(3), 20, 130)
    values, scales = quantize_rows(x, 32)
    assert np.abs(values).max() == 127
    assert (values[1] == 0).all()
    assert np.abs(values[:, :130] * np.repeat(scales, 32, axis=1)[:, :130] - x)[3:9].max() <= scales[3:9].max() * 0.5001
    x[0, 5] = np.inf
    assert np.isnan(quantize_rows(x, 32)[1][0, 0])


def quantized(fmt: Format, **more: Any) -> dict[str, Any]:
    return {"weight_format": F32, "body_quant": fmt, "head_quant": fmt, **more}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", [True, False])
@every_format
def test_kernel_equals_reference(fmt: Format, exact: bool, isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied and not, over odd widths. Narrow sums are exact integers, so both quantize alike or a step apart."""
    if isa is not None:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
    model = tiny(
        4, scale=0.15, hidden_size=92, intermediate_size=140, head_dim=22, vocab_size=211,
        tie_word_embeddings=fmt.scale_group == 64,
    )  # fmt: skip
    ids = random_ids(1, 16, 211)
    target = quantized(fmt, exact=exact, rows=64, ctx=64)
    expected = prompt_logits(reference(model.spec, dict(model.tensors), **target), ids)
    kernel = cpu(model.spec, dict(model.tensors), **target)
    try:
        assert relative_error(prompt_logits(kernel, ids), expected) <= (2e-4 if exact else 2e-2)
        wanted = {True: "f32", False: "int8"}[exact]
        assert kernel.describe()["activations"] == wanted
    finally:
        kernel.close()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("d_model", "d_ff"), [(64, 64), (64, 48), (192, 72), (128, 130)])
def test_groups_longer_than_rows(d_model: int, d_ff: int, exact: bool) -> None:
    """Rows are padded to whole groups in place; one must not reach into the next."""
    model = tiny(5, scale=0.15, hidden_size=d_model, intermediate_size=d_ff, head_dim=16, vocab_size=97)
    ids, target = random_ids(1, 16, 97), quantized(QUANTS["int8-g128"], exact=exact, rows=64, ctx=64)
    expected = prompt_logits(reference(model.spec, dict(model.tensors), **target), ids)
    kernel = cpu(model.spec, dict(model.tensors), **target)
    try:
        assert relative_error(prompt_logits(kernel, ids), expected) <= (2e-4 if exact else 2e-2)
        one_by_one = prompt_logits(kernel, ids, chunk=1)
        assert one_by_one.tobytes() == prompt_logits(kernel, ids).tobytes()
    finally:
        kernel.close()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8-g32", "int4-g128", "int4-g32-zp", "nf4-g64"])
@pytest.mark.parametrize("exact", [True, False])
def test_same_bits(name: str, exact: bool, isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks, the threads and the rows."""
    if isa is not None:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
    spec = random_spec(7)
    tensors, ids = random_tensors(spec, 7), random_ids(2, 70, 211)
    found = set()
    for n_workers, chunk in ((1, 64), (2, 7), (3, 1), (4, 5)):
        kernel = cpu(spec, tensors, n_workers, **quantized(QUANTS[name], exact=exact))
        try:
            found.add(prefill(kernel, ids, chunk=chunk).tobytes())
        finally:
            kernel.close()
    assert len(found) == 1


def test_integer_sums_are_the_same_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saturation and signs: weights and activations at their largest, where a wrong instruction would overflow."""
    model = tiny(9, scale=0.3, hidden_size=128, intermediate_size=256, vocab_size=97)
    extreme = {
        role: Tensor(role, F32, np.where(t.data > 0, np.float32(0.5), np.float32(-0.5))) if t.data.ndim == 2 else t
        for role, t in model.tensors.items()
    }
    for name in ("int8-g128", "int4-g128", "nf4-g128", "int4-g128-zp"):
        found = []
        for isa in ISAS:
            if isa is not None:
                monkeypatch.setenv("FLASHFORMER_ISA", isa)
            else:
                monkeypatch.delenv("FLASHFORMER_ISA")
            kernel = cpu(model.spec, extreme, **quantized(QUANTS[name]))
            try:
                found.append(prompt_logits(kernel, random_ids(3, 16, 97)))
            finally:
                kernel.close()
        for other in found[:-1]:
            assert relative_error(other, found[-1]) < 1e-4


@pytest.mark.parametrize(
    "name", [*("int8-g32", "int8-g128", "int4-g64", "int4-g32-zp", "int4-g128-zp", "nf4-g128"), None]
)
def test_a_matrix_unit_gives_the_bits_of_dot_products(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, one pass of it, several of different lengths; whole tiles, several blocks of k and a rest. Sums of bf16
    have an order of their own there, whatever the rows."""
    if "amx" not in load_native().isas():
        pytest.skip("this CPU has no AMX: nothing to run")
    model = tiny(8, scale=0.05, hidden_size=1100, intermediate_size=650, head_dim=22, vocab_size=211)
    ids, shape = random_ids(5, 150, 211), {"rows": 150, "ctx": 160}
    target = {"weight_format": BF16, **shape} if name is None else quantized(QUANTS[name], **shape)
    found: dict[str, list[NDArray[np.float32]]] = {}
    for isa in ("avx512", "amx"):
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
        kernel = cpu(model.spec, dict(model.tensors), **target)
        try:
            found[isa] = [prefill(kernel, ids, chunk=chunk) for chunk in (1, 5, 16, 17, 37, 64, 150)]
        finally:
            kernel.close()
        assert len({logits.tobytes() for logits in found[isa]}) == 1
    assert relative_error(found["amx"][0], found["avx512"][0]) <= (0 if name else 5e-3)  # activations rounded otherwise


def test_head_and_body_are_chosen_apart() -> None:
    model = tiny(6, scale=0.2, hidden_size=64, intermediate_size=96, vocab_size=130)
    ids = random_ids(4, 20, 130)
    exact = model.logits(ids)

    def error(body: Format | None, head: Format | None) -> float:
        with cpu_kernel_of(model, body, head) as kernel:
            assert greedy(kernel, ids, 4)
            return relative_error(prompt_logits(kernel, ids), exact)

    int8, int4 = QUANTS["int8-g32"], QUANTS["int4-g32"]
    assert error(None, None) < 1e-4 < error(None, int8) < error(None, int4) < 1
    assert 1e-4 < error(int8, None) < error(int4, None) < 1
    assert error(int8, int8) < error(int4, int8) < 1


def cpu_kernel_of(model: Tiny, body: Format | None, head: Format | None) -> Any:
    return cpu_kernel(model, body_quant=body, head_quant=head, rows=64)


@every_format
def test_what_is_not_finite_is_an_error(fmt: Format) -> None:
    model = tiny(6, scale=0.2, hidden_size=64, intermediate_size=96, vocab_size=130)
    huge = dict(model.tensors)
    huge["layers.0.gate"] = Tensor("gate", F32, model.tensors["layers.0.gate"].data * np.float32(1e9))
    with (
        pytest.raises(LoadError, match="too large for the format"),
        cpu_kernel_of(replace(model, tensors=huge), fmt, fmt),
    ):
        pass
    overflow = dict(model.tensors)
    for role in ("layers.0.up", "layers.0.gate"):
        overflow[role] = Tensor(role, F32, model.tensors[role].data * np.float32(1e4))
    overflow["layers.0.ffn_norm"] = Tensor("n", F32, model.tensors["layers.0.ffn_norm"].data * np.float32(1e18))
    with (
        cpu_kernel_of(replace(model, tensors=overflow), fmt, fmt) as kernel,
        pytest.raises(NumericalError, match="layer 0"),
    ):
        prompt_logits(kernel, [1, 2, 3])
    bad = dict(model.tensors)
    data = model.tensors["layers.1.down"].data.copy()
    data[3, 4] = np.nan
    bad["layers.1.down"] = Tensor("down", F32, data)
    with pytest.raises(LoadError, match=r"\[3, 4\] is NaN"), cpu_kernel_of(replace(model, tensors=bad), fmt, fmt):
        pass


def test_bf16_embedding_beside_quantized_layers() -> None:
    """An untied embedding keeps the format of what is not quantized."""
    model = tiny(6, stored="bf16", scale=0.2, hidden_size=64, intermediate_size=96, vocab_size=130)
    ids = random_ids(4, 16, 130)
    with cpu_kernel(model, weights=BF16, body_quant=QUANTS["int8-g64"], head_quant=QUANTS["int8-g64"]) as kernel:
        assert relative_error(prompt_logits(kernel, ids), model.logits(ids)) < 5e-2
