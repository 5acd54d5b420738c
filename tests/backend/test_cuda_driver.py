"""The driver side of the CUDA backend: its calls through cuda-bindings into a libcuda in host memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOTHING_LEFT = "left: memory 0 pinned 0 libraries 0 streams 0 events 0 contexts 0"

START = """
import numpy as np
from flashformer.backends.cuda.driver import DriverGpu, find_gpu, find_gpus
from flashformer.errors import DeviceError

COPY = np.dtype([("to", "<u8"), ("from", "<u8"), ("n_bytes", "<u8")])

def use(gpu):
    data = np.arange(4096, dtype=np.uint8)
    source, target, out = gpu.allocate(data.nbytes), gpu.allocate(data.nbytes), gpu.pinned(data.nbytes)
    gpu.write(source, data)
    kernel = gpu.load(b"cubin", "copy", 132, 288, 200_000)
    gpu.launch(kernel, np.array([(target, source, data.nbytes)], COPY))
    gpu.zero(target, 16)
    gpu.read(out, target)
    gpu.finish()
    assert not out[:16].any()
    assert (out[16:] == data[16:]).all()
    gpu.unpin(out)
    gpu.unload(kernel)
    gpu.free(source)
    gpu.free(target)

def message(call):
    try:
        call()
    except DeviceError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fake driver."""
    folder = tmp_path_factory.mktemp("driver")
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
    subprocess.run([*command, "-o", folder / "libcuda.so.1", HERE / "fake_libcuda.cpp"], check=True)
    return folder


def run(library: Path | None, code: str, **fakes: str | int) -> tuple[str, str]:
    """(stdout, stderr) of a process that uses the driver in `library`."""
    env = {**os.environ, **{name: str(value) for name, value in fakes.items()}}
    if library is not None:
        env["LD_LIBRARY_PATH"] = str(library)
    script = START + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_kernel_runs_and_everything_is_given_back(library: Path) -> None:
    out, err = run(
        library,
        """
        gpu = DriverGpu()
        use(gpu)
        runs = []
        print(gpu.seconds(lambda: runs.append(use(gpu))), len(runs))
        gpu.mark(1)
        gpu.wait(1)
        gpu.close()
        gpu.close()
        """,
    )
    assert out == "0.0025 2\n"
    assert NOTHING_LEFT in err


def test_threads_take_turns(library: Path) -> None:
    """The context is made current in whichever thread calls."""
    out, _ = run(
        library,
        """
        from concurrent.futures import ThreadPoolExecutor
        gpu = DriverGpu()
        with ThreadPoolExecutor(3) as pool:
            print(len([f.result() for f in [pool.submit(use, gpu) for _ in range(6)]]))
        gpu.close()
        """,
    )
    assert out == "6\n"


def test_what_a_gpu_is(library: Path) -> None:
    out, _ = run(
        library, "print(len(find_gpus()), find_gpu().summary, find_gpu().driver, find_gpu().facts)", FAKE_GPUS=3
    )
    uuid = "GPU-10111213-1415-1617-1819-1a1b1c1d1e1f"
    assert out.startswith(f"3 Fake GPU (sm_90, 132 multiprocessors, 80 GiB, {uuid}) 13.1 ")
    assert "shared_bytes=232448" in out


@pytest.mark.parametrize(
    ("fakes", "code", "words"),
    [
        ({"FAKE_GPUS": 0}, "find_gpu", ["no GPU is visible", "CUDA_VISIBLE_DEVICES"]),
        ({"FAKE_MAJOR": 8}, "find_gpu", ["Fake GPU has compute capability 8.0, the CUDA kernel needs 9.0"]),
        ({"FAKE_FAIL": "cuInit:0:100"}, "find_gpu", ["CUDA_ERROR_NO_DEVICE (text of the fake driver)", "visible"]),
        ({"FAKE_FAIL": "cuInit:0:999"}, "find_gpu", ["starting the NVIDIA driver", "CUDA_ERROR_UNKNOWN"]),
        ({"FAKE_FAIL": "cuDevicePrimaryCtxRetain:0:2"}, "DriverGpu", ["Fake GPU", "CUDA_ERROR_OUT_OF_MEMORY"]),
        ({"FAKE_FAIL": "cuStreamCreate:0:999"}, "DriverGpu", ["making a stream", "CUDA_ERROR_UNKNOWN"]),
    ],
)
def test_refusals_in_one_line(library: Path, fakes: dict[str, str | int], code: str, words: list[str]) -> None:
    out, err = run(library, f"message({code})", **fakes)
    assert out.count("\n") == 1
    for word in words:
        assert word in out
    assert NOTHING_LEFT in err


@pytest.mark.parametrize(
    ("fakes", "code", "words"),
    [
        (
            {},
            "gpu.allocate(2 << 30)",
            ["2,147,483,648 bytes cannot be had", "5,000 of 9,000 are free", "ctx or streams"],
        ),
        ({"FAKE_FAIL": "cuMemAlloc:0:999"}, "gpu.allocate(9)", ["allocating 9 bytes", "CUDA_ERROR_UNKNOWN"]),
        ({"FAKE_FAIL": "cuMemHostAlloc:0:2"}, "gpu.pinned(9)", ["pinning 9 bytes", "CUDA_ERROR_OUT_OF_MEMORY"]),
        (
            {"FAKE_FAIL": "cuStreamSynchronize:0:719"},
            "use(gpu)",
            ["unspecified launch failure", "start the process anew"],
        ),
        ({"FAKE_FAIL": "cuStreamSynchronize:0:700"}, "use(gpu)", ["ILLEGAL_ADDRESS", "context is lost"]),
        ({"FAKE_FAIL": "cuLaunchCooperativeKernel:0:720"}, "use(gpu)", ["TOO_LARGE", "Another process or MPS"]),
        ({"FAKE_FAIL": "cuKernelSetAttribute:0:1"}, "use(gpu)", ["200,000 bytes of shared memory", "INVALID_VALUE"]),
        ({"FAKE_FAIL": "cuFuncSetAttribute:0:1"}, "use(gpu)", ["200,000 bytes of shared memory", "INVALID_VALUE"]),
        ({"FAKE_FAIL": "cuLibraryLoadData:0:209"}, "use(gpu)", ["loading the kernel", "driver is older than NVRTC"]),
        ({}, "gpu.load(b'no kernel', 'copy', 132, 288, 0)", ["loading the kernel", "CUDA_ERROR_INVALID_IMAGE"]),
        ({}, "gpu.load(b'cubin', 'other', 132, 288, 0)", ["finding other", "CUDA_ERROR_NOT_FOUND"]),
        ({"FAKE_PER_SM": 0}, "use(gpu)", ["132 blocks of copy must run at once, but 0 fit on Fake GPU", "MPS"]),
        ({}, "gpu.load(b'cubin', 'copy', 133, 288, 0)", ["133 blocks", "but 132 fit"]),
    ],
)
def test_errors_say_what_failed_in_the_drivers_words(
    library: Path, fakes: dict[str, str | int], code: str, words: list[str]
) -> None:
    out, err = run(library, f"gpu = DriverGpu()\nmessage(lambda: {code})\ngpu.close()", **fakes)
    assert out.count("\n") == 1, out
    for word in words:
        assert word in out
    assert "streams 0" in err
    assert "contexts 0" in err
    if "load(" in code or "PER_SM" in str(fakes) or "Attribute" in str(fakes):
        assert "libraries 0" in err


@pytest.mark.parametrize(("code", "lost"), [(700, True), (719, True), (716, True), (1, False), (2, False)])
def test_a_lost_context_is_an_error_of_its_own(library: Path, code: int, lost: bool) -> None:
    out, _ = run(
        library,
        """
        from flashformer.backends.cuda.driver import LostContextError
        try:
            DriverGpu().finish()
        except DeviceError as error:
            print(isinstance(error, LostContextError))
        """,
        FAKE_FAIL=f"cuStreamSynchronize:0:{code}",
    )
    assert out == f"{lost}\n"


WATCHED = f"""
import sys
sys.path.append({str(Path(__file__).parents[2] / "benchmarks")!r})
from gpu_stages.watch import HungError, WatchedGpu, context_lost
"""


def test_a_gpu_that_is_watched_gives_everything_back(library: Path) -> None:
    code = "gpu = WatchedGpu()\nuse(gpu)\ngpu.mark(0)\ngpu.wait(0)\ngpu.close()\nprint(context_lost())"
    out, err = run(library, WATCHED + code)
    assert out == "False\n"
    assert NOTHING_LEFT in err


@pytest.mark.parametrize("wait", ["gpu.finish()", "gpu.wait(0)"])
def test_what_hangs_is_looked_at_and_then_left_alone(library: Path, wait: str) -> None:
    code = f"""
gpu, other = WatchedGpu(limit_s=0.05), WatchedGpu()
data = np.arange(6, dtype=np.uint32)
words = gpu.allocate(data.nbytes)
gpu.write(words, data)
gpu.watched = {{"words": (words, 20)}}
try:
    {wait}
except HungError as error:
    print(error, error.found)
gpu.free(words)
gpu.close()
other.close()
print(context_lost())
"""
    out, err = run(library, WATCHED + code, FAKE_HANGS=1)
    assert out == "what runs on the GPU did not end in 0 s {'words': [0, 1, 2, 3, 4]}\nTrue\n"
    assert "memory 1 " in err
    assert "contexts 2" in err


def test_no_driver_is_said_in_one_line() -> None:
    code = """
        import sys
        from flashformer.backends.cuda import driver
        sys.modules["cuda"] = None  # it is not even asked for
        driver.LIBRARY = "libno_such_driver.so.1"
        message(find_gpu)
        print(driver.has_driver())
        """
    assert run(None, code)[0] == "no NVIDIA driver here (libno_such_driver.so.1 cannot be loaded)\nFalse\n"


def test_a_driver_without_its_library_names_the_install(library: Path) -> None:
    out, _ = run(library, "import sys\nsys.modules['cuda.bindings'] = None\nmessage(find_gpu)")
    assert "pip install 'flashformer[cuda]'" in out
    assert out.count("\n") == 1
