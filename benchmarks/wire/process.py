"""`flashformer serve` as a process, from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from types import TracebackType

from .client import Address

PATIENCE_S = 600.0  # for a model to be loaded
LEAVING_S = 60.0
CLOSING_S = 0.2
PREFIX = "flashformer:"


class Served:
    """Ready when made, at a free port of this machine. Raises RuntimeError where it does not become ready."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "flashformer.cli", "serve", model, "--port", "0", *options]
        environment = {name: value for name, value in os.environ.items() if name != "FLASHFORMER_API_KEY"}
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._said: deque[str] = deque(maxlen=50)
        self._found: SimpleQueue[re.Match[str] | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        try:
            self.address = Address(port=int(self._line()[1]))
            self._line()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _listen(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._said.append(line)
            if found := re.search(r" at http://127\.0\.0\.1:(\d+)| is ready: ", line):
                self._found.put(found)
        self._found.put(None)

    def _line(self) -> re.Match[str]:
        try:
            found = self._found.get(timeout=PATIENCE_S)
        except Empty:
            found = None
        if found is None:
            raise RuntimeError(f"the server did not become ready:\n{''.join(self._said)}")
        return found

    def rss_mib(self) -> float:
        found = re.search(r"^VmRSS:\s+(\d+) kB$", self._proc("status").read_text(), re.MULTILINE)
        assert found
        return int(found[1]) / 1024

    def n_files(self) -> int:
        """File descriptors."""
        return len(list(self._proc("fd").iterdir()))

    def n_threads(self) -> int:
        return len(list(self._proc("task").iterdir()))

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self._process.pid}/{name}")

    def metrics(self) -> dict[str, float]:
        """By name without the prefix, labels added up."""
        with closing(HTTPConnection("127.0.0.1", self.address.port, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith(PREFIX):
                name, value = line.removeprefix(PREFIX).split("{")[0], float(line.rpartition(" ")[2])
                found[name] = found.get(name, 0.0) + value
        return found

    def settle(self, seconds: float) -> dict[str, float]:
        """The metrics when nothing runs and nothing waits, or after so long; connections are closed by then."""
        end = monotonic() + seconds
        while True:
            found = self.metrics()
            is_idle = found["num_requests_running"] == found["num_requests_waiting"] == 0
            sleep(CLOSING_S)
            if is_idle or monotonic() > end:
                return found

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(LEAVING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(LEAVING_S)
        assert self._process.stderr
        self._process.stderr.close()
