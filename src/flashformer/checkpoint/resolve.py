"""MODEL -> a local folder: `demo`, an existing folder, or a hub id through the Hugging Face cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import LoadError

DEMO = Path(__file__).resolve().parent.parent / "demo"

WANTED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    files: Sequence[str] = WANTED_FILES,
) -> Path:
    """The folder of a model; of a hub id, `files` are downloaded into the Hugging Face cache.

    `revision` (branch, tag or commit) is meant for hub ids only. `offline` uses what the cache holds.
    Raises LoadError.
    """
    name = str(model)
    try:
        path = DEMO if name == "demo" else Path(model).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as e:
        raise LoadError(f"{name!r}: not a usable path: {e}; give a folder, a hub id (owner/name), or `demo`") from e
    if is_folder:
        if revision is not None:
            raise LoadError(f"{name}: revision {revision!r} given, but this is a local folder, which has no revisions")
        return path
    if exists:
        raise LoadError(f"{name}: is a file; expected the folder that holds config.json and model.safetensors")
    if name == "demo":
        raise LoadError(f"demo: {DEMO} is missing; this installation is incomplete, install the package again")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name):
        raise LoadError(f"{name}: no such folder, and not a hub id (owner/name) either; give one of these, or `demo`")
    return _download(name, revision, offline, files)


def _download(repo: str, revision: str | None, offline: bool, files: Sequence[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f"{repo}, revision {revision}" if revision else repo
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(files), local_files_only=offline)
    except errors.GatedRepoError as e:
        raise LoadError(
            f"{repo}: access is gated; accept its licence at https://huggingface.co/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise LoadError(f"{repo}: has no revision {revision!r}; see https://huggingface.co/{repo}/tree/main") from e
    except errors.RepositoryNotFoundError as e:
        raise LoadError(
            f"{repo}: neither a local folder nor a repository on the hub that you may read; check the spelling, "
            "or log in with `hf auth login` if it is private"
        ) from e
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as e:
        cause = "offline was asked for" if offline else "the hub cannot be reached"
        raise LoadError(f"{at}: not in the Hugging Face cache and {cause}; download it while online") from e
    except Exception as e:  # the client lets errors of several libraries through
        raise LoadError(
            f"{at}: the download failed: {type(e).__name__}: {e}; check the network and the disk, then try again"
        ) from e
    return Path(folder)
