"""What README.md tells people to type works, every block of it, and its figures are the recorded ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import figures
import pytest
import readme_blocks

import flashformer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = readme_blocks.read_blocks(README)
PACKAGE = Path(flashformer.__file__).parent


def run_here(command, folder):
    """Runs in an empty folder, with this interpreter's `flashformer` and `python` first on PATH."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def run_sh(block, tmp_path):
    """Its lines do not build on each other: two at a time."""
    lines = block.code.splitlines()
    with ThreadPoolExecutor(2) as pool:
        every = list(pool.map(lambda line: run_here(["bash", "-euo", "pipefail", "-c", line], tmp_path), lines))
    for line, done in zip(lines, every, strict=True):
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip(), f"{line} printed nothing"


def run_python(block, tmp_path):
    done = run_here([sys.executable, "-c", block.code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def run_in_ci(block, tmp_path):
    assert f"readme_blocks.py {block.name}" in (ROOT / ".ci" / "run").read_text()
    assert run_here(["bash", "-n", "-c", block.code], tmp_path).returncode == 0


def run_client(block, tmp_path):
    """Against the server whose command stands in the text, at a port that is free."""
    command = re.search(r"&& flashformer (serve \w+)`", README)[1].split()
    server = [sys.executable, "-m", "flashformer.cli", *command, "--port", "0", "--threads", "1"]
    environment = {**os.environ, "FLASHFORMER_API_KEY": ""}
    with subprocess.Popen(server, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            while "is ready" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            address = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
            assert "http://127.0.0.1:8000" in block.code
            run_python(block._replace(code=block.code.replace("http://127.0.0.1:8000", address)), tmp_path)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()


def name_folders(block, tmp_path):
    parts = [line.split()[0] for line in block.code.splitlines()]
    missing = [part for part in parts if not (PACKAGE / part / "__init__.py").exists()]
    assert parts
    assert not missing


HOW = {
    ("sh", ""): run_sh,
    ("sh", "first"): run_in_ci,
    ("sh", "second"): run_in_ci,
    ("python", ""): run_python,
    ("python", "client"): run_client,
    ("text", "pipeline"): name_folders,
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"line{b.line}-{b.language}-{b.name}")
def test_block(block, tmp_path):
    HOW[block.language, block.name](block, tmp_path)


def test_every_way_is_used():
    assert {(b.language, b.name) for b in BLOCKS} == set(HOW)


def test_blocks_are_found():
    text = "a\n```sh x\none\n```\n````text\n```\n````\n~~~python\ntwo\n~~~\n"
    assert [(b.line, b.language, b.name, b.code) for b in readme_blocks.read_blocks(text)] == [
        (2, "sh", "x", "one\n"),
        (5, "text", "", "```\n"),
        (8, "python", "", "two\n"),
    ]
    with pytest.raises(ValueError, match="line 1 is not closed"):
        readme_blocks.read_blocks("```sh\nls\n")


def test_torch_is_the_pinned_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = next(d for d in project["optional-dependencies"]["test"] if d.startswith("torch=="))
    assert re.findall(r"torch==[\w.]+", README) == [pinned]


@pytest.mark.parametrize("path", figures.FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_figures_are_the_recorded_ones(path):
    text = path.read_text()
    assert figures.filled(text, figures.FILES[path]()) == text


def test_no_figure_outside_the_markers():
    prose = README[: README.index(figures.BEGIN)] + README[README.index(figures.END) :]
    assert not re.findall(r"\d[\d.,]*\s*(?:tok(?:ens)?/s|[GM]i?B/s|ms\b|us\b|%|percent)", prose)


def test_table_shows_the_last_record(tmp_path):
    record = {
        "test": "decode", "rows": 1, "depth": 0, "tokens_per_s": 10.0, "gb_per_s": 20.0, "probe_gb_per_s": 25.0,
        "fraction": 0.8, "device": "cpu", "threads": 2, "quant": "none", "model": "m", "commit": "0123456789",
        "weight_bytes": 4 * 10**7, "machine": {"cpu": "X", "isa": "avx2", "llc_bytes": 10**7},
    }  # fmt: skip
    lines = [record, record | {"rows": 2}, record | {"tokens_per_s": 11.04, "gb_per_s": None, "fraction": None}]
    lines.append(record | {"rows": 3, "weight_bytes": 4 * 10**7 - 1})
    (tmp_path / "a.jsonl").write_text("".join(figures.json.dumps(line) + "\n" for line in lines))
    shown = figures.benchmark_figures(tmp_path).splitlines()
    assert shown[2:5] == [
        "| m | as stored | decode | 0 | 11.0 |  | 25.0 |  | 0123456789 |",
        "| m | as stored | decode, 2 rows | 0 | 10.0 | 20.0 | 25.0 | 80 % | 0123456789 |",
        "| m | as stored | decode, 3 rows | 0 | 10.0 | 20.0 | 25.0 | weights fit in cache | 0123456789 |",
    ]
    assert shown[-1] == "Measured on: X, avx2, 2 threads."


PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/design.md", "docs/figures.md", "docs/program.md"),
    "docs/server.md",
]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
