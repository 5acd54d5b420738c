"""The compiled extension, imported when a kernel is made."""

from __future__ import annotations

from typing import Any

from ...errors import DeviceError


def load_native() -> Any:
    """The module flashformer._cpu. Raises DeviceError where it cannot be imported."""
    try:
        from ... import _cpu
    except ImportError as error:
        raise DeviceError(f"flashformer._cpu cannot be imported ({error}): install the package again") from error
    return _cpu
