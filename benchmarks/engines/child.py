"""The process of one engine, from outside: requests, and how much CPU it used while it was not its turn."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERVE = Path(__file__).with_name("serve.py")
HUGE_KINDS = ("AnonHugePages", "FilePmdMapped", "ShmemPmdMapped", "Private_Hugetlb")  # of smaps
PATIENCE_S = 1200.0
TICKS_S = os.sysconf("SC_CLK_TCK")


class EngineError(Exception):
    """An engine said no, died, or took too long; the message's first line says which and how."""


class Child:
    def __init__(self, python: str, engine: str, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [python, str(SERVE), engine],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
            )
        self._buffer = b""

    def __call__(self, do: str, **options: object) -> dict[str, Any]:
        """Raises EngineError."""
        assert self._process.stdin
        try:
            self._process.stdin.write((json.dumps({"do": do, **options}) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed(do, "has ended") from None
        answer: dict[str, Any] = json.loads(self._line(do))
        if "error" in answer:
            error = str(answer["error"]).strip()
            raise self._failed(do, error.splitlines()[-1], error)
        return answer

    def _line(self, do: str) -> bytes:
        assert self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(PATIENCE_S):
                    raise self._failed(do, f"gave no answer in {PATIENCE_S:.0f} s")
                more = os.read(self._process.stdout.fileno(), 1 << 20)
                if not more:
                    raise self._failed(do, "has ended")
                self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failed(self, do: str, how: str, detail: str = "") -> EngineError:
        tail = self._log.read_text(errors="replace")[-2000:]
        return EngineError(f"{do}: {how}\n{detail}\n{tail}\nwhole log: {self._log}")

    def cpu_s(self) -> float:
        """Processor time of all threads so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_S

    def memory_mib(self) -> dict[str, int]:
        """Resident, and of that in huge pages."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()
        kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines[1:])}
        huge = sum(kib.get(kind, 0) for kind in HUGE_KINDS)
        return {"rss_mib": kib["Rss"] // 1024, "huge_mib": huge // 1024}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
