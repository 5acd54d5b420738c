"""Values in messages, and lists of prompts: as much is looked at as is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashformer import RequestError
from flashformer.engine.request import is_batch, shown

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.text() | st.text("'\"\\a", max_size=90)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=30,
)


@given(VALUES)
def test_values_are_shown_as_python_shows_them(value: Any) -> None:
    due = repr(value)
    assert shown(value) == (due if len(due) <= 80 else due[:77] + "...")


def test_quotes_far_behind_decide_as_in_python() -> None:
    for text in ("a" * 200, "a" * 200 + "'", "a" * 200 + "'\"", "'" + "a" * 200, "\\" * 100, "\0" * 100):
        assert shown(text) == repr(text)[:77] + "..."
        assert shown([text, text]) == repr([text, text])[:77] + "..."


class Looked:
    """Counts how often it is shown."""

    n = 0

    def __repr__(self) -> str:
        Looked.n += 1
        return "item"


MAKE = [list, tuple, lambda items: dict(enumerate(items)), lambda items: [[i] for i in items]]


@pytest.mark.parametrize("make", MAKE, ids=["list", "tuple", "dict", "lists"])
def test_no_more_is_looked_at_than_is_shown(make: Callable[[list[Looked]], Any]) -> None:
    Looked.n = 0
    text = shown(make([Looked() for _ in range(10_000)]))
    assert len(text) == 80
    assert 5 <= Looked.n <= 20
    endless: list[Any] = []
    endless.append(endless)
    assert shown(endless) == "[" * 77 + "..."


def n_opcodes(call: Callable[[], object]) -> int:
    """How many Python executes."""
    n = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal n
        frame.f_trace_opcodes = True
        n += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return n


def test_a_list_of_many_ids_is_one_prompt_after_few_steps() -> None:
    few, many = ([1] * n for n in (10, 10_000))
    n = n_opcodes(lambda: is_batch(few))
    assert n > 10
    assert n_opcodes(lambda: is_batch(many)) < n + 100


@given(st.lists(st.sampled_from([1, True, None, 1.5, "a", [1], (1,), np.int32(1), np.ones(2)]), min_size=1))
def test_prompts_are_all_lists_or_all_ids(prompt: list[Any]) -> None:
    nested = [isinstance(p, str | list | tuple | np.ndarray) for p in prompt]
    if all(nested) or not any(nested):
        assert is_batch(prompt) == is_batch(tuple(prompt)) == nested[0]
    else:
        with pytest.raises(RequestError, match="mixed"):
            is_batch(prompt)
