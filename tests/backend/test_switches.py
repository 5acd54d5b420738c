"""Every switch of a LayerSpec on random models: the CPU kernel against the reference, and its bits against itself."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_kernels import ISAS, greedy, prefill, prompt_logits
from numpy.typing import NDArray
from switch_models import D_MODEL, VOCAB, cpu, random_spec, random_tensors, reference
from tiny import put, relative_error

from flashformer.backends.base import Want
from flashformer.backends.cpu.kernel import CpuKernel
from flashformer.checkpoint import Tensor
from flashformer.errors import NumericalError
from flashformer.formats import BF16, F16, F32, Format
from flashformer.model.spec import Activation, LayerSpec, ModelSpec

N_SHAPES = 24


def some_ids(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


@pytest.mark.parametrize("seed", range(N_SHAPES))
def test_cpu_equals_reference(seed: int) -> None:
    spec = random_spec(seed)
    tensors, ids = random_tensors(spec, seed), some_ids(seed, 40)
    with_reference = prompt_logits(reference(spec, tensors), ids)
    kernel = cpu(spec, tensors, 1 + seed % 4)
    try:
        assert relative_error(prompt_logits(kernel, ids), with_reference) <= 1e-4
    finally:
        kernel.close()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_long_prompts_cross_chunks_and_windows(seed: int) -> None:
    """560 positions: three key chunks; windows begin in the middle of some and hide others."""
    spec = random_spec(100 + seed)
    tensors, ids = random_tensors(spec, seed), some_ids(seed, 560)
    expected = prefill(reference(spec, tensors), ids, chunk=64)
    kernel = cpu(spec, tensors, 3)
    try:
        assert relative_error(prefill(kernel, ids, chunk=64), expected) <= 1e-4
    finally:
        kernel.close()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stored", [F32, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("seed", range(6))
def test_same_bits(seed: int, stored: Format, isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks, the threads, and the other slots."""
    if isa is not None:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
    spec = random_spec(200 + seed)
    tensors, ids = random_tensors(spec, seed, stored), some_ids(seed, 300)
    formats = {"weight_format": stored, "kv_format": stored}
    found: list[bytes] = []
    for n_workers, chunk in ((1, 64), (2, 7), (3, 1), (4, 64)):
        kernel = cpu(spec, tensors, n_workers, streams=2, **formats)
        try:
            other = some_ids(seed + 1, 5)
            if n_workers == 4:  # another stream in the same forwards, the slots the other way round
                found.append(_beside(kernel, ids, other))
            else:
                found.append(prefill(kernel, ids, chunk=chunk, slot=n_workers % 2).tobytes())
        finally:
            kernel.close()
    assert len(set(found)) == 1


def _beside(kernel: CpuKernel, ids: list[int], other: list[int]) -> bytes:
    for begin in range(0, len(ids), 50):
        part = ids[begin : begin + 50]
        put(kernel, 0, other, pos=begin, slot=1, want=Want.NOTHING)
        put(kernel, len(other), part, pos=begin, slot=0, want=Want.NOTHING)
        kernel.rows.want[len(other) + len(part) - 1] = Want.LOGITS
        kernel.forward(len(other) + len(part))
    result: NDArray[np.float32] = kernel.logits[0]
    return result.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("weights", "exact"), [(BF16, True), (F16, True), (F16, False)])
@pytest.mark.parametrize("kv", [F32, BF16, F16])
def test_16_bit_formats(
    weights: Format, kv: Format, isa: str | None, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of 16-bit weights, activations as they are, equal those of the reference. f16 never rounds them."""
    if isa is not None:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
    spec = random_spec(1)
    tensors, ids = random_tensors(spec, 1, weights), some_ids(1, 40)
    target = {"weight_format": weights, "kv_format": kv, "exact": exact}
    expected = prompt_logits(reference(spec, tensors, **target), ids)
    kernel = cpu(spec, tensors, **target)
    try:
        assert relative_error(prompt_logits(kernel, ids), expected) <= (1e-4 if kv is F32 else 5e-3)
        assert len(greedy(kernel, ids, 8)) == 8
    finally:
        kernel.close()


@pytest.mark.parametrize("isa", ISAS)
def test_every_f16_is_read_and_written_right(isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All finite values, subnormal ones too, as a head; and float32 between them, rounded to f16 as numpy does.

    The layer adds nothing, so the logits of token c are column c of the head times one factor.
    """
    if isa is not None:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    between = values[:-1] / 2 + values[1:] / 2
    wide = np.concatenate([values, between, np.nextafter(between, np.float32(np.inf))])
    places = (np.arange(len(wide)), np.arange(len(wide)) % D_MODEL % 16)  # every place of a packed vector
    layer = LayerSpec(1, 1, 4, 16, False, False, False, 1e-5, Activation.SILU, 0.5, None)
    spec = ModelSpec(D_MODEL, len(wide), 64, (layer,), 1e-5, False, None, ())
    tensors = random_tensors(spec, 0)
    for role in ("layers.0.o", "layers.0.down", "embed"):
        tensors[role].data[:] = 0
    tensors["embed"].data[:16, :16] = np.eye(16)
    tensors["final_norm"].data[:] = 1
    tensors["lm_head"].data[:] = 0
    tensors["lm_head"].data[places] = wide
    kernel = cpu(spec, tensors, weight_format=F16, ctx=64)
    try:
        found = prompt_logits(kernel, list(range(16))).sum(axis=0)
    finally:
        kernel.close()
    factor = 1 / np.sqrt(1 / D_MODEL + 1e-5)
    np.testing.assert_allclose(found, wide.astype(np.float16).astype(np.float64) * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("role", ["embed", "layers.0.q", "layers.0.v", "layers.1.o", "layers.2.down", "layers.2.gate"])
@pytest.mark.parametrize("seed", range(8))
def test_overflow_is_an_error(seed: int, role: str) -> None:
    """Norms of branches and of heads, soft caps and exp must not hide what is not finite."""
    spec = random_spec(300 + seed)
    tensors = random_tensors(spec, seed)
    tensors[role] = Tensor(role, F32, tensors[role].data * np.float32(3e38))
    assert not np.isnan(tensors[role].data).any()
    tensors[role].data[np.isinf(tensors[role].data)] = np.float32(3e38)
    kernel = cpu(spec, tensors)
    try:
        with pytest.raises(NumericalError):
            prompt_logits(kernel, some_ids(seed, 8))
    finally:
        kernel.close()
