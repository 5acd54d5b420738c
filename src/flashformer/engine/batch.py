"""Which rows make up a forward, and what becomes of its results.

All sequences on their way share every forward: those that decode have a row each, and prompts fill what is left. There
is no thread for this. Whoever needs a token takes the turn and runs a forward for all; the others find their tokens
made when they come, at most AHEAD of them before they were asked for. What a sequence gets does not depend on the
others, and a forward whose results were not noted, because an interrupt came, is simply run again.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from collections.abc import Sequence as List
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Kernel, Want
from ..errors import DeviceError, FlashformerError, NumericalError
from .adjust import Adjustments
from .request import Request
from .slots import Slot, Turns

AHEAD = 4  # tokens that are made before they are asked for
MIXED_ROWS = 8  # of prompts in a forward in which others decode: more would keep these waiting


def deal(left: List[int], n_rows: int, chunk: int) -> list[int]:
    """Rows in the next forward for each sequence, of `left` prompt tokens, or 0 where it decodes.

    Those that decode have one each. Prompts are served in their order, with `chunk` rows together, MIXED_ROWS where
    somebody decodes; there are `n_rows` in all.
    """
    n_decoding = sum(n == 0 for n in left)
    room = min(chunk, n_rows - n_decoding, *([MIXED_ROWS] if n_decoding else []))
    counts = []
    for n in left:
        count = min(n, room) if n else 1
        room -= count if n else 0
        counts.append(count)
    return counts


class Sequence:
    """A request in its slot: the tokens that were made, and how far its prompt was run.

    Changed by whoever has the turn, but `asked`, `over` and what is read from `made`, by its own thread.
    """

    __slots__ = (
        "__weakref__", "asked", "changes", "error", "held", "logits", "made", "n_noted", "n_run", "over", "request",
        "slot", "took_ns", "wanted",
    )  # fmt: skip

    def __init__(self, kernel: Kernel, slot: Slot, request: Request) -> None:
        self.slot, self.held, self.request = slot, slot.held, request
        self.n_run = slot.n  # tokens of the prompt whose keys and values are there, while no token was made
        self.made: list[int] = []
        self.took_ns: list[int] = []  # by the forward of each token
        self.asked = 0  # tokens that the caller has or waits for
        self.over = False
        self.error: FlashformerError | None = None
        self.logits: NDArray[np.float32] | None = None  # those that the last token was chosen from, where asked for
        if request.logprobs is not None:
            self.logits = np.empty(kernel.program.spec.vocab_size, np.float32)
        self.wanted = Want.TOKEN if self.logits is None else Want.LOGITS
        self.n_noted = 0
        adjusted = request.repeat_penalty != 1 or len(request.logit_bias) > 0
        penalty, bias = request.repeat_penalty, request.logit_bias
        self.changes = Adjustments(kernel.rows, slot, request.ids, penalty, bias) if adjusted else None

    @property
    def left(self) -> int:
        """Tokens of the prompt that were not run."""
        return 0 if self.made else len(self.request.ids) - self.n_run

    @property
    def has_ended(self) -> bool:
        made, request = self.made, self.request
        if not made:
            return request.max_tokens == 0 and not self.left
        return len(made) >= request.max_tokens or made[-1] in request.stop_ids

    @property
    def waits(self) -> bool:
        """Whether what its caller asked for is not there: a token, or, where none was asked for, the whole prompt."""
        return len(self.made) < self.asked or (self.asked == 0 and self.left > 0)

    @property
    def can_go_on(self) -> bool:
        if self.over or self.error is not None or self.has_ended:
            return False
        return self.left > 0 or len(self.made) < self.asked + (AHEAD if self.logits is None else 0)

    @property
    def pos(self) -> int:
        """Of its next row."""
        return len(self.request.ids) + len(self.made) - 1 if self.made else self.n_run


class Part(NamedTuple):
    """`n` rows of a sequence, from `row` on."""

    sequence: Sequence
    row: int
    n: int

    @property
    def makes_token(self) -> bool:
        return self.n >= self.sequence.left and self.sequence.request.max_tokens > 0


class Batch:
    """The sequences of one kernel. `step` is for whoever has the turn."""

    def __init__(self, kernel: Kernel, turns: Turns, chunk: int) -> None:
        self._kernel, self._turns, self._chunk = kernel, turns, chunk
        self._sequences: list[weakref.ref[Sequence]] = []  # in the order of their arrival

    def sequence(self, slot: Slot, request: Request) -> Sequence:
        return Sequence(self._kernel, slot, request)

    def tokens(self, sequence: Sequence) -> Generator[tuple[int, int], None, None]:
        """The tokens of a sequence and what each took in ns, waiting for it included; (-1, 0) after a forward that made
        none, as all of a sequence do that makes no tokens: a place to stop. Closing it between two ends the sequence.
        Raises what `Kernel.forward` and `Turns.take` raise.
        """
        made, clock = sequence.made, perf_counter_ns
        self._sequences.append(weakref.ref(sequence))
        try:
            while sequence.request.max_tokens == 0 and sequence.waits:
                self._wait(sequence)
                yield -1, 0
            for i in range(sequence.request.max_tokens):
                sequence.asked, begin, waited = i + 1, clock(), False
                while sequence.waits:
                    waited = True
                    self._wait(sequence)
                    if sequence.waits:
                        yield -1, 0
                yield made[i], clock() - begin if waited else sequence.took_ns[i]
                if made[i] in sequence.request.stop_ids:
                    return
        finally:
            sequence.over = True

    def _wait(self, sequence: Sequence) -> None:
        """For one forward at most."""
        self._turns.take(self._advance, sequence)
        if sequence.error is not None:
            raise sequence.error

    def _advance(self, sequence: Sequence) -> None:
        if sequence.waits and sequence.error is None:
            self.step()

    def step(self) -> None:
        """One forward of all sequences that can go on."""
        ready = []
        for ref in self._sequences[:]:
            one = ref()
            if one is None or one.over:
                self._sequences.remove(ref)
            elif one.can_go_on and self._is_sound(one):
                ready.append(one)
        counts = deal([one.left for one in ready], self._kernel.program.target.rows, self._chunk)
        chosen = sorted(zip(ready, counts, strict=True), key=lambda pair: pair[0].slot.index)
        parts, row = [], 0
        for one, count in chosen:
            if count:
                parts.append(Part(one, row, count))
                row += count
        if parts:
            self._run(parts, row)

    def _is_sound(self, sequence: Sequence) -> bool:
        """Whether its slot still holds what was run."""
        if sequence.slot.held is sequence.held and sequence.held.n >= sequence.pos:
            return True
        sequence.error = DeviceError("something else wrote to the cache of this request (`forget`): ask again")
        return False

    def _run(self, parts: list[Part], n_rows: int) -> None:
        begin = perf_counter_ns()
        for part in parts:
            self._put(part)
        try:
            self._kernel.forward(n_rows, self._stops(parts))
        except NumericalError as error:
            if len(parts) > 1:  # one of them is to blame, the others go on
                for part in parts:
                    self._run([part._replace(row=0)], part.n)
            else:
                parts[0].sequence.error = error
            return
        except FlashformerError as error:
            for part in parts:
                part.sequence.error = error
            return
        took, head = perf_counter_ns() - begin, 0
        for part in parts:
            head += self._note(part, head, took)

    def _put(self, part: Part) -> None:
        """The rows of a part, and how the token of the last is chosen."""
        sequence, row, count = part
        rows, request, pos = self._kernel.rows, sequence.request, sequence.pos
        if sequence.made:
            rows.token[row], rows.slot[row], rows.pos[row] = sequence.made[-1], sequence.slot.index, pos
        else:
            at = slice(row, row + count)
            rows.token[at], rows.slot[at] = request.ids[pos : pos + count], sequence.slot.index
            rows.pos[at], rows.want[at] = np.arange(pos, pos + count), Want.NOTHING
            if not part.makes_token:
                return
        last, changes = row + count - 1, sequence.changes
        rows.want[last], rows.temperature[last], rows.top_k[last] = sequence.wanted, request.temperature, request.top_k
        rows.top_p[last], rows.min_p[last], rows.seed[last] = request.top_p, request.min_p, request.seed
        rows.choice[last], rows.adjust_begin[last], rows.adjust_end[last] = 0, 0, 0
        if changes is not None:
            for token in sequence.made[sequence.n_noted :]:
                changes.note(token)
            sequence.n_noted = len(sequence.made)
            rows.adjust_begin[last], rows.adjust_end[last] = changes.begin, changes.end

    def _stops(self, parts: list[Part]) -> tuple[int, ...] | None:
        """For Kernel.forward: the same rows will run again unless one of these tokens is made."""
        stops: set[int] = set()
        for sequence, _, _ in parts:
            goes_on = bool(sequence.made) and len(sequence.made) + 1 < sequence.request.max_tokens
            if not goes_on or sequence.changes is not None or sequence.logits is not None:
                return None
            stops.update(sequence.request.stop_ids)
        return tuple(stops)

    def _note(self, part: Part, head: int, took_ns: int) -> int:
        """What a forward made of a part, with the `head`-th result if it has one: 1 if so. May be cut off anywhere."""
        sequence, _, count = part
        held, pos, makes_token = sequence.held, sequence.pos, part.makes_token
        held.ids[pos : pos + count] = self._kernel.rows.token[part.row : part.row + count]
        held.n = pos + count
        if not makes_token:
            sequence.n_run = held.n
            return 0
        if sequence.logits is not None:
            sequence.logits[:] = self._kernel.logits[head]
        sequence.took_ns[len(sequence.made) :] = [took_ns]
        sequence.made.append(self._kernel.tokens.item(head))
        return 1
