"""`flashformer chat` in a terminal, as a person uses it, and the demo model's chat template."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import record_chat
from folders import model_folder
from terminal import CTRL_C, CTRL_D, PASTE, PASTED, screen
from transformers import AutoTokenizer

import flashformer as ff
from flashformer.checkpoint.resolve import DEMO

PROMPT, MORE, STATS = record_chat.PROMPT, record_chat.MORE, record_chat.STATS
FIRST, N_TOKENS = "class Stack:", 150
Steps = list[tuple[str, str]]


def talk(
    *steps: tuple[str, str], model: str | Path = "demo", options: tuple[str, ...] = ("-n", "40")
) -> tuple[str, int]:
    """What the terminal shows in the end, and the exit code. A step: what to wait for, what to type then."""
    raw, code = record_chat.record(("chat", str(model), *options), steps)
    return screen(raw), code


def saved(path: Path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text())]


@pytest.fixture(scope="module")
def answer() -> str:
    """To FIRST, uninterrupted: seconds of the slowed model."""
    with ff.load("demo") as llm:
        return llm.chat([{"role": "user", "content": FIRST}], max_tokens=N_TOKENS).text


def test_ctrl_c_stops_the_answer_and_its_beginning_stays(tmp_path: Path, answer: str) -> None:
    begin = answer.split()[0]
    shown, code = talk(
        (PROMPT, f"{FIRST}\n"),
        (begin, CTRL_C),
        (STATS, ""),
        (PROMPT, "def pop(self):\n"),
        (STATS, ""),
        (PROMPT, f"/save {tmp_path}/talk.json\n"),
        (PROMPT, CTRL_D),
        options=("-n", str(N_TOKENS)),
    )
    assert code == 0
    user, partial, second, rest = saved(tmp_path / "talk.json")
    assert (user, second) == (FIRST, "def pop(self):")
    assert begin in partial
    assert answer.startswith(partial)
    assert len(partial) < len(answer)
    assert rest
    stats = [line for line in shown.splitlines() if STATS in line]
    assert [line.endswith("| interrupted") for line in stats] == [True, False]
    assert [int(n) > 4 for n in re.findall(r"\((\d+) cached\)", shown)] == [False, True]


LEAVING: list[tuple[str, Steps, int]] = [
    ("Ctrl-D", [(PROMPT, CTRL_D)], 0),
    ("/exit", [(PROMPT, "/exit\n")], 0),
    ("Ctrl-C twice", [(PROMPT, CTRL_C), ("Ctrl-C again", ""), (PROMPT, CTRL_C)], 130),
    ("Ctrl-C once", [(PROMPT, "thrown away"), ("away", CTRL_C), ("Ctrl-C again", ""), (PROMPT, CTRL_D)], 0),
    ("Ctrl-C in an answer, then once", [(PROMPT, "import \n"), ("\n", CTRL_C), (STATS, ""), (PROMPT, CTRL_C)], 130),
    (
        "a line between",
        [(PROMPT, CTRL_C), (PROMPT, "/stats\n"), ("peak", ""), (PROMPT, CTRL_C), ("again", ""), (PROMPT, CTRL_D)],
        0,
    ),
]


@pytest.mark.parametrize(("steps", "code"), [case[1:] for case in LEAVING], ids=[case[0] for case in LEAVING])
def test_how_to_leave(steps: Steps, code: int) -> None:
    shown, found = talk(*steps, options=("-n", "400", "--ignore-eos"))
    assert found == code
    assert "Traceback" not in shown
    assert "Aborted" not in shown


def test_messages_of_several_lines_typed_and_pasted(tmp_path: Path) -> None:
    shown, code = talk(
        (PROMPT, "def first(items):\\\n"),
        (MORE, "    # of all\n"),
        (STATS, ""),
        (PROMPT, '"""\n'),
        (MORE, "class Stack:\n"),
        (MORE, '    """Items."""\n'),
        (MORE, '"""\n'),
        (STATS, ""),
        (PROMPT, f"{PASTE}def f():\n  x = 1\n{PASTED}"),
        ("x = 1", "\n"),
        (STATS, ""),
        (PROMPT, f"/save {tmp_path}/talk.json\n"),
        (PROMPT, CTRL_D),
        options=("-n", "3"),
    )
    assert code == 0
    messages = ["def first(items):\n    # of all", 'class Stack:\n    """Items."""', "def f():\n  x = 1\n"]
    assert saved(tmp_path / "talk.json")[::2] == messages
    assert f"{PROMPT}def first(items):\\\n{MORE}    # of all\n" in shown


def test_retry_and_what_is_wrong_keep_the_conversation(tmp_path: Path) -> None:
    shown, code = talk(
        (PROMPT, "import \n"),
        (STATS, ""),
        (PROMPT, f"/save {tmp_path}/first.json\n"),
        (PROMPT, "/retry\n"),
        (STATS, ""),
        (PROMPT, f"/save {tmp_path}/again.json\n"),
        (PROMPT, "/frobnicate\n"),
        (PROMPT, f"{'x ' * 400}\n"),
        ("/clear begins", ""),
        (PROMPT, f"/save {tmp_path}/after.json\n"),
        (PROMPT, CTRL_D),
        options=("-n", "9", "--temp", "1", "--seed", "1", "--ctx", "300"),
    )
    assert code == 0
    assert "/frobnicate: no such command" in shown
    first, again, after = (saved(tmp_path / f"{name}.json") for name in ("first", "again", "after"))
    assert [len(texts) for texts in (first, again)] == [2, 2]
    assert first[0] == again[0]
    assert first[1] != again[1]
    assert after == again


def test_a_template_that_refuses_is_shown_and_the_chat_goes_on(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "model")
    template = folder / "chat_template.jinja"
    refusal = "{% if messages|length == 1 and messages[0].content == 'no' %}{{ raise_exception('not so') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    shown, code = talk(
        (PROMPT, "no\n"),
        ("the chat template refuses this conversation: not so", ""),
        (PROMPT, "import \n"),
        (STATS, ""),
        (PROMPT, CTRL_D),
        model=folder,
    )
    assert code == 0
    assert "(0 cached)" in shown


def test_a_model_without_a_template_exits_2(tmp_path: Path) -> None:
    shown, code = talk(model=model_folder(tmp_path))
    assert code == 2
    assert "no default chat template" in shown
    assert "chat_template.jinja" in shown
    assert "Traceback" not in shown


def test_a_pipe_gets_nothing_but_answers() -> None:
    with ff.load("demo") as llm:
        messages = [{"role": "user", "content": "import "}]
        first = llm.chat(messages, max_tokens=9)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "def f():"}]
        second = llm.chat(messages, max_tokens=9)
    command = [sys.executable, "-m", "flashformer.cli", "chat", "demo", "-n", "9"]
    done = subprocess.run(command, input="import \ndef f():\n", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
    assert done.stdout == "".join(text + "\n" * (not text.endswith("\n")) for text in (first.text, second.text))
    cached = [int(n) for n in re.findall(r"\((\d+) cached\)", done.stderr)]
    assert cached == [0, second.cached_tokens]
    assert cached[1] > 0


def test_an_interrupt_ends_a_script() -> None:
    code = record_chat.SLOWED.replace("time.sleep(0.03)", "os.kill(os.getpid(), signal.SIGINT)")
    command = [sys.executable, "-c", f"import os, signal\n{code}", "chat", "demo"]
    done = subprocess.run(command, input="import \nimport \n", capture_output=True, text=True, timeout=100)
    assert done.returncode == 130
    assert done.stderr.count(STATS) <= 1
    assert "Traceback" not in done.stderr


# ---- the demo's template


def test_the_demo_joins_messages_to_one_growing_file() -> None:
    chat = [
        {"role": "system", "content": "import os"},
        {"role": "user", "content": "def f(x):"},
        {"role": "assistant", "content": "    return x"},
        {"role": "user", "content": "<|eos|>"},
    ]
    with ff.load("demo") as llm:
        text = llm.tokenizer.render_chat(chat)
        ids = llm.tokenizer.encode_chat(chat)
        shorter = llm.tokenizer.encode_chat(chat[:2])
    assert text == "<|bos|>import os\ndef f(x):\n    return x\n\n<|eos|>\n"
    assert text == AutoTokenizer.from_pretrained(DEMO).apply_chat_template(chat, tokenize=False)
    assert ids[: len(shorter)] == shorter
    assert (ids.count(0), ids.count(1)) == (1, 0)


def test_the_page_shows_what_is_typed() -> None:
    page = record_chat.PAGE.read_text()
    assert record_chat.typed(record_chat.ARGUMENTS) in page
    typed = [keys for _, keys in record_chat.STEPS if keys.endswith("\n")]
    assert typed
    assert all(keys in page for keys in typed)
    assert page.count("cached)") == sum(awaited == STATS for awaited, _ in record_chat.STEPS)
    assert "| interrupted" in page
