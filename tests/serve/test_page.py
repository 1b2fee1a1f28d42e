"""The page in a real browser before the real engine: somebody asks, experts come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from serve.browser import CHROMEDRIVER, CHROMIUM, Browser, serving, small_engine

from understudy.batch.engine import BatchEngine

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not installed"
)

TAB, ENTER, ESCAPE, RIGHT, DOWN = "\ue004", "\ue007", "\ue00c", "\ue014", "\ue015"

MAP = "return document.getElementById('map').toDataURL()"
ANSWER = ".turn.answer .text"
WATCH_THE_ANSWER = """
    window.lengths = [];
    const log = document.getElementById("log");
    new MutationObserver(() => window.lengths.push(log.innerText.length))
        .observe(log, { characterData: true, subtree: true });
"""


@pytest.fixture(scope="module")
def batch() -> Iterator[BatchEngine]:
    made = small_engine()
    yield made
    made.close()
    made.engine.close()


@pytest.fixture(scope="module")
def url(batch: BatchEngine) -> Iterator[str]:
    with serving(batch) as address:
        yield address


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture
def browser(one_browser: Browser, url: str) -> Browser:
    """Before the live page, in the usual size and light."""
    one_browser.resize(1440, 900)
    one_browser.prefer("light")
    one_browser.open(url)
    one_browser.until(lambda: "resident" in one_browser.text("#summary"))
    return one_browser


def choose(browser: Browser, field: str, value: str) -> None:
    browser.run("document.getElementById(arguments[0]).value = arguments[1]", field, value)


def ask(browser: Browser, text: str = "Write about the sea.", most: int = 60) -> None:
    choose(browser, "max-tokens", str(most))
    choose(browser, "temperature", "0")
    browser.element("#message").send_keys(text + ENTER)


def test_a_message_by_keyboard_streams_and_the_map_changes(browser: Browser, url: str) -> None:
    choose(browser, "max-tokens", "60")
    choose(browser, "temperature", "0")
    browser.run(WATCH_THE_ANSWER)
    before = browser.run(MAP)
    browser.press(TAB, ENTER)  # the skip link
    browser.until(lambda: browser.run("return document.activeElement.id") == "message")
    browser.press("Write about <b>the</b> sea.", ENTER)
    browser.until(lambda: "first token" in browser.text(".turn.answer .facts"))
    assert len(set(browser.run("return window.lengths"))) > 4, "the answer came at once"
    facts = browser.text(".turn.answer .facts")
    assert "tokens/s" in facts and "hits" in facts and "for experts" in facts
    assert browser.run(MAP) != before
    assert "Busiest" in browser.text("#summary")
    assert "<b>the</b>" in browser.text(".turn .text")  # as text, not as markup
    assert browser.run("return document.activeElement.id") == "message"
    assert browser.complaints() == []
    asked = browser.requests()
    assert any(address.endswith("/understudy/live") for address in asked)
    assert [address for address in asked if not address.startswith(url)] == []


def test_escape_stops_the_answer_and_frees_the_request(
    browser: Browser, batch: BatchEngine
) -> None:
    ask(browser, most=400)
    browser.until(lambda: browser.text(ANSWER))
    browser.press(ESCAPE)
    browser.until(lambda: "stopped" in browser.text(".turn.answer .facts"))
    browser.until(lambda: batch.snapshot().running == 0, 5)
    assert browser.element("#send").is_displayed()
    ask(browser, "And again.", most=3)
    browser.until(lambda: browser.run("return document.querySelectorAll('.facts').length") == 2)


def test_a_refusal_is_shown_and_the_message_is_not_lost(browser: Browser) -> None:
    ask(browser, "Too much, please.", most=100_000)
    browser.until(lambda: "context" in browser.text("#problem"))
    assert browser.run("return document.getElementById('message').value") == "Too much, please."
    assert browser.text(".turn") == ""
    assert all("400" in line for line in browser.complaints())  # the browser's own line about it


def test_cells_are_inspected_by_keyboard(browser: Browser) -> None:
    browser.run("document.getElementById('map').focus()")
    browser.press(RIGHT, RIGHT, DOWN)
    assert browser.text("#cell").startswith("Layer 1, expert 1: ")
    browser.press(ESCAPE)
    assert browser.text("#cell").startswith("Point at a cell")


def test_light_and_dark(browser: Browser) -> None:
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    light, light_map = browser.run(background), browser.run(MAP)
    browser.prefer("dark")
    browser.until(lambda: browser.run(background) != light)
    dark = browser.run(background)
    browser.until(lambda: browser.run(MAP) != light_map)
    button = browser.element("#theme")
    button.click()
    assert button.text == "Theme: light"
    assert browser.run(background) == light
    browser.driver.refresh()
    browser.until(lambda: browser.text("#theme") == "Theme: light")
    assert browser.run(background) == light
    browser.element("#theme").click()
    browser.prefer("light")
    assert browser.run(background) == dark
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [360, 800, 1024, 2560])
def test_nothing_sticks_out(browser: Browser, width: int) -> None:
    browser.resize(width, 800)
    sticks_out = "return document.scrollingElement.scrollWidth > innerWidth"
    browser.until(lambda: not browser.run(sticks_out), 2)
    assert browser.element("#send").is_displayed()


def test_everything_that_takes_the_focus_has_a_name(browser: Browser) -> None:
    nameless = """
        return [...document.querySelectorAll("button, input, textarea, [tabindex]")].filter((e) =>
            !(e.innerText || e.ariaLabel || (e.labels && e.labels.length))).map((e) => e.id)"""
    assert browser.run(nameless) == []


def test_the_key_is_asked_for_and_stays_in_the_tab(
    one_browser: Browser, batch: BatchEngine
) -> None:
    browser = one_browser
    with serving(batch, api_key="open sesame") as url:
        browser.open(url)
        browser.until(lambda: browser.element("#key").is_displayed())
        assert browser.text("#status") == "needs an API key"
        browser.press("open sesame", ENTER)
        browser.until(lambda: "resident" in browser.text("#summary"))
        assert not browser.element("#key").is_displayed()
        ask(browser, most=3)
        browser.until(lambda: browser.text(".turn.answer .facts"))
        assert browser.run("return JSON.stringify(localStorage)") == "{}"
        browser.driver.get("about:blank")  # nobody watches while the server ends
