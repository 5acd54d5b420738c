"""The command line over the reference backend: what goes where, and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from folders import model_folder
from typer.testing import CliRunner, Result

import flashformer as ff
from flashformer.backends.base import Kernel
from flashformer.backends.reference import ReferenceKernel
from flashformer.bench.decode import pair_ratios
from flashformer.cli.app import app
from flashformer.log import log

PROMPT = "def f(x):"
STATS = re.compile(
    r"prompt \d+ tok \d+ ms \| \d+ tok [\d.]+ tok/s \(p50 [\d.]+ p99 [\d.]+ ms\) \| "
    r"[\d.]+ GB/s, weights fit in cache \| peak [\d.]+ GiB\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def on_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load of the command line, which offers no such device, gets the reference kernel."""

    def load_kernel(checked, weights, **_: object) -> Kernel:
        return ReferenceKernel(checked, weights)

    monkeypatch.setattr("flashformer.engine.engine.load_kernel", load_kernel)


@pytest.fixture
def expected(folder: Path) -> ff.Output:
    with ff.load(folder, device="reference") as llm:
        return llm.generate(PROMPT, max_tokens=9, ignore_eos=True)


def call(*args: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin)


GREEDY = ("-n", "9", "--ignore-eos")


def test_run_streams_only_text_to_stdout_and_one_line_to_stderr(folder: Path, expected: ff.Output) -> None:
    result = call("run", folder, PROMPT, *GREEDY)
    assert result.exit_code == 0
    assert result.stdout_bytes.decode() == expected.text
    assert STATS.fullmatch(result.stderr)


@pytest.mark.parametrize("args", [(), ("-",)])
def test_run_reads_the_prompt_from_stdin_as_it_is(folder: Path, expected: ff.Output, args: tuple[str, ...]) -> None:
    result = call("run", folder, *args, *GREEDY, "--quiet", stdin=PROMPT)
    assert (result.stdout_bytes.decode(), result.stderr, result.exit_code) == (expected.text, "", 0)
    with_newline = call("run", folder, *args, *GREEDY, "--json", stdin=PROMPT + "\n")
    assert len(json.loads(with_newline.stdout)["prompt_token_ids"]) == len(expected.prompt_token_ids) + 1


def test_run_json_is_one_object(folder: Path, expected: ff.Output) -> None:
    result = call("run", folder, PROMPT, *GREEDY, "--json", "--seed", "7")
    found = json.loads(result.stdout)
    assert found["text"] == expected.text
    assert found["token_ids"] == expected.token_ids
    assert (found["seed"], found["finish_reason"], found["fits_in_cache"], found["fraction"]) == (
        7,
        "length",
        True,
        None,
    )
    assert result.stdout.count("\n") == 1


BAD_LINES = [
    (("run",), "MODEL"),
    (("run", "MODEL", "hi", "--speculate", "ngram"), "--speculate"),
    (("run", "MODEL", "hi", "--quant", "int5"), "quant"),
    (("run", "MODEL", "hi", "--top-k", "-1"), "top_k=-1"),
    (("run", "MODEL", "hi", "--top-k", "259"), "top_k=259"),
    (("run", "MODEL", "hi", "--top-p", "0"), "top_p=0"),
    (("run", "MODEL", "hi", "--min-p", "2"), "min_p=2"),
    (("run", "MODEL", "hi", "--repeat-penalty", "0"), "repeat_penalty=0"),
    (("run", "MODEL", "hi", "--stop", ""), "stop"),
    (("run", "MODEL", "hi", *("--stop", "x") * 5), "stop"),
    (("run", "MODEL", "hi", "--kv-dtype", "f64"), "f64"),
    (("run", "MODEL", "hi", "--device", "tpu"), "tpu"),
    (("run", "MODEL", "hi", "--device", "reference"), "reference"),
    (("run", "MODEL", "hi", "--dtype", "f64"), "f64"),
    (("run", "MODEL", "hi", "-n", "0"), "max_tokens=0"),
    (("run", "MODEL", "hi", "--streams", "17"), "streams=17"),
    (("run", "MODEL", "hi", "--seed", "-1"), "seed=-1"),
    (("run", "MODEL", "hi", "--temp", "nan"), "temperature"),
    (("run", "MODEL", "hi", "--ctx", "97"), "97"),
    (("run", "MODEL", "hi", "extra"), "extra"),
    (("run", "MODEL", "x" * 200), "longer than the context"),
    (("run", "/no/such/folder", "hi"), "/no/such/folder"),
    (("run", "shape:no-such", "hi"), "no-such"),
    (("run", "MODEL", "hi", "--revision", "main"), "revision"),
    (("bench", "MODEL", "--rows", "1,x"), "--rows"),
    (("bench", "MODEL", "--rows", "17"), "17"),
    (("bench", "MODEL", "--depth", "96"), "--depth"),
    (("bench", "MODEL", "-p", "-5"), "prompt_tokens"),
    (("bench", "MODEL", "-p", "97"), "97"),
    (("plan", "MODEL", "-n", "5"), "-n"),
    (("serve", "MODEL", "--max-waiting", "-1"), "max_waiting=-1"),
    (("serve", "MODEL", "--port", "65536"), "port=65536"),
    (("chat", "MODEL"), "no default chat template"),
    (("chat", "MODEL", "--top-p", "0"), "top_p=0"),
    (("chat", "MODEL", "hi"), "hi"),
    (("chat", "shape:smollm2-135m"), "no chat template"),
    (("frobnicate",), "frobnicate"),
    (("--frobnicate",), "--frobnicate"),
]


@pytest.mark.parametrize(("args", "named"), BAD_LINES, ids=[" ".join(a)[:60] for a, _ in BAD_LINES])
def test_what_the_user_got_wrong_is_named_and_exits_2(folder: Path, args: tuple[str, ...], named: str) -> None:
    result = call(*(folder if a == "MODEL" else a for a in args))
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_stdin_that_is_not_text_exits_2(folder: Path) -> None:
    result = call("run", folder, stdin=b"ab\xff")
    assert result.exit_code == 2
    assert "byte 2 is not UTF-8" in result.stderr


FAILURES = [
    (ff.NumericalError("NaN in layer 3", 3), 2),
    (ff.DeviceError("a wait expired"), 1),
    (ff.UnavailableError("no GPU"), 2),
    (ff.ProgramError("unproved"), 1),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), FAILURES, ids=repr)
def test_errors_of_a_forward_have_their_exit_codes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def forward(self: ReferenceKernel, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        raise error

    monkeypatch.setattr(ReferenceKernel, "forward", forward)
    result = call("run", folder, PROMPT)
    assert result.exit_code == code
    assert str(error) in result.stderr
    assert result.stderr.count("\n") <= 1


def test_sampling_settings_that_are_not_applied_are_named(tmp_path: Path) -> None:
    sampling = model_folder(tmp_path, generation={"do_sample": True, "typical_p": 0.9})
    assert "typical_p=0.9: not applied" in call("run", sampling, PROMPT, "-n", "2").stderr
    model_folder(tmp_path, generation={"do_sample": True, "top_p": 0.9, "typical_p": 1.0})
    assert "top_p" not in call("run", sampling, PROMPT, "-n", "2").stderr


SETTINGS = [
    (("--temp", "1.5", "--top-k", "4"), {"temperature": 1.5, "top_k": 4}),
    (("--temp", "1.5", "--top-p", "0.3"), {"temperature": 1.5, "top_p": 0.3}),
    (("--temp", "1.5", "--min-p", "0.4"), {"temperature": 1.5, "min_p": 0.4}),
    (("--repeat-penalty", "1.8"), {"repeat_penalty": 1.8}),
    (("--kv-dtype", "bf16", "--temp", "1.5"), {"temperature": 1.5}),
]


@pytest.mark.parametrize(("options", "settings"), SETTINGS, ids=[" ".join(o) for o, _ in SETTINGS])
def test_sampling_options_are_the_settings_of_python(
    folder: Path, options: tuple[str, ...], settings: dict[str, float]
) -> None:
    kv_dtype = "bf16" if "--kv-dtype" in options else None
    with ff.load(folder, device="reference", kv_dtype=kv_dtype) as llm:
        asked = llm.generate(PROMPT, max_tokens=40, ignore_eos=True, seed=5, **settings)  # type: ignore[arg-type]
        off = {"temperature": settings.get("temperature", 0)}
        plain = llm.generate(PROMPT, max_tokens=40, ignore_eos=True, seed=5, **off)  # type: ignore[arg-type]
    run = call("run", folder, PROMPT, "-n", "40", "--ignore-eos", "--seed", "5", "--json", *options)
    assert json.loads(run.stdout)["token_ids"] == asked.token_ids
    assert (asked.token_ids != plain.token_ids) == (kv_dtype is None)


def test_stop_strings_end_the_text_and_are_left_out(folder: Path) -> None:
    whole = json.loads(call("run", folder, PROMPT, "-n", "40", "--ignore-eos", "--json").stdout)["text"]
    stop = whole[9:11]
    assert stop
    result = call("run", folder, PROMPT, "-n", "40", "--ignore-eos", "--stop", "never ever", "--stop", stop)
    assert result.stdout_bytes.decode() == whole[: whole.index(stop)]
    found = json.loads(call("run", folder, PROMPT, "-n", "40", "--ignore-eos", "--stop", stop, "--json").stdout)
    assert (found["stop"], found["finish_reason"]) == (stop, "stop")


@pytest.mark.parametrize("quiet", [(), ("--quiet",), ("--json",)], ids=str)
def test_the_log_is_lines_on_stderr(folder: Path, monkeypatch: pytest.MonkeyPatch, quiet: tuple[str, ...]) -> None:
    def load_kernel(checked, weights, **_: object) -> Kernel:
        log.info("packed %d bytes", 5)
        log.warning("the cache is %s", "full")
        return ReferenceKernel(checked, weights)

    monkeypatch.setattr("flashformer.engine.engine.load_kernel", load_kernel)
    level, handlers = log.level, list(log.handlers)
    lines = call("run", folder, PROMPT, "-n", "2", *quiet).stderr.splitlines()
    assert "warning: the cache is full" in lines
    assert ("packed 5 bytes" in lines) == (not quiet)
    assert (log.level, log.handlers) == (level, handlers)


def test_an_error_in_the_log_says_what_raised_it_and_where(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_kernel(checked, weights, **_: object) -> Kernel:
        try:
            raise ZeroDivisionError("of our own")
        except ZeroDivisionError as error:
            log.error("a request failed", exc_info=error)
        return ReferenceKernel(checked, weights)

    monkeypatch.setattr("flashformer.engine.engine.load_kernel", load_kernel)
    lines = call("run", folder, PROMPT, "-n", "2", "--quiet").stderr.splitlines()
    at = lines.index("warning: a request failed")
    assert lines[at + 1] == "Traceback (most recent call last):"
    assert "ZeroDivisionError: of our own" in lines[at + 2 :]
    assert any("in load_kernel" in line for line in lines[at + 2 :])


BENCH_FIELDS = {
    "test",
    "rows",
    "depth",
    "tokens_per_s",
    "ms_per_token",
    "weight_bytes",
    "kv_bytes",
    "gb_per_s",
    "probe_gb_per_s",
    "fraction",
    "device",
    "threads",
    "quant",
    "model",
    "commit",
}


def test_bench_json_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.cli.bench.ReadProbe", FakeProbe)
    result = call("bench", folder, "--rows", "1,3", "-n", "4", "-r", "2", "--depth", "5", "--threads", "2", "--json")
    prompt, *lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert set(prompt) == BENCH_FIELDS - {"gb_per_s", "probe_gb_per_s", "fraction"}
    assert (prompt["test"], prompt["rows"], prompt["depth"]) == ("prefill", 1, 0)
    assert prompt["tokens_per_s"] == pytest.approx(1000 / prompt["ms_per_token"]["median"])
    assert [set(line) for line in lines] == [BENCH_FIELDS] * 2
    matrices = 2 * (32 * 32 * 2 + 2 * 16 * 32 + 3 * 48 * 32) + 258 * 32
    position = 2 * 2 * 16 * 4  # two layers, keys and values, one head of 16, f32
    for line, rows in zip(lines, (1, 3), strict=True):
        assert (line["test"], line["rows"], line["depth"], line["threads"]) == ("decode", rows, 5, 2)
        assert line["weight_bytes"] == 4 * matrices
        assert 6 * rows * position <= line["kv_bytes"] <= 9 * rows * position
        ms = line["ms_per_token"]
        assert ms["min"] <= ms["median"] <= ms["max"]
        assert line["tokens_per_s"] == pytest.approx(rows * 1000 / ms["median"])
        assert line["gb_per_s"] == pytest.approx((line["weight_bytes"] + line["kv_bytes"]) / ms["median"] / 1e6)
        assert line["probe_gb_per_s"] == 10.0
        assert line["fraction"] > 0


class FakeProbe:
    def __init__(self, n_threads: int, n_bytes: int | None = None) -> None:
        self.n_threads = n_threads

    def gb_s(self, seconds: float) -> float:
        return 10.0


def test_fractions_are_taken_against_the_probes_around_each_block() -> None:
    assert pair_ratios([10.0, 30.0, 12.0], [10.0, 10.0, 30.0, 10.0]) == [1.0, 1.5, 0.6]
    with pytest.raises(ValueError, match="zip"):
        pair_ratios([1.0], [1.0])


def test_bench_alternates_at_least_nine_blocks_with_probes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    forward = ReferenceKernel.forward
    monkeypatch.setattr(FakeProbe, "gb_s", lambda self, seconds: events.append("P") or 10.0)
    monkeypatch.setattr(ReferenceKernel, "forward", lambda self, *a: events.append("f") or forward(self, *a))
    monkeypatch.setattr("flashformer.cli.bench.ReadProbe", FakeProbe)
    assert call("bench", folder, "--rows", "1", "-n", "2", "-r", "1", "-p", "0", "--json").exit_code == 0
    assert re.fullmatch("f+P(f+P){9,}", "".join(events))


def test_bench_refuses_a_kernel_whose_tokens_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, count = ReferenceKernel.forward, iter(range(10_000))

    def unsteady(self: ReferenceKernel, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        forward(self, n_rows, again)
        self.tokens[0] = next(count) % 100

    monkeypatch.setattr(ReferenceKernel, "forward", unsteady)
    monkeypatch.setattr("flashformer.cli.bench.ReadProbe", FakeProbe)
    result = call("bench", folder, "--rows", "1", "-n", "2", "-r", "2", "-p", "0")
    assert result.exit_code == 1
    assert "not deterministic" in result.stderr


def test_bench_table_is_for_people(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.cli.bench.ReadProbe", FakeProbe)
    result = call("bench", folder, "--rows", "2", "-n", "3", "-r", "1")
    assert result.exit_code == 0
    assert "prefill" in result.stdout
    assert "decode" in result.stdout
    assert "in cache" in result.stdout


def test_plan_prints_reasons_and_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.cli.plan.ReadProbe", FakeProbe)
    result = call("plan", "shape:smollm2-135m", "--check", "--threads", "2", "--ctx", "1024")
    assert result.exit_code == 0
    for part in ("threads    2: asked for", "context    1024: asked for", "lm_head", "proved", "at 10.0 GB/s"):
        assert part in result.stdout
    found = json.loads(call("plan", "shape:smollm2-135m", "--json", "--threads", "2").stdout)
    assert set(found["memory"]) == {"weights_bytes", "kv_bytes", "buffers_bytes", "total_bytes"}
    assert found["floor_ms"] == pytest.approx(found["weight_bytes_per_token"] / 10.0 / 1e6)


def test_threads_above_the_quota_warn_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashformer.backends.cpu.topology.affinity", lambda: frozenset({0}))
    result = call("run", folder, PROMPT, "-n", "2", "--threads", "3")
    assert result.exit_code == 0
    assert result.stderr.count("3 threads asked for") == 1


def test_doctor_describes_the_machine() -> None:
    found = json.loads(call("doctor", "--json").stdout)
    assert found["version"] == ff.__version__
    assert found["threads"] >= 1
    assert found["affinity"]
    assert call("doctor", "--quiet").stdout.count("\n") == len(found)


def test_doctor_counts_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "x.ffpack").write_bytes(bytes(1234))
    for value, expected in ((str(tmp_path), (str(tmp_path), 1234)), ("off", (None, 0))):
        monkeypatch.setenv("FLASHFORMER_CACHE", value)
        found = json.loads(call("doctor", "--json").stdout)
        assert (found["cache"], found["cache_bytes"]) == expected


def spawn(*args: str | Path, **options: object) -> subprocess.Popen[bytes]:
    code = (
        "import flashformer.engine.engine as e\n"
        "from flashformer.backends.reference import ReferenceKernel\n"
        "e.load_kernel = lambda checked, weights, **_: ReferenceKernel(checked, weights)\n"
        "from flashformer.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("endless"), max_position_embeddings=8000)


def test_a_reader_that_leaves_is_no_error(endless: Path) -> None:
    process = spawn("run", endless, PROMPT, "-n", "7000", "--ignore-eos")
    assert process.stdout is not None
    assert process.stderr is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_interrupt_exits_130_without_a_traceback(endless: Path) -> None:
    process = spawn("run", endless, PROMPT, "-n", "7000", "--ignore-eos")
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
