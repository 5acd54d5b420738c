"""How benchmarks/gpu.py looks for what is wrong, on the simulated GPU: which phase was the first to leave something
else than NumPy, and where blocks were when one of them waited in vain.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_on_host.host_gpu import HostGpu, compiler
from gpu_on_host.one_forward import one_kernel, run
from gpu_on_host.simulator import Mode
from gpu_on_host.whole import SHARED_BYTES, gpu_of
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from gpu_stages import tiny_models
from gpu_stages.bisect import first_wrong_phase
from gpu_stages.decode import prompt_logits
from gpu_stages.families import tiny
from gpu_stages.record import Record, problems
from gpu_stages.trace import trace_hang

from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.cuda.specialize import DeviceFacts
from flashformer.backends.reference import ReferenceKernel
from flashformer.check import CheckedProgram, check
from flashformer.checkpoint import Tensor
from flashformer.errors import DeviceError, NumericalError
from flashformer.formats import BF16, from_f32, to_f32
from flashformer.program import build
from flashformer.program.records import rope_begin

FACTS = DeviceFacts("simulated", 3, SHARED_BYTES, (9, 0))
MISTRAL = 3  # of families.MODELS: 9 query heads of one kv head, a window of 23
SLOT, SEEN = 2, 32  # positions that are computed before
WRONG = {
    "": {},
    "embed": {"phase": 0, "op": "embed", "layer": -1, "buffer": "residual"},
    "layers.0.v": {"phase": 1, "op": "qkv", "layer": 0, "buffer": "qkv"},
    "layers.1.o": {"op": "o_proj", "layer": 1, "buffer": "residual"},
    "layers.1.up": {"op": "gate_up", "layer": 1, "buffer": "hidden"},
    "lm_head": {"op": "lm_head", "layer": -1, "buffer": "logits"},
}


def negated(one: Tensor) -> Tensor:
    return Tensor(one.name, BF16, from_f32(-to_f32(one.data, BF16), BF16))


@pytest.mark.parametrize(("begin", "end"), [(SEEN, SEEN + 8), (SEEN, SEEN + 1)])
@pytest.mark.parametrize("role", WRONG)
def test_the_first_wrong_phase(role: str, begin: int, end: int) -> None:
    case, model = tiny_models.Case(MISTRAL, BF16), tiny(MISTRAL, 7)
    ids = np.random.default_rng(1).integers(0, model.spec.vocab_size, end).astype(np.int32)
    checked = case.checked(model, FACTS)
    weights = dict(model.weights)
    if role:
        weights[role] = negated(weights[role])
    gpu = HostGpu(facts=FACTS, rope_begin=rope_begin(checked.program))
    kernel = CudaKernel(checked, model.weights, gpu=gpu, compiler=compiler, n_threads=1)
    reference = ReferenceKernel(check(build(model.spec, tiny_models.plain(case))), weights)
    prompt_logits(kernel, ids[:begin], 16, SLOT)
    found = first_wrong_phase(kernel, reference, ids, begin, end, SLOT)
    kernel.close()
    expected = WRONG[role]
    assert {name: found.get(name) for name in expected} == expected
    if role:
        assert abs(found["found"] - found["expected"]) > 0
        assert all(error <= 0.03 for *_, error in found["errors"][:-1])


def test_buffers_of_merged_chunks_and_of_branches_agree() -> None:
    """Attention over two chunks, norms behind branches: a forward in which every kind of buffer is compared."""
    index = next(i for i, (name, _) in enumerate(tiny_models.MODELS) if name.startswith("Gemma2"))
    case, model = tiny_models.Case(index, BF16), tiny(index, 7)
    ids = np.random.default_rng(1).integers(0, model.spec.vocab_size, 262).astype(np.int32)
    checked = case.checked(model, FACTS)
    gpu = HostGpu(facts=FACTS, rope_begin=rope_begin(checked.program))
    kernel = CudaKernel(checked, model.weights, gpu=gpu, compiler=compiler, n_threads=1)
    reference = ReferenceKernel(check(build(model.spec, tiny_models.plain(case))), model.weights)
    prompt_logits(kernel, ids[:256], 16, SLOT)
    found = first_wrong_phase(kernel, reference, ids, 256, 262, SLOT)
    kernel.close()
    assert found == {}


Changes = dict[str, Callable[[Tensor], Tensor]]  # of weights, by role
CASE = tiny_models.Case(MISTRAL, BF16)


def run_case(
    wrong: Changes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[CudaKernel] = CudaKernel
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """What the record has of CASE, whose kernel has other weights than NumPy, and the logits of NumPy."""
    case, model = CASE, tiny(MISTRAL, 7)
    checked = case.checked(model, FACTS)

    def kernel(checked: CheckedProgram, weights: Mapping[str, Tensor], **options: Any) -> CudaKernel:
        changed = {role: change(weights[role]) for role, change in wrong.items()}
        gpu = HostGpu(facts=FACTS, rope_begin=rope_begin(checked.program))
        return kind(checked, {**weights, **changed}, **(options | {"gpu": gpu}))

    monkeypatch.setattr(tiny_models, "CudaKernel", kernel)
    monkeypatch.setattr(tiny_models, "WatchedGpu", lambda: None)
    for name, value in {"PROMPT": 112, "COMPARED": 20, "CUTS": (16, 1), "RERUNS": 2}.items():
        monkeypatch.setattr(tiny_models, name, value)
    path = tmp_path / "gpu-2-some.json"
    exact, allowed = tiny_models.oracle(case, 7)
    tiny_models.CaseRun(Record(2, "some", path), case, model, exact, allowed).run(checked, compiler)  # type: ignore[arg-type]
    document: dict[str, Any] = json.loads(path.read_text())
    assert problems(document) == []
    return document, exact


def checks_of(document: dict[str, Any]) -> dict[str, bool]:
    return {c["name"].partition(": ")[2]: c["passed"] for c in document["checks"]}


@pytest.mark.parametrize("wrong", [{}, {"layers.0.gate": negated}])
def test_a_case_of_the_stage(wrong: Changes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of its checks; of a kernel with another matrix than NumPy, which phase reads it."""
    document, exact = run_case(wrong, monkeypatch, tmp_path)
    assert checks_of(document) == {
        "logits in forwards of 16": not wrong,
        "logits in forwards of 1": not wrong,
        "same bits in forwards of 1": True,
        "same bits beside other slots": True,
        "same bits 2 times": True,
    }
    results = document["results"]
    assert len(results) == (4 if wrong else 0)
    for cut in (16, 1) if wrong else ():
        found = results[f"first wrong phase of {CASE.name} in forwards of {cut}"]
        assert (found["op"], found["layer"], found["positions"]) == ("gate_up", 0, [0, cut])
        worst = results[f"{CASE.name}: logits in forwards of {cut}"]["worst"]
        assert exact[list(tiny_models.compared()).index(worst["position"]), worst["token"]] == worst["expected"]


def huge_in_row(row: int) -> Callable[[Tensor], Tensor]:
    def change(one: Tensor) -> Tensor:
        values = to_f32(one.data, BF16)
        values[row] = 3e38  # whose squares are not finite; NaN is not loaded
        return Tensor(one.name, BF16, from_f32(values, BF16))

    return change


LATE = 50  # a position of the prompt whose token is nowhere before it


@pytest.mark.parametrize(("role", "op", "begins"), [("layers.0.o", "o_proj", (0, 0)), ("embed", "embed", (48, 50))])
def test_nan_in_every_cut(
    role: str, op: str, begins: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each has a check and is searched, from the forward on that it appeared in."""
    ids = tiny_models._prompt(CASE, tiny(MISTRAL, 7))
    assert ids[LATE] not in ids[:LATE]
    document, _ = run_case({role: huge_in_row(ids[LATE] if role == "embed" else 0)}, monkeypatch, tmp_path)
    assert checks_of(document) == {"logits in forwards of 16": False, "logits in forwards of 1": False}
    assert all("NumericalError: NaN or Inf" in c["detail"] for c in document["checks"])
    for cut, begin in zip((16, 1), begins, strict=True):
        found = document["results"][f"first wrong phase of {CASE.name} in forwards of {cut}"]
        assert (found["op"], found["positions"]) == (op, [begin, begin + cut])
    assert len(document["skipped"]) == 1


class NanInMany(CudaKernel):
    """Right in forwards of less than 16 rows."""

    def forward(self, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        super().forward(n_rows, again)
        if n_rows == 16:
            raise NumericalError("NaN", 0)


def test_nan_in_the_first_cut_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document, _ = run_case({}, monkeypatch, tmp_path, NanInMany)
    assert checks_of(document) == {
        "logits in forwards of 16": False,
        "logits in forwards of 1": True,
        "same bits beside other slots": False,
        "same bits 2 times": True,
    }
    assert document["results"][f"first wrong phase of {CASE.name} in forwards of 16"] == {"positions": [0, 16]}


def test_where_blocks_were_after_a_wait_in_vain(tmp_path: Path) -> None:
    """Nobody arrives at the end of a phase, so that all wait for phase 1 until one of them gives up."""
    kernel = one_kernel(options={"seed": 1, "stop_at_deadlock": 0}, spin_cycles=10**7)
    gpu_of(kernel).sites = {"kHandoffArrive": Mode.OFF}
    with pytest.raises(DeviceError) as caught:
        run(kernel)
    path = tmp_path / "gpu-2-some.json"
    trace_hang(Record(2, "some", path), "a case", kernel, caught.value)
    kernel.close()
    found = json.loads(path.read_text())["results"]["stuck in a case"]
    assert [row["block"] for row in found] == [0, 1, 2]
    assert {(row["how"], row["phase"], row["op"], row["layer"]) for row in found} == {("waits for", 1, "qkv", 0)}
