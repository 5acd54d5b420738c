"""MODEL -> where its files are: `demo`, an existing folder, or a hub id through the Hugging Face cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoadError
from .convert import INDEX
from .hub import Snapshot, open_snapshot

DEMO = Path(__file__).resolve().parent.parent / "demo"

# All but the weights, which are downloaded when they are asked for. No other file is ever requested.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Place:
    """A folder and, of a hub id, the snapshot that it is, from which more files can be fetched."""

    folder: Path
    snapshot: Snapshot | None = None


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    files: Sequence[str] = SMALL_FILES,
) -> Path:
    """The folder of a model, as `locate` finds it. Raises LoadError."""
    return locate(model, revision=revision, offline=offline, files=files).folder


def locate(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    files: Sequence[str] = SMALL_FILES,
) -> Place:
    """Where a model is; of a hub id, `files` are downloaded into the Hugging Face cache.

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
        return Place(path)
    if exists:
        raise LoadError(f"{name}: is a file; expected the folder that holds config.json and model.safetensors")
    if name == "demo":
        raise LoadError(f"demo: {DEMO} is missing; this installation is incomplete, install the package again")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name):
        raise LoadError(f"{name}: no such folder, and not a hub id (owner/name) either; give one of these, or `demo`")
    snapshot = open_snapshot(name, revision, offline, files)
    return Place(snapshot.folder, snapshot)
