"""A real browser before the real server: Debian's Chromium, and models/fine held to a third."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from understudy.batch.engine import BatchEngine
from understudy.batch.opening import start
from understudy.serve import run
from understudy.serve.app import create_app
from understudy.serve.outside import Outside
from understudy.serve.served import Stage
from understudy.serve.settings import Settings

FINE = Path(__file__).parents[2] / "models" / "fine"

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")


def small_engine() -> BatchEngine:
    """Some hundred of 320 experts fit."""
    return start(FINE, memory="40MiB", max_context=512, max_num_seqs=8, max_num_batched_tokens=128)


@contextmanager
def serving(batch: BatchEngine, api_key: str | None = None) -> Iterator[str]:
    """The address of a server before ``batch``, which stays open."""
    settings = Settings(model=str(FINE), names=("fine",), port=0, api_key=api_key, access_log=False)
    stage, ready = Stage(), threading.Event()
    outside = Outside("fine", stage.require)
    app = create_app(stage, settings, routers=outside.routers, open_paths=outside.open_paths)
    listener = run.listen("127.0.0.1", 0)
    server = run.Server(
        settings, lambda say: batch, lambda line: ready.set(), stage, app, outside.open
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        assert ready.wait(30), "the server has not begun"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


class Browser:
    """Chromium without a screen; what it logs and asks for is kept."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        options.binary_location = str(CHROMIUM)
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
        self.resize(1440, 900)

    def close(self) -> None:
        self.driver.quit()

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        """``light`` or ``dark``, as the system would say."""
        wish = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wish]})

    def open(self, url: str) -> None:
        """The page, fresh: nothing remembered, nothing logged before."""
        self.driver.get(url)
        self.run("localStorage.clear(); sessionStorage.clear()")
        self.complaints(), self.requests()
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, holds: Callable[[], Any], seconds: float = 20.0) -> Any:
        """What ``holds`` answers, once that is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: holds())

    def element(self, selector: str) -> Any:
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(
            self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        )

    def press(self, *keys: str) -> None:
        """On whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def complaints(self) -> list[str]:
        """What the console has said since this was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since this was asked last."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found
