"""The text that the demo model is trained on: the Python standard library's own source.

``tools/demo_corpus.txt`` pins it: one line per file, ``sha256[:16] path``, relative to the standard
library's folder, sorted by path. Every 20th line is held out. ``python tools/demo_corpus.py --pin``
writes that list anew from the running interpreter.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).with_name("demo_corpus.txt")
HOLD_OUT_EVERY = 20
SKIPPED_FOLDERS = ("site-packages/", "pydoc_data/", "encodings/", "lib2to3/tests/data/", "test/encoded_modules/")


class File(NamedTuple):
    path: str
    digest: str  # first 16 hex digits of the SHA-256 of the file's bytes
    held_out: bool

    @property
    def is_test(self) -> bool:
        return "/test" in "/" + self.path or "/idle_test/" in self.path


def stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def is_data_like(data: bytes) -> bool:
    """Tables and fixtures rather than code: not ASCII, very long lines, or mostly digits and escapes."""
    if len(data) < 200 or not data.isascii():
        return True
    lines = data.splitlines()
    if max(map(len, lines)) > 400:
        return True
    dense = sum(data.count(c) for c in b"0123456789\\")
    return dense > 0.12 * len(data)


def find_files(root: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(SKIPPED_FOLDERS) or "/bad" in name:
            continue
        data = path.read_bytes()
        if not is_data_like(data):
            found.append((name, digest(data)))
    return sorted(found)


def pinned_files() -> list[File]:
    lines = [line.split(" ", 1) for line in LIST.read_text().splitlines() if not line.startswith("#")]
    return [File(path, sha, i % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1) for i, (sha, path) in enumerate(lines)]


def list_digest() -> str:
    return hashlib.sha256(LIST.read_bytes()).hexdigest()


def read_files(files: list[File], *, strict: bool) -> dict[File, str]:
    """The text of those files. A file that is missing or differs is an error (strict) or is left out."""
    texts = {}
    for file in files:
        path = stdlib() / file.path
        data = path.read_bytes() if path.exists() else b""
        if digest(data) == file.digest:
            texts[file] = data.decode("ascii")
        elif strict:
            raise SystemExit(f"{path} is not the pinned file {file.digest}: train with the Python named in {LIST.name}")
    return texts


def main() -> None:
    import sys

    if sys.argv[1:] != ["--pin"]:
        raise SystemExit(__doc__)
    files = find_files(stdlib())
    header = f"# Python {sys.version.split()[0]}, sha256[:16] and path; every {HOLD_OUT_EVERY}th is held out\n"
    LIST.write_text(header + "".join(f"{sha} {path}\n" for path, sha in files))
    print(f"{len(files)} files, {sum((stdlib() / p).stat().st_size for p, _ in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
