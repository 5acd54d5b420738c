"""What goes wrong in a stage of benchmarks/gpu.py, NaN first of all, is said and takes nothing else along."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu
from launches import kernel, put, reporting, sound, token_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from gpu_stages import device, micro, record, stream, tiny_models, trace
from gpu_stages.decode import device_seconds, run_phases
from gpu_stages.record import Clock, OutOfTimeError, Record, problems

from flashformer.backends.cuda.driver import LostContextError
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.cuda.launch import REPORT_WORDS
from flashformer.backends.cuda.nvrtc import Resources, Source
from flashformer.errors import DeviceError, NumericalError
from flashformer.formats import BF16

NOT_FINITE = {REPORT_WORDS + 2: 2 + 3}  # seen after the feed-forward of layer 1
IN_VAIN = {0: 1, 1: 2}
ERRORS = [(NOT_FINITE, NumericalError, "feed-forward of layer 1"), (IN_VAIN, DeviceError, "block 2 waited in vain")]
CALLS: dict[str, Callable[[CudaKernel], object]] = {
    "forward": lambda made: made.forward(1),
    "run_phases": lambda made: run_phases(made, 1, 3),
    "device_seconds": lambda made: device_seconds(made, 1, 2, 1),
}


@pytest.fixture
def one(tmp_path: Path) -> Record:
    return Record(2, "some", tmp_path / "gpu-2-some.json")


def found(one: Record) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(one._path.read_text())
    assert problems(document) == []
    return document


def assert_sound(gpu: FakeGpu, made: CudaKernel) -> None:
    """The next forward finds report and counter as if nothing had been wrong."""
    gpu.run = sound
    made.forward(1)
    assert made.tokens[0] == token_of(3, 0)
    assert not gpu.read_now(made._report_at, np.uint32, len(made._report)).any()


# ---- launches of the stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "error", "text"), ERRORS)
@pytest.mark.parametrize("call", CALLS)
def test_launches_of_the_stages_raise_what_forwards_do(
    call: str, words: dict[int, int], error: type[Exception], text: str
) -> None:
    gpu = FakeGpu(reporting(words))
    with kernel(gpu) as made:
        put(made, [3])
        with pytest.raises(error, match=text):
            CALLS[call](made)
        assert_sound(gpu, made)


def test_times_of_what_is_not_finite_are_times() -> None:
    gpu = FakeGpu(reporting(NOT_FINITE))
    with kernel(gpu) as made:
        put(made, [3])
        assert min(device_seconds(made, 1, 2, 3, (NumericalError,))) > 0
        assert_sound(gpu, made)
        gpu.run = reporting(NOT_FINITE)
        with pytest.raises(NumericalError):
            trace.traced(made)
        gpu.run = reporting(NOT_FINITE)
        assert trace.traced(made, (NumericalError,))["ops"]
        gpu.run = reporting(IN_VAIN)
        with pytest.raises(DeviceError, match="in vain"):
            device_seconds(made, 1, 2, 3, (NumericalError,))


# ---- after a wait in vain ------------------------------------------------------------------------------------------


class Again(FakeGpu):
    """Waits in vain; the next forward, for its times, ends with `error`."""

    error: Exception

    def wait(self, event: int) -> None:
        if len(self.launches) > 1:
            raise self.error
        super().wait(event)


@pytest.mark.parametrize("error", [DeviceError("x"), LostContextError("x")])
def test_a_context_that_is_lost_over_a_trace_is_lost(error: Exception, one: Record) -> None:
    gpu = Again(reporting(IN_VAIN))
    gpu.error = error
    with kernel(gpu) as made:
        put(made, [3])
        lost = isinstance(error, LostContextError)
        expected = pytest.raises(type(error), match="x" if lost else "in vain")
        with expected, trace.tracing_hangs(one, "a case", made):
            made.forward(1)
        assert [c["passed"] for c in found(one)["checks"]] == [False] * lost
        assert ("stuck in a case" in found(one)["results"]) == (not lost)
        assert lost or made._kernels is made._plain


def test_a_trace_that_cannot_be_made_hides_no_wait_in_vain(one: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_times(self: CudaKernel) -> None:
        raise ValueError("no compiler")

    monkeypatch.setattr(CudaKernel, "keep_times", keep_times)
    with kernel(FakeGpu(reporting(IN_VAIN))) as made:
        put(made, [3])
        with pytest.raises(DeviceError, match="in vain"), trace.tracing_hangs(one, "a case", made):
            made.forward(1)
    (check,) = found(one)["checks"]
    assert (check["passed"], check["detail"]) == (False, "ValueError: no compiler")


# ---- compiling -----------------------------------------------------------------------------------------------------


def test_several_threads_ask_for_kernels_at_once(one: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = record.os.replace

    def slowly(*paths: Path) -> None:
        time.sleep(0.002)
        replace(*paths)

    monkeypatch.setattr(record.os, "replace", slowly)
    monkeypatch.setattr(device, "resources", lambda cubin, entry: Resources(int(cubin), 0, 0, 0))
    sources = [Source(f"// {i}\n", (), "sm_90") for i in range(32)]
    compiler = device.Compiler(one)
    for i, source in enumerate(sources):
        compiler._begun[source] = Future()
        compiler._begun[source].set_result(b"%d" % i)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(compiler, sources)) == [b"%d" % i for i in range(32)]
    kernels = found(one)["results"]["kernels"]
    assert sorted(noted["registers"] for noted in kernels.values()) == list(range(32))
    again = device.Compiler(Record(2, "some", one._path, first=1))  # of the process that goes on
    again._begun = compiler._begun
    again(sources[5])
    assert found(one)["results"]["kernels"] == kernels


# ---- oracles -------------------------------------------------------------------------------------------------------

CASES = [tiny_models.Case(i, BF16) for i in range(4)]


class Late(Future):  # type: ignore[type-arg]
    def result(self, timeout: float | None = None) -> Any:
        assert timeout is not None
        raise TimeoutError


class Oracles:
    """In place of a pool: answers 0, an error for case 1, 2, and for case 3 what is given."""

    def __init__(self, last: Future[Any]) -> None:
        self._last = last

    def submit(self, function: object, case: tiny_models.Case, seed: int) -> Future[Any]:
        future: Future[Any] = self._last if case.model == 3 else Future()
        if case.model == 1:
            future.set_exception(MemoryError("no room"))
        elif case.model != 3:
            future.set_result((np.zeros(1), 0.5))
        return future

    def shutdown(self, **options: bool) -> None: ...


class NoCompiler:
    def __init__(self, record: Record) -> None: ...

    def __enter__(self) -> NoCompiler:
        return self

    def __exit__(self, *error: object) -> None: ...

    def prepare(self, sources: object) -> None: ...


class Passing:
    """In place of a run: a check."""

    def __init__(self, record: Record, case: tiny_models.Case, *others: object) -> None:
        self._record, self._case = record, case

    def run(self, *arguments: object) -> None:
        self._record.check(f"{self._case.name}: runs", True)


@pytest.mark.parametrize("late", [True, False])
def test_what_goes_wrong_in_one_oracle_or_program_is_of_its_case(
    late: bool, one: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    last: Future[Any] = Late() if late else Future()
    if not late:
        last.set_result((np.zeros(1), 0.5))
    gpu, tiny = FakeGpu(), tiny_models.tiny

    def broken(index: int, seed: int) -> tiny_models.Tiny:
        if index == 2:
            raise ValueError("odd")
        return tiny(index, seed)

    def pool(*arguments: object) -> Oracles:
        return Oracles(last)

    for name, value in {
        "ProcessPoolExecutor": pool, "Compiler": NoCompiler, "CaseRun": Passing, "cases": lambda: CASES, "tiny": broken,
        "open_gpu": lambda record: gpu,
    }.items():  # fmt: skip
        monkeypatch.setattr(tiny_models, name, value)
    monkeypatch.setattr(device, "_queried", lambda: None)
    if late:
        with pytest.raises(OutOfTimeError, match="waiting for NumPy; 3 cases done"):
            tiny_models.run(one, Clock(100))
    else:
        tiny_models.run(one, Clock(100))
    names = {case.model: case.name for case in CASES}
    assert [(c["name"], c["passed"], c["detail"]) for c in found(one)["checks"]] == [
        (f"{names[2]}: is made", False, "ValueError: odd"),
        (f"{names[0]}: runs", True, ""),
        (f"{names[1]}: runs", False, "MemoryError: no room"),
        (f"{names[2]}: runs", False, "ValueError: odd"),
        *([] if late else [(f"{names[3]}: runs", True, "")]),
    ]
    assert gpu.closed


# ---- reads ---------------------------------------------------------------------------------------------------------


class Reader(stream.Reader):
    """Takes 1 ms a read, and knows when."""

    bench: micro.Bench

    def __init__(self, wrong: str) -> None:
        self._n_bytes, self.n_blocks, self.sm_mhz, self._wrong_text = 16 << 20, 4, 0.0, wrong
        self.asked: list[tuple[str, float]] = []  # what was under way, seconds of reads

    def seconds(self, read: stream.Read, repeats: int) -> tuple[list[float], str]:
        assert read.n_items * self.n_blocks * read.slot_bytes > self._n_bytes // 2, "hardly anything is read"
        times = [] if self._wrong_text else [0.001] * repeats
        self.asked.append((self.bench.record.facts.get("now", ""), sum(times)))
        return times, self._wrong_text


@pytest.mark.parametrize("wrong", ["", "the words add up to 1, not 2"])
def test_reads_before_the_first_that_counts(wrong: str, one: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(wrong)
    reader.bench = micro.Bench(one, Clock(100), FakeGpu(), NoCompiler(one))  # type: ignore[arg-type]
    monkeypatch.setattr(micro, "_reader", lambda *given: reader)
    monkeypatch.setattr(micro, "_hand_offs", lambda *given: None)
    micro._reads(reader.bench)
    names = [name for name, _ in reader.asked]
    first = next(i for i, name in enumerate(names) if name.startswith("M1"))
    before = sum(seconds for _, seconds in reader.asked[:first])
    assert first == 1 if wrong else 0.25 < before < 0.4
    assert len(found(one)["checks"]) >= len(micro.SLOTS) * len(micro.RINGS)
