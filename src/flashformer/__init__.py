"""One native call per token: FlashFormer as a library.

    import flashformer as ff

    with ff.load("demo") as llm:
        print(llm.generate("def fib(n):", max_tokens=64).text)

Names are imported when they are first used, so that importing the package reads no file but this one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import (
    ContextError,
    DeviceError,
    FlashformerError,
    LoadError,
    NumericalError,
    ProgramError,
    RequestError,
    UnavailableError,
)
from .version import __version__

if TYPE_CHECKING:
    from .engine import LLM, Output, Piece, Plan, SamplingSettings, Score, Stream, Timing, TokenLogprobs, load

_LAZY = (
    *("LLM", "Output", "Piece", "Plan", "SamplingSettings", "Score", "Stream", "Timing", "TokenLogprobs"),
    "load",
)

__all__ = [
    "LLM",
    "ContextError",
    "DeviceError",
    "FlashformerError",
    "LoadError",
    "NumericalError",
    "Output",
    "Piece",
    "Plan",
    "ProgramError",
    "RequestError",
    "SamplingSettings",
    "Score",
    "Stream",
    "Timing",
    "TokenLogprobs",
    "UnavailableError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        value: object = getattr(import_module(".engine", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
