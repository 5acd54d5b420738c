"""A model folder whose weights are a packed file: what is not exactly as it must be is refused, and not repaired."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import model_folder
from packed_files import forged
from typer.testing import CliRunner, Result

import flashformer as ff
from flashformer.cli.app import app
from flashformer.engine import quantize_model

PACKED = "weights.ffpack"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    """The model of `folder` in int4."""
    quantize_model(folder, tmp_path / "out", quant="int4", threads=2)
    return tmp_path / "out"


def logits(model: Path) -> bytes:
    with ff.load(model, threads=1) as llm:
        return llm.logits([3, 4, 5]).tobytes()


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def at(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        file.write(data)


def change_layout(header: dict[str, Any]) -> None:
    header["layout"]["matrices"][2][-2] += 64


def of(**changes: Any) -> Callable[[Path], None]:
    return lambda path: forged(path, lambda header: header.update(changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "not a file of packed weights"),
    "magic only": (lambda p: p.write_bytes(b"FFPACK1\n"), "header has"),
    "cut in the header": (lambda p: os.truncate(p, 1000), "truncated"),
    "cut in the weights": (lambda p: os.truncate(p, 9000), "bytes instead of"),
    "last byte lost": (lambda p: os.truncate(p, p.stat().st_size - 1), "bytes instead of"),
    "longer": (lambda p: at(p, p.stat().st_size, b"x"), "bytes instead of"),
    "no magic": (lambda p: at(p, 0, b"X"), "not a file of packed weights"),
    "another version": (lambda p: at(p, 6, b"2"), "another version"),
    "huge header": (lambda p: at(p, 8, b"\xff" * 8), "at most 100000000"),
    "header is no JSON": (lambda p: at(p, 16, b"\xff"), "header"),
    "a letter of the header": (lambda p: at(p, p.read_bytes().index(b"workshop"), b"W"), "header or the sums"),
    "a bit of the weights": (lambda p: at(p, 4096 * 3 + 3, b"\x5a\xa5"), "blocks are damaged"),
    "sums": (lambda p: at(p, -40, b"\xff"), "header or the sums"),
    "digest": (lambda p: at(p, -1, bytes([p.read_bytes()[-1] ^ 1])), "header or the sums"),
    "web page": (lambda p: p.write_bytes(b"<html>" * 1000), "HTML page"),
    "LFS pointer": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "forged: fields": (lambda p: forged(p, lambda h: h.pop("tied")), "another file"),
    "forged: a file of the cache": (lambda p: forged(p, lambda h: h.update(sources={})), "a file of the cache"),
    "forged: kinds": (of(tied=1), "wrong kind"),
    "forged: unknown format": (of(formats={"weights": "f32", "body": "int3", "head": "none"}), "no format of this"),
    "forged: format of a list": (of(formats={"weights": [], "body": "none", "head": "none"}), "no format of this"),
    "forged: formats": (of(formats=[]), "formats"),
    "forged: other formats": (of(formats={"weights": "f32", "body": "int8-g32", "head": "none"}), "of its layout"),
    "forged: tied": (of(tied=False), "of its layout"),
    "forged: offset": (lambda p: forged(p, change_layout), "matrices of its layout"),
    "forged: no layout": (of(layout={}), "version of its layout"),
    "forged: layout of another version": (lambda p: forged(p, lambda h: h["layout"].update(version=99)), "version of"),
    "forged: more in the layout": (lambda p: forged(p, lambda h: h["layout"].update(more=1)), "more of its layout"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "regular file"),
    "a link out": (lambda p: (p.unlink(), p.symlink_to("/etc/passwd")), "outside the model folder"),
}
WEIGHTS_ONLY = {"a bit of the weights"}  # which doctor and plan do not read


@pytest.mark.parametrize("name", DAMAGES)
def test_c39_a_damaged_file_is_refused_and_not_repaired(name: str, out: Path) -> None:
    damage, why = DAMAGES[name]
    damage(out / PACKED)
    before = (out / PACKED).lstat()
    with pytest.raises(ff.LoadError, match=why) as caught:
        ff.load(out)
    assert str(out / PACKED) in str(caught.value)
    assert len(str(caught.value)) < 800 + 2 * len(str(out))
    after = (out / PACKED).lstat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    for command in (("plan", out), ("doctor", "--model", out)):
        assert call(*command).exit_code == (0 if name in WEIGHTS_ONLY else 2)


def test_doctor_says_which_step_refuses(out: Path) -> None:
    def steps() -> dict[str, str]:
        found = json.loads(call("doctor", "--model", out, "--json").stdout)["diagnosis"]["steps"]
        return {step["name"]: step["verdict"] for step in found}

    assert steps() == {
        "files": "ok", "config": "ok", "packed": "ok", "fit": "ok", "tokenizer": "ok", "chat template": "not tried",
        "memory": "ok",
    }  # fmt: skip
    forged(out / PACKED, change_layout)
    assert steps()["packed"] == "ok"
    assert steps()["fit"] == "refused"
    at(out / PACKED, 0, b"X")
    assert steps()["packed"] == "refused"
    assert "fit" not in steps()


def test_another_config_does_not_fit(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    for key, value in (("intermediate_size", 64), ("num_hidden_layers", 1), ("vocab_size", 300)):
        (out / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ff.LoadError, match="of its layout"):
            ff.load(out)
        assert call("doctor", "--model", out).exit_code == 2


def test_both_kinds_of_weights_are_ambiguous(folder: Path, out: Path) -> None:
    shutil.copy(folder / "model.safetensors", out)
    with pytest.raises(ff.LoadError, match=r"holds both weights\.ffpack and model\.safetensors"):
        ff.load(out)
    assert [call(*args, out).exit_code for args in (("plan",), ("doctor", "--model"))] == [2, 2]


def test_a_file_that_others_may_write_is_read(out: Path) -> None:
    """It is a model's file, not one of ours."""
    first = logits(out)
    (out / PACKED).chmod(0o666)
    out.chmod(0o777)
    assert logits(out) == first
    assert stat.S_IMODE((out / PACKED).stat().st_mode) == 0o666
