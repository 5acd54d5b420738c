"""The installed command with the demo model, as a person uses it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import flashformer as ff

PROMPT = "def fib(n):"


def flashformer(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashformer.cli", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def answer() -> ff.Output:
    with ff.load("demo", threads=1) as llm:
        return llm.generate(PROMPT, max_tokens=24, temperature=0)


def test_text_does_not_depend_on_threads_or_on_where_it_comes_from(answer: ff.Output) -> None:
    run = ("run", "demo", "-n", "24", "--temp", "0")
    results = [
        flashformer(*run, PROMPT),
        flashformer(*run, PROMPT, "--threads", "2"),
        flashformer(*run, "-", stdin=PROMPT),
        flashformer(*run, "--quiet", stdin=PROMPT),
    ]
    assert [r.returncode for r in results] == [0] * 4
    assert {r.stdout for r in results} == {answer.text}
    assert len(answer.token_ids) > 4
    line = re.compile(r"prompt \d+ tok .* GB/s, weights fit in cache \| peak [\d.]+ GiB\n")
    assert all(line.search(r.stderr) for r in results[:3])
    assert results[3].stderr == ""


def test_the_cpu_agrees_with_the_reference(answer: ff.Output) -> None:
    ids = answer.prompt_token_ids + answer.token_ids
    logits = []
    for device in ("cpu", "reference"):
        with ff.load("demo", device=device, dtype="f32", kv_dtype="f32", threads=2) as llm:
            logits.append(llm.logits(ids))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-3 * np.abs(logits[1]).max())


def test_sampling_repeats_with_its_seed() -> None:
    run = ("run", "demo", PROMPT, "-n", "24", "--temp", "1", "--json", "--seed")
    texts = [json.loads(flashformer(*run, seed).stdout)["token_ids"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_plan_proves_the_program() -> None:
    found = json.loads(flashformer("plan", "demo", "--check", "--json").stdout)
    assert "the weights fit in cache" in flashformer("plan", "demo").stdout
    assert min(found["proof"].values()) > 0
    with ff.load("demo") as llm:
        assert llm.plan.memory == found["memory"]


def test_bench_prints_one_line_per_test() -> None:
    done = flashformer("bench", "demo", "--rows", "1,2", "-n", "4", "-r", "1", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [(line["test"], line["rows"]) for line in lines] == [("prefill", 1), ("decode", 1), ("decode", 2)]
    assert all(line["gb_per_s"] > 0 and line["probe_gb_per_s"] > 0 for line in lines[1:])


def test_doctor_sees_the_extension() -> None:
    found = json.loads(flashformer("doctor", "--json").stdout)
    assert found["extension"] == "present"
    assert found["isa"]


def test_unknown_commands_and_options_exit_2() -> None:
    for args in (
        ("frobnicate", "demo"),
        ("run", "demo", "x", "--quant", "int5"),
        ("run", "demo", "x", "--device", "tpu"),
    ):
        assert flashformer(*args).returncode == 2


def test_a_run_imports_no_library_that_it_does_not_use() -> None:
    code = (
        "import json, sys\nfrom flashformer.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(json.dumps(sorted(m for m in sys.modules if '.' not in m)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "demo", PROMPT, "-n", "2", "--quiet"],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    modules = set(json.loads(done.stderr.splitlines()[-1]))
    assert {"numpy", "tokenizers", "typer"} <= modules
    assert not modules & {"rich", "huggingface_hub", "jinja2", "httpx", "tqdm"}


def test_every_sampling_option_together() -> None:
    options = ("--temp", "0.8", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.05", "--repeat-penalty", "1.1")
    done = flashformer("run", "demo", PROMPT, "-n", "64", *options, "--stop", "\n\n", "--seed", "3", "--json")
    with ff.load("demo") as llm:
        expected = llm.generate(
            PROMPT, max_tokens=64, temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, repeat_penalty=1.1, stop="\n\n",
            seed=3,
        )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["token_ids"] == expected.token_ids
    assert (found["text"], found["stop"]) == (expected.text, expected.stop)
