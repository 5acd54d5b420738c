"""The compiled extension, imported when a kernel is made."""

from __future__ import annotations

import atexit
import os
import time
from functools import cache
from typing import Any

from ...errors import DeviceError


@cache
def load_native() -> Any:
    """The module flashformer._cpu. Raises DeviceError where it cannot be imported."""
    try:
        from ... import _cpu
    except ImportError as error:
        raise DeviceError(f"flashformer._cpu cannot be imported ({error}): install the package again") from error
    atexit.register(_end, _cpu, os.getpid())
    return _cpu


def _end(native: Any, pid: int) -> None:
    """Before the interpreter ends: waits for the forwards that daemon threads run. See Released in csrc/module.cpp."""
    native.end()
    while os.getpid() == pid and native.n_inside():  # a forked child has none of these threads
        time.sleep(0.001)
