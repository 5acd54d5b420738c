"""What the stages of benchmarks/gpu.py compute on the host, and one whole model over a GPU that knows the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_models import H100
from fake_gpu import FakeGpu

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from gpu_stages import one_model, stream, torch_model, trace
from gpu_stages.families import MODELS, tiny
from gpu_stages.models import Kind
from gpu_stages.record import Clock, Record, problems
from gpu_stages.target import cuda_target

from flashformer.backends.base import Times
from flashformer.backends.cuda.launch import FIRST_PLACE, FLAG, REPORT_WORDS
from flashformer.backends.cuda.nvrtc import Source
from flashformer.backends.cuda.specialize import refusals
from flashformer.errors import DeviceError
from flashformer.formats import QUANTS
from flashformer.model.outline import read_outline
from flashformer.model.spec import ModelSpec
from flashformer.program import build
from flashformer.program import pack as definition
from flashformer.program.ir import Op, Space
from flashformer.quantize import Quantized


def test_sums_of_stretches() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    block, words = stream.Block(data), np.tile(data, 4).view(np.uint32)
    for begin, end in ((0, 4096), (8192, 196608), (65536, 262144), (61440, 73728)):
        assert block.total(begin, end) == words[begin // 4 : end // 4].sum(dtype=np.uint64) % 2**32


def test_items_of_uneven_rounds() -> None:
    for rounds in range(1, 6):
        read = stream.Read(n_items=5, uneven=2, rounds=rounds)
        for block in range(3):
            assert read.items_of(block) == sum(7 if (block + r) % 2 else 3 for r in range(rounds))


def test_stream_record_is_the_devices() -> None:
    assert stream.STREAM.itemsize == 64
    assert [stream.STREAM.fields[n][1] for n in ("data", "counter", "slot_bytes", "bubble")] == [0, 16, 32, 60]  # type: ignore[index]


def test_small_models_can_run_on_the_device() -> None:
    names = {architecture for architecture, _ in MODELS}
    assert len(names) == 10
    for i in range(len(MODELS)):
        assert list(refusals(tiny(i, 0).spec, cuda_target(132), H100)) == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", [None, "int8-g128", "int8-g32", "int4-g128", "int4-g32"])
def test_packing_on_the_device_is_the_definition(
    quant: str | None, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = read_outline("shape:llama-3.2-1b").spec
    rope = replace(base.layers[0].rope, rotary_dim=32)  # type: ignore[type-var]
    layer = replace(base.layers[0], n_heads=4, n_kv_heads=2, head_dim=32, d_ff=2304, rope=rope)
    spec, fmt = replace(base, d_model=256, vocab_size=101, layers=(layer, layer), tied=tied), QUANTS.get(quant or "")
    program = build(spec, cuda_target(3, quant=fmt))
    weights = torch_model.random_weights(spec, fmt, "cpu")
    region = torch_model.pack(program, weights, "cpu").numpy()
    n_matrices = 0
    for matrix in (phase.matrix for phase in program.phases if phase.matrix is not None):
        sources = [weights[role] for role in matrix.roles]
        codes = np.concatenate([bits(one.elements) for one in sources])  # type: ignore[union-attr]
        if fmt is not None:
            scales = np.concatenate([one.scales.numpy() for one in sources])  # type: ignore[union-attr]
            drawn = Quantized(codes, scales, np.full(scales.shape, fmt.zero, np.uint8))
            monkeypatch.setattr(definition, "quantize", lambda x, fmt, drawn=drawn: drawn)
        expected = definition.pack_fragments(matrix, codes)
        assert np.array_equal(region[matrix.offset :][: matrix.n_bytes], expected), matrix.roles
        n_matrices += 1
    assert n_matrices == 9
    if not tied:
        embed = bits(weights["embed"].elements).reshape(-1).view(np.uint8)  # type: ignore[union-attr]
        assert np.array_equal(region[program.embed_offset :][: len(embed)], embed)
    norm = program.phases[1].norm
    assert norm is not None
    found = region[norm.offset :][: 4 * spec.d_model].view(np.float32)
    assert np.array_equal(found, weights["layers.0.attn_norm"].numpy())  # type: ignore[union-attr]


# ---- a whole stage over a GPU that knows the answers ---------------------------------------------------------------


class NoCompiler:
    def prepare(self, sources: Iterable[Source]) -> None:
        assert all(list(sources))

    def __call__(self, source: Source) -> bytes:
        return b"cubin"


class SmallKind(Kind):
    @property
    def spec(self) -> ModelSpec:
        base = read_outline("shape:llama-3.2-1b").spec
        layer = replace(base.layers[0], n_heads=4, n_kv_heads=2, head_dim=64, d_ff=512)
        return replace(base, d_model=256, vocab_size=16384, layers=(layer,))


Factor = Callable[[np.void], float]  # what a launch multiplies the logits of the oracle by
KIND = SmallKind("llama-3.2-1b", None, 2, (32, 48), (1, 2), trace=True)
BEFORE = [0, 1, 7, 15, 16, 31]  # positions before the first context that are compared


def run_small(factor: Factor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the record has of KIND. A launch whose logits are NaN reports that, and for Inf a wait in vain."""
    answers: dict[int, np.ndarray] = {}  # type: ignore[type-arg]
    program = build(KIND.spec, cuda_target(H100.n_sm, streams=KIND.streams, ctx=KIND.ctx))
    place = next(b for b in program.memory.buffers if b.space is Space.LOGITS)
    oracle = torch_model.logits

    def logits(
        spec: ModelSpec, weights: object, ids: object, wanted: list[int], rounding: object = None
    ) -> torch.Tensor:
        found = oracle(spec, weights, ids, wanted, rounding)  # type: ignore[arg-type]
        if rounding is None:
            answers.update(zip(wanted, found.numpy(), strict=True))
        return found

    def run(gpu: FakeGpu, launch: np.void) -> None:
        for i, row in enumerate(launch["head_row"][: launch["n_head_rows"]]):
            at = int(launch["work"]) + place.offset + 4 * i * place.shape[1]
            gpu.read_now(at, np.float32, KIND.spec.vocab_size)[:] = answers[int(launch["pos"][row])] * factor(launch)
        if not np.isfinite(factor(launch)):
            report = gpu.read_now(int(launch["report"]), np.uint32, REPORT_WORDS + 1)
            report[FLAG if np.isinf(factor(launch)) else REPORT_WORDS] = FIRST_PLACE + 1
            gpu.pinned_at(int(launch["failed"]), np.uint32, 1)[:] = 1

    monkeypatch.setattr(torch_model, "logits", logits)
    monkeypatch.setattr(one_model, "DEVICE", "cpu")
    monkeypatch.setattr(one_model, "WatchedGpu", lambda: FakeGpu(run))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    path = tmp_path / "gpu-3-some.json"
    one = Record(3, "some", path)
    one_model.run_kind(one, Clock(100), KIND, NoCompiler())  # type: ignore[arg-type]
    document: dict[str, Any] = json.loads(path.read_text())
    assert problems(document) == []
    return document


def checks_of(document: dict[str, Any]) -> dict[str, bool]:
    return {c["name"].replace("3.2-1b bf16", "it"): c["passed"] for c in document["checks"]}


def assert_timed(unchecked: dict[str, Any]) -> None:
    assert unchecked["us"]["median"] > 0
    assert max(unchecked["read_gb_s"].values()) > 0
    assert unchecked["trace"]["ops"].keys() == {op.value for op in Op}


def test_a_model_from_its_weights_to_its_speeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = run_small(lambda launch: 1.0, monkeypatch, tmp_path)
    assert not any(name.startswith("UNCHECKED") for name in document["results"])
    assert all(c["passed"] for c in document["checks"])
    speeds = [s["name"] for s in document["speeds"]]
    for context in (32, 48):
        for rows in (1, 2):
            assert f"3.2-1b bf16, {context} cached, {rows} rows" in speeds
    assert document["results"]["trace of 3.2-1b bf16"]["ops"].keys() == {op.value for op in Op}


@pytest.mark.parametrize("factor", [0.7, np.nan])
@pytest.mark.parametrize("rows", [1, 16])
def test_times_of_wrong_logits_are_no_speeds(
    factor: float, rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of forwards of at least so many rows: those of one row are right where only those of 16 are wrong."""
    document = run_small(lambda launch: factor if launch["n_rows"] >= rows else 1.0, monkeypatch, tmp_path)
    assert checks_of(document) == {"it: logits of 16 rows": False, "it: logits of one row": rows == 16}
    assert document["speeds"] == []
    assert_timed(document["results"]["UNCHECKED 3.2-1b bf16"])
    wrong = {c["name"]: c["detail"] for c in document["checks"] if not c["passed"]}
    if np.isnan(factor):
        assert all(detail.startswith("NumericalError: NaN or Inf appeared in") for detail in wrong.values())
        return
    for name, positions in (("logits of 16 rows", BEFORE), ("logits of one row", [*BEFORE, 32, 33, 34, 35])):
        facts = document["results"].get(f"3.2-1b bf16: {name}", [])
        due = positions if f"3.2-1b bf16: {name}" in wrong else []
        assert [one["worst"]["position"] for one in facts] == due
        assert all(one["worst"]["found"] == pytest.approx(0.7 * one["worst"]["expected"]) for one in facts)


@pytest.mark.parametrize(
    ("rows", "failed"),
    [
        (1, ["it, 48 cached: logits", "trace of it"]),
        (2, ["it, 48 cached, 2 rows: same bits as one row", "trace of it"]),
    ],
)
def test_nan_in_one_context_takes_no_other_along(
    rows: int, failed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In forwards of at least so many rows that begin at position 48, and in the last forwards, which are traced."""

    def factor(launch: np.void) -> float:
        return np.nan if launch["pos"][0] == 48 and (launch["n_rows"] >= rows or launch["times"]) else 1.0

    document = run_small(factor, monkeypatch, tmp_path)
    assert [name for name, passed in checks_of(document).items() if not passed] == failed
    speeds = [s["name"] for s in document["speeds"]]
    for context, n in ((32, 1), (32, 2), (48, 1), (48, 2)):
        assert (f"3.2-1b bf16, {context} cached, {n} rows" in speeds) == (context == 32 or n < rows)
    assert [name for name in document["results"] if name.startswith("UNCHECKED")] == (
        ["UNCHECKED 3.2-1b bf16, 48 cached"] if rows == 1 else []
    )


def test_a_ring_that_is_wrong_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gb_s = stream.Reader.gb_s

    def one_is_wrong(self: stream.Reader, read: stream.Read) -> float:
        if read == one_model.RINGS[1]:
            raise DeviceError("reading by bulk copies: 3 waits in vain")
        return gb_s(self, read)

    monkeypatch.setattr(stream.Reader, "gb_s", one_is_wrong)
    document = run_small(lambda launch: 1.0, monkeypatch, tmp_path)
    assert [name for name, passed in checks_of(document).items() if not passed] == ["it read: ring 32 KB x 6"]
    speeds = [s["name"] for s in document["speeds"]]
    assert [name for name in speeds if "read:" in name] == [f"3.2-1b bf16 read: ring 16 KB x {n}" for n in (12, 8)]
    assert "3.2-1b bf16, 48 cached, 2 rows" in speeds


def test_a_wait_in_vain_of_many_rows_leaves_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = run_small(lambda launch: np.inf if launch["n_rows"] == 16 else 1.0, monkeypatch, tmp_path)
    assert checks_of(document) == {"it: logits of 16 rows": False, "it: logits of one row": True}
    assert "DeviceError: block 0 waited in vain" in document["checks"][0]["detail"]
    assert "stuck in 3.2-1b bf16: logits of 16 rows" in document["results"]
    assert_timed(document["results"]["UNCHECKED 3.2-1b bf16"])


def bits(elements: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    if elements.dtype is torch.uint8:
        return elements.numpy()
    return elements.view(torch.int16).numpy().view(np.uint16)


def test_phases_add_up_to_the_forward() -> None:
    program = build(tiny(3, 0).spec, cuda_target(2))
    n = len(program.phases)
    steps = np.arange(n) * 100 + np.array([[0], [30]])  # each block enters and is busy for 50 ns
    times = Times(0, int(steps[1, -1]) + 50, steps, steps + 50)
    table = trace.phase_table(program, times)
    ops = table["ops"].values()
    assert sum(row["times"] for row in ops) == n
    assert sum(row["step_us"] for row in ops) == pytest.approx(table["forward_us"])
    assert sum(row["busy_us"] for row in ops) == pytest.approx(n * 0.05)
    assert sum(row["wait_us"] + row["busy_us"] for row in ops) == pytest.approx(((n - 1) * 100 + 50 + 15) / 1e3)
