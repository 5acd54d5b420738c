"""The chat page in a real browser: what a visitor does there, sees and hears."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, Request, Route, expect, sync_playwright
from serving import CHATS, Running

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["gpu", "quic", "sync", "background-networking", "component-update", "extensions"]
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}


def browser_path() -> str:
    """Skips the test where there is none, and fails it where the environment says that this is CI."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    says = f"none of {', '.join(NAMES)} is on PATH, and the page's test needs one: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(says)
    pytest.skip(says)


@contextmanager
def browsing() -> Iterator[Browser]:
    """Inside, the thread has an event loop that runs: no other may be started in it."""
    path = browser_path()
    expect.set_options(timeout=20_000)
    flags = [f"--disable-{what}" for what in FLAGS]
    with sync_playwright() as playwright, closing(playwright.chromium.launch(executable_path=path, args=flags)) as it:
        it.new_page()
        yield it


class Visit:
    """A page, what it asked for, and what the browser complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: list[Request] = []
        self.errors: list[str] = []
        page.set_default_timeout(20_000)
        self.box = page.get_by_role("textbox", name="Message")
        self.state = page.get_by_role("banner").get_by_role("status")
        self.settings = page.get_by_text("Settings", exact=True)
        self.heard = page.get_by_role("contentinfo").get_by_role("status")
        self.turns = page.get_by_role("listitem")
        self.alert = self.turns.last.get_by_role("alert")
        self.answer = self.turns.last.locator(".given .text")
        self.note = self.turns.last.locator(".note")

    def hear_request(self, request: Request) -> None:
        self.asked.append(request)

    def hear_console(self, said: ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            self.errors.append(said.text)

    def hear_error(self, error: Error) -> None:
        self.errors.append(str(error))

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    @property
    def text(self) -> str:
        """The last answer as it stands there."""
        return self.answer.text_content() or ""

    def some_text(self) -> str:
        """The last answer, once there is some of it."""
        self.page.wait_for_function("() => document.querySelector('.turn:last-child .given .text').textContent")
        return self.text

    def ended(self, text: str) -> None:
        """The answer comes to its end and is this."""
        expect(self.button("Send")).to_be_visible()
        assert self.text == text

    def refused(self, title: str, says: str) -> None:
        """The last message has one error, in these words."""
        expect(self.alert).to_contain_text(re.compile(says))
        expect(self.alert.locator("strong")).to_have_text(title)
        expect(self.button("Send")).to_be_visible()

    def again(self, text: str) -> None:
        """Another try gives this answer, and the error is gone."""
        self.button("Try again").click()
        expect(self.alert).to_have_count(0)
        self.ended(text)

    def walk(self, key: str, n: int) -> list[str]:
        """What has the focus after each of `n` presses."""
        found = []
        for _ in range(n):
            self.page.keyboard.press(key)
            found.append(self.page.evaluate("document.activeElement.id || document.activeElement.localName"))
        return found

    @property
    def bodies(self) -> list[Any]:
        """Of all chat requests."""
        return [request.post_data_json for request in self.asked if request.url.endswith(CHATS)]


@contextmanager
def visiting(
    browser: Browser, here: Running, state: str = "Ready", *, clock: bool = False, **context: Any
) -> Iterator[Visit]:
    """Asks nobody but the server, and the browser complains of nothing but answers that are errors.

    `state`: what the page says of the server at first. `clock`: the page's own time can be set forward.
    """
    own = browser.new_page(**context) if clock or context else None
    page = own or browser.contexts[0].pages[0]  # which takes less time
    visit = Visit(page)
    hear = {"request": visit.hear_request, "console": visit.hear_console, "pageerror": visit.hear_error}
    for kind, handler in hear.items():
        page.on(kind, handler)  # type: ignore[call-overload]
    try:
        if clock:
            page.clock.install()
        page.goto(here.url)
        expect(visit.state).to_have_text(state)
        yield visit
        page.evaluate("0")  # what was said until now has come
    finally:
        for kind, handler in hear.items():
            page.remove_listener(kind, handler)
        page.unroute_all()
        page.context.set_offline(False)
        page.emulate_media(color_scheme="null")
        page.goto("about:blank")  # what runs is stopped
        if own:
            own.close()
    assert visit.asked
    assert [r.url for r in visit.asked if not r.url.startswith((f"{here.url}/", "data:"))] == []
    assert [said for said in visit.errors if not said.startswith("Failed to load resource")] == []


def scripted(visit: Visit, *events: dict[str, Any], done: bool = True) -> None:
    """From now on chats are answered with these events, and [DONE]."""
    data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n" * done

    def fulfill(route: Route) -> None:
        route.fulfill(body=data, content_type="text/event-stream")

    visit.page.route(f"**{CHATS}", fulfill)


def delta(content: str = "", finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}], **more}


def too_wide(page: Page) -> list[str]:
    """What stands out to the right of the window, or can be scrolled there."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("html, body, body *:not(.unseen, input, details:not([open]) #fields)")]
          .filter((box) => box.getClientRects().length && (box.getBoundingClientRect().right > screen.width + .5 ||
            getComputedStyle(box).overflowX !== "visible" && box.scrollWidth > box.clientWidth))
          .map((box) => box.outerHTML.slice(0, 80))"""
    )
    return found


def contrasts(page: Page) -> list[float]:
    """Of all text that can be seen, with what it stands on, by WCAG 2.2: between 1 and 21."""
    found: list[float] = page.evaluate(
        """() => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
              .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b;
          };
          const behind = (box) => {
            const colour = getComputedStyle(box).backgroundColor;
            return colour === "rgba(0, 0, 0, 0)" && box.parentElement ? behind(box.parentElement) : colour;
          };
          return [...document.querySelectorAll("body *")]
            .filter((box) => box.getClientRects().length)
            .filter((box) => [...box.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()))
            .map((box) => [light(getComputedStyle(box).color), light(behind(box))].sort((a, b) => b - a))
            .map(([more, less]) => (more + .05) / (less + .05));
        }"""
    )
    return found
