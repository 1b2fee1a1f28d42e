"""docs/serving.md against a running server: its snippets run, its names are those of the server."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from serve.browser import serving

from docs import pages
from understudy.batch.opening import start
from understudy.serve.protocol import ChatRequest, CompletionRequest

PAGE = pages.ROOT / "docs" / "serving.md"
FINE = pages.ROOT / "models" / "fine"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if not FINE.is_dir():
        pytest.skip("models/fine is not here")
    batch = start(FINE, memory="60MiB", max_num_seqs=4)
    with serving(batch) as address:
        yield address.rstrip("/")
    batch.close()
    batch.engine.close()


def test_the_python_of_the_page_runs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="openai is not installed")
    names: dict[str, Any] = {"__name__": "page"}
    for block in pages.blocks(PAGE, "python"):
        if "langchain" in block.text:
            pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
        text = "\n" * (block.line - 1) + block.text.replace(ADDRESS, url)
        exec(compile(text, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "'misses':" in printed and "CompletionUsage" in printed
    assert re.search(
        r'\{\s*"rainy"\s*:\s*(true|false)\s*,\s*"size"\s*:\s*"(small|large)"\s*\}', printed
    ), printed


def curls() -> list[list[str]]:
    return [words for _, words in pages.commands(PAGE) if words[0] == "curl"]


def test_there_are_commands_to_run() -> None:
    assert len(curls()) >= 4


@pytest.mark.parametrize("words", curls(), ids=lambda words: words[2].rpartition("/")[2])
def test_the_curls_of_the_page_get_answers(url: str, words: list[str]) -> None:
    got = subprocess.run(
        [*(word.replace(ADDRESS, url) for word in words), "--fail", "--noproxy", "*"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    if "-sN" in words:
        assert got.rstrip().endswith("data: [DONE]")
    else:
        assert "error" not in json.loads(got)


def section(heading: str) -> str:
    return PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_every_address_of_the_page_is_there_and_all_are_on_the_page(url: str) -> None:
    named = set(re.findall(r"(?:GET|POST) (/[\w/.]*)", section("Addresses")))
    schema = httpx2.get(f"{url}/openapi.json", trust_env=False).json()
    assert named - {"/openapi.json", "/", "/understudy/live"} <= set(schema["paths"])
    hidden = {"/ping", "/v1/models/{model_id}"}
    assert set(schema["paths"]) - hidden <= named


def test_every_field_of_the_page_is_taken_and_all_are_on_the_page() -> None:
    told = section("Addresses").split("What a request may say:")[1].split("**")[0]
    named = set(re.findall(r"`(\w+)`", told))
    fields = ChatRequest.model_fields | CompletionRequest.model_fields
    refused = {name for name, field in fields.items() if field.annotation is Any}
    labels = {"safety_identifier", "prompt_cache_key"}
    assert named == set(fields) - refused - labels


def test_every_metric_of_the_page_is_there(url: str) -> None:
    named = set(re.findall(r"`(\w+)`", section("What can be seen").split("```")[0]))
    rendered = httpx2.get(f"{url}/metrics", trust_env=False).text
    found = {m.removesuffix("_bucket") for m in re.findall(r"^understudy:(\w+)", rendered, re.M)}
    assert len(named) > 20 and named <= found, named - found
    ours = {m for m in found if not re.search(r"_(sum|count|created)$", m)}
    assert ours - named <= {"http_requests_total"}
