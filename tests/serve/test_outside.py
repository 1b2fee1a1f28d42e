"""The page's files and what browsers are told about them; nothing of a model before it is there."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from serve.pretended import PretendedBatch, a_step

from understudy.batch import Observer
from understudy.serve import web
from understudy.serve.outside import Outside


class Loading(Exception):
    pass


class Observed(PretendedBatch):
    def __init__(self) -> None:
        super().__init__()
        self.observers: list[Observer] = []

    def add_observer(self, observer: Observer) -> None:
        self.observers.append(observer)


def app_of(outside: Outside) -> TestClient:
    app = FastAPI()
    for router in outside.routers:
        app.include_router(router)
    return TestClient(app)


@pytest.fixture(scope="module")
def client() -> TestClient:
    return app_of(Outside("tiny", lambda: None))


def test_before_the_model_there_is_the_page_and_nothing_else() -> None:
    def require() -> None:
        raise Loading

    client = app_of(Outside("tiny", require))
    assert client.get("/").status_code == 200
    for path in ("model", "layers", "live"):
        with pytest.raises(Loading):
            client.get(f"/understudy/{path}")


def test_what_is_opened_is_observed() -> None:
    batch = Observed()
    outside = Outside("tiny", lambda: None)
    metrics = outside.open(batch)
    for observer in batch.observers:
        observer.on_step(a_step(new_tokens=3))
    assert b'generation_tokens_total{model_name="tiny"} 3.0' in metrics.render()
    assert app_of(outside).get("/understudy/model").json()["model"] == "tiny"


@pytest.mark.parametrize("path", sorted(web.PATHS))
def test_every_file_is_served_safely(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    tag = response.headers["etag"]
    again = client.get(path, headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/page/", "/page/../web.py", "/page/%2e%2e/web.py", "/page/x.js"])
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_all_files_of_the_folder_are_served() -> None:
    there = {file.name for file in (files("understudy.serve") / "page").iterdir()}
    assert there == set(web.FILES)


def sources() -> dict[str, str]:
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in (files("understudy.serve") / "page").iterdir()
    }


@pytest.mark.parametrize("name", sorted(sources()))
def test_no_file_names_another_host_or_needs_what_the_policy_forbids(name: str) -> None:
    text = sources()[name].replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", text)
    if name.endswith(".html"):
        assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script>", text)
    if name.endswith(".js"):
        # What a model says may be markup: it must never be parsed.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
