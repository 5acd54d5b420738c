"""Stop strings, found in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Gives out the text before the first stop string, and never a character of one that ends it.

    The first stop string to be complete wins; of those complete at the same character, the longest. So the cut does
    not depend on how the text was split into pieces. Text that may be the beginning of a stop string is held back.
    Knuth, Morris and Pratt: per character, `_matched` is how much of each stop string the text so far ends with.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]  # no stop is empty
        self._firsts = tuple({stop[0] for stop in stops})
        self._matched = [0] * len(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to give out, the stop string that was found): after one is found, nothing may follow."""
        if not self._held and not any(first in text for first in self._firsts):
            return text, None  # nothing begins in it, which is the ordinary case
        held, matched = self._held + text, self._matched
        for end in range(len(held) - len(text) + 1, len(held) + 1):
            found = ""
            for i, (stop, borders) in enumerate(self._stops):
                matched[i] = _advance(stop, borders, matched[i], held[end - 1])
                if matched[i] == len(stop) > len(found):
                    found = stop
            if found:
                self._held = ""
                return held[: end - len(found)], found
        safe = len(held) - max(matched, default=0)
        self._held = held[safe:]
        return held[:safe], None

    def rest(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For every n > 0, the length of the longest proper prefix of stop[:n] that also ends it; [0] is unused."""
    borders = [0, 0]
    for char in stop[1:]:
        borders.append(_advance(stop, borders, borders[-1], char))
    return borders


def _advance(stop: str, borders: list[int], n: int, char: str) -> int:
    """How much of `stop` a text ends with that ended with stop[:n] before `char`."""
    while n and stop[n] != char:
        n = borders[n]
    return n + (stop[n] == char)
