"""`flashformer chat` over the reference backend, its messages from stdin: what it asks the model and what it prints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import model_folder
from typer.testing import CliRunner, Result

import flashformer as ff
from flashformer.backends.base import Kernel
from flashformer.backends.reference import ReferenceKernel
from flashformer.cli import progress
from flashformer.cli.app import app
from flashformer.cli.reader import read_message

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
)
SHORT = ("-n", "5", "--ignore-eos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=300)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return path


@pytest.fixture(autouse=True)
def on_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_kernel(checked, weights, **_: object) -> Kernel:
        return ReferenceKernel(checked, weights)

    monkeypatch.setattr("flashformer.engine.engine.load_kernel", load_kernel)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[ff.LLM]:
    with ff.load(folder, device="reference") as loaded:
        yield loaded


def chat(folder: Path, typed: str | bytes, *args: str) -> Result:
    return CliRunner().invoke(app, ["chat", str(folder), *SHORT, *args], input=typed)


def said(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of the user, then of the assistant, in turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(llm: ff.LLM, messages: list[dict[str, str]], seed: int | None = None) -> str:
    heat = {} if seed is None else {"seed": seed, "temperature": 1.5}
    return llm.chat(messages, max_tokens=5, ignore_eos=True, **heat).text  # type: ignore[arg-type]


def lines(*answers: str) -> str:
    return "".join(text if text.endswith("\n") else text + "\n" for text in answers)


def test_every_line_is_a_message_and_answers_stay_in_the_history(folder: Path, llm: ff.LLM) -> None:
    result = chat(folder, "hello\n\nmore\n")
    first = answer(llm, said("hello"))
    second = answer(llm, said("hello", first, "more"))
    assert first != second
    assert result.exit_code == 0
    assert result.stdout_bytes.decode() == lines(first, second)
    assert [line for line in result.stderr.splitlines() if line.startswith(">>>")] == [
        ">>> hello", ">>> ", ">>> more", ">>> ",
    ]  # fmt: skip
    assert "(0 cached)" in result.stderr
    assert "cut at -n 5" in result.stderr


def test_the_second_turn_finds_the_first_in_the_cache(folder: Path) -> None:
    first, second = map(json.loads, chat(folder, "hello\nmore\n", "--json").stdout.splitlines())
    assert first["cached_tokens"] == 0
    assert len(first["prompt_token_ids"]) <= second["cached_tokens"] < len(second["prompt_token_ids"])


def test_quiet_leaves_only_the_answers(folder: Path, llm: ff.LLM) -> None:
    result = chat(folder, "hello", "--quiet")
    assert (result.stdout_bytes.decode(), result.stderr) == (lines(answer(llm, said("hello"))), "")


def test_system_messages(folder: Path, llm: ff.LLM) -> None:
    asked = chat(folder, "a\n/clear\n/system loud\na\n/clear\n/system\na\n", "--system", "be brief", "--quiet")
    expected = [answer(llm, said("a", system=system)) for system in ("be brief", "loud", None)]
    assert len(set(expected)) == 3
    assert asked.stdout_bytes.decode() == lines(*expected)


def test_retry_takes_another_seed_for_the_same_message(folder: Path, llm: ff.LLM) -> None:
    result = chat(folder, "a\n/retry\n/retry\nb\n", "--seed", "7", "--temp", "1.5", "--quiet")
    tries = [answer(llm, said("a"), seed) for seed in (7, 8, 9)]
    assert len(set(tries)) == 3
    assert result.stdout_bytes.decode() == lines(*tries, answer(llm, said("a", tries[-1], "b"), 7))


def test_save_writes_messages_that_chat_takes(folder: Path, llm: ff.LLM, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    result = chat(folder, f"zwölf\n/save {file}\n", "--system", "s")
    assert result.exit_code == 0
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert messages == said("zwölf", answer(llm, said("zwölf", system="s")), system="s")
    again = chat(folder, f"a\n/save {file}\n")
    assert again.exit_code == 2
    assert f"/save {file}: the file exists; give another name" in again.stderr
    assert json.loads(file.read_text(encoding="utf-8")) == messages


def test_what_cannot_be_saved_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    """The disk is full, which a limit on the size of files stands for."""
    file = tmp_path / "talk.json"
    code = (
        "import resource, signal; from flashformer.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))\n"
        "main()"
    )
    words = [sys.executable, "-c", code, "chat", str(folder), "-n", "2"]
    made = subprocess.run(words, input=f"a\n/save {file}\n", capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert f"/save {file}: File too large" in made.stderr
    assert not file.exists()


def test_an_error_after_some_text_begins_a_line(folder: Path, llm: ff.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, left = ReferenceKernel.forward, iter([True, True, True])

    def fail(self: ReferenceKernel, n_rows: int, again: tuple[int, ...] | None = None) -> None:
        if not next(left, False):
            raise ff.NumericalError("NaN in layer 1", 1)
        forward(self, n_rows)

    text = answer(llm, said("hello"))
    monkeypatch.setattr(ReferenceKernel, "forward", fail)
    result = chat(folder, "hello\n")
    printed = result.stdout_bytes.decode()
    assert result.exit_code == 2
    assert text.startswith(printed.removesuffix("\n"))
    assert printed.endswith("\n")


def test_lines_that_are_no_commands(folder: Path, llm: ff.LLM) -> None:
    result = chat(folder, '"""\n/clear\n1\n"""\n /exit\n', "--quiet")
    first = answer(llm, said("/clear\n1"))
    assert result.stdout_bytes.decode() == lines(first, answer(llm, said("/clear\n1", first, " /exit")))


def test_leaving_help_and_stats(folder: Path) -> None:
    for word in ("/exit", "/bye", "/quit"):
        assert chat(folder, f"{word}\nnot asked\n").stdout == ""
    shown = chat(folder, "a\nb\n/help\n/stats\n").stderr
    assert all(name in shown for name in ("/help", "/clear", "/system TEXT", "/retry", "/save FILE", "/stats", "/exit"))
    assert "2 answers: 10 tokens" in shown


REFUSED = [
    ("refuse\n", "the chat template refuses this conversation: not this"),
    ("/frobnicate now\n", "/frobnicate: no such command; /help"),
    ("/clear all\n", "'all'"),
    ("/save\n", "/save needs the name of a file"),
    ("/retry\n", "there is no answer yet"),
    (f"{'x' * 400}\n", "/clear begins a new conversation"),
    (b"ab\xff\n", "byte 2 of a line is not UTF-8"),
]


@pytest.mark.parametrize(("typed", "named"), REFUSED, ids=[named[:40] for _, named in REFUSED])
def test_a_script_ends_with_the_first_thing_that_is_wrong(folder: Path, typed: str | bytes, named: str) -> None:
    result = chat(folder, (typed if isinstance(typed, bytes) else typed.encode()) + b"hello\n")
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_full_context_says_both_numbers_and_what_to_do(folder: Path, llm: ff.LLM) -> None:
    result = chat(folder, f"hello\n{'x' * 80}\n", "--ctx", "64")
    n = len(llm.tokenizer.encode_chat(said("hello", answer(llm, said("hello")), "x" * 80)))
    assert result.exit_code == 2
    assert f"has {n} tokens, and 64 positions" in result.stderr
    assert "larger --ctx" in result.stderr
    near = chat(folder, "x" * 48, "--ctx", "60", "-n", "50")
    assert near.exit_code == 0
    assert "context 60 of 60 | context full" in near.stderr


def test_a_model_without_a_template_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashformer.engine.engine.load_kernel", None)
    result = chat(model_folder(tmp_path), "hello\n")
    assert result.exit_code == 2
    assert "no default chat template" in result.stderr
    assert chat(Path("shape:smollm2-135m"), "hello\n").exit_code == 2


def test_text_that_spells_a_special_token_stays_text(folder: Path, llm: ff.LLM) -> None:
    made = json.loads(chat(folder, "<s>hi</s>\n", "--json").stdout)
    ids = made["prompt_token_ids"]
    assert ids.count(llm.spec.bos_id) == 1
    assert ids[0] == llm.spec.bos_id
    assert not set(llm.spec.eos_ids) & set(ids)


# ---- what a message is

MESSAGES = [
    ("one\n", ["one"]),
    ("a\\\nb\\\n c\nd\n", ["a\nb\n c", "d"]),
    ('"""\na\n\n  b"""\n"""\nc\n', ['a\n\n  b"""', "c"]),
    ('"""a\nb"""\nc\n', ["a\nb", "c"]),
    ('"""a"""\nb\n', ["a", "b"]),
    ('"""\n"""\nb\n', ["", "b"]),
    ('x = """\n', ['x = """']),
    ("a\\\n", ["a"]),
    ('"""\na\\\n', ["a\\"]),
    ('"""a\n', ["a"]),
    ("", []),
]


@pytest.mark.parametrize(("typed", "messages"), MESSAGES, ids=[repr(typed) for typed, _ in MESSAGES])
def test_messages_of_several_lines(typed: str, messages: list[str]) -> None:
    source = iter(typed.splitlines())
    found = []
    while (message := read_message(lambda prompt: next(source, None))) is not None:
        found.append(message)
    assert found == messages


# ---- the bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, *, quiet: bool = False) -> str:
    monkeypatch.setattr("sys.stderr", stderr)
    with progress.loading_bar(quiet) as update:
        for done in (0, 1 << 20, 2 << 20):
            if update is not None:
                update("packing", done, 2 << 20)
    return stderr.getvalue()


def test_a_long_load_has_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", -1.0)
    assert "packing" in show(monkeypatch, Screen())
    assert show(monkeypatch, Screen(), quiet=True) == ""
    assert show(monkeypatch, io.StringIO()) == ""
    monkeypatch.setattr(progress, "PATIENCE_S", 1e9)
    assert show(monkeypatch, Screen()) == ""
