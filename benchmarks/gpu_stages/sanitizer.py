"""Stage 6: compute-sanitizer over forwards of one small model, where the tool is on the machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .device import note_clocks, open_gpu
from .record import Clock, OutOfTimeError, Record

TOOL = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
USUAL = Path("/usr/local/cuda/bin")
MODEL = 4  # of families.MODELS: grouped heads, biases
FOLDERS = [str(path) for path in (Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2] / "src")]
PROGRAM = f"import sys; sys.path[:0] = {FOLDERS!r}; from gpu_stages.sanitizer import forwards; forwards()"


def run(record: Record, clock: Clock) -> None:
    open_gpu(record).close()
    tool = shutil.which(TOOL) or shutil.which(TOOL, path=str(USUAL))
    if tool is None:
        record.skip(f"{TOOL} is not on this machine")
        return
    subprocess.run([sys.executable, "-c", PROGRAM], timeout=max(clock.left_s, 1), check=True)  # without it first
    for name in TOOLS:
        clock.require(name)
        command = [tool, "--tool", name, "--error-exitcode", "3", sys.executable, "-c", PROGRAM]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=clock.left_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise OutOfTimeError(name) from error
        lines = (done.stdout + done.stderr).strip().splitlines()
        record.check(f"{TOOL} {name}", done.returncode == 0, lines[-1] if lines else "no output")
        record.result(name, lines[-40:])
    note_clocks(record, "clocks_after")


def forwards() -> None:
    """A prompt in forwards of 16, 5 and 1 rows."""
    import numpy as np

    from flashformer.backends.cuda.driver import DriverGpu
    from flashformer.backends.cuda.kernel import CudaKernel
    from flashformer.check import check
    from flashformer.formats import BF16
    from flashformer.program import build

    from .decode import prompt_logits
    from .families import tiny
    from .tiny_models import Case

    model, gpu = tiny(MODEL, 0), DriverGpu()
    checked = check(build(model.spec, Case(MODEL, BF16).target(gpu.info.facts.n_sm)))
    limit = 400_000_000_000  # cycles: under the tool everything takes hundreds of times longer
    kernel = CudaKernel(checked, model.weights, gpu=gpu, spin_cycles=limit)
    ids = np.arange(40, dtype=np.int32)
    for cut in (16, 5, 1):
        assert np.isfinite(prompt_logits(kernel, ids, cut)).all()
    kernel.close()
