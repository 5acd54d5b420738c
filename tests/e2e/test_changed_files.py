"""A20: a file truncated under a load, or under a loaded model. Each in a process of its own, which SIGBUS would end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from folders import model_folder

LOADED = """
import os, sys
import flashformer as ff
folder, weights = sys.argv[1], sys.argv[1] + "/model.safetensors"
with ff.load(folder, threads=1) as llm:
    before = llm.logits([5, 6, 7])
    os.truncate(weights, 0)
    os.unlink(weights)
    assert (llm.logits([5, 6, 7]) == before).all()
    assert len(llm.generate([5, 6, 7], max_tokens=5, ignore_eos=True).token_ids) == 5
"""

PACKING = """
import os, sys
import flashformer as ff
from flashformer.engine import engine
weights, real = sys.argv[1] + "/model.safetensors", engine.load_kernel
def truncating(*args, **options):
    os.truncate(weights, int(sys.argv[2]))
    return real(*args, **options)
engine.load_kernel = truncating
try:
    ff.load(sys.argv[1], threads=1)
except ff.LoadError as error:
    print(error)
"""


def run(code: str, *args: str) -> str:
    made = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made  # -7 is SIGBUS
    return made.stdout


def test_a20_a_loaded_model_does_not_need_its_file(tmp_path: Path) -> None:
    run(LOADED, str(model_folder(tmp_path)))


@pytest.mark.parametrize("n_bytes", [0, 20_000])
def test_a20_truncated_before_its_weights_are_packed(tmp_path: Path, n_bytes: int) -> None:
    said = run(PACKING, str(model_folder(tmp_path)), str(n_bytes))
    assert f"{tmp_path / 'model.safetensors'}: changed while it was read" in said
