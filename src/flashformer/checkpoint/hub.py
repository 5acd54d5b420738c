"""A hub id -> files in the ordinary Hugging Face cache, asked for by name; and what to say where that fails."""

from __future__ import annotations

import errno
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import LoadError
from ..log import wants_notes
from .convert import INDEX, SINGLE, TOKENIZER, no_tokenizer, no_weights

ASK_S = 10  # seconds to wait for the hub's answer before the cache is used
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository in the cache. `sizes`: bytes by name of all its files, {} if the hub did not say."""

    repo: str
    folder: Path
    offline: bool
    sizes: Mapping[str, int]

    def fetch(self, files: Iterable[str]) -> None:
        """Downloads what is not cached of the files that these shell patterns match. Raises LoadError."""
        files = list(files)
        try:
            _download(self.repo, self.folder.name, self.offline, files)
        except Exception as e:  # the client lets errors of several libraries through
            absent = {name: n for name, n in self.sizes.items() if not (self.folder / name).exists()}
            due_bytes = _matching_bytes(absent, files)
            raise _refusal(e, self.repo, self.folder.name, self.offline, due_bytes) from e


def open_snapshot(repo: str, revision: str | None, offline: bool, files: Iterable[str]) -> Snapshot:
    """The commit that `revision` (default: main) names, with `files` in the cache.

    The hub is asked first; where it does not answer or gives no access, the cache is used with a warning.
    Raises LoadError, of a repository without safetensors or tokenizer.json before anything is downloaded.
    """
    from huggingface_hub import errors

    files = list(files)
    sizes: Mapping[str, int] = {}
    unasked: Exception | None = None
    if not offline:
        try:
            sizes = _listing(repo, revision)
        except errors.RevisionNotFoundError as e:
            raise _refusal(e, repo, revision, offline) from e
        except Exception as e:  # the client lets errors of several libraries through
            unasked = e
        else:
            _require_readable(repo, sizes)
    try:
        folder = _download(repo, revision, offline or unasked is not None, files)
    except Exception as e:
        absent = isinstance(e, errors.LocalEntryNotFoundError)
        cause = unasked if unasked is not None and absent else e
        raise _refusal(cause, repo, revision, offline, _matching_bytes(sizes, files)) from cause
    if unasked is not None and not isinstance(unasked, errors.OfflineModeIsEnabled):
        warnings.warn(
            f"{repo}: the hub cannot be asked ({_brief(unasked)}); the copy in the cache is used, which may be old",
            stacklevel=2,
        )
    return Snapshot(repo, folder, offline, sizes)


def _matching_bytes(sizes: Mapping[str, int], patterns: Iterable[str]) -> int:
    patterns = list(patterns)
    return sum(size for name, size in sizes.items() if any(fnmatchcase(name, p) for p in patterns))


def _listing(repo: str, revision: str | None) -> dict[str, int]:
    """Name -> bytes of every file, as the hub says now."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=ASK_S)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _download(repo: str, revision: str | None, offline: bool, files: Iterable[str]) -> Path:
    """Progress bars go to a terminal only, and not where the log is set to warnings."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            hidden = not (sys.stderr.isatty() and wants_notes())
            super().__init__(*args, **{**kwargs, "disable": hidden})  # type: ignore[no-untyped-call]

    return Path(
        snapshot_download(repo, revision=revision, allow_patterns=list(files), local_files_only=offline, tqdm_class=Bar)
    )


def _require_readable(repo: str, names: Iterable[str]) -> None:
    """Refuses a repository whose files could not be loaded if they were all here. Raises LoadError."""
    names, into = set(names), repo.rpartition("/")[2]
    if not names & {SINGLE, INDEX}:
        raise LoadError(no_weights(repo, names, repo, into))
    if TOKENIZER not in names:
        raise LoadError(no_tokenizer(repo, names, repo, into))


def _refusal(error: Exception, repo: str, revision: str | None, offline: bool, due_bytes: int = 0) -> LoadError:
    """What to say of an error of the client. `due_bytes`: size of what was to be downloaded."""
    from huggingface_hub import constants, errors

    at = f"{repo}, revision {revision}" if revision else repo
    if isinstance(error, errors.GatedRepoError):
        return LoadError(
            f"{repo}: access is gated; accept its licence at https://huggingface.co/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return LoadError(
            f"{repo}: neither a local folder nor a repository on the hub that you may read; check the spelling, "
            "or log in with `hf auth login` (or set HF_TOKEN) if it is private"
        )
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        cache = Path(constants.HF_HUB_CACHE)
        return LoadError(
            f"{at}: cannot be written to the cache {cache}: {error.strerror}; {due_bytes:,} bytes are needed"
            f"{_free_bytes(cache)}. Make room there, or set HF_HOME to another folder"
        )
    refs, commits = _cached(repo)
    named = [f"{name} ({commit[:12]})" for name, commit in sorted(refs.items())]
    cached = ", ".join(named + sorted(commits - set(refs.values())))
    known = f"; revisions in the cache: {cached}" if cached else ""
    if isinstance(error, errors.RevisionNotFoundError):
        return LoadError(f"{repo}: has no revision {revision!r}; see https://huggingface.co/{repo}/tree/main{known}")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        partly = (revision or "main") in {*refs, *commits}
        what = "only partly in the Hugging Face cache" if partly else "not in the Hugging Face cache"
        why = "offline was asked for" if offline else "HF_HUB_OFFLINE is set or the hub cannot be reached"
        return LoadError(f"{at}: {what}, and {why}; download it while online{known}")
    return LoadError(
        f"{at}: the download failed: {_brief(error)}; check the network and the disk, then try again{known}"
    )


def _brief(error: Exception) -> str:
    """The error's type and first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _free_bytes(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f", {shutil.disk_usage(folder).free:,} are free"
    except OSError:
        return ""


def _cached(repo: str) -> tuple[dict[str, str], set[str]]:
    """Branches and tags -> commit, and all commits, of which the cache has a folder."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / "--".join(("models", *repo.split("/")))
    try:
        commits = {folder.name for folder in (root / "snapshots").iterdir()}
        refs = {str(p.relative_to(root / "refs")): p.read_text() for p in (root / "refs").rglob("*") if p.is_file()}
    except (OSError, ValueError):
        return {}, set()
    return {name: commit for name, commit in refs.items() if commit in commits}, commits
