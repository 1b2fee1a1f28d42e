"""Makes the picture of the page that the documentation shows: the real engine, at work.

    PYTHONPATH=src:tests python -m serve.screenshot docs/img/page.png

Several people ask at once, most of them unseen; a minute later the picture is taken.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import httpx
from PIL import Image
from serve.browser import Browser, serving, small_engine

SEEN = (  # what models/fine has learned: see its card
    "largest 417 , 902 , 655 , 38 , 781",
    "sort u n d e r s t",
    "recall k from b 4 , k 7 , q 1 , s 9",
)
UNSEEN = (
    "Explain what a Python generator is.",
    "Tell the story of an understudy who waits behind the curtain.",
    "A train leaves at 9 and travels 120 miles in 3 hours. How fast is it?",
)
SECONDS_BETWEEN = 16.0  # two questions of the one who is seen
COLOURS = 128


@contextmanager
def others(url: str, people: int) -> Iterator[None]:
    """So many who ask one question after another."""
    over = threading.Event()

    def ask(number: int) -> None:
        for turn in count(number):
            if over.is_set():
                return
            message = {"role": "user", "content": UNSEEN[turn % len(UNSEEN)]}
            length = 40 + 30 * (turn % 4)
            body = {"messages": [message], "max_tokens": length, "ignore_eos": True, "seed": turn}
            httpx.post(f"{url}v1/chat/completions", json=body, timeout=60).raise_for_status()
            over.wait(0.5 + turn % 3)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(people)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def take(to: Path, theme: str, width: int, height: int, people: int) -> None:
    batch = small_engine()
    browser = Browser()
    try:
        with serving(batch) as url, others(url, people):
            browser.resize(width, height)
            browser.prefer(theme)
            browser.open(url)
            for field, value in (("max-tokens", 60), ("temperature", 0)):
                browser.run(
                    "document.getElementById(arguments[0]).value = arguments[1]", field, value
                )
            for question in SEEN:
                browser.element("#message").send_keys(question + "\ue007")
                threading.Event().wait(SECONDS_BETWEEN)
            browser.driver.save_screenshot(str(to))
            browser.driver.get("about:blank")
    finally:
        browser.close()
        batch.close()
        batch.engine.close()
    with Image.open(to) as image:  # few colours, a third of the bytes
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("to", type=Path)
    parser.add_argument("--theme", choices=("dark", "light"), default="dark")
    parser.add_argument("--size", default="1440x900", help="in pixels")
    parser.add_argument("--people", type=int, default=2, help="who ask beside the one who is seen")
    asked = parser.parse_args()
    width, height = map(int, asked.size.split("x"))
    take(asked.to, asked.theme, width, height, asked.people)


if __name__ == "__main__":
    main()
