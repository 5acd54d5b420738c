"""benchmarks/gpu.py without a GPU: what it imports, how it divides time, what it writes, that its CUDA compiles."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
sys.path.append(str(SCRIPT.parent))

from gpu_stages import device, plan  # noqa: E402
from gpu_stages.families import tiny  # noqa: E402
from gpu_stages.record import Clock, OutOfTimeError, Record, problems  # noqa: E402
from gpu_stages.target import cuda_target  # noqa: E402

from flashformer.backends.cuda.nvrtc import Source, compile_cubin, resources, source_of  # noqa: E402
from flashformer.backends.cuda.specialize import DeviceFacts, specialize  # noqa: E402
from flashformer.check import check  # noqa: E402
from flashformer.formats import QUANTS  # noqa: E402
from flashformer.program import build  # noqa: E402

H100 = DeviceFacts("H100", 132, 232448, (9, 0))
ABSENT = ("flashformer._cpu", "typer", "rich", "msgspec", "jinja2", "huggingface_hub", "transformers")
MODULES = sorted({stage.module for stage in plan.STAGES} | {"one_model"})


# ---- imports -------------------------------------------------------------------------------------------------------


def blocked(code: str) -> subprocess.CompletedProcess[str]:
    """Runs with only the folders of the checkout that the script adds, and nothing of ABSENT."""
    block = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.path.insert(0, {str(SCRIPT.parent)!r}); "
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}
    )


def test_every_stage_imports_with_little_installed() -> None:
    names = [f"gpu_stages.{module}" for module in MODULES]
    done = blocked(f"import gpu, importlib; [importlib.import_module(n) for n in {names!r}]; print('all')")
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr


def test_small_models_are_made_with_little_installed() -> None:
    done = blocked(
        "import gpu; from gpu_stages.families import MODELS, tiny; "
        "from gpu_stages.tiny_models import Case, oracle; from flashformer.formats import BF16; "
        "print([tiny(i, 0).spec.n_layers for i in range(len(MODELS))], oracle(Case(3, BF16), 0)[0].shape)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("(48, 555)\n")


def test_a_blocked_library_is_missed() -> None:
    assert "ModuleNotFoundError" in blocked("import jinja2").stderr


# ---- time and order ------------------------------------------------------------------------------------------------


def test_stages_are_numbered_and_have_a_module() -> None:
    assert [stage.number for stage in plan.STAGES] == list(range(8))
    for stage in plan.STAGES:
        assert callable(importlib.import_module(f"gpu_stages.{stage.module}").run)


@pytest.mark.parametrize("text", ["", "8", "-1", "1,1", "0,x", "0,,1", "0 1"])
def test_stages_that_do_not_exist(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="different numbers"):
        plan.parse_stages(text)


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "nan", "inf", "1e9"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="seconds"):
        plan.parse_seconds(text)


def test_the_plan_names_every_stage_and_its_share() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--plan", "--stage", "3,0", "--budget-s", "120"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["0 wrappers         30.0 s", "3 llama-3.2-1b     90.0 s"]


def test_the_first_five_fit_one_call() -> None:
    assert plan.STAGES[:5] == plan.DEFAULT
    assert plan.BUDGET_S == 480
    assert plan.STAGES[4].share / sum(s.share for s in plan.DEFAULT) == pytest.approx(1 / 3)


def test_time_left_over_goes_to_later_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now, given = [1000.0], []
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])

    def runner(stage: plan.Stage, seconds: float, out: Path) -> None:
        given.append(round(seconds, 3))
        now[0] += 10 if stage.number == 0 else seconds

    plan.run_stages(plan.parse_stages("0,1,2"), 230, tmp_path, runner)
    assert given == [30, 88, 132]  # of 230, 220 and 132 seconds


def test_a_stage_out_of_time_has_the_first_call_refused() -> None:
    clock = Clock(100)
    clock.require("work", 50)
    with pytest.raises(OutOfTimeError, match="work"):
        clock.require("work", 101)


# ---- what is written -----------------------------------------------------------------------------------------------


def record(tmp_path: Path) -> Record:
    return Record(3, "some", tmp_path / "gpu-3-some.json")


def written(tmp_path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((tmp_path / "gpu-3-some.json").read_text())
    return found


def test_a_speed_needs_a_check_that_passed(tmp_path: Path) -> None:
    one = record(tmp_path)
    assert not one.speed("a", 1, "us", check="logits")
    one.check("logits", True, "error 0")
    assert one.speed("b", 2, "us", check="logits", shown=True, extra=[1])
    one.check("logits", False)
    assert not one.speed("c", 3, "us", check="logits")
    one.finish()
    document = written(tmp_path)
    assert [s["name"] for s in document["speeds"]] == ["b"]  # type: ignore[attr-defined]
    assert len(document["skipped"]) == 2  # type: ignore[arg-type]
    assert problems(document) == ["speed b without a passed check logits"]  # it failed only later


def test_what_is_wrong_with_a_document() -> None:
    good = Record(0, "x", Path("unused")).document()
    assert problems(good) == []
    for bad in ({"stage": "0"}, {"checks": [{"name": "a"}]}, {"more": 1}, {"complete": True, "stopped": "why"}):
        assert problems(good | bad), bad
    assert problems({k: v for k, v in good.items() if k != "about"})


def fake_stage(monkeypatch: pytest.MonkeyPatch, run: object) -> plan.Stage:
    module = types.ModuleType("gpu_stages.fake")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gpu_stages.fake", module)
    stage = plan.Stage(0, "fake", 1, "fake")
    monkeypatch.setattr(plan, "STAGES", (stage,))
    return stage


def test_a_stage_that_ends_early_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(one: Record, clock: Clock) -> None:
        one.check("first", True)
        clock.require("the second", 1e6)

    stage = fake_stage(monkeypatch, run)
    assert plan.run_inside(0, 5, tmp_path) == 0
    document = plan.read(stage, tmp_path)
    assert problems(document) == []
    assert (document["complete"], document["stopped"]) == (False, "out of time at the second")
    assert [c["name"] for c in document["checks"]] == ["first"]


def test_a_stage_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(one: Record, clock: Clock) -> None:
        raise ValueError("odd")

    stage = fake_stage(monkeypatch, run)
    assert plan.run_inside(0, 5, tmp_path) == 1
    assert plan.read(stage, tmp_path)["stopped"] == "ValueError: odd"


def test_the_table_and_the_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    def run(one: Record, clock: Clock) -> None:
        one.check("right", True)
        one.speed("token", 812.5, "us", check="right", shown=True)
        one.speed("hidden", 1, "us", check="right")

    stage = fake_stage(monkeypatch, run)

    def runner(stage: plan.Stage, seconds: float, out: Path) -> None:
        plan.run_inside(stage.number, seconds, out)

    assert plan.run_stages((stage,), 5, tmp_path, runner) == 0
    table = capsys.readouterr().out
    assert "1/1 checks" in table
    assert "812.5 us" in table
    assert "hidden" not in table
    assert plan.run_stages((stage,), 5, tmp_path / "other", lambda *_: None) == 1
    assert "NOT COMPLETE: no result" in capsys.readouterr().out


def test_a_process_without_a_gpu_writes_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan.run_apart(plan.STAGES[0], 60, tmp_path)
    document = plan.read(plan.STAGES[0], tmp_path)
    assert problems(document) == []
    assert not document["complete"]
    assert document["stopped"].startswith("DeviceError: ")


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(plan, "SCRIPT", script)
    monkeypatch.setattr(plan, "GRACE_S", 0.1)
    plan.run_apart(plan.STAGES[0], 0.2, tmp_path)
    assert plan.read(plan.STAGES[0], tmp_path)["stopped"].startswith("killed after")


# ---- CUDA sources --------------------------------------------------------------------------------------------------

ENTRIES = {
    "selftest.cu": [
        *("test_mma_bf16", "test_mma_f16", "test_memory", "test_record", "test_numbers", "test_shuffles"),
        *("test_threads", "test_bulk", "test_grid", "test_time"),
    ],
    "stream.cu": ["stream_read", "nothing"],
}


def test_every_source_is_compiled_here() -> None:
    assert device.stage_sources().keys() == {*ENTRIES, "dequant.cu"}


@pytest.mark.parametrize("name", ENTRIES)
def test_sources_compile(name: str) -> None:
    cubin, _ = compile_cubin(device.source(name, (9, 0)))
    for entry in ENTRIES[name]:
        assert resources(cubin, entry).local_bytes == 0


@pytest.mark.parametrize("n_cols", [8, 16])
@pytest.mark.parametrize("quant", [None, "int8-g128", "int8-g32", "int4-g128", "int4-g32"])
def test_the_inner_loop_compiles(quant: str | None, n_cols: int) -> None:
    found = resources(compile_cubin(dequant_source(quant, n_cols))[0], "dequant")
    assert found.local_bytes == 0


def dequant_source(quant: str | None, n_cols: int) -> Source:
    target = cuda_target(H100.n_sm, quant=QUANTS[quant] if quant else None)
    one = specialize(check(build(tiny(0, 0).spec, target)), H100, n_rows=n_cols)
    return device.source("dequant.cu", (9, 0), source_of(one))
