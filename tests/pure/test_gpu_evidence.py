"""What benchmarks/gpu.py leaves behind when something is wrong: where numbers differ and blocks were, what was lost."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeGpu

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from gpu_stages import ahead, device, micro, numbers_model, plan, trace, wrappers
from gpu_stages.compare import Place, compare
from gpu_stages.families import tiny
from gpu_stages.record import Clock, OutOfTimeError, Record, problems
from gpu_stages.target import cuda_target
from gpu_stages.watch import HungError

from flashformer.backends.base import Times
from flashformer.backends.cuda.driver import LostContextError
from flashformer.backends.cuda.nvrtc import Source
from flashformer.errors import DeviceError
from flashformer.program import build

# ---- where numbers differ ------------------------------------------------------------------------------------------


def test_where_logits_are_furthest_off_and_how_far_by_position() -> None:
    expected = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    expected[2, 7] = 8.0  # the largest
    found, positions = expected.copy(), [0, 3, 20, 300]
    assert compare(found, expected, positions).n_unequal == 0
    found[1, 30] += 0.08
    found[3, 11] -= 0.4
    one = compare(found, expected, positions, allowed=0.02)
    assert one.error == pytest.approx(0.05)
    assert one.worst == Place(300, 11, float(found[3, 11]), float(expected[3, 11]))
    assert one.by_position == pytest.approx({"0": 0, "1-15": 0.01, "16-255": 0, "256-": 0.05}, abs=1e-6)
    assert (one.n_unequal, one.n, one.first_above) == (2, 200, 300)
    assert one.first_unequal == Place(3, 30, float(found[1, 30]), float(expected[1, 30]))
    assert compare(found, expected, positions, allowed=0.001).first_above == 3
    assert "position 300, token 11" in one.text
    assert "2 of 200 words differ, first at position 3, token 30" in one.bits
    json.dumps(one.facts(), allow_nan=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_the_worst(bad: float) -> None:
    expected = np.ones((2, 9), np.float32)
    found = expected + np.float32(0.5)
    found[1, 4] = bad
    one = compare(found, expected, [5, 6])
    assert (one.error, one.worst.position, one.worst.token) == (np.inf, 6, 4)


def test_special_numbers_have_the_larger_one_of_every_pair() -> None:
    words, ((_, _, expected, is_nan),) = numbers_model._special(np.random.default_rng(0))
    a, b = words[0].view(np.float32), words[1].view(np.float32)
    values = expected.view(np.float32)
    assert (is_nan(expected) == (np.isnan(a) & np.isnan(b))).all()
    assert (values[np.isnan(a) & ~np.isnan(b)] == b[np.isnan(a) & ~np.isnan(b)]).all()
    both_zero = (a == 0) & (b == 0)
    assert both_zero.sum() >= 4
    assert (np.signbit(values) == (np.signbit(a) & np.signbit(b)))[both_zero].all()
    finite = np.isfinite(a) & np.isfinite(b)
    assert (values == np.where(a > b, a, b))[finite].all()


# ---- where blocks were ---------------------------------------------------------------------------------------------


def test_where_a_block_was_is_its_longest_time() -> None:
    """Block 0 waits in vain for phase 4, block 1 is in phase 3 meanwhile; then both walk through the rest."""
    program = build(tiny(3, 0).spec, cuda_target(2))
    n = len(program.phases)
    entered = np.tile(np.arange(n) * 100, (2, 1))
    left = entered + 50
    entered[0, 4:] += 10**9
    left[0, 4:] += 10**9
    entered[1, 4:] += 10**9
    left[1, 3:] += 10**9
    found = trace.stuck(program, Times(0, int(left.max()), entered, left))
    assert [(row["block"], row["how"], row["phase"]) for row in found] == [(0, "waits for", 4), (1, "is in", 3)]
    assert found[0]["op"] == program.phases[4].op.value
    assert all(row["ms"] == pytest.approx(1000, abs=1) for row in found)


# ---- errors --------------------------------------------------------------------------------------------------------


def record(tmp_path: Path) -> tuple[Record, Callable[[], dict]]:  # type: ignore[type-arg]
    path = tmp_path / "gpu-0-some.json"
    return Record(0, "some", path), lambda: json.loads(path.read_text())


@pytest.mark.parametrize("error", [DeviceError("x"), KeyError("x"), AssertionError("x"), RuntimeError("x")])
def test_any_error_is_a_failed_check_with_its_traceback(error: Exception, tmp_path: Path) -> None:
    one, document = record(tmp_path)
    with device.failing(one, "part"):
        raise error
    (check,) = document()["checks"]
    assert (check["name"], check["passed"]) == ("part", False)
    assert "raise error" in document()["results"]["traceback of part"]


@pytest.mark.parametrize(
    "error",
    [
        LostContextError("x"),
        HungError("x", {"words": [1, 2]}),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_without_a_context_a_stage_ends(error: Exception, tmp_path: Path) -> None:
    one, document = record(tmp_path)
    with pytest.raises(type(error)), device.failing(one, "part"):
        raise error
    assert [c["name"] for c in document()["checks"]] == ["part"]
    if isinstance(error, HungError):
        assert document()["results"]["memory after part"] == {"words": [1, 2]}


def test_time_that_is_up_is_no_failure(tmp_path: Path) -> None:
    one, document = record(tmp_path)
    with pytest.raises(OutOfTimeError), device.failing(one, "part"):
        raise OutOfTimeError("x")
    one.save()
    assert document()["checks"] == []


def test_giving_memory_back_hides_no_error() -> None:
    class Gpu:
        def allocate(self, n_bytes: int) -> int:
            return 1

        def zero(self, address: int, n_bytes: int) -> None: ...

        def free(self, address: int) -> None:
            raise DeviceError("second")

    def use(*errors: Exception) -> None:
        with device.Memory(Gpu()) as memory:  # type: ignore[arg-type]
            memory.zeros(4)
            for error in errors:
                raise error

    with pytest.raises(DeviceError, match="first"):
        use(DeviceError("first"))
    with pytest.raises(DeviceError, match="second"):
        use()


# ---- processes -----------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, types
sys.path[:0] = {folders!r}
import gpu
from gpu_stages import plan
from flashformer.backends.cuda.driver import LostContextError
from gpu_stages.device import failing
from gpu_stages.watch import HungError

def end(unit):
    if unit != 2:
        return
    how = {how!r}
    if how == "lost" or how == "lost once" and "CUDA_COREDUMP_FILE" not in os.environ:
        raise LostContextError("gone")
    if how == "hung":
        raise HungError("hangs", {{}})
    if how == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "error":
        raise KeyError("odd")

def run(record, clock):
    for unit in record.units(range(4), "unit {{}}".format):
        with failing(record, f"unit {{unit}}"):
            end(unit)
            record.check(f"unit {{unit}}", True)

module = types.ModuleType("gpu_stages.fake")
module.run = run
sys.modules["gpu_stages.fake"] = module
plan.STAGES = (plan.Stage(0, "fake", 1, "fake"),)
sys.exit(gpu.main())
"""
ROOT = Path(__file__).parents[2]
GOOD = [("unit 0", True), ("unit 1", True)]
REST = [("unit 3", True)]


@pytest.mark.parametrize(
    ("how", "unit_2"),
    [
        ("nothing", [("unit 2", True)]),
        ("error", [("unit 2", False)]),
        ("lost", [("unit 2", False), ("unit 2", False)]),
        ("lost once", [("unit 2", False), ("unit 2", True)]),
        ("hung", [("unit 2", False)]),
        ("signal", [("unit 2: runs", False)]),
    ],
)
def test_another_process_goes_on_behind_a_unit_that_ended_one(
    how: str, unit_2: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folders=[str(ROOT / "benchmarks"), str(ROOT / "src")], how=how))
    monkeypatch.setattr(plan, "SCRIPT", script)
    stage = plan.Stage(0, "fake", 1, "fake")
    plan.run_apart(stage, 100, tmp_path)
    document = plan.read(stage, tmp_path)
    assert problems(document) == []
    assert [(c["name"], c["passed"]) for c in document["checks"]] == [*GOOD, *unit_2, *REST]
    assert (document["complete"], document["stopped"]) == (True, "")
    assert not list(tmp_path.glob("*.stack.txt"))


def test_a_stage_that_hangs_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    text = SCRIPT.format(folders=[str(ROOT / "benchmarks"), str(ROOT / "src")], how="")
    script.write_text(text.replace("    how = ''", "    import time; plan.GRACE_S = 0.1; time.sleep(60)"))
    script.write_text(script.read_text().replace("plan.STAGES =", "plan.GRACE_S = 0.2\nplan.STAGES ="))
    monkeypatch.setattr(plan, "SCRIPT", script)
    monkeypatch.setattr(plan, "GRACE_S", 6.0)
    stage = plan.Stage(0, "fake", 1, "fake")
    plan.run_apart(stage, 1.0, tmp_path)
    document = plan.read(stage, tmp_path)
    assert document["stopped"] == "killed after 7 s, at unit 2"
    assert "in end" in (tmp_path / "gpu-0-fake.stack.txt").read_text()


# ---- compiling -----------------------------------------------------------------------------------------------------


def test_a_source_that_does_not_compile_fails_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLASHFORMER_CACHE", "off")
    one, _ = record(tmp_path)
    good, bad = (Source(text, (), "sm_90") for text in ('extern "C" __global__ void f() {}', "int f() { return no; }"))
    with device.Compiler(one) as compiler:
        compiler.prepare([bad, good])
        assert compiler(good).startswith(b"\x7fELF")
        for _ in range(2):
            with pytest.raises(DeviceError, match="cannot compile"):
                compiler(bad)


def test_resources_of_whole_kernels_are_in_the_results(tmp_path: Path) -> None:
    one, document = record(tmp_path)
    checked = ahead.models.KINDS[3][0].checked(ahead.FACTS)
    first = next(ahead.models.KINDS[3][0].kernels(checked, ahead.FACTS))
    device.Compiler(one)(first)
    ((name, found),) = document()["results"]["kernels"].items()
    assert name.startswith("kRows=1 kTimes=0 kBodyFormat=")
    assert 32 < found["registers"] <= 168
    assert found["local_bytes"] == 0


def test_the_cache_is_filled_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHFORMER_CACHE", str(tmp_path))
    texts = [Source(f'extern "C" __global__ void f{i}() {{}}', (), "sm_90") for i in range(2)]
    monkeypatch.setattr(ahead, "sources", lambda facts: iter([*texts, *texts]))
    assert ahead.fill_cache() == 0
    assert len(list((tmp_path / "cubin").glob("*.cubin"))) == 2
    assert "2 kernels" in capsys.readouterr().out
    monkeypatch.setenv("FLASHFORMER_CACHE", "off")
    assert ahead.fill_cache() == 1


def test_all_kernels_of_all_stages_are_known_ahead() -> None:
    found = list(ahead.sources(ahead.FACTS))
    timed = [one for one in found if "kTimes = 1" in dict(one.headers).get("specialization.h", "")]
    assert len(set(found)) > 100
    assert len(timed) == 3 * 3  # of the models that are traced


# ---- whole stages --------------------------------------------------------------------------------------------------


class FakeCompiler:
    def __init__(self, record: Record) -> None: ...

    def __enter__(self) -> FakeCompiler:
        return self

    def __exit__(self, *error: object) -> None: ...

    def prepare(self, sources: Iterable[Source]) -> None:
        assert all(list(sources))

    def __call__(self, source: Source) -> bytes:
        return b"cubin"


@pytest.mark.parametrize("module", [wrappers, micro])
def test_kernels_that_do_nothing_fail_their_checks(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing else goes wrong on the way."""
    one, document = record(tmp_path)
    gpus = []

    def open_gpu(record: Record) -> FakeGpu:
        gpus.append(FakeGpu())
        return gpus[-1]

    monkeypatch.setattr(module, "open_gpu", open_gpu)
    monkeypatch.setattr(module, "Compiler", FakeCompiler)
    monkeypatch.setattr(device, "_queried", lambda: None)
    monkeypatch.setattr(micro, "DATA_BYTES", 16 << 20)
    monkeypatch.setattr(micro, "PERIOD_BYTES", 4 << 20)
    monkeypatch.setattr(micro, "SLOTS", (16384, 32768))
    monkeypatch.setattr(micro, "compile_cubin", lambda source: (b"cubin", ""))
    module.run(one, Clock(1000))
    found = document()
    assert problems(found) == []
    assert not any("Error" in c["detail"] for c in found["checks"]), found["checks"]
    assert len(found["checks"]) > 20
    wrong = [c["name"] for c in found["checks"] if not c["passed"]]
    assert len(wrong) > 10
    measured = {s["check"].split()[0] for s in found["speeds"]}
    assert measured == ({"M5", "M8"} if module is micro else set())  # M5 here has no data to read
    assert [(gpu.memory, gpu.pins, gpu.kernels, gpu.closed) for gpu in gpus] == [({}, [], [], True)]
