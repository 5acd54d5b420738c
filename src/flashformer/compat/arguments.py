"""Arguments as other projects name them: formats, and values that change nothing here."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import RequestError

# Their names for formats -> ours; every other name is passed on, and refused where it is none of ours.
DTYPES: Mapping[str, str] = {"float32": "f32", "float": "f32", "bfloat16": "bf16", "float16": "f16", "half": "f16"}


def dtype(name: str) -> str:
    return DTYPES.get(name, name)


def require_neutral(given: Mapping[str, object], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Raises RequestError for the first argument that is unknown, or not at a value that changes nothing.

    `neutral`: name -> the values that are accepted because they ask for nothing.
    """
    for name, value in given.items():
        if name not in neutral:
            raise RequestError(f"{name}={value!r}: no such argument here; leave it out")
        if not any(type(value) is type(allowed) and value == allowed for allowed in neutral[name]):
            allowed = " or ".join(map(repr, neutral[name]))
            raise RequestError(f"{name}={value!r}: not supported; expected {allowed}, or leave it out")
