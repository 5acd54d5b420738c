"""Attention beside what the cache holds of other sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_kernels import ISAS, cpu_kernel, prefill, prompt_logits
from odd_shapes import Shape, random_ids
from switch_models import VOCAB, cpu, random_spec, random_tensors, reference
from tiny import put, relative_error

import flashformer as ff
from flashformer.backends.base import Want
from flashformer.backends.cpu.native import load_native
from flashformer.checkpoint import Tensor
from flashformer.formats import BF16, F16, F32, Format

SHAPE = Shape(4, 2, 14, 56, 72, 101, layers=2)
POISON = 100


@pytest.mark.parametrize("kv", [BF16, F16, F32], ids=lambda f: f.name)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("chunk", [1, 8])
def test_what_an_earlier_sequence_left_is_not_read(kv: Format, exact: bool, chunk: int) -> None:
    """Its keys and values are NaN, right behind those of the new one, which may end anywhere in a block of 32."""
    model = SHAPE.make(seed=1, stored="bf16")
    embed = model.tensors["embed"]
    bits = embed.data.copy()
    bits[POISON] = 0x7F00  # 1.7e38: its square is no float, and its norm NaN
    tensors = {**model.tensors, "embed": Tensor(embed.name, BF16, bits)}
    ids = random_ids(5, 290, POISON)
    with cpu_kernel(replace(model, tensors=tensors), weights=BF16, kv=kv, exact=exact, ctx=336) as kernel:
        expected = prompt_logits(kernel, ids)
        for n in (*range(1, 19), 31, 32, 33, 250, 256, 257, 289):
            put(kernel, 0, [POISON] * 16, pos=n, slot=0, want=Want.LOGITS)
            put(kernel, 16, [POISON] * 24, pos=n + 16, slot=0, want=Want.NOTHING)
            with pytest.raises(ff.NumericalError):
                kernel.forward(40)
            np.testing.assert_array_equal(prompt_logits(kernel, ids[:n], chunk=chunk), expected[:n])


@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (2, 1, 32), (3, 1, 64), (4, 1, 96), (10, 2, 16), (6, 1, 32), (7, 1, 64), (8, 1, 80)], ids=str
)
@pytest.mark.parametrize("isa", ISAS)
def test_one_query_as_among_others(
    shape: tuple[int, int, int], isa: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row and several, so 1 to 64 queries of a head at once, to the end of a context that ends within a block."""
    if isa is not None:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
    model = Shape(*shape, 840, 88, 101, layers=2).make(seed=4)
    ids, found = random_ids(8, 176, 101), dict[tuple[int, int, int], bytes]()
    for ctx, chunks in ((176, (1, 2, 5, 64)), (192, (64,))):
        with cpu_kernel(model, weights=BF16, kv=BF16, streams=2, ctx=ctx) as kernel:
            for slot in (1, 0):
                for chunk in chunks:
                    found[ctx, slot, chunk] = prompt_logits(kernel, ids, chunk=min(chunk, 16), slot=slot).tobytes()
                    found[ctx, slot, -chunk] = prefill(kernel, ids, chunk=chunk, slot=slot).tobytes()
    assert len({bits for (_, _, chunk), bits in found.items() if chunk > 0}) == 1
    assert len({bits for (_, _, chunk), bits in found.items() if chunk < 0}) == 1


@pytest.mark.parametrize("shape", [(1, 1, 64), (4, 4, 16), (3, 1, 30), (8, 2, 80)], ids=str)
@pytest.mark.parametrize("window", [None, 300, 700])
@pytest.mark.parametrize("isa", ISAS)
def test_one_query_as_among_others_over_many_positions(
    shape: tuple[int, int, int], window: int | None, isa: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row alone, beside 3 and 12 others, and beside that of another stream, as few queries may meet two
    chunks of 256 positions at once."""
    if isa is not None:
        monkeypatch.setenv("FLASHFORMER_ISA", isa)
    model = Shape(*shape, 60, 40, 101, layers=1).make(
        seed=4, architecture="MistralForCausalLM", sliding_window=window, max_position_embeddings=2048
    )
    ids = random_ids(8, 1089, 101)
    with cpu_kernel(model, weights=BF16, kv=BF16, streams=2, ctx=1104) as kernel:
        for n in (513, 577, 769, 833, 1025, 1089):
            found = [prefill(kernel, ids[:n], chunk=chunk).tobytes() for chunk in (64, 50, 63)]
            found.append(prefill(kernel, ids[: n - 1] + ids[-1:], chunk=64, slot=1).tobytes())
            assert n % 64 == 1
            assert len(set(found[:3])) == 1
            assert n == 1089 or found[3] != found[0]
            put(kernel, 0, ids[n - 1 : n], pos=n - 1, slot=0, want=Want.LOGITS)
            put(kernel, 1, ids[-1:], pos=n - 1, slot=1, want=Want.LOGITS)
            kernel.forward(2)
            assert [kernel.logits[r].tobytes() for r in range(2)] == [found[0], found[3]]


def test_many_chunks_are_merged() -> None:
    """More than one vector of them, beside the reference."""
    spec = random_spec(3)
    tensors = random_tensors(spec, 3)
    ids = np.random.default_rng(1).integers(0, VOCAB, 4400).tolist()
    target = {"rows": 128, "ctx": 4416}
    expected = prefill(reference(spec, tensors, **target), ids, chunk=128)
    kernel = cpu(spec, tensors, 2, **target)
    try:
        assert relative_error(prefill(kernel, ids, chunk=128), expected) <= 1e-4
    finally:
        kernel.close()


@pytest.mark.parametrize("head_dim", [14, 30, 64, 80, 256])
@pytest.mark.parametrize("isa", ["avx512", "amx"])
def test_subnormal_values(isa: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to and below the least normal number, made visible by o_proj: one row as among others."""
    if isa not in load_native().isas():
        pytest.skip(f"this CPU has no {isa}: nothing to run")
    monkeypatch.setenv("FLASHFORMER_ISA", isa)
    model = Shape(4, 2, head_dim, 56, 72, 101, layers=1).make(seed=2)
    rng, tensors = np.random.default_rng(3), dict(model.tensors)
    for name, low, high in (("v", -39.5, -36.5), ("o", 35.0, 36.0)):
        old = tensors[f"layers.0.{name}"]
        size = (10.0 ** rng.uniform(low, high, old.data.shape)).astype(np.float32)
        tensors[f"layers.0.{name}"] = Tensor(old.name, F32, np.sign(old.data) * size)
    ids = random_ids(5, 70, POISON)
    with cpu_kernel(replace(model, tensors=tensors), weights=BF16, kv=BF16) as kernel:
        logits = [prompt_logits(kernel, ids, chunk=chunk) for chunk in (1, 2, 3, 9)]
    nothing = {**tensors, "layers.0.o": Tensor("o", F32, np.zeros_like(tensors["layers.0.o"].data))}
    with cpu_kernel(replace(model, tensors=nothing), weights=BF16, kv=BF16) as kernel:
        assert not np.allclose(prompt_logits(kernel, ids, chunk=9), logits[0], rtol=0.05)
    assert all(found.tobytes() == logits[0].tobytes() for found in logits)
