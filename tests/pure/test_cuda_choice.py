"""Which device a load takes, and what the CUDA backend needs to be imported."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_models import H100
from programs import spec
from typer.testing import CliRunner

import flashformer as ff
from flashformer.backends import registry
from flashformer.backends.cpu import topology
from flashformer.backends.cuda import driver, nvrtc
from flashformer.backends.cuda.driver import GpuInfo
from flashformer.cli.app import app
from flashformer.engine.setup import Options, Setup, set_up
from flashformer.formats import BF16, F32
from flashformer.program.ir import Layout

bench = import_module("flashformer.cli.bench")  # the package has the command under that name
MODEL = spec()
GPU = GpuInfo(H100, "GPU-1", "13.0", 80 << 30)


@pytest.fixture(autouse=True)
def said_nothing_yet() -> None:
    registry._say_why_not.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[GpuInfo | str], None]:
    """Makes this a machine with a GPU, or one where looking for it fails with a message."""

    def make(found: GpuInfo | str) -> None:
        def find_gpu() -> GpuInfo:
            if isinstance(found, str):
                raise ff.DeviceError(found)
            return found

        monkeypatch.setattr(driver, "find_gpu", find_gpu)
        monkeypatch.setattr(driver, "has_driver", lambda: True)

    return make


def chosen(device: str = "auto", stored: object = BF16, **options: object) -> Setup:
    return set_up(MODEL, stored, Options(device=device, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_is_taken_where_there_is_one(device: str, machine: Callable[[GpuInfo | str], None]) -> None:
    machine(GPU)
    setup = chosen(device, streams=3)
    target = setup.target
    assert (setup.device, setup.gpu, setup.prompt_chunk) == ("cuda", GPU, 16)
    assert (target.n_workers, target.rows, target.streams, target.layout) == (132, 16, 3, Layout.FRAGMENTS)
    assert "132 multiprocessors" in setup.workers_why
    assert setup.free is not None
    assert (setup.free.value, setup.free.source) == (80 << 30, "H100")


def test_the_memory_of_this_machine_says_nothing_of_a_gpu(
    machine: Callable[[GpuInfo | str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` gives no floor, and `bench` compares with what the GPU reads."""
    machine(GPU)
    made = CliRunner().invoke(app, ["plan", "shape:smollm2-135m"])
    assert made.exit_code == 0
    assert "device     cuda, sm_90" in made.stdout
    assert "floor" not in made.stdout
    assert "bandwidth of a GPU is measured by `flashformer bench`" in made.stderr
    monkeypatch.setattr(bench, "ReadProbe", None)
    speeds = iter([2900.0, 3000.0])
    llm: Any = SimpleNamespace(
        setup=chosen(), fits_in_cache=False, kernel=SimpleNamespace(probe_weights=lambda: next(speeds))
    )
    probe = bench._probe(llm)
    assert probe is not None
    assert [probe.gb_s(0.3), probe.gb_s(0.3)] == [2900.0, 3000.0]
    llm.fits_in_cache = True
    assert bench._probe(llm) is None


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_other_devices_look_for_no_gpu(device: str, machine: Callable[[GpuInfo | str], None]) -> None:
    machine("this is not asked")
    setup = chosen(device, stored=F32)
    assert (setup.device, setup.gpu, setup.prompt_chunk) == (device, None, 64)
    assert setup.target.layout is Layout.LANES
    assert setup.workers_why == setup.threads.why


@pytest.mark.parametrize(
    ("isa", "options", "rows"),
    [
        ("amx", {}, 256),
        ("amx", {"prompt_chunk": 7}, 7),
        ("amx", {"quant": "int8"}, 128),
        ("amx", {"quant": "int4", "exact": True}, 64),
        ("amx", {"exact": True}, 64),
        ("amx", {"dtype": "f32"}, 64),
        ("avx512", {}, 64),
        (None, {}, 64),
    ],
)
def test_a_matrix_unit_takes_prompts_in_larger_chunks(
    isa: str | None, options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "native_isa", lambda: isa)
    setup = chosen("cpu", **options)
    assert (setup.prompt_chunk, setup.target.rows) == (rows, max(rows, 16))


def test_larger_chunks_need_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "native_isa", lambda: "amx")
    chunks = []
    for free in (1 << 40, 1 << 20):
        monkeypatch.setattr(topology, "free_memory", lambda free=free: topology.Limit(free, "a test"))
        chunks.append(set_up(MODEL, BF16, Options(device="cpu", ctx=256)).prompt_chunk)
    assert chunks == [256, 64]


REFUSED: dict[str, tuple[GpuInfo | str, dict[str, object], str]] = {
    "no gpu": ("no GPU is visible to this process", {}, "no GPU is visible"),
    "f32 as stored": (GPU, {"stored": F32}, "weights in f32"),
    "f32 asked for": (GPU, {"dtype": "f32"}, "weights in f32"),
    "exact": (GPU, {"exact": True}, "exact activations"),
    "nf4": (GPU, {"quant": "nf4"}, "weights in nf4-g64"),
    "kv": (GPU, {"kv_dtype": "f32"}, "KV cache in f32"),
    "chunk": (GPU, {"prompt_chunk": 17}, "17 rows"),
    "old driver": (dataclasses.replace(GPU, driver="12.8"), {}, r"driver supports CUDA 12.8, needed is 13.0"),
    "new gpu": (
        dataclasses.replace(GPU, facts=dataclasses.replace(H100, capability=(99, 0))),
        {},
        "cannot compile for",
    ),
    "small": (dataclasses.replace(GPU, facts=dataclasses.replace(H100, shared_bytes=1 << 15)), {}, "shared memory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_auto_says_once_why_not_and_cuda_is_refused(
    case: str, machine: Callable[[GpuInfo | str], None], caplog: pytest.LogCaptureFixture
) -> None:
    found, options, words = REFUSED[case]
    machine(found)
    with caplog.at_level(logging.DEBUG, logger="flashformer"):
        for _ in range(2):
            assert chosen("auto", **options).device == "cpu"  # type: ignore[arg-type]
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert words in record.getMessage()
    assert "\n" not in record.getMessage()
    with pytest.raises(ff.DeviceError, match=rf"device='cuda': .*{words}.*or use device='cpu'"):
        chosen("cuda", **options)  # type: ignore[arg-type]


def test_a_machine_without_a_driver_is_not_told(
    machine: Callable[[GpuInfo | str], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("no NVIDIA driver here")
    monkeypatch.setattr(driver, "has_driver", lambda: False)
    with caplog.at_level(logging.DEBUG, logger="flashformer"):
        assert chosen().device == "cpu"
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_without_a_compiler_auto_takes_the_cpu_and_cuda_names_the_install(
    machine: Callable[[GpuInfo | str], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(GPU)
    nvrtc._bindings.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    try:
        with caplog.at_level(logging.INFO, logger="flashformer"):
            assert chosen().device == "cpu"
        assert "pip install 'flashformer[cuda]'" in caplog.text
        with pytest.raises(ff.DeviceError, match=r"NVRTC.*pip install 'flashformer\[cuda\]'"):
            chosen("cuda")
        assert "pip install" in str(registry.describe_cuda()["nvrtc"])
    finally:
        nvrtc._bindings.cache_clear()


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(ff.RequestError, match="device='tpu': expected one of auto, cpu, cuda"):
        chosen("tpu")


def test_doctor_says_what_there_is(machine: Callable[[GpuInfo | str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "find_gpus", lambda: [GPU])
    found = registry.describe_cuda()
    assert found["gpu"] == ["H100 (sm_90, 132 multiprocessors, 80 GiB, GPU-1)"]
    assert found["cuda_driver"] == "13.0"
    assert str(found["nvrtc"]).startswith("13.")

    def none() -> list[GpuInfo]:
        raise ff.DeviceError("no NVIDIA driver here")

    monkeypatch.setattr(driver, "find_gpus", none)
    assert registry.describe_cuda()["gpu"] == "none: no NVIDIA driver here"


# Packs, loads and runs a forward of the CUDA kernel on a GPU in host memory, without what may be missing beside it.
ALONE = """
import json, sys
blocked = ("flashformer._cpu", "msgspec", "typer", "rich", "tokenizers", "huggingface_hub", "jinja2", "torch",
           "transformers", "safetensors", "fastapi", "uvicorn")
for name in blocked:
    sys.modules[name] = None
sys.path.insert(0, "tests")
from cuda_models import checked, random_weights
from fake_gpu import FakeGpu
from programs import spec
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.formats import QUANTS
launched = []
gpu = FakeGpu(lambda gpu, launch: launched.append(int(launch["n_rows"])))
weights = random_weights(spec(n_layers=2))
kernel = CudaKernel(checked(quant=QUANTS["int4-g32"]), weights, gpu=gpu, compiler=lambda source: b"")
kernel.rows.want[:1] = 1
kernel.forward(1)
kernel.close()
print(json.dumps([launched, sorted(name for name in blocked if sys.modules.get(name))]))
"""


def test_the_backend_runs_without_the_cpu_extension_and_without_command_line_and_server() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1], []]
