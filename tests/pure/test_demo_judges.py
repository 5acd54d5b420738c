"""The judges of the demo model's samples, against cases decided by hand and by slower definitions."""

from __future__ import annotations

import ast
import random

import demo_corpus
import demo_judges
import pytest
from hypothesis import given
from hypothesis import strategies as st

STDLIB = [demo_corpus.stdlib() / name for name in ("textwrap.py", "heapq.py", "shlex.py", "sched.py")]


@pytest.mark.parametrize("path", STDLIB, ids=lambda p: p.name)
def test_real_code_cut_anywhere_parses(path):
    source = path.read_text()
    prompt = source[: source.index("\n", 200) + 1]
    first_code = len(ast.get_docstring(ast.parse(source), clean=False) or "") + 800
    cuts = random.Random(path.name).sample(range(first_code, len(source)), 60)
    broken = [cut for cut in cuts if not demo_judges.parses(prompt, source[len(prompt) : cut])]
    assert not broken


@pytest.mark.parametrize(
    ("prompt", "completion", "good"),
    [
        ("def ", "f(x):\n    return x\n", True),
        ("def ", "f(x):\n    return x\n\ndef g(", True),
        ("def ", "f(x):\n    y = (1,\n         2", True),
        ("def ", "f(x):\n    a = 1\n    y = (1,\n         2", True),
        ("def ", "f(x):\n    a = 1\n    y = (1,\n    return y\n    b = 2\n", False),
        ("def ", "f(x):\n    a = 1\n    try:\n        b = 2\n        c = ", True),
        ("def ", "f(x):\n    a = 1\n    @property\n    def g", True),
        ("def ", "f(x):\n    a = = 1\n    b = 2\n    c = 3", False),
        ("def ", "f(x):\n    a = 'open\n    b = 2\n    c = 3", False),
        ("def ", "f(x:", False),
        ("def ", "f(x,\n      y", False),  # one unfinished statement: nothing is left
        ("def ", 'f(x):\n    """Text that does not end\n    here', True),
        ("class ", "A:\n    x = 1\n    def f(self):\n        '''Open\n text", True),
        ("    for ", "i in x:\n        print(i)\n    if i", True),
        ("import ", "os\n  import sys\n", False),
        (
            "class ",
            "A:\n    y = B)\n    c.d(E, 1\n    z",
            False,
        ),  # closes what was not open, then leaves something open
    ],
)
def test_parses(prompt, completion, good):
    assert demo_judges.parses(prompt, completion) is good


def test_indentation():
    assert demo_judges.indents_consistently("", "if a:\n    b = (\n1)\n    c\n")
    assert demo_judges.indents_consistently("", "if a:\n    b = '''open\n c")
    assert not demo_judges.indents_consistently("", "if a:\n    b\n  c\n")
    assert not demo_judges.indents_consistently("", "if a:\n        b\n        if c:\n            d\n     e\n")


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 40), st.integers(0, 5))
def test_loops_are_found_and_only_they(start, period, repeats):
    ids = start + list(range(100, 100 + period)) * repeats
    by_definition = False
    for p in range(1, 33):
        n = max(48, 3 * p)
        by_definition |= len(ids) >= n and all(ids[-i] == ids[-i - p] for i in range(1, n - p + 1))
    assert demo_judges.loops(ids) == by_definition


def test_loops():
    assert demo_judges.loops([5, 6, 7] * 16)
    assert demo_judges.loops(list(range(40)) + [9] * 48)
    assert not demo_judges.loops(list(range(40)) + [9] * 47)
    assert not demo_judges.loops(list(range(33)) * 4)
    assert not demo_judges.loops([1] * 60 + [2])


@given(st.lists(st.text("ab\n", max_size=30), max_size=4), st.lists(st.text("ab\n", max_size=60), max_size=4))
def test_longest_copy_equals_brute_force(samples, texts):
    pieces = {s[i:j] for s in samples for i in range(len(s)) for j in range(i, len(s) + 1)}
    longest = max((len(p) for p in pieces if any(p in t for t in texts)), default=0)
    found = demo_judges.longest_copy(samples, texts)
    assert len(found) == longest
    assert not found or (any(found in s for s in samples) and any(found in t for t in texts))


def test_indented_prompts_get_a_block_of_their_own():
    assert ast.parse(demo_judges.as_module("    for ", "i in x:\n        pass\n"))
    assert demo_judges.as_module("def ", "f") == "def f"
