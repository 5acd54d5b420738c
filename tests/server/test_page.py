"""The chat page, as people use it: with a mouse, at a keyboard, on a phone, with a screen reader."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from browsing import NAMES, PHONE, Visit, browser_path, browsing, contrasts, delta, scripted, too_wide, visiting
from playwright.sync_api import Browser, expect
from serving import CHAT, COMPLETIONS, LONG, NAME, PROMPT, Gate, Running, running, sent, stop
from threads import until

import flashformer as ff
from flashformer.server.service import State

KEY = "s3cret-key"
HOSTILE = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script><b>&lt;"


def load_demo() -> ff.LLM:
    """Its answers can be read, so that what the page shows is compared to the letter."""
    return ff.load("demo", device="cpu", threads=1, streams=2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def llm() -> Iterator[ff.LLM]:
    with load_demo() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def here(llm: ff.LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(llm, tmp_path_factory.mktemp("at")) as server:
        yield server


@pytest.fixture
def visit(browser: Browser, here: Running, gate: Gate) -> Iterator[Visit]:
    with visiting(browser, here) as found:
        yield found
    gate.open()
    here.idle()


def test_a_missing_browser_is_skipped_but_not_by_ci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for ci, outcome in (("true", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match="apt-get install chromium"):
            browser_path()
    (tmp_path / NAMES[-1]).touch(0o755)
    assert browser_path() == str(tmp_path / NAMES[-1])


# ---- an answer ------------------------------------------------------------------------------------------------------


def test_an_answer_streams_with_its_speed(visit: Visit, llm: ff.LLM, gate: Gate) -> None:
    expected = llm.chat(CHAT)
    llm.forget()
    expect(visit.page).to_have_title(f"{NAME} - flashformer")
    gate.shut()
    visit.say(PROMPT)
    expect(visit.heard).to_have_text("Sent.")
    expect(visit.button("Stop")).to_be_visible()
    expect(visit.note).to_have_text("Waiting for the first token")
    gate.let(10)
    part = visit.some_text()
    assert part != expected.text
    assert expected.text.startswith(part)
    gate.let(20)
    expect(visit.note).to_have_text(re.compile(r"^[\d.]+\stokens/s,\s[\d.]+\sGB/s,\sweights\sfit\sin\scache$"))
    gate.open()
    visit.page.wait_for_function("text => document.querySelector('#heard').textContent === text", arg=expected.text)
    visit.ended(expected.text)
    expect(visit.note).to_have_text(re.compile(r"^ended\sat\sthe\slength\slimit,\s256\stokens,.*\sfit\sin\scache$"))
    assert visit.errors == []


def test_speed_stands_beside_the_measured_bandwidth(visit: Visit) -> None:
    usage = {"prompt_tokens": 23, "completion_tokens": 128}
    timings = {"tok_s": 118.44, "gb_s": 31.2, "measured_gb_s": 33.9, "cached_tokens": 3}
    events = [delta("a"), delta("b", timings={"tok_s": 1.0}), delta(finish_reason="stop")]
    scripted(visit, *events, {"choices": [], "usage": usage, "timings": timings})
    visit.say(PROMPT)
    visit.ended("ab")
    expect(visit.note).to_have_text(
        "128 tokens, 118 tokens/s, 31.2 GB/s, 92% of measured bandwidth, 3 of 23 prompt tokens cached"
    )
    bar = visit.note.locator(".share")
    expect(bar).to_be_visible()
    assert bar.evaluate("bar => bar.style.getPropertyValue('--part')") == "92%"


def test_the_next_message_carries_the_conversation(visit: Visit, llm: ff.LLM) -> None:
    seed = 2**64 - 1  # more than a number of JavaScript holds
    visit.settings.click()
    for label, text in (("System prompt", "import re"), ("Max tokens", 12), ("Temperature", 0), ("Seed", seed)):
        visit.page.get_by_label(label).fill(str(text))
    first = [{"role": "system", "content": "import re"}, *CHAT]
    answer = llm.chat(first, max_tokens=12, temperature=0).text
    visit.say(PROMPT)
    visit.ended(answer)
    visit.say("def g")
    expect(visit.turns).to_have_count(2)
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "def g"}]
    visit.ended(llm.chat(second, max_tokens=12, temperature=0).text)
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    fields |= {"temperature": 0, "max_tokens": 12, "seed": seed}
    assert visit.bodies == [{**fields, "messages": first}, {**fields, "messages": second}]
    cached = re.search(r"(\d+) of (\d+) prompt tokens cached", (visit.note.text_content() or "").replace("\xa0", " "))
    assert cached
    n_first, n_second = len(llm.chat_ids(first)), len(llm.chat_ids(second))
    assert int(cached[2]) == n_second
    assert n_first < int(cached[1]) < n_second
    visit.button("New chat").click()
    expect(visit.turns).to_have_count(0)
    visit.say(PROMPT)
    visit.ended(answer)
    assert visit.bodies[2]["messages"] == first


def test_what_a_model_says_is_text(browser: Browser, llm: ff.LLM, tmp_path: Path) -> None:
    with running(llm, tmp_path, model_name=HOSTILE) as here, visiting(browser, here) as visit:
        expect(visit.page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
        scripted(visit, delta(HOSTILE), {"error": {"message": HOSTILE, "code": HOSTILE}})
        visit.say(HOSTILE)
        visit.refused("Error", re.escape(HOSTILE))
        assert visit.text == HOSTILE
        assert visit.turns.locator(".asked .text").text_content() == HOSTILE
        assert visit.page.locator("img, b, script:not([type=module])").count() == 0
        assert visit.page.title() == f"{HOSTILE} - flashformer"


def test_nothing_comes_from_elsewhere(visit: Visit) -> None:
    """The policy stops what would be asked of others, and the watch that every visit is under would see it."""
    n_asked = len(visit.asked)
    assert visit.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped')") == "stopped"
    assert [said for said in visit.errors if "Content Security Policy" in said]
    visit.errors.clear()
    visit.page.evaluate("fetch('live')")
    assert len(visit.asked) == n_asked + 1


# ---- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_frees_the_slot_and_keeps_what_was_said(visit: Visit, here: Running, gate: Gate, how: str) -> None:
    gate.shut()
    visit.say(PROMPT)
    gate.let(30)
    expect(visit.note).to_contain_text("tokens/s")
    visit.button("Stop").click() if how == "button" else visit.page.keyboard.press(how)
    expect(visit.heard).to_have_text("Stopped.")
    until(lambda: here.n_jobs == 0)
    gate.let(1)  # the forward that runs; there is no other
    here.idle()
    expect(visit.button("Send")).to_be_visible()
    expect(visit.note).to_have_text(re.compile(r"^stopped,.*tokens/s"))
    expect(visit.alert).to_have_count(0)
    part = visit.text
    assert part
    gate.open()
    visit.say("def g")
    expect(visit.turns).to_have_count(2)
    assert visit.some_text()
    assert visit.bodies[1]["messages"][1] == {"role": "assistant", "content": part}


def test_who_stops_while_waiting_leaves_the_line(visit: Visit, here: Running, gate: Gate) -> None:
    gate.shut()
    with sent(here, COMPLETIONS, **LONG), sent(here, COMPLETIONS, **LONG):
        until(lambda: here.n_running == 2)
        visit.say(PROMPT)
        until(lambda: here.n_waiting == 1)
        expect(visit.note).to_have_text("Waiting for the server")
        visit.page.keyboard.press("Escape")
        until(lambda: here.n_waiting == 0)
        expect(visit.note).to_have_text("stopped")
        assert here.n_jobs == 2


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_what_is_refused_says_so_and_can_be_tried_again(
    browser: Browser, llm: ff.LLM, gate: Gate, tmp_path: Path
) -> None:
    expected = llm.chat(CHAT).text
    with running(llm, tmp_path, max_waiting=0) as here, visiting(browser, here) as visit:
        visit.page.context.set_offline(True)
        visit.say(PROMPT)
        visit.refused("Error", "The server does not answer")
        expect(visit.state).to_contain_text("The server does not answer")
        visit.page.context.set_offline(False)
        visit.again(expected)

        visit.settings.click()
        visit.page.get_by_label("Seed").fill(str(2**64))
        visit.say(PROMPT)
        visit.refused("Error 400", f"seed={2**64}")
        visit.settings.click()
        visit.page.get_by_label("Seed").fill("")

        gate.shut()
        with sent(here, COMPLETIONS, **LONG), sent(here, COMPLETIONS, **LONG):
            until(lambda: here.n_running == 2)
            visit.say(PROMPT)
            visit.refused("Error 429", "2 requests run and 0 wait, .* ask again later")
        gate.open()
        here.idle()
        conversation = [*CHAT, {"role": "assistant", "content": expected}, *CHAT]  # without what was refused
        visit.again(llm.chat(conversation).text)
        assert visit.bodies[-1]["messages"] == conversation


def test_a_server_that_ends(browser: Browser, llm: ff.LLM, gate: Gate, tmp_path: Path) -> None:
    with running(llm, tmp_path) as here, visiting(browser, here) as visit:
        gate.shut()
        with sent(here, COMPLETIONS, **LONG):
            until(lambda: here.n_running == 1)
            stop(here)
            until(lambda: here.service.state is State.DRAINING)
            visit.say(PROMPT)
            visit.refused("Error 503", "the server is shutting down")
            expect(visit.state).to_have_text("the server is shutting down")
        gate.open()


def test_a_server_that_begins_is_waited_for(browser: Browser, llm: ff.LLM, tmp_path: Path) -> None:
    loading = threading.Event()

    def source() -> ff.LLM:
        assert loading.wait(60)
        return load_demo()

    state = "the model is being loaded"
    with running(source, tmp_path, wait=False) as here, visiting(browser, here, state, clock=True) as visit:
        visit.say(PROMPT)
        expect(visit.note).to_have_text(f"Not ready: {state}. Trying again.")
        loading.set()
        until(lambda: here.service.state is State.READY)
        visit.page.clock.run_for(1000)  # for which the server asks
        visit.ended(llm.chat(CHAT).text)
        expect(visit.state).to_have_text("Ready")


def test_a_key_that_is_wrong(browser: Browser, llm: ff.LLM, tmp_path: Path) -> None:
    """The page itself is behind the key, too, as a password that the browser asks for."""
    known = {"username": "", "password": KEY}
    with running(llm, tmp_path, api_key=KEY) as here, visiting(browser, here, http_credentials=known) as visit:
        visit.settings.click()
        key = visit.page.get_by_label("API key")
        key.fill("wrong")
        visit.say(PROMPT)
        visit.refused("Error 401", "no API key, or a wrong one")
        expect(key).to_be_focused()
        key.fill(KEY)
        visit.again(llm.chat(CHAT).text)
        expect(key).to_be_hidden()
        visit.page.reload()
        expect(visit.state).to_have_text("Ready")
        assert key.input_value() == KEY


BREAKS: dict[str, Callable[[Running, Gate], object]] = {
    "NaN in layer 3": lambda _, gate: gate.fail(ff.NumericalError("NaN in layer 3", 3), times=1),
    "The connection was lost": lambda here, _: [job.close() for job in here.service._jobs],
    "The answer broke off": lambda here, _: [line.transport.abort() for line in here.server.server_state.connections],
}


@pytest.mark.parametrize("says", BREAKS)
def test_a_stream_that_breaks_off(visit: Visit, llm: ff.LLM, here: Running, gate: Gate, says: str) -> None:
    expected = llm.chat(CHAT).text
    gate.shut()
    visit.say(PROMPT)
    gate.let(30)
    part = visit.some_text()
    broken = threading.Event()
    here.server._loop.call_soon_threadsafe(lambda: (BREAKS[says](here, gate), broken.set()))
    assert broken.wait(60)
    gate.let(4)
    visit.refused("Error", says)
    assert visit.text.startswith(part)
    assert expected.startswith(visit.text)
    expect(visit.note).to_contain_text("cut off")
    here.idle()
    gate.open()
    visit.again(expected)


def test_a_stream_without_its_end_broke_off(visit: Visit) -> None:
    scripted(visit, delta("a", finish_reason="stop"), done=False)
    visit.say(PROMPT)
    visit.refused("Error", "The connection was lost")
    expect(visit.note).to_have_text("cut off")


def test_silence_is_a_lost_connection(browser: Browser, here: Running, gate: Gate) -> None:
    with visiting(browser, here, clock=True) as visit:
        gate.shut()
        visit.say(PROMPT)
        expect(visit.note).to_have_text("Waiting for the first token")
        visit.page.clock.fast_forward(600_000)  # as after a pause of the tab: every timer goes off once
        gate.let(5)
        part = visit.some_text()
        visit.page.clock.run_for(46_000)
        visit.refused("Error", "The connection was lost")
        assert visit.text.startswith(part)
        until(lambda: here.n_jobs == 0)


# ---- phones, keyboards, eyes ----------------------------------------------------------------------------------------


def test_on_a_phone(browser: Browser, here: Running) -> None:
    with visiting(browser, here, **PHONE) as visit:
        page = visit.page
        assert page.evaluate("[innerWidth, document.activeElement.localName]") == [360, "body"]  # and no keyboard is up
        assert too_wide(page) == []
        visit.say("x" * 80)
        visit.box.press_sequentially("y")
        assert visit.box.input_value() == "x" * 80 + "\ny"  # there is no Shift+Enter
        visit.button("Send").tap()
        assert visit.some_text()
        expect(visit.button("Send")).to_be_visible()
        visit.settings.tap()
        expect(page.get_by_label("API key")).to_be_visible()
        assert too_wide(page) == []
        visit.settings.tap()
        scripted(visit, delta("z" * 200), {"error": {"message": "w" * 200}})
        visit.box.fill("again")
        visit.button("Send").tap()
        visit.refused("Error", "www")
        assert too_wide(page) == []
        boxes = [button.bounding_box() for button in (*page.get_by_role("button").all(), visit.settings)]
        assert len(boxes) == 4
        assert min(box["height"] for box in boxes if box) >= 44
        page.locator("#view").evaluate("view => view.append(Object.assign(new Image(), {width: 400}))")
        assert too_wide(page) != []


def test_with_the_keyboard_alone(visit: Visit, gate: Gate) -> None:
    keyboard, key = visit.page.keyboard, visit.page.get_by_label("API key")
    expect(visit.box).to_be_focused()
    assert visit.walk("Shift+Tab", 3) == ["view", "fresh", "summary"]
    keyboard.press("Enter")
    assert visit.walk("Tab", 5) == ["system", "temperature", "max_tokens", "seed", "key"]
    keyboard.press("Escape")
    expect(key).to_be_hidden()
    expect(visit.settings).to_be_focused()
    keyboard.press("Enter")
    assert visit.walk("Tab", 6)[-1] == "fresh"
    expect(key).to_be_hidden()  # and covers nothing of what comes next
    assert visit.walk("Tab", 2) == ["view", "input"]
    keyboard.type("def f")
    keyboard.press("Shift+Enter")
    keyboard.type("x")
    gate.shut()
    keyboard.press("Enter")
    gate.let(5)
    part = visit.some_text()
    assert visit.bodies[0]["messages"] == [{"role": "user", "content": "def f\nx"}]
    assert visit.walk("Tab", 1) == ["go"]
    keyboard.press("Enter")
    expect(visit.button("Send")).to_be_focused()
    assert visit.text.startswith(part)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Browser, here: Running, scheme: Literal["light", "dark"]) -> None:
    with visiting(browser, here) as visit:
        visit.page.emulate_media(color_scheme=scheme)
        scripted(visit, delta("text"), {"error": {"message": "an error"}})
        visit.say(PROMPT)
        visit.refused("Error", "an error")
        visit.settings.click()
        found = contrasts(visit.page)
        assert len(found) > 15
        assert 4.5 <= min(found) <= max(found) <= 21
        paper = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(251, 250, 248)", "dark": "rgb(23, 23, 22)"}[scheme]
