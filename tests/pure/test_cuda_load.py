"""A model loaded onto a GPU in host memory through the public door: packed file, requests, what is given back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeGpu
from folders import VOCAB_SIZE, model_folder

import flashformer as ff
from flashformer.backends import packed
from flashformer.backends.cuda import cache, driver, host, kernel
from flashformer.backends.cuda.host import Region
from flashformer.program.ir import Space
from flashformer.program.records import MODEL

PROMPT = list(range(3, 40))  # three chunks of 16 rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def run(gpu: FakeGpu, launch: np.void) -> None:
    """Logits that grow towards the id after the row's own; the token is their largest."""
    model = gpu.read_now(int(launch["model"]), MODEL, 1)[0]
    work, stride = int(launch["work"]), int(model["logits_stride"])
    chosen = gpu.read_now(work + int(model["tokens"]), np.int32, 16)
    results = gpu.pinned_at(int(launch["results"]), np.int32, launch["n_head_rows"])
    for i, row in enumerate(launch["head_row"][: launch["n_head_rows"]]):
        token = int(launch["token"][row])
        best = (int(chosen[-1 - token] if token < 0 else token) + 1) % VOCAB_SIZE
        logits = gpu.read_now(work + int(model["logits"]) + 4 * i * stride, np.float32, stride)
        logits[:] = -np.abs(np.arange(stride) - best)
        chosen[i] = results[i] = best


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[FakeGpu]]:
    """The GPUs that were opened; every load opens one. At the end nothing of them is held."""
    opened: list[FakeGpu] = []

    def open_gpu() -> FakeGpu:
        opened.append(FakeGpu(run))
        return opened[-1]

    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "MIN_BYTES", 0)
    monkeypatch.setattr("flashformer.backends.kept.FREE_SHARE", 0)
    monkeypatch.setattr(driver, "find_gpu", lambda: FakeGpu().info)
    monkeypatch.setattr(kernel, "DriverGpu", open_gpu)
    monkeypatch.setattr(cache, "compile_cubin", lambda source: (b"cubin for " + source.arch.encode(), ""))
    yield opened
    assert opened
    for gpu in opened:
        assert (gpu.memory, gpu.pins, gpu.kernels, gpu.closed) == ({}, [], [], True)


def test_requests_run_in_chunks_of_16_rows(folder: Path, gpus: list[FakeGpu]) -> None:
    with ff.load(folder, dtype="bf16", streams=2) as llm:
        assert llm.setup.device == "cuda"
        assert llm.program.target.n_workers == 132
        answer = llm.generate(PROMPT, max_tokens=3, temperature=0, ignore_eos=True)
        assert answer.token_ids == [40, 41, 42]
        (gpu,) = gpus
        assert [int(launch["n_rows"]) for _, launch in gpu.launches] == [16, 16, 5, 1, 1]
        logits = llm.logits(PROMPT)
        assert logits.shape[-1] == VOCAB_SIZE
        assert logits.reshape(-1, VOCAB_SIZE)[-1].argmax() == 40
        assert llm.plan.isa == "sm_90"
        assert "132 multiprocessors" in llm.plan.threads_why
        assert llm.plan.prompt_chunk == 16
    (gpu,) = gpus
    assert gpu.kernels == []


@pytest.mark.parametrize("with_extension", [True, False])
def test_packed_weights_are_mapped_the_second_time(
    with_extension: bool, folder: Path, gpus: list[FakeGpu], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not with_extension:
        monkeypatch.setattr(host, "extension", lambda: None)
        monkeypatch.setattr(kernel, "extension", lambda: None)
    packs: list[int] = []
    real = kernel.pack_weights

    def spy(region: np.ndarray, *args: object, **options: object) -> None:
        packs.append(len(region))
        real(region, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel, "pack_weights", spy)
    found = []
    for _ in range(2):
        with ff.load(folder, dtype="bf16", quant="int4", device="cuda") as llm:
            n_bytes = llm.program.memory.weights_bytes
            address = int(llm.kernel._launch["weights"][0])  # type: ignore[attr-defined]
            found.append(gpus[-1].at(address, n_bytes).tobytes())
    assert len(packs) == 1
    assert found[0] == found[1]
    files = list((tmp_path / "cache" / "packed").glob("*.ffpack"))
    assert len(files) == 1
    assert len(list((tmp_path / "cache" / "cubin").glob("*.cubin"))) == 3  # for 1, 8 and 16 rows


def test_the_cpus_packed_file_is_another_one(folder: Path, gpus: list[FakeGpu], tmp_path: Path) -> None:
    for device in ("cuda", "cpu", "cuda", "cpu"):
        with ff.load(folder, dtype="bf16", device=device):
            pass
    assert len(list((tmp_path / "cache" / "packed").glob("*.ffpack"))) == 2


def test_a_file_that_numpy_wrote_is_read_by_the_extension(
    folder: Path, gpus: list[FakeGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    extension = host.extension()
    reads = []
    for native in (None, extension, None):
        monkeypatch.setattr(host, "extension", lambda native=native: native)
        real = packed.PackedFile.read

        def spy(self: packed.PackedFile, *args: object, real: object = real) -> object:
            region = real(self, *args)  # type: ignore[operator]
            reads.append(type(region))
            return region

        with monkeypatch.context() as patch:
            patch.setattr(packed.PackedFile, "read", spy)
            with ff.load(folder, dtype="bf16", device="cuda"):
                pass
    assert extension is not None
    assert reads == [type(None), type(None), extension.Region, Region]


def test_progress_goes_to_the_end_of_both_steps(folder: Path, gpus: list[FakeGpu]) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, done: int, total: int) -> None:
        seen.setdefault(what, []).append((done, total))

    with ff.load(folder, dtype="bf16", device="cuda", progress=progress) as llm:
        n_bytes = llm.program.memory.weights_bytes
    assert list(seen) == ["packing", "copying to the GPU"]
    assert all(steps[-1] == (n_bytes, n_bytes) for steps in seen.values())


def test_a_closed_model_says_so(folder: Path, gpus: list[FakeGpu]) -> None:
    llm = ff.load(folder, dtype="bf16", device="cuda")
    assert any(b.space is Space.MERGES for b in llm.program.memory.buffers)
    llm.close()
    with pytest.raises(ff.DeviceError, match="closed"):
        llm.generate(PROMPT, max_tokens=1)
