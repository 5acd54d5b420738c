"""Faults of the process around the engine: memory, forks, interrupts, exits. Each test is named for its fault."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from folders import model_folder

import flashformer as ff
from flashformer.backends.cpu import topology
from flashformer.backends.cpu.native import load_native
from flashformer.engine import setup

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATES = {
    "src/flashformer/checkpoint/template.py": 1,  # what a chat template that asks for the date gets
    "src/flashformer/server/answers.py": 1,  # `created` of an answer
    "src/flashformer/server/app.py": 1,  # and of the model
}
SOURCES = [p for folder in ("src", "csrc") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")]


def python(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with this one's import paths, tests included, that keeps no packed weights."""
    paths = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "FLASHFORMER_CACHE": "off", **env},
        capture_output=True,
        text=True,
        timeout=200,
    )


def run_python(code: str, *arguments: str, **env: str) -> str:
    """Its stdout; it must end well and say nothing else."""
    done = python(code, *arguments, **env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def test_c48_a_model_above_the_memory_limit_is_refused_before_it_is_allocated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = topology.Limit(5e5, "/sys/fs/cgroup/memory.max")
    monkeypatch.setattr(setup.topology, "free_memory", lambda: limit)
    monkeypatch.setattr("flashformer.engine.engine.load_kernel", lambda *a, **k: pytest.fail("it was allocated"))
    with pytest.raises(ff.LoadError, match=r"[\d,]+ bytes .* 500,000 are free \(/sys/fs/cgroup/memory\.max\)"):
        ff.load(folder, ctx=96, streams=16, threads=1)


def test_c48_whatever_cannot_be_had_while_loading_leaves_a_usable_process(tmp_path: Path) -> None:
    library = tmp_path / "failing.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-D_GNU_SOURCE", "-shared", "-fPIC", "-O1", "-o", library, HERE / "failing.cpp"]
    subprocess.run([*command, "-ldl"], check=True)
    out = run_python(
        """
        import ctypes
        import numpy as np
        from cpu_kernels import cpu_kernel, prefill
        from odd_shapes import SHAPES, random_ids
        from flashformer.errors import DeviceError

        system, shape = ctypes.CDLL(None), SHAPES[8]
        model, ids = shape.make(1), random_ids(1, 9, shape.vocab)

        def answer():
            with cpu_kernel(model, n_workers=3) as kernel:
                return prefill(kernel, ids, chunk=64)

        expected, refused, n = answer(), [], 0
        while True:
            n += 1
            system.fail_call(n)
            try:
                found = answer()
            except DeviceError as error:
                found, _ = None, refused.append(str(error))
            left = system.calls_left()
            system.fail_call(0)
            assert found is None or np.array_equal(found, expected)
            assert np.array_equal(answer(), expected)
            if left:
                break
        print(n, *(sum(word in message for message in refused) for word in ("memory", "threads")))
        """,
        LD_PRELOAD=str(library),
    )
    n, memory, threads = map(int, out.split())
    assert n > memory + threads  # without a thread more, packing goes on with those there are
    assert memory > 10
    assert threads == 2  # of three workers, one is the caller


def test_c49_an_idle_model_uses_no_processor(folder: Path) -> None:
    """Waiting threads spin for a bounded time only. What a quota does to their number: tests/pure/test_topology.py."""
    with ff.load(folder, threads=2) as llm:
        llm.generate("a", max_tokens=4)
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.6)
        assert time.process_time() - before < 0.3


def test_c50_two_engines_at_once_spend_little_more_than_one_after_the_other() -> None:
    """Processor time, which a spinning thread would spend without bound, and which no other process changes."""
    out = run_python(
        """
        import threading, time, warnings
        import flashformer as ff

        warnings.simplefilter("ignore")
        models = [ff.load("shape:smollm2-135m", ctx=64, threads=4) for _ in range(2)]
        answer = lambda llm: llm.generate([1, 2, 3], max_tokens=16, ignore_eos=True)
        for llm in models:
            answer(llm)

        def spent(use):
            before = time.process_time()
            use()
            return time.process_time() - before

        def together():
            threads = [threading.Thread(target=answer, args=(llm,)) for llm in models]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        alone = min(spent(lambda: [answer(llm) for llm in models]) for _ in range(3))
        print(min(spent(together) for _ in range(3)) / alone)
        """
    )
    assert float(out) < 5


def test_c51_a_forked_child_is_refused_and_may_load_again(folder: Path) -> None:
    with ff.load(folder, threads=2, streams=2) as llm:
        expected = llm.generate("a", max_tokens=4, ignore_eos=True, temperature=0).token_ids
        with llm.stream("b") as open_stream:
            next(open_stream)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    for use in (lambda: llm.generate("a"), lambda: next(open_stream), lambda: llm.logits([1])):
                        with pytest.raises(ff.DeviceError, match=rf"process {os.getppid()}.*forked child"):
                            use()
                    with ff.load(folder, threads=2) as again:
                        same = again.generate("a", max_tokens=4, ignore_eos=True, temperature=0).token_ids == expected
                    code = 17 if same else 2
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
            assert next(open_stream).token_id is not None
        assert llm.generate("a", max_tokens=4, ignore_eos=True, temperature=0).token_ids == expected


def test_c51_a_forked_child_that_ends_as_programs_do_ends(folder: Path) -> None:
    """Its parent was inside a forward when it forked."""
    code = """
        import os, sys, threading, time
        import flashformer as ff
        from flashformer.backends.cpu.native import load_native

        llm = ff.load(sys.argv[1], threads=2)
        def run():
            for _ in range(200):
                llm.logits(list(range(2, 90)))
        worker = threading.Thread(target=run)
        worker.start()
        while not load_native().n_inside():
            time.sleep(0)
        child = os.fork()
        if child == 0:
            sys.exit(17)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        worker.join()
        """
    assert run_python(code, str(folder)) == "17\n"


def test_c52_processes_at_once_answer_alike(folder: Path) -> None:
    code = """
        import sys
        import flashformer as ff
        with ff.load(sys.argv[1], threads=2) as llm:
            print(llm.generate("x", max_tokens=40, seed=3, temperature=1.0, ignore_eos=True).token_ids)
        """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FLASHFORMER_CACHE": "off"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert len(set(found)) == 1
    assert len(found[0].split()) == 40


def test_c53_an_interrupt_stops_within_one_forward_and_leaves_the_model_usable() -> None:
    out = run_python(
        """
        import os, signal, threading, time
        import flashformer as ff

        llm = ff.load("shape:smollm2-135m", ctx=1600, threads=2, prompt_chunk=16)
        done, forward = 0, llm.kernel.forward

        def counted(*arguments):
            global done
            forward(*arguments)
            done += 1

        def interrupt():
            global at
            while done < 5:
                time.sleep(0.001)
            at = done
            os.kill(os.getpid(), signal.SIGINT)

        def short():
            return llm.generate([1, 2, 3], max_tokens=4, temperature=0, ignore_eos=True).token_ids

        expected = short()
        for prompt in ([1, 2, 3], list(range(1500))):
            done, llm.kernel.forward = 0, counted
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                llm.generate(prompt, max_tokens=1000, ignore_eos=True)
            except KeyboardInterrupt:
                print(done - at)
            thread.join()
            llm.kernel.forward = forward
            assert short() == expected
        """
    )
    late = [int(n) for n in out.split()]
    assert len(late) == 2, "an interrupt was lost"
    assert max(late) <= 2  # the one that ran, and one more if this thread was slow to send


class UnwantedError(Exception):
    pass


def _read_and_fail(llm: ff.LLM) -> None:
    with llm.stream("a", max_tokens=6) as pieces:
        for _ in pieces:
            raise UnwantedError


def test_c53_an_error_in_a_callback_leaves_nothing_behind(folder: Path) -> None:
    def refuse(what: str, done: int, total: int) -> None:
        raise UnwantedError

    gc.collect()  # what other tests left behind goes now, not between the two looks
    before = os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")
    with pytest.raises(UnwantedError):
        ff.load(folder, threads=2, progress=refuse)
    gc.collect()
    assert (os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")) == before
    with ff.load(folder, threads=2) as llm:
        expected = llm.generate("a", max_tokens=6, ignore_eos=True, temperature=0).token_ids
        with pytest.raises(UnwantedError):
            _read_and_fail(llm)
        assert llm.generate("a", max_tokens=6, ignore_eos=True, temperature=0).token_ids == expected


@pytest.mark.parametrize("end", ["del llm", "llm.close()", "llm.stream('a').__next__(); del llm"])
def test_c54_a_hundred_loads_leave_memory_threads_and_files_as_they_were(end: str) -> None:
    out = run_python(
        f"""
        import gc, os, re
        from pathlib import Path
        import flashformer as ff

        def held():
            gc.collect()
            resident = re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
            return int(resident[1]) << 10, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

        def use():
            llm = ff.load("demo", threads=3)
            llm.generate("def", max_tokens=2)
            size = llm.plan.memory["total_bytes"]
            {end}
            return size

        for _ in range(5):
            use()
        before = held()
        for _ in range(100):
            size = use()
        after = held()
        print(size, *(b - a for a, b in zip(before, after)))
        """
    )
    size, memory, threads, files = map(int, out.split())
    assert (threads, files) == (0, 0)
    assert size > 8 << 20
    assert memory < 2 * size


EXITS = {
    "an open stream": "stream = llm.stream('class A', max_tokens=400); next(stream)",
    "a stream in a cycle": "stream = llm.stream('a', max_tokens=400); next(stream); me = [llm, stream]; me.append(me)",
    "daemon threads": "start(3)",
    "daemon threads and a stream": "start(2); stream = llm.stream('class A', max_tokens=400); next(stream)",
    "a daemon thread that loads": "threading.Thread(target=load, daemon=True).start(); time.sleep(0.3)",
}


@pytest.mark.parametrize("exit_", EXITS.values(), ids=EXITS)
def test_c55_the_interpreter_ends_cleanly_with(exit_: str) -> None:
    """The end is timed from inside, so that starting the interpreter does not count."""
    code = f"""
        import sys, threading, time
        import flashformer as ff

        llm = ff.load("demo", threads=2, streams=4)

        def run():
            while True:
                llm.generate("def f(", max_tokens=490, ignore_eos=True, temperature=1.0)

        def load():
            while True:
                ff.load("demo", threads=1).close()

        def start(n):
            for _ in range(n):
                threading.Thread(target=run, daemon=True).start()
            time.sleep(0.2)

        {exit_}
        print(time.monotonic_ns(), flush=True)
        """
    for _ in range(3):  # what goes wrong here depends on the moment
        out = run_python(code)
        assert (time.monotonic_ns() - int(out)) / 1e9 < 1


def test_c55_calls_after_the_end_has_begun_still_work(folder: Path) -> None:
    out = run_python(
        """
        import atexit, sys
        import flashformer as ff

        atexit.register(lambda: print(llm.generate("a", max_tokens=5, ignore_eos=True).finish_reason))
        llm = ff.load(sys.argv[1], threads=2)
        """,
        str(folder),
    )
    assert out == "length\n"
    assert load_native().n_inside() == 0


def test_c56_durations_come_from_monotonic_clocks() -> None:
    """Other clocks jump: when a laptop sleeps, or when somebody sets them."""
    pattern = r"\btime\.time(_ns)?\(|\bdatetime\.now\b|\bsystem_clock\b|CLOCK_REALTIME|\bgettimeofday\b"
    counts = {str(path.relative_to(ROOT)): len(re.findall(pattern, path.read_text())) for path in SOURCES}
    assert {path: n for path, n in counts.items() if n} == DATES


def test_nothing_in_the_sources_runs_what_a_file_holds() -> None:
    pattern = r"\bpickle\b|\btorch\.load\b|\beval\(|\bexec\(|allow_pickle|\bmarshal\b|yaml\.load\("
    assert len(SOURCES) > 100
    assert [str(path) for path in SOURCES if re.search(pattern, path.read_text())] == []
