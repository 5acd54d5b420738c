"""What the CUDA kernel does around a launch: on a GPU in host memory, whose launches the tests compute."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from cuda_models import H100, checked
from fake_gpu import FakeGpu
from launches import (
    HEAD_BEGIN,
    MODEL,
    N_PHASES,
    PROGRAM,
    WEIGHTS,
    WORKERS,
    buffer,
    compiler,
    counter,
    kernel,
    put,
    reporting,
    sound,
    token_of,
)

import flashformer as ff
from flashformer.backends.base import Want
from flashformer.backends.cuda import probe
from flashformer.backends.cuda.kernel import CudaKernel
from flashformer.backends.cuda.launch import REPORT_WORDS, site_names
from flashformer.backends.cuda.pack import pack_weights
from flashformer.backends.cuda.specialize import DeviceFacts
from flashformer.backends.weights import rope_tables
from flashformer.program.ir import Op, Space
from flashformer.program.records import flatten


def test_everything_is_where_the_launch_says() -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        put(made, [7])
        made.forward(1)
        _, launch = gpu.launches[0]
        flat = flatten(PROGRAM)
        for name in ("model", "phases", "schedule", "tapes", "tape_begin"):
            data = getattr(flat, name).reshape(-1).view(np.uint8)
            np.testing.assert_array_equal(gpu.at(int(launch[name]), len(data)), data)
        region = gpu.at(int(launch["weights"]), PROGRAM.memory.weights_bytes)
        expected = region.copy()  # what lies between the parts does not matter
        pack_weights(expected, PROGRAM, WEIGHTS, 1)
        np.testing.assert_array_equal(region, expected)
        assert not gpu.at(int(launch["kv"]), PROGRAM.memory.kv_bytes).any()
        work = gpu.at(int(launch["work"]), PROGRAM.memory.buffers_bytes)
        tables = rope_tables(PROGRAM)
        for offset, table in tables:
            np.testing.assert_array_equal(work[offset:][: table.nbytes].view(np.float32), table.ravel())
        assert tables
        assert launch["times"] == 0
        assert launch["spin_limit"] > 10**9


def test_weights_do_not_come_from_what_was_there_before() -> None:
    """Two regions filled differently before packing differ nowhere but between the parts."""
    first, second = (np.full(PROGRAM.memory.weights_bytes, fill, np.uint8) for fill in (0, 255))
    for region in (first, second):
        pack_weights(region, PROGRAM, WEIGHTS, 1)
    assert (first != second).mean() < 0.02


def test_rows_groups_and_head_rows() -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        put(made, [5, 6, 7], slot=1, pos=40, want=[Want.NOTHING, Want.NOTHING, Want.LOGITS])
        put(made, [9], row=3, slot=0, pos=3, want=Want.TOKEN)
        made.rows.temperature[:4], made.rows.seed[:4] = 0.5, 2**63 + 1
        made.forward(4)
        _, launch = gpu.launches[0]
        assert (launch["n_rows"], launch["n_groups"], launch["n_head_rows"]) == (4, 2, 2)
        for name, due in {
            "group_slot": [1, 0], "group_begin": [0, 3], "group_end": [3, 4], "group_pos": [40, 3], "head_row": [2, 3],
            "token": [5, 6, 7, 9], "slot": [1, 1, 1, 0], "pos": [40, 41, 42, 3], "want": [0, 0, 2, 1],
            "temperature": [0.5] * 4, "top_p": [1.0] * 4, "seed": [2**63 + 1] * 4,
        }.items():  # fmt: skip
            assert launch[name][: len(due)].tolist() == due, name
        assert made.tokens[:2].tolist() == [token_of(7, 42), token_of(9, 3)]
        np.testing.assert_array_equal(made.logits[0], token_of(7, 42) + np.arange(MODEL.vocab_size))


def test_logits_of_the_rows_that_want_them() -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        wants = [Want.TOKEN, Want.LOGITS, Want.TOKEN, Want.LOGITS, Want.TOKEN]
        put(made, [1, 2, 3, 4, 5], want=wants)
        made.forward(5)
        due = [token_of(1 + i, i) for i in range(5)]
        assert made.tokens[:5].tolist() == due
        assert made.logits[[1, 3], 0].tolist() == [due[1], due[3]]
        assert made.logits.shape == (16, MODEL.vocab_size)


@pytest.mark.parametrize(("n_rows", "most"), [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16)])
def test_the_kernel_follows_from_the_rows(n_rows: int, most: int) -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        put(made, list(range(n_rows)), want=Want.NOTHING)
        made.forward(n_rows)
        used, _ = gpu.launches[0]
        one, handle = made._kernels[most]
        assert handle is used
        assert (used.blocks, used.threads, used.shared_bytes) == (WORKERS, 288, one.shared_bytes)
        assert one.n_rows == most
        assert used.entry == "flashformer_forward"


@pytest.mark.parametrize(("shared_bytes", "parts"), [(101_376, (8, 5)), (85_000, (4, 4, 4, 1)), (62_000, (1,) * 13)])
def test_more_rows_than_a_kernel_takes_are_several_launches(shared_bytes: int, parts: tuple[int, ...]) -> None:
    """In their order, each with the runs it has, and every result in its place."""
    gpu = FakeGpu(sound, facts=DeviceFacts("less", H100.n_sm, shared_bytes, (12, 0)))
    with kernel(gpu, base=2**32 - 7, streams=3) as made:
        rows, at = made.rows, 0
        for slot, n, pos in ((1, 3, 40), (0, 9, 5), (2, 1, 0)):
            put(made, list(range(at + 1, at + n + 1)), row=at, slot=slot, pos=pos, want=Want.NOTHING)
            at += n
        rows.want[[2, 4, 11, 12]] = [Want.LOGITS, Want.TOKEN, Want.LOGITS, Want.LOGITS]
        rows.seed[:13] = np.arange(13, dtype=np.uint64) + np.uint64(2**63)
        made.forward(13)
        assert [launch["n_rows"] for _, launch in gpu.launches] == [*parts]
        begin = 0
        for (used, launch), n in zip(gpu.launches, parts, strict=True):
            assert used is made._kernels[next(m for m in made._kernels if n <= m)][1]
            for name in ("token", "slot", "pos", "want", "seed"):
                np.testing.assert_array_equal(launch[name][:n], getattr(rows, name)[begin : begin + n], name)
            groups = [launch[f"group_{name}"][: launch["n_groups"]] for name in ("slot", "begin", "end", "pos")]
            covered = [(s, r, p + r - b) for s, b, e, p in zip(*groups, strict=True) for r in range(b, e)]
            assert covered == [(launch["slot"][r], r, launch["pos"][r]) for r in range(n)]
            begin += n
        due = [token_of(int(rows.token[r]), int(rows.pos[r])) for r in (2, 4, 11, 12)]
        assert (made.tokens[:4].tolist(), made.logits[[0, 2, 3], 0].tolist()) == (due, [due[0], *due[2:]])


@pytest.mark.parametrize("base", [0, 2**32 - 1, 2**32 - WORKERS * N_PHASES, 2**32 - WORKERS * HEAD_BEGIN - 1])
def test_arrivals_are_counted_modulo_2_to_32(base: int) -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu, base=base) as made:
        expected = base
        for want in (Want.NOTHING, Want.TOKEN, Want.NOTHING, Want.TOKEN):
            put(made, [3], want=want)
            made.forward(1)
            assert gpu.launches[-1][1]["base"] == expected
            expected = (expected + WORKERS * (N_PHASES if want else HEAD_BEGIN)) % 2**32
    assert (base == 0) == (expected > base)  # the others have passed 2^32


def test_adjustments_are_there_before_the_launch() -> None:
    seen = []

    def run(gpu: FakeGpu, launch: np.void) -> None:
        sound(gpu, launch)
        at = slice(int(launch["adjust_begin"][1]), int(launch["adjust_end"][1]))
        columns = (("adjust_token", np.int32), ("adjust_penalty", np.float32), ("adjust_bias", np.float32))
        seen.append([gpu.read_now(int(launch[name]), dtype, at.stop)[at].tolist() for name, dtype in columns])

    gpu = FakeGpu(run)
    with kernel(gpu) as made:
        put(made, [1, 2])
        rows = made.rows
        rows.adjust_token[:5], rows.adjust_penalty[:5], rows.adjust_bias[:5] = range(5), 1.5, range(5)
        rows.adjust_begin[:2], rows.adjust_end[:2] = (0, 2), (2, 5)
        made.forward(2)
        assert seen == [[[2, 3, 4], [1.5] * 3, [2, 3, 4]]]


ABORTED = {0: 1, 1: 3, 2: 7, 3: 9, 4: 123, 5: 140, 6: 2}


def test_an_aborted_launch_says_who_waited_for_what_and_the_next_one_works() -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu, base=2**32 - 5) as made:
        put(made, [3])
        made.forward(1)
        gpu.run = reporting(ABORTED)
        with pytest.raises(ff.DeviceError) as caught:
            made.forward(1)
        phase = PROGRAM.phases[7]
        for words in ("block 3", f"phase 7 ({phase.op.value} of layer 1)", site_names()[9], "123 seen", "140 expected"):
            assert words in str(caught.value)
        _, launch = gpu.launches[-1]
        assert counter(gpu, launch)[0] == 0
        merges = int(launch["work"]) + buffer(Space.MERGES).offset
        assert not gpu.at(merges, buffer(Space.MERGES).n_bytes).any()
        assert not gpu.read_now(int(launch["report"]), np.uint32, REPORT_WORDS + WORKERS).any()
        assert not gpu.closed
        gpu.run = sound
        made.forward(1)
        assert made.tokens[0] == token_of(3, 0)


def test_a_report_out_of_all_ranges_is_still_an_error_that_can_be_read() -> None:
    gpu = FakeGpu(reporting({0: 1, 1: 2**32 - 1, 2: 9999, 3: 9999}))
    with kernel(gpu) as made:
        put(made, [3])
        with pytest.raises(ff.DeviceError, match=r"phase 9999 \(unknown\): site 9999"):
            made.forward(1)


@pytest.mark.parametrize(
    ("places", "layer", "where"),
    [
        ({0: -1}, -1, "the embedding"),
        ({3: 0}, 0, "the attention of layer 0"),
        ({1: 1}, 0, "the feed-forward of layer 0"),
        ({1: 3, 2: 2, 3: 4}, 1, "the attention of layer 1"),
        ({0: 3}, 1, "the feed-forward of layer 1"),
        ({2: 4}, 2, "the logits"),
    ],
)
def test_what_is_not_finite_names_the_first_layer(places: dict[int, int], layer: int, where: str) -> None:
    gpu = FakeGpu(reporting({REPORT_WORDS + block: place + 2 for block, place in places.items()}))
    with kernel(gpu) as made:
        put(made, [3])
        with pytest.raises(ff.NumericalError, match=where) as caught:
            made.forward(1)
        assert caught.value.layer == layer
        gpu.run = sound  # which finds the counter where it should be
        made.forward(1)


def test_rows_out_of_range_never_reach_the_gpu() -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        put(made, [MODEL.vocab_size])
        with pytest.raises(ff.RequestError, match="token id"):
            made.forward(1)
        with pytest.raises(ff.RequestError, match="17 rows"):
            made.forward(17)
        assert gpu.launches == []


def left(gpu: FakeGpu) -> tuple[int, int, int, bool]:
    return len(gpu.memory), len(gpu.pins), len(gpu.kernels), not gpu.closed


def test_close_gives_everything_back_and_a_closed_kernel_says_so() -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        made.keep_times()
        assert all(left(gpu))
    made.close()
    assert left(gpu) == (0, 0, 0, False)
    with pytest.raises(ff.DeviceError, match="closed"):
        made.forward(1)


def test_a_kernel_that_is_dropped_gives_everything_back() -> None:
    gpu = FakeGpu(sound)
    made = CudaKernel(checked(MODEL), WEIGHTS, gpu=gpu, compiler=compiler)
    assert all(left(gpu))
    del made
    gc.collect()
    assert left(gpu) == (0, 0, 0, False)


def test_a_load_that_fails_anywhere_leaves_nothing_behind() -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu):
        n_calls = gpu.n_calls
    assert n_calls > 30
    for refused in range(n_calls):
        gpu = FakeGpu(sound, refuse=refused)
        with pytest.raises(ff.DeviceError, match="was refused"), kernel(gpu):
            pass
        assert left(gpu) == (0, 0, 0, False)


def test_an_error_of_a_launch_is_passed_on() -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        put(made, [3])
        gpu.refuse = gpu.n_calls  # the launch is the first call of a forward without adjustments
        with pytest.raises(ff.DeviceError, match="launch was refused"):
            made.forward(1)
        made.forward(1)  # nothing was counted


def test_a_forked_child_gets_an_error_and_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        parent = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(ff.DeviceError, match="fork"):
            made.forward(1)
        made.close()
        assert all(left(gpu))


def test_times_of_the_last_forward() -> None:
    def run(gpu: FakeGpu, launch: np.void) -> None:
        sound(gpu, launch)
        times = gpu.read_now(int(launch["times"]), np.uint64, WORKERS * N_PHASES * 2).reshape(WORKERS, N_PHASES, 2)
        n = int(launch["n_phases"])
        times[:, :n] = 10**9 + np.arange(n)[None, :, None] * 100 + np.arange(WORKERS)[:, None, None] + [0, 50]

    gpu = FakeGpu(run)
    with kernel(gpu) as made:
        with pytest.raises(ff.DeviceError, match="keep_times"):
            made.times()
        made.keep_times()
        made.keep_times()
        assert all(one.times for one, _ in made._kernels.values())
        for want, n in ((Want.TOKEN, N_PHASES), (Want.NOTHING, HEAD_BEGIN)):
            put(made, [3], want=want)
            made.forward(1)
            times = made.times()
            assert times.entered.shape == times.left.shape == (WORKERS, n)
            assert (times.left - times.entered == 50).all()
            assert (times.begin, times.end) == (10**9, 10**9 + (n - 1) * 100 + WORKERS - 1 + 50)
        made.forget_times()
        assert not any(one.times for one, _ in made._kernels.values())
        with pytest.raises(ff.DeviceError, match="keep_times"):
            made.times()


def test_probe_reads_the_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(sound)
    with kernel(gpu) as made:
        before = left(gpu)
        assert made.probe_weights() is None  # caches hold them
        monkeypatch.setattr(probe, "LEAST_BYTES", 0)
        found = made.probe_weights()
        assert found is not None
        _, argument = gpu.launches[-1]
        assert (argument["data"], argument["n_bytes"]) == (made._launch["weights"][0], PROGRAM.packed_bytes)
        assert found == pytest.approx(PROGRAM.packed_bytes / 0.004 / 1e9)  # the fourth launch of the fake
        assert left(gpu) == before


def test_a_kernel_describes_itself() -> None:
    with kernel(FakeGpu(sound)) as made:
        found = made.describe()
    assert {"device", "isa", "threads", "activations", "gpu", "gpu_uuid", "driver", "nvrtc"} <= found.keys()
    assert (found["device"], found["isa"], found["threads"], found["activations"]) == ("cuda", "sm_90", WORKERS, "bf16")


def test_the_phases_are_those_the_tests_mean() -> None:
    assert [PROGRAM.phases[i].op for i in (0, 7, HEAD_BEGIN)] == [Op.EMBED, Op.ATTEND, Op.LM_HEAD]
