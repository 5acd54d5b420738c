"""Long versions, run by hand with --long: many random shapes, many delayed runs, and a build that watches for races."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from cpu_kernels import cpu_kernel, prefill, prompt_logits
from odd_shapes import SHAPES, Shape, random_ids
from tiny import relative_error

import flashformer
from flashformer.backends.cpu.native import load_native
from flashformer.formats import BF16, F32

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


@pytest.mark.parametrize("seed", range(100))
def test_random_shapes_equal_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.integers(1, 5))
    heads = kv_heads * int(rng.integers(1, 9))
    shape = Shape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=2 * int(rng.integers(4, 129)),
        d_model=heads * int(rng.integers(3, 20)),
        d_ff=int(rng.integers(8, 400)),
        vocab=int(rng.integers(20, 2500)),
        layers=int(rng.integers(1, 4)),
        tied=bool(rng.integers(2)),
        attention_bias=bool(rng.integers(2)),
        mlp_bias=bool(rng.integers(2)),
    )
    model = shape.make(seed)
    ids = random_ids(seed, int(rng.integers(2, 600)), shape.vocab)
    with cpu_kernel(model, n_workers=int(rng.integers(1, 5)), ctx=640) as kernel:
        found = prompt_logits(kernel, ids)
        assert relative_error(found, model.logits(ids)) <= 2e-4
        assert prefill(kernel, ids, chunk=int(rng.integers(1, 65))).tobytes() == found[-1].tobytes()


def test_ten_thousand_delayed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = SHAPES[4].make(4), random_ids(7, 11, SHAPES[4].vocab)
    for weights, kv in ((F32, F32), (BF16, BF16)):
        monkeypatch.delenv("FLASHFORMER_DELAYS", raising=False)
        with cpu_kernel(model, weights=weights, kv=kv) as kernel:
            expected = prefill(kernel, ids, chunk=64).tobytes()
        for n_workers in (2, 3, 4, 5):
            monkeypatch.setenv("FLASHFORMER_DELAYS", str(n_workers))
            with cpu_kernel(model, n_workers=n_workers, weights=weights, kv=kv) as kernel:
                for run in range(1250):
                    assert prefill(kernel, ids, chunk=1 + run % 11).tobytes() == expected


# Forwards of changing length, with and without the head; `race` then takes the waits away from worker 1.
WATCHED = """
    import sys
    import numpy as np
    from flashformer.backends.cpu.kernel import CpuKernel
    from flashformer.check import check
    from flashformer.errors import NumericalError
    from flashformer.formats import BF16, F32
    from flashformer.model import random_model, shape_config
    from flashformer.program import Target, build
    from flashformer.program.records import flatten

    config = shape_config("smollm2-135m") | {
        "hidden_size": 96, "intermediate_size": 150, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500,
    }
    model = random_model("watched", config)
    for n_workers in (2, 3, 4):
        for fmt in (BF16, F32):
            program = build(model.spec, Target(n_workers, fmt, fmt, 64, 2, 600))
            flat = flatten(program)
            if sys.argv[1] == "race":
                flat.schedule["wait"][4:, 1] = 0
            kernel = CpuKernel(check(program), model.weights, flat=flat)
            rng = np.random.default_rng(0)
            for i in range(40):
                n, pos = int(rng.integers(1, 60)), int(rng.integers(0, 500))
                kernel.rows.token[:n] = rng.integers(0, 500, n)
                kernel.rows.pos[:n] = pos + np.arange(n)
                kernel.rows.want[:n] = 0
                kernel.rows.want[n - 1] = 2 * (i % 2)
                kernel.rows.temperature[:n] = i % 3
                try:
                    kernel.forward(n)
                except NumericalError:
                    assert sys.argv[1] == "race"
            kernel.close()
    print("finished")
"""


@pytest.fixture(scope="module")
def watched_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this package and an extension built with ThreadSanitizer. Needs g++, cmake and nanobind."""
    folder = tmp_path_factory.mktemp("tsan")
    build = folder / "build"
    nanobind = subprocess.run(
        [sys.executable, "-m", "nanobind", "--cmake_dir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    flags = ["-DSKBUILD_PROJECT_VERSION=0", f"-Dnanobind_DIR={nanobind}", f"-DPython_EXECUTABLE={sys.executable}"]
    flags.append("-DCMAKE_CXX_FLAGS=-fsanitize=thread -g")
    subprocess.run(["cmake", "-S", ROOT, "-B", build, *flags], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build, "-j2"], check=True, capture_output=True)
    package = folder / "flashformer"
    package.mkdir()
    for part in Path(flashformer.__file__).parent.iterdir():
        if not part.name.startswith("_cpu"):
            (package / part.name).symlink_to(part)
    extension = next(build.glob("_cpu*.so"))
    extension.rename(package / extension.name)
    return folder


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("mode", ["sound", "race"])
def test_thread_sanitizer(watched_package: Path, isa: str, mode: str) -> None:
    """Silent on the Program as it is; it speaks when a worker does not wait, so it would have seen one."""
    if isa not in load_native().isas():
        pytest.skip(f"this CPU has no {isa}: nothing to run")
    runtime = subprocess.run(
        ["g++", "-print-file-name=libtsan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED), mode],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(watched_package), *sys.path]),
            "LD_PRELOAD": runtime,
            "TSAN_OPTIONS": "exitcode=0",
            "FLASHFORMER_ISA": isa,
            "FLASHFORMER_DELAYS": "5",
        },
        capture_output=True,
        text=True,
    )
    assert "finished" in done.stdout, done.stderr
    assert ("WARNING: ThreadSanitizer" in done.stderr) == (mode == "race")
