"""What a forward does to the process: no allocation inside, memory as planned, errors that name their cause."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_kernels import cpu_kernel, prefill
from odd_shapes import SHAPES, random_ids
from tiny import Tiny, put

from flashformer.backends.base import Want
from flashformer.backends.cpu.kernel import CpuKernel
from flashformer.checkpoint import Tensor
from flashformer.errors import DeviceError, LoadError, NumericalError, RequestError
from flashformer.formats import BF16, F32, Format

SHAPE = SHAPES[8]

# Counts what the process asks of the allocator while any thread may be inside a forward; `reach` proves that it counts.
COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/mman.h>
static int inside, counted, forwards;
#define NEXT(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void __libc_free(void *);
static void count(void) {
  if (__atomic_load_n(&inside, __ATOMIC_SEQ_CST)) __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
}
void *malloc(size_t n) { count(); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { count(); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { count(); return __libc_realloc(p, n); }
void free(void *p) { if (p) count(); __libc_free(p); }
void *mmap(void *a, size_t n, int p, int f, int d, off_t o) {
  count();
  return NEXT(void *, "mmap", void *, size_t, int, int, int, off_t)(a, n, p, f, d, o);
}
int munmap(void *a, size_t n) { count(); return NEXT(int, "munmap", void *, size_t)(a, n); }
void flashformer_in_forward(int entered) {
  if (entered) __atomic_add_fetch(&forwards, 1, __ATOMIC_SEQ_CST);
  __atomic_store_n(&inside, entered, __ATOMIC_SEQ_CST);
}
int counted_so_far(void) { return counted; }
int forwards_so_far(void) { return forwards; }
int reach(void) {
  flashformer_in_forward(1);
  void *volatile p = malloc(10);
  free(p);
  flashformer_in_forward(0);
  return counted;
}
"""


def run_python(code: str, **env: str) -> str:
    """stdout of a fresh interpreter with this one's import paths."""
    paths = os.pathsep.join([*sys.path, env.pop("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": paths, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_allocation_inside_a_forward(tmp_path: Path) -> None:
    (tmp_path / "count.c").write_text(COUNTER)
    library = tmp_path / "count.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "count.c", "-ldl"], check=True)
    out = run_python(
        """
        import ctypes
        import flashformer as ff
        counter = ctypes.CDLL(None)
        with ff.load("shape:smollm2-135m", ctx=300, threads=3, streams=2) as llm:
            llm.generate(list(range(150)), max_tokens=20, ignore_eos=True)
            llm.generate(list(range(150)), max_tokens=20, ignore_eos=True, temperature=1.0, seed=1)
            print(counter.forwards_so_far(), counter.counted_so_far(), counter.reach())
        """,
        LD_PRELOAD=str(library),
    )
    forwards, counted, reached = map(int, out.split())
    assert forwards >= 40
    assert reached == counted + 2, "the counter does not count"
    assert counted == 0


@pytest.mark.parametrize("shape", ["llama-3.2-1b"])
def test_private_memory_is_what_plan_says(shape: str) -> None:
    """Loaded and run, within 5 percent of the planned total; the interpreter's own memory is subtracted."""
    out = run_python(
        f"""
        import re
        from pathlib import Path
        import flashformer as ff
        from flashformer.engine import engine

        def private():
            text = Path("/proc/self/smaps_rollup").read_text()
            return 1024 * sum(int(n) for n in re.findall(r"^Private_\\w+:\\s+(\\d+) kB", text, re.M))

        with ff.load("shape:smollm2-135m", ctx=64) as llm:
            llm.generate([1, 2, 3], max_tokens=2, ignore_eos=True)
        before = private()
        with ff.load("shape:{shape}") as llm:
            llm.generate(list(range(100)), max_tokens=4, ignore_eos=True)
            print(private() - before, llm.plan.memory["total_bytes"])
        """
    )
    used, planned = map(int, out.split())
    assert planned > 1e9
    assert abs(used - planned) <= 0.05 * planned


def test_c51_a_forked_child_gets_an_error_and_the_parent_goes_on() -> None:
    model = SHAPE.make(1)
    ids = random_ids(1, 9, SHAPE.vocab)
    with cpu_kernel(model) as kernel:
        expected = prefill(kernel, ids, chunk=64)
        child = os.fork()
        if child == 0:
            try:
                kernel.forward(1)
            except DeviceError as error:
                os._exit(17 if "fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        assert np.array_equal(prefill(kernel, ids, chunk=64), expected)


def test_c51_a_forked_child_may_load_again_and_drop_the_old_kernel() -> None:
    model = SHAPE.make(1)
    ids = random_ids(1, 9, SHAPE.vocab)
    with cpu_kernel(model, n_workers=4) as kernel:
        expected = prefill(kernel, ids, chunk=64)
        child = os.fork()
        if child == 0:
            with cpu_kernel(model, n_workers=4) as mine:
                kernel.close()
                gc.collect()
                same = np.array_equal(prefill(mine, ids, chunk=64), expected)
            os._exit(17 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


def with_value(model: Tiny, role: str, index: tuple[int, ...], value: float) -> Tiny:
    tensor = model.tensors[role]
    data = tensor.data.copy()
    data[index] = value
    return replace(model, tensors={**model.tensors, role: Tensor(tensor.name, tensor.format, data)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("role", "index"),
    [("layers.1.k", (3, 5)), ("layers.0.up", (179, 131)), ("layers.1.ffn_norm", (131,)), ("embed", (1024, 0))],
)
def test_a11_weights_that_are_not_finite_are_refused(role: str, index: tuple[int, ...], value: float) -> None:
    model = with_value(SHAPE.make(1), role, index, value)
    name = model.tensors[role].name
    with pytest.raises(LoadError, match="NaN or Inf") as caught, cpu_kernel(model):
        pass
    assert name in str(caught.value)
    assert str(list(index)) in str(caught.value)


def test_a11_weights_that_overflow_the_format_are_refused() -> None:
    model = with_value(SHAPE.make(1), "layers.0.q", (2, 7), 3.4e38)
    with cpu_kernel(model, weights=F32):
        pass
    with pytest.raises(LoadError, match="too large for the format"), cpu_kernel(model, weights=BF16):
        pass


@pytest.mark.parametrize(
    ("role", "layer", "where"),
    [
        ("embed", -1, "embedding"),
        ("layers.0.o", 0, "attention of layer 0"),
        ("layers.0.down", 0, "feed-forward of layer 0"),
        ("layers.1.o", 1, "attention of layer 1"),
        ("layers.1.down", 1, "feed-forward of layer 1"),
        ("lm_head", 2, "logits"),
    ],
)
def test_overflow_names_the_layer(role: str, layer: int, where: str) -> None:
    """Finite weights so large that a sum overflows."""
    shape = replace(SHAPE, tied=False)
    model = shape.make(1)
    tensor = model.tensors[role]
    huge = Tensor(tensor.name, tensor.format, (tensor.data * np.float32(1e38 / np.abs(tensor.data).max())).astype("f4"))
    model = replace(model, tensors={**model.tensors, role: huge})
    with cpu_kernel(model, n_workers=3) as kernel:
        with pytest.raises(NumericalError, match=where) as caught:
            prefill(kernel, random_ids(1, 9, SHAPE.vocab), chunk=64)
        assert caught.value.layer == layer


@pytest.mark.parametrize("weights", [F32, BF16])
def test_a_bad_request_leaves_nothing_behind(weights: Format) -> None:
    """One token's embedding is so large that its forwards overflow; every other prompt is as before."""
    model = with_value(replace(SHAPE, tied=False).make(1), "embed", (7,), 1e30)
    ids = [i if i != 7 else 8 for i in random_ids(1, 30, SHAPE.vocab)]
    with cpu_kernel(model, n_workers=3, weights=weights) as kernel:
        expected = prefill(kernel, ids, chunk=64)
        with pytest.raises(NumericalError):
            prefill(kernel, [*ids[:9], 7, *ids[9:]], chunk=64)
        assert np.array_equal(prefill(kernel, ids, chunk=64), expected)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("token", -1),
        ("token", SHAPE.vocab),
        ("slot", -1),
        ("slot", 1),
        ("pos", -1),
        ("pos", 160),
        ("want", 3),
        ("temperature", np.nan),
        ("temperature", -1.0),
    ],
)
def test_rows_out_of_range_are_refused_by_native_code(column: str, value: float) -> None:
    with cpu_kernel(SHAPE.make(1)) as kernel:
        put(kernel, 0, [5], pos=0, slot=0, want=Want.TOKEN)
        getattr(kernel.rows, column)[0] = value
        outcome, _ = kernel._native.forward(1)
        assert outcome == 1
        with pytest.raises(RequestError):
            kernel.forward(1)
        put(kernel, 0, [5], pos=0, slot=0, want=Want.TOKEN)
        kernel.rows.temperature[0] = 0
        kernel.forward(1)


@pytest.mark.parametrize("n_rows", [0, -1, -5, 65])
def test_a_number_of_rows_out_of_range_is_refused(n_rows: int) -> None:
    with cpu_kernel(SHAPE.make(1)) as kernel, pytest.raises(RequestError):
        kernel.forward(n_rows)


@pytest.mark.parametrize("role", ["layers.0.q", "layers.0.k"])
@pytest.mark.parametrize("chunk", [1, 64])
@pytest.mark.parametrize(("weights", "kv"), [(F32, F32), (F32, BF16), (BF16, BF16)])
def test_scores_that_overflow_are_not_averaged_away(role: str, weights: Format, kv: Format, chunk: int) -> None:
    model = SHAPE.make(1)
    tensor = model.tensors[role]
    huge = Tensor(tensor.name, tensor.format, (np.sign(tensor.data) * np.float32(3e38)).astype("f4"))
    model = replace(model, tensors={**model.tensors, role: huge})
    with (
        cpu_kernel(model, weights=weights, kv=kv) as kernel,
        pytest.raises(NumericalError, match="attention of layer 0"),
    ):
        prefill(kernel, random_ids(1, 9, SHAPE.vocab), chunk=chunk)


def test_a11_nan_of_any_payload_stays_nan_when_rounded() -> None:
    model = SHAPE.make(1)
    tensor = model.tensors["layers.0.down"]
    damaged = tensor.data.copy()
    damaged.view(np.uint32)[5, 6] = 0xFFFFFFFF
    model = replace(model, tensors={**model.tensors, "layers.0.down": Tensor(tensor.name, F32, damaged)})
    with pytest.raises(LoadError, match="NaN or Inf"), cpu_kernel(model, weights=BF16):
        pass


def test_the_callers_rounding_does_not_matter() -> None:
    """A library may have told the calling thread to flush denormals to zero; helpers would not."""
    shape = replace(SHAPE, tied=False)
    model = shape.make(1)
    embed = model.tensors["embed"]
    tiny = Tensor(embed.name, embed.format, (embed.data * np.float32(1e-38)).astype("f4"))
    model = replace(model, tensors={**model.tensors, "embed": tiny})
    ids = random_ids(1, 9, SHAPE.vocab)
    with cpu_kernel(model) as kernel:
        expected = prefill(kernel, ids, chunk=64)
        assert np.count_nonzero(expected)
        assert torch.set_flush_denormal(True)
        try:
            found = prefill(kernel, ids, chunk=64)
        finally:
            torch.set_flush_denormal(False)
    assert found.tobytes() == expected.tobytes()


def test_c52_a_second_thread_inside_a_kernel_gets_an_error() -> None:
    with cpu_kernel(SHAPE.make(1)) as kernel:
        expected = prefill(kernel, list(range(60)), chunk=64)
        messages: list[str] = []
        stop = time.monotonic() + 60

        def call() -> None:
            while not messages and time.monotonic() < stop:
                try:
                    kernel.forward(60)
                except DeviceError as error:
                    messages.append(str(error))

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "take turns" in messages[0]
        assert np.array_equal(prefill(kernel, list(range(60)), chunk=64), expected)


def test_a_closed_kernel_says_so() -> None:
    with cpu_kernel(SHAPE.make(1)) as kernel:
        pass
    kernel.close()
    with pytest.raises(DeviceError, match="closed"):
        kernel.forward(1)


def test_c54_a_closed_kernel_lets_go_of_its_threads() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    for _ in range(20):
        with cpu_kernel(SHAPE.make(1), n_workers=4) as kernel:
            assert isinstance(kernel, CpuKernel)
            assert threads() == before + 3
    assert threads() == before
