"""Conversations and chat templates: those of the fuzz corpus are in the manner of well-known models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "fuzz" / "corpus" / "template"
SOURCES = {path.stem: path.read_text() for path in sorted(CORPUS.glob("*.jinja"))}


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "n": [1, 2.5, None, True]}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [message("user", "hello")],
    "turns": [
        message("user", " What?\n"),
        message("assistant", "This.\n\n"),
        message("user", "日本語 🙂👩‍👩‍👧 e\u0301"),
    ],
    "system": [message("system", "Be brief."), message("user", "a < b && c > d 'x' \"y\"")],
    "empty": [message("user", ""), message("assistant", ""), message("user", "  ")],
    "none": [message("user", "x"), message("assistant", None, tool_calls=None), message("user", "y")],
    "tools": [
        message("user", "weather?"),
        message("assistant", "", tool_calls=[CALL, CALL]),
        message("tool", '{"t": 3}', name="weather"),
        message("tool", "<b>4</b>"),
        message("assistant", "three"),
        message("user", "thanks"),
    ],
    "thinking": [
        message("user", "1+1"),
        message("assistant", "<think>\nadd\n</think>\n\n2"),
        message("user", "2+2"),
        message("assistant", "4", reasoning="more"),
    ],
    "parts": [message("user", [{"type": "text", "text": "see"}, {"type": "image"}, {"type": "text", "text": "?"}])],
    "wrong order": [message("assistant", "x"), message("assistant", "y")],
    "odd role": [message("developer", "x"), message("ipython", "y")],
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
