"""Files that are kept below the cache folder from one start to the next.

Folder and files belong to this user alone. A file appears whole or not at all (written aside, then renamed) and is
never written to again.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import env
from ..log import log

FREE_SHARE = 0.1  # of the disk, that stays free
UNUSED_S = 30 * 24 * 3600.0  # a file that nobody used for so long goes when the next is written


def kept_bytes() -> int:
    """Of all files below the cache folder."""
    base = env.cache_folder()
    try:
        return 0 if base is None else sum(path.lstat().st_size for path in base.rglob("*") if path.is_file())
    except OSError:  # one went while they were counted
        return 0


def own_folder(name: str, what: str) -> Path | None:
    """The folder `name` below the cache folder; None where nothing is to be kept, or, with a warning, cannot be."""
    if (base := env.cache_folder()) is None:
        return None
    folder = base / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(folder.stat(), "the folder")
    except (OSError, ValueError) as e:
        log.warning("%s: %s not kept: %s", folder, what, e)
        return None
    return folder


def require_own(stat: os.stat_result, what: str) -> None:
    """Raises ValueError if others could have written it."""
    if stat.st_uid != os.geteuid():
        raise ValueError(f"{what} belongs to another user ({stat.st_uid})")
    if stat.st_mode & 0o022:
        raise ValueError(f"others may write to {what} (mode {stat.st_mode & 0o777:o})")


def write_whole(path: Path, parts: Iterable[Any]) -> None:
    """Buffers one after the other as the file `path`. Raises OSError, with nothing left behind."""
    aside = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            for part in parts:
                file.write(part)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def make_room(folder: Path, suffix: str, n_bytes: int) -> bool:
    """Whether so many bytes can be written here with FREE_SHARE of the disk left free.

    The files that were used the longest ago go for that, unless all of them would not be enough.
    """
    usage = shutil.disk_usage(folder)
    missing = n_bytes + int(FREE_SHARE * usage.total) - usage.free
    found = sorted((stat.st_mtime, stat.st_size, path) for path, stat in _stats(folder) if path.suffix == suffix)
    if missing > sum(size for _, size, _ in found):
        return False
    for _, size, path in found:
        if missing <= 0:
            break
        path.unlink(missing_ok=True)
        missing -= size
    return True


def _stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Of every file here that does not go meanwhile."""
    for path in folder.iterdir():
        with suppress(OSError):
            yield path, path.stat()


def open_own(path: Path) -> int:
    """A file descriptor for reading. Raises OSError; links are not followed."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def mark_used(path: Path) -> None:
    """Puts off the day on which `remove_unused` takes it."""
    with suppress(OSError):
        os.utime(path)


def remove_unused(folder: Path, suffix: str) -> None:
    """Removes what was last used long before the latest use of anything here; what is not `suffix` after a day."""
    used = {path: stat.st_mtime for path, stat in _stats(folder)}
    for path, last in used.items():
        limit = UNUSED_S if path.suffix == suffix else 24 * 3600.0
        if max(used.values()) - last > limit:
            with suppress(OSError):
                path.unlink()
