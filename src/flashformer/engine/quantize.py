"""MODEL -> a model folder with packed weights, and what quantizing them cost."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..backends.packed import Progress, given_bytes
from ..checkpoint import PackedWeights
from ..checkpoint.files import read_bytes
from ..checkpoint.folder import small_files
from ..checkpoint.packed import AGAIN, PACKED
from ..errors import LoadError, RequestError
from ..model import Model, load_model
from ..model.random import PREFIX
from ..program import build
from .divergence import TEXT, Divergence, divergence_from, fixed_text
from .engine import make_llm
from .setup import Options, Setup, set_up


@dataclass(frozen=True)
class QuantizeReport:
    """Formats by name, "none" where a matrix is as `dtype`; the divergence from the original, on the text named `text`.

    The original is the model as it is stored, computed by the same kernel. `bytes_before`: its weights as they are
    stored; `bytes_after`: the packed file.
    """

    model: str
    out: str
    dtype: str
    quant: str
    head_quant: str
    bytes_before: int
    bytes_after: int
    text: str
    divergence: Divergence

    def to_json(self) -> dict[str, object]:
        named = {name: getattr(self, name) for name in ("model", "out", "dtype", "quant", "head_quant")}
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {**named, **sizes, **_error(self.divergence)}


def quantize_model(
    model: str | Path,
    out: str | Path,
    *,
    quant: str,
    dtype: str = "auto",
    threads: int | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Packs `model` into the new folder `out`, which then is a model as any other.

    It holds the configuration, tokenizer and templates as they are and the weights in one file, which is read when it
    is loaded. The folder appears whole or not at all. `quant` "none" packs without quantizing. The original and the
    result are loaded one after the other, never together; what is packed of them is not kept in the cache.
    `progress(what, done_bytes, total_bytes)` is called in this thread. Raises RequestError for arguments out of their
    range and a folder that cannot be made, and what `load` raises.
    """
    options = Options(device="cpu", quant=quant, dtype=dtype, threads=threads)
    if str(model).startswith(PREFIX):
        raise RequestError(f"{model} has random weights, made when it is loaded: there is nothing to quantize")
    with _new_folder(Path(out).expanduser().absolute()) as aside:
        loaded = load_model(model, revision=revision, offline=offline)
        if isinstance(loaded.weights, PackedWeights):
            raise LoadError(f"{model}: is packed already, from {loaded.weights.original!r}; {AGAIN}")
        ids = _text_ids(loaded)
        made = _set_up(loaded, replace(options, ctx=len(ids)))
        if made.threads.warning:
            warnings.warn(made.threads.warning, stacklevel=2)
        due, free = given_bytes(build(loaded.spec, made.target)), shutil.disk_usage(aside).free
        if due > free:
            raise RequestError(f"{out}: {due:,} bytes are needed, {free:,} are free: choose another place")
        assert loaded.folder is not None
        with _writing(out):
            _copy_small_files(loaded.folder, aside)
        as_stored = _set_up(loaded, Options(device="cpu", threads=threads, ctx=len(ids)))
        with make_llm(loaded, as_stored, progress=_renamed(progress, "packing the original"), keep=False) as llm:
            logits = llm.logits(ids)
        with make_llm(loaded, made, progress=_renamed(progress, "quantizing"), keep=False) as llm:
            found = divergence_from(logits, llm, ids)
            with _writing(out):
                llm.kernel.write_weights(aside / PACKED, loaded.name, _error(found))
        target = made.target
        return QuantizeReport(
            model=loaded.name,
            out=str(out),
            dtype=target.weight_format.name,
            quant=target.body_quant.name if target.body_quant else "none",
            head_quant=target.head_quant.name if target.head_quant else "none",
            bytes_before=sum(tensor.n_bytes for tensor in loaded.weights.values()),
            bytes_after=(aside / PACKED).stat().st_size,
            text=TEXT,
            divergence=found,
        )


def _error(found: Divergence) -> dict[str, object]:
    """As the file and --json have it."""
    return {
        "text": TEXT,
        "n_tokens": found.n_tokens,
        "kl_mean_nats": found.kl,
        "kl_p99_nats": found.kl_p99,
        "top1_agreement": found.top1,
    }


def _set_up(loaded: Model, options: Options) -> Setup:
    return set_up(loaded.spec, loaded.stored_format, options)


def _text_ids(loaded: Model) -> list[int]:
    """The fixed text, as much of it as the model takes."""
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(fixed_text())[: loaded.max_positions]
    if not ids:
        raise LoadError(f"{loaded.name}: its tokenizer makes no token of a text: nothing can be measured")
    return ids


def _copy_small_files(folder: Path, into: Path) -> None:
    """All files that are read of a model but for its weights; links become files. Raises LoadError, OSError."""
    for name, path in small_files(folder).items():
        (into / name).parent.mkdir(exist_ok=True)
        (into / name).write_bytes(read_bytes(path))


def _renamed(progress: Progress | None, what: str) -> Progress | None:
    return None if progress is None else lambda _, done, total: progress(what, done, total)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder aside, which becomes `out` if all goes well and disappears if not. Raises RequestError."""
    aside = out.parent / f".{out.name[:200]}.{secrets.token_hex(8)}.tmp"
    with _writing(out):
        _require_free(out)
        aside.mkdir()
    try:
        yield aside
        with _writing(out):
            for path in (*aside.rglob("*"), aside):
                _to_disk(path)
            _require_free(out)
            aside.rename(out)  # which replaces an empty folder and nothing else
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _writing(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise RequestError(f"{out}: cannot be written: {e.strerror or e}; nothing is left of it") from e


def _require_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise RequestError(f"{out}: is there already, and no folder: give the name of a new one")
    if out.is_dir() and any(out.iterdir()):
        raise RequestError(f"{out}: the folder is not empty: give the name of a new one")
    if not out.parent.is_dir():
        raise RequestError(f"{out}: there is no folder {out.parent}: make it first")


def _to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
